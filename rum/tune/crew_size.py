"""How many trials train side by side in one process."""

import dataclasses

from rum.cells import RUMConfig
from rum.errors import ConfigError
from rum.lanes import check_model
from rum.tasks import Task
from rum.tune.config import AUTO, SearchConfig

AUTO_REPLICAS = 16
AUTO_NUMBERS = 40_000
"""The largest output of a layer, units x batch x steps, up to which `benchmarks/replicas.py` shows
a gain on the CPU: of larger ones too few fit the cache together."""


def replicas(config: SearchConfig) -> int:
    """The most lanes of a crew; `with_replicas` has made it a number."""
    return int(config.search.replicas)


def with_replicas(config: SearchConfig, task: Task) -> SearchConfig:
    """The search with a number for `search.replicas=auto`.

    On a CPU a crew has one thread: then each trial is bit for bit what it is alone, and a recorded
    run can be repeated; threads would deal the rows of all trials among them.

    Raises:
        ConfigError: If trials are to run side by side and cannot.
    """
    options = config.search
    if options.replicas == AUTO:
        number = AUTO_REPLICAS if _pays(config, task) else 1
        search = dataclasses.replace(options, replicas=number)
        return dataclasses.replace(config, search=search)
    if options.replicas == 1:
        return config
    try:
        check_model(config.model)
    except ConfigError as error:
        raise ConfigError(f"search.replicas is {options.replicas}, but {error}") from error
    if config.training.device == "cpu" and options.cpus_per_trial != 1:
        raise ConfigError(
            f"search.replicas is {options.replicas}: search.cpus_per_trial must be 1 then, got "
            f"{options.cpus_per_trial}; more processes take the other cores"
        )
    return config


def _pays(config: SearchConfig, task: Task) -> bool:
    options = config.search
    can = config.training.device == "cpu" and options.cpus_per_trial == 1
    if not can or options.deterministic or not isinstance(config.model, RUMConfig):
        return False
    domain = config.space.get("model.hidden_size")
    size: float = config.model.hidden_size
    if domain is not None:
        size = max(domain.choices) if domain.choices else domain.high or size
    return size * task.training_batch(0).input.numel() <= AUTO_NUMBERS
