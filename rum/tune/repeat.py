"""Repeats a recorded run from its capsule and compares the two curves."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from rum.errors import CheckpointError, DataError, DivergedError, RumError, TrackingError
from rum.experiment import experiment_from_plain
from rum.train import TrainConfig, load_task, train
from rum.training.checkpoint import Checkpoint, CheckpointStore, read_checkpoint
from rum.training.loop import Report
from rum.tune.capsule import BIT_EXACT, changes, make_capsule, read_capsule
from rum.tune.recorder import epoch_recorder
from rum.tune.tracking import FAILED, FINISHED, connect

Curves = dict[int, dict[str, float]]
"""Numbers by epoch and name."""

# What differs between two runs that compute the same, and what was measured afterwards.
_NOT_COMPARED = ("time/", "system/", "test/")
_SHOWN = 3


class NotRepeatedError(RumError):
    """A run that can be repeated bit for bit had another curve."""


def repeat(config: TrainConfig, run_id: str, write: Callable[[str], None]) -> None:
    """Trains what a run in MLflow trained, as far as it got, and says whether the curves agree.

    Args:
        config: Where data, records and checkpoints are and go; its model, task and training
            give way to those of the capsule.
        run_id: MLflow's id of the run.
        write: Takes lines for the user.

    Raises:
        TrackingError: If there is no such run, or it has no capsule.
        DataError: If the data are not what they were.
        CheckpointError: If the run continues another whose checkpoint is not there any more.
        NotRepeatedError: If a curve differs that should not.
    """
    client, _ = connect(config.tracking, Path(config.output_dir).absolute())
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise TrackingError(f"cannot get run {run_id}: {error}") from error
    capsule = read_capsule(client, run_id)
    config = _config_of(config, run_id, capsule)
    write(f"Repeating run {run_id} ({run.info.run_name}), level: {capsule['level']}")
    different = _differences(config, capsule)
    for line in different:
        write(f"  differs now: {line}")
    if not different:
        write("  versions, code, data and machine are what they were")
    origin = _origin(run_id, capsule)
    recorded = _recorded_curves(client, run)
    diverged = None
    try:
        train(
            config,
            write,
            partial(epoch_recorder, origin=capsule["origin"]),
            begin_from=origin,
            last_epoch=_last_epoch(run, recorded),
        )
    except DivergedError as error:
        if run.data.tags.get("rum.reason") != f"diverged: {error}":
            raise
        diverged = str(error)
    if config.dry_run:
        return
    verdict = compare(recorded, _reports(config))
    if verdict.startswith("epoch") and capsule["level"] == BIT_EXACT:
        raise NotRepeatedError("\n".join([f"run {run_id} is not repeated: {verdict}", *different]))
    write(verdict if diverged is None else f"{verdict}; then diverged as it did: {diverged}")


def _config_of(config: TrainConfig, run_id: str, capsule: dict[str, Any]) -> TrainConfig:
    experiment = experiment_from_plain(capsule["experiment"])
    return replace(
        config,
        model=experiment.model,
        task=experiment.task,
        training=replace(experiment.training, threads=capsule["threads"]),
        name=config.name or f"repeat-{run_id[:8]}",
    )


def _differences(config: TrainConfig, capsule: dict[str, Any]) -> list[str]:
    """What is not as it was when the run was recorded; raises DataError if the data are not."""
    task = load_task(config)
    if task.checksum != capsule["data"]["checksum"]:
        raise DataError(
            f"the run was trained on other data than {task.corpus} is now: checksum "
            f"{capsule['data']['checksum']} then, {task.checksum} now"
        )
    return changes(capsule, make_capsule(config, task))


def _origin(run_id: str, capsule: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint that the run began from."""
    origin = capsule["origin"]
    if origin is None:
        return None
    where = f"run {run_id} went on from {origin['checkpoint']} (trial {origin['trial']} of study "
    where += f"{origin['study']}), without which it cannot be repeated"
    try:
        checkpoint = read_checkpoint(Path(origin["checkpoint"]))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if checkpoint.description["sha256"] != origin["sha256"]:
        raise CheckpointError(f"{where}: another checkpoint is there now")
    return checkpoint


def _last_epoch(run: Run, recorded: Curves) -> int | None:
    """Where a run stopped that was stopped; None for one that ended by itself, however."""
    if run.info.status in (FINISHED, FAILED) or not recorded:
        return None
    return max(recorded)


def _recorded_curves(client: MlflowClient, run: Run) -> Curves:
    curves: Curves = {}
    for name in run.data.metrics:
        if not name.startswith(_NOT_COMPARED):
            for point in client.get_metric_history(run.info.run_id, name):
                curves.setdefault(point.step, {})[name] = point.value
    return curves


def _reports(config: TrainConfig) -> list[Report]:
    """Every epoch of the repetition, those before it was resumed included."""
    last = CheckpointStore(config.folder(load_task(config))).last()
    return last.reports if last else []


def compare(recorded: Curves, reports: list[Report]) -> str:
    """Says that two curves are identical, or the first epoch that is not, with both values.

    Args:
        recorded: What MLflow has.
        reports: What was trained now.
    """
    repeated = {int(report["epoch"]): report for report in reports}
    epochs = sorted(set(recorded) & set(repeated))
    for epoch in epochs:
        names = {name for name in repeated[epoch] if not name.startswith(_NOT_COMPARED)}
        names = (names | set(recorded[epoch])) - {"epoch"}
        both = {name: (recorded[epoch].get(name), repeated[epoch].get(name)) for name in names}
        different = [
            f"{name} {then} recorded, {now} now"
            for name, (then, now) in sorted(both.items())
            if not _same(then, now)
        ]
        if different:
            more = len(different) - _SHOWN
            rest = [f"and {more} more"] if more > 0 else []
            return f"epoch {epoch} differs: {'; '.join([*different[:_SHOWN], *rest])}"
    missing = sorted(set(recorded) - set(repeated))
    text = f"identical over {len(epochs)} epochs"
    if missing:
        text += f"; the run has epochs up to {missing[-1]}, which it was given later (resume=yes)"
    return text


def _same(then: float | None, now: float | None) -> bool:
    if then is None or now is None:
        return then is now
    return then == now or (math.isnan(then) and math.isnan(now))
