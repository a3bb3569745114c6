"""Typed options of a training run."""

import re
from dataclasses import dataclass, field

from rum.checks import check_at_least, check_choice, check_positive
from rum.errors import ConfigError
from rum.training.schedule import ScheduleConfig

OPTIMIZERS = ("adam", "rmsprop", "rmsprop_tensorflow", "sgd")


@dataclass(kw_only=True)
class TrainingConfig:
    """How a model is trained; the defaults are the released Penn Treebank code's."""

    seed: int = 0
    """Of initial weights, masks and generated data."""
    device: str = "cpu"
    """"cpu" or "cuda"."""
    threads: int | None = None
    """CPU threads of torch; null leaves torch's choice. A run repeats bit by bit on the CPU only
    with the same number."""
    max_epochs: int = 100
    """Epochs in all, also when resumed; an epoch ends with a validation."""
    optimizer: str = "adam"
    """"adam"; "rmsprop" (torch's, decay 0.9); "rmsprop_tensorflow" (TensorFlow 1's: mean square
    starts at one, epsilon 1e-10 inside the root), which copying was released with; "sgd"."""
    learning_rate: float = 0.002
    """Of the optimiser, before the schedule's factor."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    max_grad_norm: float | None = 1.0
    """Clip the gradient's global norm to this; null does not clip (synthetic tasks, bAbI)."""
    diagnostics: bool = True
    """Report angles, gates and norms of RUM cells on a validation batch after each epoch."""
    checkpoint_seconds: float = 300.0
    """Within an epoch, also write a checkpoint when this many seconds have passed."""

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        check_at_least("seed", self.seed, 0)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device must be cpu, cuda or cuda:<number>, got {self.device!r}")
        if self.threads is not None:
            check_at_least("threads", self.threads, 1)
        check_at_least("max_epochs", self.max_epochs, 1)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_positive("learning_rate", self.learning_rate)
        if self.max_grad_norm is not None:
            check_positive("max_grad_norm", self.max_grad_norm)
        check_positive("checkpoint_seconds", self.checkpoint_seconds)
