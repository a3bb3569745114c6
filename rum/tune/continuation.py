"""Continues a study's best trials for more epochs, as a study of their own."""

import dataclasses
from typing import Any

from optuna.trial import FrozenTrial

from rum.errors import ConfigError, StudyError
from rum.experiment import ExperimentConfig, experiment_from_plain, model_sizes
from rum.parameters import nearest, replace, unflatten
from rum.training.checkpoint import Checkpoint, CheckpointStore
from rum.tune.conducting import conduct
from rum.tune.config import (
    Domain,
    ResumeConfig,
    SamplerConfig,
    SchedulerConfig,
    SearchConfig,
    data_folder,
    output_folder,
)
from rum.tune.database import open_storage
from rum.tune.messages import Workplace
from rum.tune.opening import define
from rum.tune.search import check_machine
from rum.tune.sizing import fitting
from rum.tune.study import ORIGIN, Study, check_definition, ensure_study, study_names
from rum.tune.study_folder import claim_folder, locked
from rum.tune.terminal import say
from rum.tune.tracking import connect, trial_run


def continue_best(config: ResumeConfig) -> str:
    """Continues the best trials, finished or stopped early, from their last checkpoints.

    They become trials of the study `<study>-to-<max_epochs>`, without a scheduler, and child runs
    of the runs they come from. Repeating the command goes on with what is not finished; a larger
    `top` adds trials.

    Raises:
        ConfigError: If `max_epochs` does not grow, or a change touches a searched option.
        StudyError: If there is no such study, or it has fewer trials than `top`.
    """
    for limit in ("max_parameters", "max_memory_gigabytes"):
        if getattr(config.search, limit) is not None:
            raise ConfigError(f"search.{limit} has no effect here: trials continue as they are")
    output_dir = output_folder(config.output_dir)
    if not output_dir.is_dir():
        raise StudyError(f"there is no study {config.study!r}: {output_dir} is no folder")
    storage = open_storage(output_dir)
    names = study_names(storage)
    if config.study not in names:
        raise StudyError(
            f"there is no study {config.study!r}{nearest(config.study, names)}. "
            f"Studies in {output_dir}: {', '.join(names) or 'none'}"
        )
    origin_study = Study(storage, config.study, {}, SamplerConfig())
    ranked = origin_study.ranked()
    if config.top > len(ranked):
        raise StudyError(
            f"top is {config.top}, but study {config.study} has {len(ranked)} trials with a value"
        )
    device = config.training.device or _device_of(config, ranked[0])
    search = _search_config(config, origin_study.definition, device)
    task = search.task.load(seed=search.training.seed, data_dir=data_folder(config.data_dir))
    if task.checksum != origin_study.definition["data_checksum"]:
        raise StudyError(
            f"study {config.study} was made on other data: checksum "
            f"{origin_study.definition['data_checksum']}, now {task.checksum}"
        )
    search = check_machine(search, task, output_dir)
    client, experiment_id = connect(config.tracking, output_dir)
    definition = define(search, task)
    name = f"{config.study}-to-{search.training.max_epochs}"
    with locked(output_dir / "studies" / name):
        ensure_study(storage, name, definition)
        fit = fitting(search, model_sizes(task))
        study = Study(storage, name, search.space, search.sampler, fit)
        check_definition(study, definition)
        claim_folder(output_dir / "studies" / name, study.id)
        origins = [trial.user_attrs.get(ORIGIN) for trial in study.trials()]
        queued = {origin["trial"] for origin in origins if origin}
        for trial in ranked[: config.top]:
            if trial.number not in queued:
                run = trial_run(client, experiment_id, config.study, trial.number, origin_study.id)
                origin = _origin(config, trial, run.info.run_id)
                study.enqueue(trial.params, {ORIGIN: origin})
        study.target = len(study.trials())
        outcome = conduct(search, study, task, client, experiment_id)
        if outcome.is_through:
            study.conclude()
        return outcome.summary


def _origin(config: ResumeConfig, trial: FrozenTrial, run_id: str) -> dict[str, Any]:
    return {
        "study": config.study,
        "trial": trial.number,
        "run_id": run_id,
        "checkpoint": str(_last_checkpoint(config, trial.number).path),
    }


def _last_checkpoint(config: ResumeConfig, number: int) -> Checkpoint:
    folder = output_folder(config.output_dir) / "studies" / config.study
    last = CheckpointStore(Workplace({}, str(folder), None).trial_folder(number)).last()
    if last is None:
        raise StudyError(f"trial {number} of study {config.study} has no checkpoint")
    return last


def _device_of(config: ResumeConfig, trial: FrozenTrial) -> str:
    """Where a trial was trained, also said: the study's definition leaves it out."""
    trained = _last_checkpoint(config, trial.number).description["experiment"]["training"]
    device = str(trained["device"])
    say(
        f"Device: {device}, as trial {trial.number} of study {config.study} had; "
        "training.device=... chooses another"
    )
    return device


def _search_config(config: ResumeConfig, definition: dict[str, Any], device: str) -> SearchConfig:
    """The search that the study was made with, with the changes that are asked for."""
    before = experiment_from_plain(unflatten(definition["experiment"]))
    experiment = _changed(before, config, definition["space"])
    return SearchConfig(
        model=experiment.model,
        task=experiment.task,
        training=dataclasses.replace(
            experiment.training,
            threads=config.search.cpus_per_trial,
            device=device,
        ),
        space={name: Domain(**domain) for name, domain in definition["space"].items()},
        scheduler=SchedulerConfig(name="none"),
        search=config.search,
        tracking=config.tracking,
        data_dir=config.data_dir,
        output_dir=config.output_dir,
        resume="yes",
        command=config.command,
    )


def _changed(
    before: ExperimentConfig, config: ResumeConfig, space: dict[str, Any]
) -> ExperimentConfig:
    if config.training.max_epochs is None:
        raise ConfigError(
            f"training.max_epochs must be given: study {config.study} had "
            f"{before.training.max_epochs}"
        )
    changes: dict[str, Any] = {"training.max_epochs": config.training.max_epochs}
    if config.training.learning_rate is not None:
        changes["training.learning_rate"] = config.training.learning_rate
    for name in changes:
        if name in space:
            raise ConfigError(f"{name} was searched: a continued trial keeps its own value")
    after = replace(before, changes)
    if after.training.max_epochs <= before.training.max_epochs:
        raise ConfigError(
            f"training.max_epochs must be more than the {before.training.max_epochs} of study "
            f"{config.study}, got {after.training.max_epochs}"
        )
    return after
