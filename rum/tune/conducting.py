"""An opened study from the first of its open trials to the summary."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from optuna.exceptions import OptunaError
from ray.exceptions import RayError
from sqlalchemy.exc import SQLAlchemyError

from rum.errors import CheckpointError, RumError
from rum.experiment import ExperimentConfig
from rum.parameters import flatten
from rum.tasks import Task
from rum.training.checkpoint import CheckpointStore
from rum.tune.budget import Budget, first_epochs
from rum.tune.cluster import concurrent, resources, running_ray
from rum.tune.conductor import Conductor
from rum.tune.config import TRAINING_SECONDS, SearchConfig, data_folder, output_folder
from rum.tune.crew_size import replicas
from rum.tune.forecast import calibrate
from rum.tune.limits import limits_of
from rum.tune.messages import Workplace
from rum.tune.orders import Orders, obey
from rum.tune.pareto import fronts, to_json
from rum.tune.prediction import Predictor
from rum.tune.provenance import common_tags
from rum.tune.ray_run import run
from rum.tune.registry import register
from rum.tune.results import best_trials, failures, next_commands, refusals, resume_command
from rum.tune.schedulers import build_scheduler
from rum.tune.spread import Spread
from rum.tune.study import COMMAND, Study
from rum.tune.terminal import say
from rum.tune.tracking import (
    DEFINITION_FILE,
    FINISHED,
    INTERRUPTED,
    TARGET_TAG,
    Tracker,
)

# What goes wrong around a search: disk, databases, cluster. Anything else is a fault of this code.
_OUTSIDE = (OSError, SQLAlchemyError, OptunaError, MlflowException, RayError)


class InterruptedSearchError(RumError):
    """A search was stopped by Ctrl-C or by what it runs on; it can be resumed."""


@dataclass(frozen=True)
class Outcome:
    """What became of a study."""

    summary: str
    """What was found and what can be done next."""
    is_through: bool
    """Whether no trial is open; else a budget ended the search."""


def conduct(
    config: SearchConfig, study: Study, task: Task, client: MlflowClient, experiment_id: str
) -> Outcome:
    """Runs a study's open trials and sums up; registers the best unless finalists are to follow.

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
            {
                "search": config.search,
                "sampler": config.sampler,
                "scheduler": config.scheduler,
                "warm_start": config.warm_start,
            }
        ),
        study_id=study.id,
    )
    tracker.log_text(json.dumps(study.definition, indent=1), DEFINITION_FILE)
    tracker.tag_study(TARGET_TAG, str(study.target))
    study.set_attribute(COMMAND, config.command)
    status = INTERRUPTED
    conductor = None
    try:
        with outside_errors_explained(resume_command(config.command, config.study or study.name)):
            scheduler = build_scheduler(config, task)
            predictor = Predictor(base, task, data_folder(config.data_dir))
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
                notes_seconds=TRAINING_SECONDS in config.search.objectives,
            )
            obey(Orders(folder), study, conductor)
            if not conductor.is_done:
                with running_ray() as machine:
                    run(config, conductor, study, workplace, concurrent(config, machine))
            spent = conductor.out_of_budget if conductor.num_open else None
            status = INTERRUPTED if conductor.num_open and spent is None else FINISHED
            best = conductor.best
            if best is not None and config.search.seeds == 1:
                tracker.flush()
                run_id = tracker.run_id(best.number)
                register_best(config, task, client, run_id, workplace.trial_folder(best.number))
            found = fronts(study, base, task, workplace)
            if found:
                tracker.log_text(to_json(found), "pareto.json")
                areas = {f"pareto/hypervolume_{each.cost}": each.hypervolume for each in found}
                tracker.log_summary(areas, conductor.num_ended)
    finally:
        if conductor is not None:
            conductor.interrupt()
        tracker.close(status)
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
        text = (
            f"{summary}\n\nEnded with {conductor.num_open} of {study.target} trials open: "
            f"{spent}.\nWith a larger one they go on:\n"
            f"  {resume_command(config.command, config.study or study.name)}"
        )
        return Outcome(text, is_through=False)
    if conductor.num_open:
        raise InterruptedSearchError(
            f"interrupted with {conductor.num_open} trials open\n\n{summary}"
        )
    return Outcome(summary, is_through=True)


@contextmanager
def outside_errors_explained(resume_command: str) -> Iterator[None]:
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


def register_best(
    config: SearchConfig,
    task: Task,
    client: MlflowClient,
    run_id: str,
    folder: Path,
    spread: Spread | None = None,
) -> None:
    """Registers the best checkpoint of the best trial, or says why not.

    Args:
        config: The search.
        task: The task.
        client: MLflow's.
        run_id: The trial's.
        folder: Of the trial's checkpoints.
        spread: Of its configuration under several seeds, if known.
    """
    try:
        checkpoint = CheckpointStore(folder).best()
    except CheckpointError as error:
        say(f"The best model is not registered: {error}")
        return
    if checkpoint is not None:
        registered = register(client, run_id, checkpoint, task, config.task.name, spread)
        say(f"Model {registered.message}")
