"""Ray Tune as the engine of a search: runs the conductor's trials until it is through."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import PlacementGroupFactory
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from rum.experiment import ExperimentConfig
from rum.tune.cluster import resources
from rum.tune.conductor import Conductor
from rum.tune.config import SearchConfig
from rum.tune.crew_size import replicas
from rum.tune.crew_trial import run_crew
from rum.tune.crews import Crews
from rum.tune.logical_order import LogicalOrder
from rum.tune.messages import Workplace
from rum.tune.orders import Orders, obey
from rum.tune.ray_adapters import (
    ConductedScheduler,
    ConductedSearcher,
    ConductedStopper,
    CrewScheduler,
    CrewSearcher,
    ProgressCallback,
    TurnCallback,
)
from rum.tune.study import Study
from rum.tune.trial import run_trial


def _trial_name(trial: Any) -> str:
    """Ray's own part tells apart the times that a trial was taken up."""
    if "crew" in trial.config:
        return f"crew_{trial.config['crew']}"
    return f"trial_{trial.config['number']:04d}_{trial.trial_id}"


def _order(config: SearchConfig, conductor: Conductor, study: Study) -> Conductor | LogicalOrder:
    """Who hands messages to the conductor: itself, as they come, or in logical order."""
    workers = config.search.max_concurrent
    if not config.search.deterministic or workers is None:
        return conductor
    return LogicalOrder(conductor, study, workers)


def _crews(
    config: SearchConfig, conductor: Conductor, workplace: Workplace, concurrent: int
) -> Crews:
    base = ExperimentConfig(model=config.model, task=config.task, training=config.training)
    lanes = replicas(config)
    if config.search.max_concurrent is not None:  # of trials, in all crews
        lanes = min(lanes, config.search.max_concurrent // concurrent)
    return Crews(conductor, base, workplace, lanes=lanes, crews=concurrent)


def run(
    config: SearchConfig, conductor: Conductor, study: Study, workplace: Workplace, concurrent: int
) -> None:
    """Lets Ray run the trials, again while orders leave more to do when it has ended.

    Args:
        config: The search; its `search.gpus_per_trial` is a number.
        conductor: Decides.
        study: The conductor's.
        workplace: Where the trials work.
        concurrent: Processes at a time.
    """
    orders = Orders(Path(workplace.folder))

    def turn() -> None:
        conductor.advance()
        obey(orders, study, conductor)

    while not conductor.is_done:
        searcher: Searcher
        scheduler: TrialScheduler
        if replicas(config) == 1:
            order = _order(config, conductor, study)
            searcher, scheduler = ConductedSearcher(order), ConductedScheduler(order)
        else:
            crews = _crews(config, conductor, workplace, concurrent)
            searcher, scheduler = CrewSearcher(crews), CrewScheduler(crews)
        _fit(config, conductor, searcher, scheduler, workplace, concurrent, turn)
        if not conductor.is_done:
            return  # Ctrl-C
        turn()


def resources_of(config: SearchConfig) -> Callable[[dict[str, Any]], PlacementGroupFactory]:
    """What a trial or crew takes, from what the searcher handed out."""
    shared = resources(config)

    def of_trial(handed: dict[str, Any]) -> PlacementGroupFactory:
        return PlacementGroupFactory([{**shared, "GPU": handed.get("gpus") or shared["GPU"]}])

    return of_trial


def _fit(
    config: SearchConfig,
    conductor: Conductor,
    searcher: Searcher,
    scheduler: TrialScheduler,
    workplace: Workplace,
    concurrent: int,
    turn: Callable[[], None],
) -> None:
    run = run_trial if replicas(config) == 1 else run_crew
    trainable = tune.with_resources(
        tune.with_parameters(run, workplace=workplace), resources_of(config)
    )
    scratch = Path(workplace.folder) / "ray"  # nothing in it is read again
    shutil.rmtree(scratch, ignore_errors=True)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,  # until the searcher says that it has finished
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            # Ray would put the parameters into these names.
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="run",
            storage_path=str(scratch),
            failure_config=tune.FailureConfig(max_failures=config.search.max_failures),
            stop=ConductedStopper(conductor),
            callbacks=[TurnCallback(turn), ProgressCallback(conductor)],
            verbose=0,
        ),
    )
    tuner.fit()
    shutil.rmtree(scratch, ignore_errors=True)
