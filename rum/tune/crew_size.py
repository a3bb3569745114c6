"""How many trials train side by side in one process."""

from rum.cells import RUMConfig
from rum.errors import ConfigError
from rum.lanes import check_model
from rum.tune.config import AUTO, SearchConfig

AUTO_REPLICAS = 16
AUTO_SIZE = 64
"""The largest size at which `benchmarks/replicas.py` shows a gain on the CPU."""


def replicas(config: SearchConfig) -> int:
    """The most lanes of a crew."""
    asked = config.search.replicas
    if asked != AUTO:
        return int(asked)
    is_small = (
        isinstance(config.model, RUMConfig)
        and config.training.device == "cpu"
        and _largest_size(config) <= AUTO_SIZE
        and not config.search.deterministic
    )
    return AUTO_REPLICAS if is_small else 1


def _largest_size(config: SearchConfig) -> float:
    domain = config.space.get("model.hidden_size")
    if domain is None:
        assert isinstance(config.model, RUMConfig)
        return config.model.hidden_size
    return max(domain.choices) if domain.choices else domain.high or 0.0


def check_replicas(config: SearchConfig) -> None:
    """Raises ConfigError if the model cannot run side by side, where it is to."""
    if replicas(config) == 1:
        return
    try:
        check_model(config.model)
    except ConfigError as error:
        raise ConfigError(f"search.replicas is {config.search.replicas}, but {error}") from error
