"""Trains what the paper claims learns, or does not, at sizes for two CPU cores; keeps the curves.

python benchmarks/learning.py                 all, about two hours; results/learning.json
python benchmarks/learning.py copying_rum_T100     one of them

Each seed's curve goes into the file as soon as it is there; a finished one is not repeated.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from rum.cells import FSRUMConfig, LSTMCellConfig, LSTMConfig, RUMCellConfig, RUMConfig
from rum.experiment import ExperimentConfig, parameter_count, run_experiment
from rum.parameters import flatten
from rum.tasks import CharacterLMConfig, CopyingConfig, RecallConfig
from rum.training.config import TrainingConfig
from rum.training.loop import Report

RESULTS = Path(__file__).parents[1] / "results" / "learning.json"
KEPT = ("step", "train/", "validation/")


def synthetic(optimizer: str, *, max_epochs: int, learning_rate: float = 0.001) -> TrainingConfig:
    """The released training of the synthetic tasks, unless another rate is given."""
    return TrainingConfig(
        optimizer=optimizer,
        learning_rate=learning_rate,
        max_grad_norm=None,
        max_epochs=max_epochs,
        diagnostics=False,
    )


def text(seed_epochs: int) -> TrainingConfig:
    """Penn Treebank's training for small models."""
    return TrainingConfig(learning_rate=0.004, max_epochs=seed_epochs, diagnostics=False)


SMALL_TEXT = CharacterLMConfig(
    corpus="ptb", batch_size=32, bptt_length=50, embedding_size=32, train_characters=1_000_000
)

EXPERIMENTS: dict[str, tuple[ExperimentConfig, int]] = {
    # name: (experiment, seeds)
    "copying_rum_lambda1_T30": (
        ExperimentConfig(
            model=RUMConfig(hidden_size=50, lambda_=1),
            task=CopyingConfig(delay=30, batch_size=32, steps_per_epoch=200),
            training=synthetic("rmsprop_tensorflow", max_epochs=60, learning_rate=0.003),
        ),
        3,
    ),
    "recall_rum_lambda1_T10": (
        ExperimentConfig(
            model=RUMConfig(hidden_size=50, lambda_=1),
            task=RecallConfig(length=10, batch_size=64, steps_per_epoch=500),
            training=synthetic("adam", max_epochs=20),
        ),
        3,
    ),
    "recall_rum_lambda0_T10": (
        ExperimentConfig(
            model=RUMConfig(hidden_size=50, lambda_=0),
            task=RecallConfig(length=10, batch_size=64, steps_per_epoch=500),
            training=synthetic("adam", max_epochs=20),
        ),
        3,
    ),
    "copying_lstm_T100": (
        ExperimentConfig(
            model=LSTMConfig(hidden_size=50),
            task=CopyingConfig(delay=100, batch_size=64, steps_per_epoch=200),
            training=synthetic("rmsprop_tensorflow", max_epochs=20),
        ),
        3,
    ),
    "copying_rum_T100": (
        ExperimentConfig(
            model=RUMConfig(hidden_size=50, lambda_=0),
            task=CopyingConfig(delay=100, batch_size=64, steps_per_epoch=200),
            training=synthetic("rmsprop_tensorflow", max_epochs=20),
        ),
        3,
    ),
    # Equal parameters (within 1 %) and steps: the table says what they are.
    "ptb_fs_rum_2_small": (
        ExperimentConfig(
            model=FSRUMConfig(
                fast=LSTMCellConfig(
                    hidden_size=64, layer_norm=True, zoneout_h=0.05, zoneout_c=0.1
                ),
                slow=RUMCellConfig(hidden_size=80, eta=1.0, layer_norm=True, zoneout=0.05),
                dropout=0.05,
            ),
            task=SMALL_TEXT,
            training=text(6),
        ),
        3,
    ),
    "ptb_lstm_small": (
        ExperimentConfig(
            model=LSTMConfig(
                hidden_size=132, layer_norm=True, zoneout_h=0.05, zoneout_c=0.1, dropout=0.05
            ),
            task=SMALL_TEXT,
            training=text(6),
        ),
        3,
    ),
}


def curve(experiment: ExperimentConfig, seed: int) -> dict[str, Any]:
    """Trains once; each metric as a list over epochs."""
    experiment.training.seed = seed
    task = experiment.task.load(seed=seed)
    reports: list[Report] = []

    def report(each: Report) -> None:
        reports.append(each)
        print(f"  step {each['step']} {task.metric} {each[f'validation/{task.metric}']:.4f}")

    with tempfile.TemporaryDirectory() as folder:
        run_experiment(experiment, task, Path(folder), report)
    names = [name for name in reports[-1] if name.startswith(KEPT)]
    return {
        "seed": seed,
        "experiment": flatten(experiment),
        "parameters": parameter_count(experiment.model, task),
        "metric": task.metric,
        "baselines": task.baselines(),
        "protocol": task.protocol,
        "curves": {name: [each.get(name) for each in reports] for name in names},
    }


def summary(name: str, runs: list[dict[str, Any]]) -> str:
    """One line: the last validation metric of every seed and where it broke through."""
    metric = runs[0]["metric"]
    last = [run["curves"][f"validation/{metric}"][-1] for run in runs]
    line = (
        f"{name:<28} {runs[0]['parameters']:>8,} parameters  {metric} "
        f"{' '.join(f'{value:.4f}' for value in last)} (median {statistics.median(last):.4f})"
    )
    for curve_name in dict.fromkeys(name for run in runs for name in run["curves"]):
        if "steps_to" in curve_name:
            reached = [
                next((s for s in run["curves"].get(curve_name, []) if s is not None), None)
                for run in runs
            ]
            line += f"  {curve_name.removeprefix('validation/')} {reached}"
    return line


def main() -> None:
    """Runs what is asked for and not there yet, then prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(EXPERIMENTS))
    chosen = parser.parse_args().names or list(EXPERIMENTS)
    for name in set(chosen) - set(EXPERIMENTS):
        parser.error(f"there is no experiment {name!r}")
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(exist_ok=True)
    for name in chosen:
        experiment, seeds = EXPERIMENTS[name]
        for seed in range(seeds):
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            experiment.training.seed = seed
            if any(run["experiment"] == flatten(experiment) for run in results.get(name, [])):
                continue
            print(f"{name}, seed {seed}")
            run = curve(experiment, seed)
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            results.setdefault(name, []).append(run)
            partial = RESULTS.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1))
            partial.replace(RESULTS)
    results = json.loads(RESULTS.read_text())
    for name in chosen:
        print(summary(name, results[name]))


if __name__ == "__main__":
    main()
