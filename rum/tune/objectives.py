"""What a search minimises beside its metric: the size of the model, or the time to train it."""

from optuna.trial import FrozenTrial

from rum.errors import ConfigError
from rum.experiment import parameter_count
from rum.tasks import Task
from rum.tune.config import METRIC, PARAMETERS, TRAINING_SECONDS, SearchConfig
from rum.tune.sampler_view import Cost
from rum.tune.space import apply
from rum.tune.study import SECONDS


def cost_of(config: SearchConfig, task: Task) -> Cost | None:
    """The second objective of a search as a function of a trial; None if it has one objective."""
    if config.search.objectives == [METRIC]:
        return None
    if config.search.objectives == [METRIC, TRAINING_SECONDS]:
        return lambda trial: trial.user_attrs.get(SECONDS)
    counts: dict[int, int] = {}

    def parameters(trial: FrozenTrial) -> float | None:
        if trial.number not in counts:
            try:
                model = apply(config, trial.params).model
            except ConfigError:  # it was refused
                return None
            counts[trial.number] = parameter_count(model, task)
        return counts[trial.number]

    assert config.search.objectives == [METRIC, PARAMETERS]
    return parameters
