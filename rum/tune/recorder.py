"""A single run with or without MLflow, which is imported only where it is asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rum.errors import ConfigError
from rum.train import TrainConfig, train
from rum.training.loop import Report


def train_or_repeat(config: TrainConfig, write: Callable[[str], None]) -> None:
    """Trains what the options say, or with `from_run` what a recorded run's capsule says.

    Args:
        config: The run.
        write: Takes lines for the user.

    Raises:
        RumError: What `rum.train.train` or `rum.tune.repeat.repeat` raises.
    """
    if config.from_run is None:
        train(config, write, epoch_recorder)
        return
    with _platform_needed("from_run"):
        from rum.tune.repeat import repeat
    repeat(config, config.from_run, write)


@contextmanager
def epoch_recorder(
    config: TrainConfig, origin: dict[str, Any] | None = None
) -> Iterator[Callable[[Report], None]]:
    """Gives a function that records each epoch of a run where `config.tracking` says.

    Args:
        config: The run.
        origin: Where its first checkpoint comes from, if it continues another's.
    """
    if config.tracking.name == "none":
        yield lambda report: None
        return
    with _platform_needed("tracking=mlflow"):
        from rum.tune.single import record_run
    with record_run(config, origin) as record:
        yield record


@contextmanager
def _platform_needed(option: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{option} needs the package {error.name!r}: install rum-torch[tune]"
        ) from error
