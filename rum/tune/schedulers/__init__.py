"""Which trials are stopped early, paused or replaced: one class a rule."""

from rum.tasks import Task
from rum.tune.config import SearchConfig
from rum.tune.schedulers.base import NoScheduler, Scheduler, Verdict
from rum.tune.schedulers.halving import Halving, HyperBand, Plateau, milestones
from rum.tune.schedulers.median import MedianRule
from rum.tune.schedulers.population import Population

__all__ = ["Population", "Scheduler", "Verdict", "build_scheduler"]


def build_scheduler(config: SearchConfig, task: Task) -> Scheduler:
    """The scheduler of a search, empty.

    Raises:
        ConfigError: If it does not fit what is searched.
    """
    options, mode = config.scheduler, task.mode
    rungs = milestones(options.grace_epochs, options.reduction_factor, config.training.max_epochs)
    plateau = None
    if options.plateau_band is not None:
        perfect = 0.0 if mode == "min" else 1.0
        plateau = Plateau(task.plateau, perfect, options.plateau_band)

    def halving(first: int, *, pauses: bool) -> Halving:
        return Halving(rungs[first:], options.reduction_factor, mode, pauses, plateau)

    match options.name:
        case "asha":
            return halving(0, pauses=False)
        case "promotion":
            return halving(0, pauses=True)
        case "hyperband":
            brackets = [halving(first, pauses=False) for first in range(len(rungs) + 1)]
            return HyperBand(brackets, config.training.max_epochs)
        case "median":
            return MedianRule(mode, options.grace_epochs, config.sampler.startup_trials)
        case "pbt":
            seed = config.sampler.seed
            return Population(mode, options.grace_epochs, seed, config.space)
        case _:
            return NoScheduler()
