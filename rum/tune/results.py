"""What a search found, as a table, and what can be done next."""

import shlex
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from rum.tasks import Task
from rum.tune.config import SearchConfig, output_folder
from rum.tune.provenance import option_text
from rum.tune.registry import model_name
from rum.tune.study import REASON, RUNG, Study, is_paused, is_sound
from rum.tune.tracking import tracking_uri

SHOWN = 5


def best_trials(study: Study, task: Task) -> str:
    """A table of the best trials with the task's baselines below."""
    ranked = study.ranked()[:SHOWN]
    if not ranked:
        return "No trial has a value."
    names = sorted({name for trial in ranked for name in trial.params})
    header = ["trial", task.metric, "epochs", "ended", *names]
    rows = [header, *(_row(trial, names) for trial in ranked)]
    lines = [f"Best trials of {study.name}:", *columns(rows)]
    for name, value in task.baselines().items():
        lines.append(f"  {name} baseline: {value:.4f} {task.metric}")
    return "\n".join(lines)


def failures(study: Study) -> list[str]:
    """One line for each trial that crashed or diverged."""
    return [
        f"trial {trial.number} failed: {str(trial.user_attrs.get(REASON)).splitlines()[0]}"
        for trial in study.trials(TrialState.FAIL, TrialState.PRUNED)
        if trial.state == TrialState.FAIL or not is_sound(trial)
    ]


def refusals(study: Study) -> list[str]:
    """How many candidates were infeasible and the first of them; nothing where none was."""
    refused = study.refused()
    if not refused:
        return []
    first = refused[0]
    return [
        f"{len(refused)} candidates were not trained, the first: "
        f"trial {first.number} {first.user_attrs[REASON]}"
    ]


def resume_command(command: str, study: str) -> str:
    """The command that goes on with this very study, from the one that was given."""
    words = shlex.split(command)
    if any(word.endswith("resume.py") for word in words):
        return command  # repeating it goes on
    dropped = ("study=", "study_exists=", "resume=")
    kept = [word for word in words if not word.startswith(dropped)]
    return shlex.join([*kept, f"study={study}", "resume=yes"])


def next_commands(config: SearchConfig, study: Study, task: Task) -> str:
    """What a user may want to do after a search, as commands."""
    output_dir = output_folder(config.output_dir)
    uri = tracking_uri(config.tracking, output_dir)
    options = {"output_dir": config.output_dir, "data_dir": config.data_dir}
    where = "".join(
        " " + shlex.quote(f"{name}={option_text(value)}")
        for name, value in options.items()
        if value not in (None, "outputs")
    )
    again = resume_command(config.command, config.study or study.name)
    more = 2 * config.training.max_epochs
    lines = ["Next:"]
    if uri.startswith("sqlite:"):
        lines.append(f"  look at the runs     mlflow ui --backend-store-uri {shlex.quote(uri)}")
    else:
        lines.append("  look at the runs     in the MLflow server of MLFLOW_TRACKING_URI")
    lines += [
        f"  go on, or extend     {again}",
        "  continue the best    python pipelines/resume.py "
        f"study={study.name} top=1 training.max_epochs={more}{where}",
        "  evaluate the best    python pipelines/evaluate.py "
        f"checkpoint=models:/{model_name(task, config.task.name)}@best{where}",
    ]
    return "\n".join(lines)


def _row(trial: FrozenTrial, names: Sequence[str]) -> list[str]:
    epochs = max(trial.intermediate_values, default=0)
    values = [_shown(trial.params.get(name, "-")) for name in names]
    return [str(trial.number), f"{trial.value:.4f}", str(epochs), how_ended(trial), *values]


def how_ended(trial: FrozenTrial) -> str:
    """How a trial ended, or that it has not, in a few words."""
    if not trial.state.is_finished():
        return "paused" if is_paused(trial) else trial.state.name.lower()
    if trial.state == TrialState.COMPLETE:
        return "finished"
    if trial.user_attrs.get(RUNG) is not None:
        return f"stopped at rung {trial.user_attrs[RUNG]}"
    reason = str(trial.user_attrs.get(REASON) or "").splitlines()
    return reason[0] if reason else trial.state.name.lower()


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows side by side; a wide table is turned, one trial a column."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    if sum(widths) + 2 * len(widths) > 110:
        rows = [list(column) for column in zip(*rows, strict=True)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
