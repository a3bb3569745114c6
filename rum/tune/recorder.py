"""Recording of a single run; imports MLflow only where it is asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rum.errors import ConfigError
from rum.train import TrainConfig
from rum.training.loop import Report


@contextmanager
def epoch_recorder(config: TrainConfig) -> Iterator[Callable[[Report], None]]:
    """Gives a function that records each epoch of a run where `config.tracking` says."""
    if config.tracking.name == "none":
        yield lambda report: None
        return
    try:
        from rum.tune.single import record_run
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tracking=mlflow needs the package {error.name!r}: install rum-torch[tune]"
        ) from error

    with record_run(config) as record:
        yield record
