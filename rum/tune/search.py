"""Runs a search: checks everything first, then lets Ray Tune run the conductor's trials."""

import dataclasses
import os
import tempfile
from pathlib import Path

import torch

from rum.errors import ConfigError
from rum.experiment import check_device, model_sizes
from rum.tasks import CharacterLMConfig, Task
from rum.tune import warm_start
from rum.tune.budget import check_budget, describe
from rum.tune.cluster import check_ray_address, concurrent, resources
from rum.tune.conducting import conduct
from rum.tune.config import SearchConfig, data_folder, output_folder
from rum.tune.crew_size import with_replicas
from rum.tune.database import open_storage
from rum.tune.finalists import check_finalists, describe_finalists, rank_finalists
from rum.tune.forecast import check_disk, forecast
from rum.tune.limits import check_feasible, limits_of, with_share
from rum.tune.objectives import cost_of
from rum.tune.opening import choose_name, default_name, define, set_target
from rum.tune.prediction import Predictor
from rum.tune.rebuild import read_study, rebuild
from rum.tune.sizing import fitting
from rum.tune.space import check_space
from rum.tune.study import Study, check_definition, ensure_study
from rum.tune.study_folder import check_unlocked, claim_folder, locked
from rum.tune.terminal import say
from rum.tune.tracking import connect


def run_search(config: SearchConfig) -> str:
    """Searches, or with `dry_run` says what a search would cost.

    Returns:
        What was found and what can be done next.

    Raises:
        ConfigError: If an option, the space or a combination is not valid.
        DataError: If the corpus is missing or altered.
        StudyError: If the study has other settings or another driver.
        TrackingError: If MLflow cannot be used.
        InterruptedSearchError: After Ctrl-C, or when disk, database or cluster fail.
    """
    config = _located(config)
    check_finalists(config)
    check_space(config, config.space)
    task = config.task.load(seed=config.training.seed, data_dir=data_folder(config.data_dir))
    output_dir = output_folder(config.output_dir)
    config = check_machine(config, task, output_dir)
    first = warm_start.given(config)
    if config.dry_run:
        warm_start.inside(first, config)
        return "Dry run: nothing was started."

    folders = output_dir / "studies"
    if config.resume != "no" or config.study_exists != "new":
        # Before any database: the other driver may have been stopped while it was writing to one.
        check_unlocked(folders / default_name(config, task))
    client, experiment_id = connect(config.tracking, output_dir)
    storage = open_storage(output_dir)
    definition = define(config, task)
    name = choose_name(config, task, storage)
    with locked(folders / name):
        if config.resume == "from_mlflow":
            recorded = read_study(client, experiment_id, name, definition, folders / name)
            say(rebuild(storage, recorded))
        ensure_study(storage, name, definition)
        fit = fitting(config, model_sizes(task))
        cost = cost_of(config, task)
        study = Study(storage, name, config.space, config.sampler, fit, cost)
        check_definition(study, definition)
        claim_folder(folders / name, study.id)
        if study.target == 0 or config.resume == "from_mlflow":
            first += warm_start.of_study(config, task, client, experiment_id)
            warm_start.queue(study, warm_start.inside(first, config))
        say(set_target(study, config))
        config = dataclasses.replace(config, study=name)
        outcome = conduct(config, study, task, client, experiment_id)
        if not outcome.is_through:
            return outcome.summary
        summary = outcome.summary
        if config.search.seeds > 1:
            ranking = rank_finalists(config, study, task, storage, client, experiment_id)
            summary = f"{ranking}\n\n{summary}"
        study.conclude()
        return summary


def check_machine(config: SearchConfig, task: Task, output_dir: Path) -> SearchConfig:
    """Says what the search will cost.

    Returns:
        The search with replicas and the share of a GPU that each trial gets as numbers.

    Raises:
        ConfigError: If it cannot run here, or nothing of the space is within its limits.
    """
    check_device(config.training.device)
    config = with_replicas(config, task)
    if not config.dry_run:
        _check_writable(output_dir)
        check_ray_address()
    predictor = Predictor(config, task, data_folder(config.data_dir))
    config = with_share(config, predictor)
    limits = limits_of(config, predictor)
    check_feasible(config, limits)
    check_budget(config, resources(config)["GPU"])
    machine = {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}
    prediction = forecast(config, task, output_dir, concurrent(config, machine), limits)
    say(f"Corpus: {task.corpus} ({task.source}); {task.protocol}")
    for line in config.setting.lines():
        say(line)
    say(str(prediction))
    if (budget := describe(config.search)) is not None:
        say(budget)
    if (more := describe_finalists(config)) is not None:
        say(more)
    if not config.dry_run:
        check_disk(prediction, config.search.disk_reserve_gigabytes)
    return config


def _located(config: SearchConfig) -> SearchConfig:
    """Threads per trial, and a corpus file by absolute path: workers run elsewhere."""
    threads = config.search.cpus_per_trial
    if config.training.threads not in (None, threads):
        raise ConfigError(
            f"training.threads must be null or search.cpus_per_trial, which is {threads}, got "
            f"{config.training.threads}: a trial computes with as many threads as it has CPUs"
        )
    training = dataclasses.replace(config.training, threads=threads)
    task = config.task
    if isinstance(task, CharacterLMConfig) and Path(task.corpus).is_file():
        task = dataclasses.replace(task, corpus=str(Path(task.corpus).absolute()))
    return dataclasses.replace(config, training=training, task=task)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"output_dir must be a folder to write to: {error}") from error
