"""Records the learning curve of every configuration of a grid, for searches to be replayed on.

python benchmarks/learning_curves.py copying       one table (copying, recall, ptb), two at a time
    results/search/<table>.json; what is there is not repeated

A table's searches are those of `python benchmarks/search.py`. Penn Treebank needs RUM_DATA_DIR or
the data in the cache.
"""

import argparse
import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rum.cells import RUMConfig
from rum.experiment import ExperimentConfig, parameter_count, run_experiment
from rum.parameters import flatten, replace
from rum.tasks import CharacterLMConfig, CopyingConfig, RecallConfig
from rum.training.config import TrainingConfig

RESULTS = Path(__file__).parents[1] / "results" / "search"
DIGITS = 6


@dataclass(frozen=True)
class Table:
    """A grid and what is trained at each of its points."""

    experiment: ExperimentConfig
    grid: Mapping[str, tuple[Any, ...]]

    def points(self) -> Iterator[dict[str, Any]]:
        """All configurations."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


def training(max_epochs: int, optimizer: str) -> TrainingConfig:
    """One thread each; two train at a time."""
    return TrainingConfig(max_epochs=max_epochs, optimizer=optimizer, threads=1, diagnostics=False)


MEMORY_GRID = {
    "training.learning_rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "model.hidden_size": (16, 32, 64),
    "model.lambda_": (0, 1),
    "model.eta": (None, 1.0),
}

TABLES = {
    "copying": Table(
        ExperimentConfig(
            model=RUMConfig(),
            task=CopyingConfig(delay=20, batch_size=32, steps_per_epoch=50),
            training=training(81, "rmsprop"),
        ),
        MEMORY_GRID,
    ),
    "recall": Table(
        ExperimentConfig(
            model=RUMConfig(),
            task=RecallConfig(
                length=8,
                batch_size=32,
                steps_per_epoch=50,
                train_size=20_000,
                validation_size=1_000,
                test_size=10,
            ),
            training=training(81, "adam"),
        ),
        MEMORY_GRID,
    ),
    "ptb": Table(
        ExperimentConfig(
            # Without it layer norm after the sigmoid lets states grow beyond all bounds.
            model=RUMConfig(eta=1.0),
            task=CharacterLMConfig(
                corpus="ptb",
                batch_size=64,
                bptt_length=50,
                embedding_size=32,
                train_characters=500_000,
            ),
            training=training(27, "adam"),
        ),
        {
            "training.learning_rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
            "model.hidden_size": (32, 64),
            "model.zoneout": (0.0, 0.2),
            "model.layer_norm": (False, True),
        },
    ),
}


def record(name: str, point: dict[str, Any]) -> dict[str, Any]:
    """Trains one configuration."""
    table = TABLES[name]
    experiment = replace(table.experiment, point)
    task = experiment.task.load(seed=0, data_dir=None)
    curve: list[float] = []
    began = time.perf_counter()
    error = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_experiment(
                experiment,
                task,
                Path(folder),
                lambda report: curve.append(round(report[f"validation/{task.metric}"], DIGITS)),
            )
        except Exception as exception:  # noqa: BLE001  # a diverged run is a point of the table
            error = f"{type(exception).__name__}: {exception}"
    return {
        "parameters": point,
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 2),
        "size": parameter_count(experiment.model, task),
        "error": error,
    }


def main() -> None:
    """Records what a table lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    name, table = arguments.table, TABLES[arguments.table]
    path = RESULTS / f"{name}.json"
    task = table.experiment.task.load(seed=0, data_dir=None)
    stored: dict[str, Any] = {
        "experiment": flatten(table.experiment),
        "grid": {key: list(values) for key, values in table.grid.items()},
        "metric": task.metric,
        "mode": task.mode,
        "plateau": task.plateau,
        "runs": [],
    }
    if path.exists():
        there = json.loads(path.read_text())
        if {**there, "runs": []} != json.loads(json.dumps(stored)):
            raise SystemExit(f"{path} was recorded with other settings: move it away")
        stored = there
    known = [run["parameters"] for run in stored["runs"]]
    missing = [point for point in table.points() if point not in known]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        pending = [pool.apply_async(record, (name, point)) for point in missing]
        for index, result in enumerate(pending, 1):
            run = result.get()
            stored["runs"].append(run)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(stored, indent=None, separators=(",", ":")))
            last = run["curve"][-1] if run["curve"] else run["error"]
            print(f"{index}/{len(missing)} {run['seconds']:.0f} s {run['parameters']}: {last}")


if __name__ == "__main__":
    main()
