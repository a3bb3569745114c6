"""Trainings of one shape side by side in a process, and the same one after the other.

python benchmarks/replicas.py [device]     five minutes; results/replicas_<device>.json

Whole trainings on copying by `rum.lanes.run_side_by_side` and by `rum.experiment.run_experiment`:
data, optimiser, clipping, validation and checkpoint of every lane included, on one thread as in a
search. Both take turns; the table shows medians. On the CPU every lane's report is compared with
that of its training alone: they are equal.
"""

import datetime
import json
import sys
import tempfile
from pathlib import Path

import torch
from peers import measure, processor

from rum.cells import RUMConfig
from rum.experiment import ExperimentConfig, run_experiment
from rum.lanes import Run, run_side_by_side
from rum.tasks import CopyingConfig
from rum.training.checkpoint import CheckpointStore
from rum.training.config import TrainingConfig

LANES = 16
ROUNDS = 5
UPDATES = 15
SIZES = (  # N, B, T of copying (the sequence has T + 20 steps), lambda
    (20, 8, 30, 0.0),
    (32, 8, 30, 0.0),
    (64, 8, 30, 0.0),
    (32, 32, 100, 0.0),
    (64, 32, 100, 0.0),
    (100, 32, 100, 0.0),
    (32, 8, 30, 1.0),
    (64, 32, 100, 1.0),
)


def experiment(size: int, batch: int, delay: int, lambda_: float, lane: int, device: str) -> Run:
    """A lane's run, without its folder."""
    config = ExperimentConfig(
        model=RUMConfig(hidden_size=size, lambda_=lambda_, eta=1.0, zoneout=0.1),
        task=CopyingConfig(delay=delay, batch_size=batch, steps_per_epoch=UPDATES),
        training=TrainingConfig(
            seed=lane,
            device=device,
            threads=1,
            max_epochs=1,
            learning_rate=1e-3 * (1 + lane),
            diagnostics=False,
        ),
    )
    return Run(config=config, task=config.task.load(seed=lane), folder=Path())


def compare(size: int, batch: int, delay: int, lambda_: float, device: str) -> dict[str, float]:
    """Milliseconds of an update of all lanes, in turn and side by side."""
    runs = [experiment(size, batch, delay, lambda_, lane, device) for lane in range(LANES)]

    def placed(folder: str) -> list[Run]:
        return [
            Run(config=run.config, task=run.task, folder=Path(folder) / str(lane))
            for lane, run in enumerate(runs)
        ]

    outcomes: dict[str, list[float]] = {}

    def keep(name: str, folder: str) -> None:
        lasts = [CheckpointStore(run.folder).last() for run in placed(folder)]
        outcomes[name] = [last.description["best_value"] for last in lasts if last is not None]

    def in_turn() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for run in placed(folder):
                run_experiment(run.config, run.task, run.folder, lambda _: None)
            keep("in turn", folder)

    def side_by_side() -> None:
        with tempfile.TemporaryDirectory() as folder:
            run_side_by_side(placed(folder), LANES)
            keep("side by side", folder)

    medians = measure({"in turn": in_turn, "side by side": side_by_side}, ROUNDS)
    if device == "cpu":
        assert outcomes["in turn"] == outcomes["side by side"], "neighbours changed a lane"
    return {name: milliseconds / UPDATES for name, milliseconds in medians.items()}


def main() -> None:
    """Measures, prints and keeps the table."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    table: dict[str, dict[str, float]] = {}
    for size, batch, delay, lambda_ in SIZES:
        row = compare(size, batch, delay, lambda_, device)
        row["ratio"] = row["side by side"] / row["in turn"]
        name = f"lambda {lambda_:g}, N {size}, B {batch}, T {delay}"
        table[name] = row
        print(
            f"{LANES} trainings, {name}: {row['in turn']:.1f} ms an update of all in turn, "
            f"{row['side by side']:.1f} ms side by side, ratio {row['ratio']:.2f}",
            flush=True,
        )
    about = {
        "date": datetime.date.today().isoformat(),
        "lanes": LANES,
        "threads": 1,
        "torch": torch.__version__,
        "machine": processor() if device == "cpu" else torch.cuda.get_device_name(),
    }
    results = Path(__file__).parents[1] / "results" / f"replicas_{device}.json"
    results.write_text(json.dumps({"about": about, "milliseconds": table}, indent=1))


if __name__ == "__main__":
    main()
