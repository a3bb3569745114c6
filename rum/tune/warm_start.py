"""What a new study trains first: the published setting, an earlier study's best, a table."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from rum.errors import ConfigError, TrackingError
from rum.parameters import flatten, nearest
from rum.tasks import Task
from rum.tune.config import Domain, SearchConfig
from rum.tune.space import applies, described, same_value
from rum.tune.study import WARM_START, Study
from rum.tune.terminal import say
from rum.tune.tracking import (
    FINISHED,
    KILLED,
    PARAMETERS_TAG,
    STUDY_ID_TAG,
    study_names_in,
    study_runs,
)


@dataclass(frozen=True)
class Candidate:
    """A configuration and where it comes from, which no other candidate shares."""

    source: str
    values: Mapping[str, Any]


def given(config: SearchConfig) -> list[Candidate]:
    """The published setting in force and the lines of `warm_start.csv`.

    Raises:
        ConfigError: If the file cannot be read, or names an option that is none.
    """
    known = flatten({name: getattr(config, name) for name in ("model", "task", "training")})
    candidates = []
    if config.warm_start.published and config.setting.name is not None:
        values = {name: known[name] for name in config.space}
        candidates.append(Candidate(f"published {config.setting.name}", values))
    if config.warm_start.csv is not None:
        candidates += _of_table(Path(config.warm_start.csv).expanduser(), known)
    return candidates


def _of_table(path: Path, known: Mapping[str, Any]) -> list[Candidate]:
    where = f"warm_start.csv={path}"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from error
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{where}: the first line must name options, got {name!r}{nearest(name, known)}"
            )
    candidates = []
    for line, row in rows:
        cells = {name: row[name] for name in names}
        if None in row or None in cells.values():
            raise ConfigError(f"{where}, line {line}: must have {len(names)} values, as line 1")
        values = {name: _value(cell.strip()) for name, cell in cells.items() if cell.strip()}
        candidates.append(Candidate(f"{path.name} line {line}", values))
    if not candidates:
        raise ConfigError(f"{where}: there must be at least one line below the names")
    return candidates


def _value(cell: str) -> Any:
    """A number, true, false or null (as JSON or Python writes them), else the text itself."""
    words = {"True": True, "False": False, "None": None}
    if cell in words:
        return words[cell]
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def of_study(
    config: SearchConfig, task: Task, client: MlflowClient, experiment_id: str
) -> list[Candidate]:
    """The best trials of `warm_start.study`, by what MLflow has of them.

    Args:
        config: The search.
        task: Its task, loaded.
        client: MLflow's.
        experiment_id: Where the study's runs are.

    Raises:
        ConfigError: If there is no such study, or it measured something else.
        TrackingError: If its records are damaged.
    """
    name = config.warm_start.study
    if name is None:
        return []
    runs = list(study_runs(client, experiment_id, name))
    parents = [run for number, run in runs if number is None]
    if not parents:
        names = study_names_in(client, experiment_id)
        raise ConfigError(
            f"warm_start.study: MLflow has no study {name!r}{nearest(name, names)}. Studies in "
            f"this experiment: {', '.join(names) or 'none'}"
        )
    latest = max(parents, key=lambda run: int(run.info.start_time))
    metric = latest.data.tags.get("rum.metric")
    if metric != task.metric:
        raise ConfigError(
            f"warm_start.study={name} must have measured {task.metric}, but measured {metric}"
        )
    found = []
    for number, run in runs:
        value = run.data.metrics.get(f"validation/best_{metric}")
        is_own = run.data.tags[STUDY_ID_TAG] == latest.data.tags[STUDY_ID_TAG]
        if number is None or not is_own or value is None or not math.isfinite(value):
            continue
        if run.info.status in (FINISHED, KILLED):
            found.append((value, number, _parameters(run.data.tags, run.info.run_id)))
    found.sort(key=lambda each: (each[0] if task.mode == "min" else -each[0], each[1]))
    return [
        Candidate(f"study {name} trial {number}", parameters)
        for _, number, parameters in found[: config.warm_start.top]
    ]


def _parameters(tags: Mapping[str, str], run_id: str) -> dict[str, Any]:
    try:
        parameters = json.loads(tags[PARAMETERS_TAG])
    except (KeyError, ValueError) as error:
        raise TrackingError(
            f"run {run_id}: its tag {PARAMETERS_TAG} is missing or damaged ({error!r})"
        ) from error
    if not isinstance(parameters, dict):
        raise TrackingError(f"run {run_id}: its tag {PARAMETERS_TAG} is no mapping")
    return parameters


def inside(candidates: Sequence[Candidate], config: SearchConfig) -> list[Candidate]:
    """The candidates as the space can have them; says what of them it cannot.

    Options that are not searched, or not beside the others, are left out; those that a candidate
    lacks are sampled. Of the rest, what is outside is clipped or its candidate is skipped.

    Raises:
        ConfigError: If there are more than `search.num_trials`.
    """
    clips = config.warm_start.outside == "clip"
    kept: list[Candidate] = []
    unused: dict[str, None] = {}
    for candidate in candidates:
        values: dict[str, Any] = {}
        wrong = []
        for name, domain in config.space.items():
            if name not in candidate.values or domain.parameters is not None:
                continue
            if not applies(domain, {**candidate.values, **values}):
                continue
            value = candidate.values[name]
            same = same_value(domain, _clipped(domain, value) if clips else value)
            if same:
                values[name] = same[0]
            else:
                wrong.append(f"{name} must be {described(domain)}, got {value!r}")
        unused.update(dict.fromkeys(name for name in candidate.values if name not in config.space))
        if wrong:
            say(f"Skipped, outside of the space: {candidate.source}: {'; '.join(wrong)}")
        elif values:
            kept.append(Candidate(candidate.source, values))
    if unused:
        say(f"Not searched, so left as it is: {', '.join(unused)}")
    if len(kept) > config.search.num_trials:
        raise ConfigError(
            f"search.num_trials is {config.search.num_trials}, but {len(kept)} configurations are "
            "to come first: ask for more trials, or give fewer with warm_start"
        )
    for candidate in kept:
        shown = ", ".join(f"{name}={value}" for name, value in candidate.values.items())
        say(f"First: {candidate.source}: {shown}")
    return kept


def _clipped(domain: Domain, value: Any) -> Any:
    """The nearest value of a numeric domain; what is no number, or of choices, stays."""
    if domain.choices is not None or isinstance(value, bool):
        return value
    if not isinstance(value, int | float) or math.isnan(value):
        return value
    assert domain.low is not None
    assert domain.high is not None
    step = domain.step or (1 if domain.type == "int" else None)
    value = min(max(value, domain.low), domain.high)
    if step is not None:
        value = domain.low + step * round((value - domain.low) / step)
        value = value if value <= domain.high else value - step
    return value


def queue(study: Study, candidates: Sequence[Candidate]) -> None:
    """Queues those that are not there; a driver may have died in the middle of it."""
    there = {trial.user_attrs.get(WARM_START) for trial in study.trials()}
    for candidate in candidates:
        if candidate.source not in there:
            study.enqueue(dict(candidate.values), {WARM_START: candidate.source})
