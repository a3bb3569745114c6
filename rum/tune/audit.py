"""Whether Optuna's study and MLflow say the same of every trial."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState

from rum.errors import StudyError
from rum.parameters import nearest
from rum.tune.config import CheckConfig, SamplerConfig, output_folder
from rum.tune.database import open_storage
from rum.tune.provenance import option_text
from rum.tune.study import REASON, RUNG, Study, run_status, study_names
from rum.tune.tracking import RUNNING, connect, milliseconds, study_runs

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Difference:
    """One thing that the two books do not agree on."""

    trial: int
    what: str
    study: str
    """What Optuna's study says."""
    mlflow: str
    """What MLflow says."""

    def __str__(self) -> str:
        """For people."""
        return (
            f"trial {self.trial}: {self.what}: {self.study} in the study, {self.mlflow} in MLflow"
        )


def check_study(config: CheckConfig) -> tuple[str, bool]:
    """Compares a study with its runs in MLflow; changes nothing in either.

    Compared of every trial: that there is one run, its state and the reason for it, parameters,
    the curve of the selection metric with each epoch once, and when the trial began and ended.

    Returns:
        That they agree, or a line for each difference (JSON where `config.json` is set); and
        whether they agree.

    Raises:
        StudyError: If there is no such study.
        TrackingError: If MLflow cannot be used.
    """
    output_dir = output_folder(config.output_dir)
    if not (output_dir / "optuna.db").is_file():
        raise StudyError(f"there is no study {config.study!r}: {output_dir} has no studies")
    storage = open_storage(output_dir)
    names = study_names(storage)
    if config.study not in names:
        raise StudyError(
            f"there is no study {config.study!r}{nearest(config.study, names)}. "
            f"Studies in {output_dir}: {', '.join(names) or 'none'}"
        )
    study = Study(storage, config.study, {}, SamplerConfig())
    client, experiment_id = connect(config.tracking, output_dir)
    found = list(differences(study, client, experiment_id))
    trials = study.trials()
    text = "\n".join(map(str, found)) or (
        f"study {study.name}: {len(trials)} trials, Optuna and MLflow agree"
    )
    if config.json:
        report = {
            "study": study.name,
            "trials": len(trials),
            "states": dict(Counter(trial.state.name for trial in trials)),
            "differences": [asdict(difference) for difference in found],
        }
        text = json.dumps(report, indent=1)
    return text, not found


def differences(study: Study, client: MlflowClient, experiment_id: str) -> Iterator[Difference]:
    """Everything that the two books do not agree on."""
    runs: dict[int, list[Run]] = {}
    for number, run in study_runs(client, experiment_id, study.name, study.id):
        if number is not None:
            runs.setdefault(number, []).append(run)
    trials = {trial.number: trial for trial in study.trials()}
    for number, trial in trials.items():
        own = runs.get(number, [])
        expected = 0 if trial.state == TrialState.WAITING else 1
        if len(own) != expected:
            yield Difference(number, "runs", str(expected), str(len(own)))
        for run in own:
            yield from _of_trial(trial, run, client)
    for number in sorted(set(runs) - set(trials)):
        yield Difference(number, "trial", "no such trial", "a run")


def _of_trial(trial: FrozenTrial, run: Run, client: MlflowClient) -> Iterator[Difference]:
    status, tags = run.info.status, run.data.tags
    key = f"validation/best_{tags.get('rum.metric')}"
    wanted = run_status(trial)
    if status != wanted and not (trial.state == TrialState.RUNNING and status == RUNNING):
        yield Difference(trial.number, "state", f"{trial.state.name} ({wanted})", status)
    for what, attribute in (("reason", REASON), ("rung", RUNG)):
        value = trial.user_attrs.get(attribute)
        noted = "" if value is None else str(value)[:5000]
        if trial.state in ENDED and noted != tags.get(f"rum.{what}", ""):
            yield Difference(trial.number, what, noted, tags.get(f"rum.{what}", ""))
    for name, value in trial.params.items():
        recorded = run.data.params.get(name, "nothing")
        if not _is_recorded(value, recorded):
            yield Difference(trial.number, name, option_text(value), recorded)
    points = client.get_metric_history(run.info.run_id, key)
    for epoch, count in Counter(point.step for point in points).items():
        if count > 1:
            yield Difference(trial.number, f"epoch {epoch}", "once", f"{count} times")
    curve = {point.step: point.value for point in points}
    for epoch in sorted(set(curve) | set(trial.intermediate_values)):
        ours, theirs = trial.intermediate_values.get(epoch), curve.get(epoch)
        if ours != theirs:
            yield Difference(trial.number, f"{key} of epoch {epoch}", str(ours), str(theirs))
    began, ended = milliseconds(trial.datetime_start), milliseconds(trial.datetime_complete)
    if trial.state in ENDED and (run.info.start_time, run.info.end_time) != (began, ended):
        yield Difference(
            trial.number,
            "time",
            _span(began, ended),
            _span(run.info.start_time, run.info.end_time),
        )


def _is_recorded(value: Any, recorded: str) -> bool:
    """Whether a run's parameter says this value; a 1 may be the 1.0 of its option's type."""
    if recorded == option_text(value):
        return True
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    try:
        return float(recorded) == value
    except ValueError:
        return False


def _span(began: int | None, ended: int | None) -> str:
    return " to ".join(
        "never" if at is None else datetime.fromtimestamp(at / 1000).isoformat(" ", "seconds")
        for at in (began, ended)
    )
