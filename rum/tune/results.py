"""What a search found, as a table, and what can be done next."""

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from rum.tasks import Task
from rum.tune.study import REASON, RUNG, Study, is_sound

SHOWN = 5


def best_trials(study: Study, task: Task) -> str:
    """A table of the best trials with the task's baselines below."""
    ranked = study.ranked()[:SHOWN]
    if not ranked:
        return "No trial has a value."
    names = sorted({name for trial in ranked for name in trial.params})
    header = ["trial", task.metric, "epochs", "ended", *names]
    rows = [header, *(_row(trial, names) for trial in ranked)]
    lines = [f"Best trials of {study.name}:", *_columns(rows)]
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


def _row(trial: FrozenTrial, names: Sequence[str]) -> list[str]:
    epochs = max(trial.intermediate_values, default=0)
    ended = (
        "finished"
        if trial.state == TrialState.COMPLETE
        else f"stopped at rung {trial.user_attrs.get(RUNG)}"
    )
    values = [_shown(trial.params.get(name, "-")) for name in names]
    return [str(trial.number), f"{trial.value:.4f}", str(epochs), ended, *values]


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
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
