"""Ray Tune as the engine of a search: runs the conductor's trials until it is through."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import PlacementGroupFactory
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from rum.errors import ConfigError
from rum.experiment import ExperimentConfig
from rum.tune.cluster import concurrent, resources
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

LOOK_SECONDS = 5.0
"""Between two looks at what the cluster has."""


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


def _crews(config: SearchConfig, conductor: Conductor, workplace: Workplace, room: int) -> Crews:
    base = ExperimentConfig(model=config.model, task=config.task, training=config.training)
    lanes = replicas(config)
    if config.search.max_concurrent is not None:  # of trials, in all crews
        lanes = min(lanes, config.search.max_concurrent // room)
    return Crews(conductor, base, workplace, lanes=lanes, crews=room)


def run(
    config: SearchConfig, conductor: Conductor, study: Study, workplace: Workplace, room: int
) -> None:
    """Lets Ray run the trials, again while orders leave more to do when it has ended.

    Args:
        config: The search; its `search.gpus_per_trial` is a number.
        conductor: Decides.
        study: The conductor's.
        workplace: Where the trials work.
        room: Processes at a time, to begin with.
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
            crews = _crews(config, conductor, workplace, room)
            searcher, scheduler = CrewSearcher(crews), CrewScheduler(crews)
        limited = ConcurrencyLimiter(searcher, max_concurrent=room)
        follow = _Room(config, limited).follow
        _fit(config, conductor, limited, scheduler, workplace, [turn, follow])
        if not conductor.is_done:
            return  # Ctrl-C
        turn()


class _Room:
    """Keeps as many processes at work as the cluster has room for, while nodes come and go."""

    def __init__(self, config: SearchConfig, limited: ConcurrencyLimiter) -> None:
        self._config = config
        self._limited = limited
        self._looked = time.monotonic()

    def follow(self) -> None:
        """Looks now and then; to be called often."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            self._limited.max_concurrent = concurrent(self._config, ray.cluster_resources())
        except ConfigError:  # not one fits now: what is under way waits for another node
            return


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
    turns: list[Callable[[], None]],
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
            callbacks=[*map(TurnCallback, turns), ProgressCallback(conductor)],
            verbose=0,
        ),
    )
    tuner.fit()
    shutil.rmtree(scratch, ignore_errors=True)
