"""Which study a search goes on with, what makes it comparable, and how many trials it gets."""

from typing import Any

from optuna.storages import RDBStorage

from rum.errors import StudyError
from rum.parameters import flatten, nearest
from rum.tasks import Task
from rum.train import task_slug
from rum.tune.config import SearchConfig, output_folder
from rum.tune.space import space_to_plain
from rum.tune.study import Study, study_names

# Options that may differ between the drivers of one study: they do not change what is computed.
_NOT_DEFINING = (
    "training.device",
    "training.threads",
    "training.diagnostics",
    "training.checkpoint_seconds",
)


def define(config: SearchConfig, task: Task) -> dict[str, Any]:
    """What makes a study's trials comparable: space, experiment, data and direction."""
    experiment = flatten({name: getattr(config, name) for name in ("model", "task", "training")})
    definition: dict[str, Any] = {
        "space": space_to_plain(config.space),
        "experiment": {k: v for k, v in experiment.items() if k not in _NOT_DEFINING},
        "data_checksum": task.checksum,
        "mode": task.mode,
    }
    if len(config.search.objectives) > 1:
        definition["objectives"] = list(config.search.objectives)
    if config.search.deterministic:
        definition["workers"] = config.search.max_concurrent
    return definition


def default_name(config: SearchConfig, task: Task) -> str:
    """The study's name as given, else made of task, corpus, model and preset."""
    suffix = "" if config.preset == "full" else f"-{config.preset}"
    return config.study or f"{task_slug(task, config.task.name)}-{config.model.name}{suffix}"


def choose_name(config: SearchConfig, task: Task, storage: RDBStorage) -> str:
    """The name of the study to open or to make, by `resume` and `study_exists`.

    Raises:
        StudyError: If it must be there and is not, or must not and is.
    """
    existing = study_names(storage)
    name = default_name(config, task)
    if config.resume == "yes" and name not in existing:
        known = ", ".join(existing) or "none"
        raise StudyError(
            f"resume=yes, but there is no study {name!r}{nearest(name, existing)}. "
            f"Studies in {output_folder(config.output_dir)}: {known}. Give the options that it "
            "was started with, or study=..."
        )
    if config.resume == "from_mlflow" and name in existing:
        raise StudyError(
            f"resume=from_mlflow, but study {name!r} is there, in "
            f"{output_folder(config.output_dir) / 'optuna.db'}: nothing was changed; resume=yes "
            "goes on with it"
        )
    if config.resume == "no" and name in existing:
        if config.study_exists == "error":
            raise StudyError(f"study {name!r} exists and study_exists=error")
        if config.study_exists == "new":
            number = 2
            while f"{name}-{number}" in existing:
                number += 1
            return f"{name}-{number}"
    return name


def set_target(study: Study, config: SearchConfig) -> str:
    """Decides how many trials the study is to have, and says so."""
    asked = config.search.num_trials
    ended = len(study.ended())
    before = study.target
    if before == 0:
        study.target = asked
        return f"Study {study.name}: {asked} trials."
    if config.resume == "from_mlflow":
        return f"Study {study.name} goes on: {ended} of {before} trials have ended."
    if config.resume == "yes" and not (ended >= before and study.is_concluded):
        study.target = max(before, asked)
        return f"Study {study.name} goes on: {ended} of {study.target} trials have ended."
    study.target = before + asked
    return (
        f"Study {study.name} exists with {ended} ended trials of {before}: "
        f"extended by {asked} to {study.target}."
    )
