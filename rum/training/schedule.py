"""Learning-rate schedules: factors that depend on where a run stands and need no state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rum.checks import check_at_least, check_choice, check_positive
from rum.errors import ConfigError

SCHEDULES = ("constant", "table6", "drop", "step", "cosine", "plateau")


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate as a factor.

    It is a function of the update, of `max_epochs` in force and (for "plateau") of the validation
    values so far, so a resumed run goes on with the same rate.
    """

    name: str = "constant"
    """"constant"; "table6": the paper's Table 6 (x 1, 1/20, 1/200 for one half, one sixth and one
    third of the epochs: 180, 60 and 120 of 360); "drop": x `drop_factor` once, after the share
    `drop_at` of the epochs (as released: 0.1 after 181 of 200); "step": x `drop_factor` every
    `step_epochs`; "cosine": from 1 to `final_factor` along half a cosine over all updates
    (Loshchilov and Hutter 2017, no restarts); "plateau": x `drop_factor` after `patience` epochs
    without a better validation value."""
    drop_at: float = 0.905
    """Of "drop": share of `max_epochs` at the full rate, in (0, 1)."""
    drop_factor: float = 0.1
    """Of "drop", "step" and "plateau", > 0."""
    step_epochs: int = 25
    """Of "step": epochs between two changes, >= 1."""
    final_factor: float = 0.0
    """Of "cosine": factor at the end, in [0, 1)."""
    patience: int = 5
    """Of "plateau": epochs without a better validation value before a change, >= 1."""
    warmup_steps: int = 0
    """Of every schedule: updates over which the rate grows in equal steps to its full value."""

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        check_choice("name", self.name, SCHEDULES)
        if not 0.0 < self.drop_at < 1.0:
            raise ConfigError(f"drop_at must be in (0, 1), got {self.drop_at}")
        check_positive("drop_factor", self.drop_factor)
        check_at_least("step_epochs", self.step_epochs, 1)
        if not 0.0 <= self.final_factor < 1.0:
            raise ConfigError(f"final_factor must be in [0, 1), got {self.final_factor}")
        check_at_least("patience", self.patience, 1)
        check_at_least("warmup_steps", self.warmup_steps, 0)

    def factor(
        self, step: int, steps_per_epoch: int, max_epochs: int, losses: Sequence[float] = ()
    ) -> float:
        """Computes the factor of an update.

        Args:
            step: Its number, the first is 0.
            steps_per_epoch: Updates in an epoch.
            max_epochs: Epochs in all.
            losses: The selection metric after each epoch so far, negated where higher is better.
        """
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warmup * self._factor(step, steps_per_epoch, max_epochs, losses)

    def _factor(
        self, step: int, steps_per_epoch: int, max_epochs: int, losses: Sequence[float]
    ) -> float:
        epoch = step // steps_per_epoch + 1
        if self.name == "table6":
            if 2 * epoch <= max_epochs:
                return 1.0
            return 0.05 if 3 * epoch <= 2 * max_epochs else 0.005
        if self.name == "drop":
            # A little more than the product, which may be a little less than the whole number.
            return 1.0 if epoch <= self.drop_at * max_epochs + 1e-9 else self.drop_factor
        if self.name == "step":
            return float(self.drop_factor ** ((epoch - 1) // self.step_epochs))
        if self.name == "cosine":
            done = step / (steps_per_epoch * max_epochs)
            return self.final_factor + (1 - self.final_factor) * (1 + math.cos(math.pi * done)) / 2
        if self.name == "plateau":
            return float(self.drop_factor ** _num_plateaus(losses, self.patience))
        return 1.0


def _num_plateaus(losses: Sequence[float], patience: int) -> int:
    """How many times `patience` values in a row brought nothing better."""
    best = math.inf
    waited = plateaus = 0
    for loss in losses:
        waited += 1
        if loss < best:
            best, waited = loss, 0
        elif waited == patience:
            plateaus, waited = plateaus + 1, 0
    return plateaus
