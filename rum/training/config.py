"""Typed options of a training run."""

from dataclasses import dataclass, field

from rum.checks import check_at_least, check_choice, check_positive
from rum.errors import ConfigError

OPTIMIZERS = ("adam", "rmsprop", "rmsprop_tensorflow")
SCHEDULES = ("constant", "table6", "drop")


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate as a factor that depends on the epoch and on `max_epochs` in force."""

    name: str = "constant"
    """"constant"; "table6": the paper's Table 6 (x 1, 1/20, 1/200 for one half, one sixth and one
    third of the epochs: 180, 60 and 120 of 360); "drop": x `drop_factor` after the share
    `drop_at` of the epochs (as released: 0.1 after 181 of 200)."""
    drop_at: float = 0.905
    """Of "drop": share of `max_epochs` at the full rate, in (0, 1)."""
    drop_factor: float = 0.1
    """Of "drop": factor from then on, > 0."""

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        check_choice("name", self.name, SCHEDULES)
        if not 0.0 < self.drop_at < 1.0:
            raise ConfigError(f"drop_at must be in (0, 1), got {self.drop_at}")
        check_positive("drop_factor", self.drop_factor)

    def factor(self, epoch: int, max_epochs: int) -> float:
        """The factor in epoch number `epoch` (the first is 1) of `max_epochs`."""
        if self.name == "table6":
            if 2 * epoch <= max_epochs:
                return 1.0
            return 0.05 if 3 * epoch <= 2 * max_epochs else 0.005
        if self.name == "drop":
            # A little more than the product, which may be a little less than the whole number.
            return 1.0 if epoch <= self.drop_at * max_epochs + 1e-9 else self.drop_factor
        return 1.0


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
    starts at one, epsilon 1e-10 inside the root), which the synthetic tasks were released with."""
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
        check_choice("device", self.device.split(":")[0], ("cpu", "cuda"))
        if self.threads is not None:
            check_at_least("threads", self.threads, 1)
        check_at_least("max_epochs", self.max_epochs, 1)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_positive("learning_rate", self.learning_rate)
        if self.max_grad_norm is not None:
            check_positive("max_grad_norm", self.max_grad_norm)
        check_positive("checkpoint_seconds", self.checkpoint_seconds)
