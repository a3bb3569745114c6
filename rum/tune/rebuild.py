"""Rebuilds a study from MLflow alone, when Optuna's database was lost."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState, create_trial

from rum.errors import StudyError
from rum.parameters import nearest
from rum.tune.config import Domain
from rum.tune.space import differences, distribution
from rum.tune.study import FINALIST, ORIGIN, REASON, add_study
from rum.tune.tracking import (
    ATTRIBUTES_TAG,
    CONSTRAINTS_TAG,
    DEFINITION_FILE,
    FAILED,
    FINISHED,
    KILLED,
    PARAMETERS_TAG,
    SEQUENCE_TAG,
    STUDY_ID_TAG,
    TARGET_TAG,
    read_text,
    study_names_in,
    study_runs,
)


@dataclass(frozen=True)
class RecordedStudy:
    """All that MLflow has of a study."""

    name: str
    id: str
    target: int
    definition: dict[str, Any]
    sequence: dict[str, int]
    trials: list[FrozenTrial]
    """From number 0 on, without a gap: one that MLflow does not have waits to be run."""
    missing: list[int]
    """Numbers of trials that MLflow does not have."""


def read_study(
    client: MlflowClient,
    experiment_id: str,
    name: str,
    definition: dict[str, Any],
    folder: Path,
) -> RecordedStudy:
    """Reads a study from its runs; changes nothing.

    Where MLflow has several of this name it is the one whose checkpoints are in `folder`, else
    the one that began last.

    Args:
        client: MLflow's.
        experiment_id: Where the runs are.
        name: Of the study.
        definition: What the study is to have been made with.
        folder: The study's, which may be lost too.

    Raises:
        StudyError: If MLflow has no such study, or it has another definition, or its records are
            not complete enough.
        TrackingError: If its definition cannot be had.
    """
    runs = list(study_runs(client, experiment_id, name))
    parents = {run.data.tags[STUDY_ID_TAG]: run for number, run in runs if number is None}
    if not parents:
        names = study_names_in(client, experiment_id)
        raise StudyError(
            f"resume=from_mlflow, but MLflow has no study {name!r}{nearest(name, names)}. Studies "
            f"in this experiment: {', '.join(names) or 'none'}. Give the options that it was "
            "started with, or study=..., tracking.uri=..., tracking.experiment=..."
        )
    marker = folder / "study_id"
    owner = marker.read_text() if marker.exists() else ""
    latest = max(parents, key=lambda study_id: parents[study_id].info.start_time)
    study_id = owner if owner in parents else latest
    parent = parents[study_id]
    recorded = json.loads(read_text(client, parent.info.run_id, DEFINITION_FILE))
    different = differences(definition, recorded)
    if different:
        lines = "\n  ".join(different)
        raise StudyError(
            f"study {name} in MLflow has other settings:\n  {lines}\n"
            "Nothing was changed. Give the settings that it was made with"
        )
    space = {option: Domain(**domain) for option, domain in recorded["space"].items()}
    own = {
        number: run
        for number, run in runs
        if number is not None and run.data.tags[STUDY_ID_TAG] == study_id
    }
    by_number = {number: _trial(run, number, space, client) for number, run in own.items()}
    numbers = range(max(by_number, default=-1) + 1)
    missing = [number for number in numbers if number not in by_number]
    attributes = {key for trial in by_number.values() for key in trial.user_attrs}
    if missing and attributes & {ORIGIN, FINALIST}:
        raise StudyError(
            f"study {name} cannot be rebuilt: its trials continue or repeat others, and MLflow "
            f"has no run of trials {missing} that says which"
        )
    waiting = create_trial(state=TrialState.WAITING)
    return RecordedStudy(
        name=name,
        id=study_id,
        target=int(parent.data.tags.get(TARGET_TAG, len(numbers))),
        definition=recorded,
        sequence=_sequence(own.values()),
        trials=[by_number.get(number, waiting) for number in numbers],
        missing=missing,
    )


def rebuild(storage: optuna.storages.RDBStorage, study: RecordedStudy) -> str:
    """Makes the study in Optuna, which must not have it.

    Returns:
        What was rebuilt, for the user.
    """
    add_study(
        storage,
        study.name,
        study.id,
        study.target,
        study.definition,
        study.sequence,
        study.trials,
    )
    counts = Counter(trial.state.name for trial in study.trials)
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    text = f"Study {study.name} is rebuilt from MLflow: {len(study.trials)} trials ({states})"
    if study.missing:
        text += f"; of trials {study.missing} MLflow has no run: they are run anew"
    return text


def _trial(run: Run, number: int, space: dict[str, Domain], client: MlflowClient) -> FrozenTrial:
    """A trial as Optuna had it, as far as MLflow heard of it."""
    tags = run.data.tags
    try:
        parameters = json.loads(tags[PARAMETERS_TAG])
        attributes = json.loads(tags[ATTRIBUTES_TAG])
        domains = {name: distribution(space[name], value) for name, value in parameters.items()}
        constraints = json.loads(tags.get(CONSTRAINTS_TAG, "{}"))
    except (KeyError, ValueError) as error:
        raise StudyError(
            f"trial {number} cannot be rebuilt from run {run.info.run_id}: its tags "
            f"{PARAMETERS_TAG} and {ATTRIBUTES_TAG} are missing or damaged ({error!r})"
        ) from error
    key = f"validation/best_{tags['rum.metric']}"
    points = client.get_metric_history(run.info.run_id, key)
    curve = {point.step: point.value for point in points}
    state = _state(run, curve)
    if "rum.reason" in tags:
        attributes[REASON] = tags["rum.reason"]
    ended = state.is_finished()
    has_value = curve and state in (TrialState.COMPLETE, TrialState.PRUNED)
    trial = create_trial(
        state=state,
        value=curve[max(curve)] if has_value else None,
        params=parameters,
        distributions=domains,
        user_attrs=attributes,
        intermediate_values=curve,
        constraints=constraints or None,
    )
    trial.datetime_start = _time(run.info.start_time)
    trial.datetime_complete = _time(run.info.end_time) if ended else None
    return trial


def _sequence(runs: Iterable[Run]) -> dict[str, int]:
    """How far the latest trial had taken the sampler's sequence."""
    latest: dict[str, int] = {}
    for run in runs:
        for key, value in json.loads(run.data.tags.get(SEQUENCE_TAG, "{}")).items():
            latest[key] = max(value, latest.get(key, value))
    return latest


def _state(run: Run, curve: dict[int, float]) -> TrialState:
    """What has ended is what MLflow says has; all else goes on from its last checkpoint."""
    if run.info.status == FINISHED and curve:
        return TrialState.COMPLETE
    if run.info.status == KILLED:
        return TrialState.PRUNED
    if run.info.status == FAILED:  # diverged, or crashed
        return TrialState[run.data.tags.get("rum.state", "FAIL")]
    return TrialState.RUNNING


def _time(milliseconds: int) -> datetime:
    """MLflow's time in Optuna's form, in the middle of the millisecond: no rounding leaves it."""
    return datetime.fromtimestamp(milliseconds // 1000) + timedelta(
        milliseconds=milliseconds % 1000, microseconds=500
    )
