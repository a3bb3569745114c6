"""Runs a search: checks everything first, then lets Ray Tune run the conductor's trials."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from optuna.exceptions import OptunaError
from ray.exceptions import RayError
from sqlalchemy.exc import SQLAlchemyError

from rum.errors import CheckpointError, ConfigError, RumError
from rum.experiment import ExperimentConfig, check_device, model_sizes
from rum.parameters import flatten
from rum.tasks import CharacterLMConfig, Task
from rum.training.checkpoint import CheckpointStore
from rum.tune.budget import Budget, check_budget, describe, first_epochs
from rum.tune.cluster import check_ray_address, concurrent, resources, running_ray
from rum.tune.conductor import Conductor
from rum.tune.config import SearchConfig, output_folder
from rum.tune.crew_size import replicas, with_replicas
from rum.tune.database import open_storage
from rum.tune.forecast import calibrate, check_disk, forecast
from rum.tune.limits import check_feasible, limits_of, with_share
from rum.tune.messages import Workplace
from rum.tune.opening import choose_name, default_name, define, set_target
from rum.tune.orders import Orders, obey
from rum.tune.pareto import fronts, to_json
from rum.tune.prediction import Predictor
from rum.tune.provenance import common_tags
from rum.tune.ray_run import run
from rum.tune.rebuild import read_study, rebuild
from rum.tune.registry import register
from rum.tune.results import best_trials, failures, next_commands, refusals, resume_command
from rum.tune.schedulers import build_scheduler
from rum.tune.sizing import fitting
from rum.tune.space import check_space
from rum.tune.study import COMMAND, Study, check_definition, ensure_study
from rum.tune.study_folder import check_unlocked, claim_folder, locked
from rum.tune.terminal import say
from rum.tune.tracking import (
    DEFINITION_FILE,
    FINISHED,
    INTERRUPTED,
    TARGET_TAG,
    Tracker,
    connect,
)

# What goes wrong around a search: disk, databases, cluster. Anything else is a fault of this code.
_OUTSIDE = (OSError, SQLAlchemyError, OptunaError, MlflowException, RayError)


class InterruptedSearchError(RumError):
    """A search was stopped by Ctrl-C or by what it runs on; it can be resumed."""


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
    check_space(config, config.space)
    task = config.task.load(seed=config.training.seed, data_dir=_data_dir(config))
    output_dir = output_folder(config.output_dir)
    config = check_machine(config, task, output_dir)
    if config.dry_run:
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
        study = Study(storage, name, config.space, config.sampler, fit)
        check_definition(study, definition)
        claim_folder(folders / name, study.id)
        say(set_target(study, config))
        return conduct(config, study, task, client, experiment_id)


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
    predictor = Predictor(config, task, _data_dir(config))
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
    if not config.dry_run:
        check_disk(prediction, config.search.disk_reserve_gigabytes)
    return config


def _data_dir(config: SearchConfig) -> Path | None:
    return Path(config.data_dir).absolute() if config.data_dir else None


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


def conduct(
    config: SearchConfig, study: Study, task: Task, client: Any, experiment_id: str
) -> str:
    """Runs a study's open trials, then registers the best and sums up.

    Args:
        config: The search.
        study: Locked by this process, its target set.
        task: The task, loaded.
        client: MLflow's.
        experiment_id: MLflow's.

    Raises:
        InterruptedSearchError: After Ctrl-C, or when disk, database or cluster fail.
        TrackingError: If MLflow stops taking records.
    """
    output_dir = output_folder(config.output_dir)
    base = ExperimentConfig(model=config.model, task=config.task, training=config.training)
    folder = output_dir / "studies" / study.name
    workplace = Workplace(
        dataclasses.asdict(base), str(folder), config.data_dir, resources(config)["GPU"]
    )
    # From here on the study's id, not its name, says which runs are its own.
    tracker = Tracker(
        client,
        experiment_id,
        study.name,
        task,
        {
            **common_tags(task, config.task.name),
            **config.published_tags(),
            "rum.command": config.command,
        },
        flatten(
            {"search": config.search, "sampler": config.sampler, "scheduler": config.scheduler}
        ),
        study_id=study.id,
    )
    tracker.log_text(json.dumps(study.definition, indent=1), DEFINITION_FILE)
    tracker.tag_study(TARGET_TAG, str(study.target))
    study.set_attribute(COMMAND, config.command)
    status = INTERRUPTED
    conductor = None
    try:
        with _outside_errors_explained(resume_command(config.command, study.name)):
            scheduler = build_scheduler(config, task)
            predictor = Predictor(base, task, _data_dir(config))
            calibrate(predictor, base, study, client, experiment_id)
            limits = limits_of(config, predictor)
            budget = Budget(
                study,
                config.search,
                gpus_per_trial=resources(config)["GPU"] / replicas(config),
                first_epochs=first_epochs(config),
            )
            conductor = Conductor(
                study,
                base,
                task,
                scheduler,
                tracker,
                workplace,
                limits,
                budget,
                config.search.max_failures,
            )
            obey(Orders(folder), study, conductor)
            if not conductor.is_done:
                with running_ray() as machine:
                    run(config, conductor, study, workplace, concurrent(config, machine))
            spent = conductor.out_of_budget if conductor.num_open else None
            status = INTERRUPTED if conductor.num_open and spent is None else FINISHED
            best = conductor.best
            if best is not None:
                tracker.flush()
                run_id = tracker.run_id(best.number)
                _register(config, task, client, run_id, workplace.trial_folder(best.number))
            found = fronts(study, base, task, workplace)
            if found:
                tracker.log_text(to_json(found), "pareto.json")
                areas = {f"pareto/hypervolume_{each.cost}": each.hypervolume for each in found}
                tracker.log_summary(areas, conductor.num_ended)
    finally:
        if conductor is not None:
            conductor.interrupt()
        tracker.close(status)
    if not conductor.num_open:
        study.conclude()
    parts = [
        best_trials(study, task),
        *map(str, found),
        *failures(study),
        *refusals(study),
        "",
        next_commands(config, study, task),
    ]
    summary = "\n".join(parts)
    if spent is not None:
        return (
            f"{summary}\n\nEnded with {conductor.num_open} of {study.target} trials open: "
            f"{spent}.\nWith a larger one they go on:\n"
            f"  {resume_command(config.command, study.name)}"
        )
    if conductor.num_open:
        raise InterruptedSearchError(
            f"interrupted with {conductor.num_open} trials open\n\n{summary}"
        )
    return summary


@contextmanager
def _outside_errors_explained(resume_command: str) -> Iterator[None]:
    """Says of an error that is none of this code how the search goes on after it."""
    try:
        yield
    except RumError:
        raise
    except Exception as error:
        chain: list[BaseException] = [error]  # Ray and Optuna raise errors of their own around it
        while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(inner)
        if not any(isinstance(each, _OUTSIDE) for each in chain):
            raise
        cause = chain[-1]
        raise InterruptedSearchError(
            f"the search was stopped by {type(cause).__name__}: {cause}\n"
            "What was decided and computed so far is kept. When this is mended, go on with\n"
            f"  {resume_command}"
        ) from error


def _register(
    config: SearchConfig, task: Task, client: MlflowClient, run_id: str, folder: Path
) -> None:
    """Registers the best checkpoint of the best trial, or says why not."""
    try:
        checkpoint = CheckpointStore(folder).best()
    except CheckpointError as error:
        say(f"The best model is not registered: {error}")
        return
    if checkpoint is not None:
        registered = register(client, run_id, checkpoint, task, config.task.name)
        say(f"Model {registered.message}")
