"""What a study may use in all, and what it has used: epochs of trials, hours, GPU hours.

What was used is kept in the study, so that it adds up over drivers, whether they end or are
killed. Epochs are those whose values the study holds; one that a trial repeats because its process
died counts once. Hours pass while a driver runs. A trial uses its share of a GPU from when it is
handed out until it ends, is paused or its driver dies, epochs that it repeats included.
"""

import time
from collections.abc import Callable, Collection

from rum.errors import ConfigError
from rum.tune.config import SearchConfig, SearchOptions
from rum.tune.study import Study

SPENT = "rum.spent"
"""Attribute of the study: seconds of drivers, of trials and of GPUs, and the epochs in them."""
BUDGET = "rum.budget"
"""Attribute of the study: the budgets of its last driver, by option."""
KEPT_SECONDS = 1.0  # a driver that is killed loses less than this
OPTIONS = ("max_trial_epochs", "max_hours", "max_gpu_hours")


class Budget:
    """The books of what a study uses; the conductor tells it what happens."""

    def __init__(
        self,
        study: Study,
        options: SearchOptions,
        *,
        gpus_per_trial: float,
        first_epochs: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes over the books where the last driver left them.

        Args:
            study: Has the books.
            options: The budgets; None is none.
            gpus_per_trial: Share of a GPU.
            first_epochs: Epochs without which a trial is not worth starting.
            clock: In seconds.
        """
        self._study = study
        self._options = options
        self._share = gpus_per_trial
        self._first_epochs = first_epochs
        self._clock = clock
        self._spent = {"driver": 0.0, "trials": 0.0, "gpus": 0.0, "epochs": 0.0}
        self._spent |= study.attribute(SPENT, {})
        self._epochs = trained_epochs(study)
        self._at = self._kept_at = clock()
        study.set_attribute(BUDGET, {name: getattr(options, name) for name in OPTIONS})

    def advance(self, running: Collection[float | None]) -> None:
        """Takes that time has passed since the last call, all of it with the same trials.

        Args:
            running: Of each trial its share of a GPU, None for the usual one.
        """
        now = self._clock()
        passed, self._at = now - self._at, now
        self._spent["driver"] += passed
        self._spent["trials"] += passed * len(running)
        self._spent["gpus"] += passed * sum(share or self._share for share in running)
        if now - self._kept_at >= KEPT_SECONDS:
            self.keep()

    def add_epoch(self) -> None:
        """Takes that a trial has had an epoch."""
        self._epochs += 1
        self._spent["epochs"] += 1

    def keep(self) -> None:
        """Writes what was used into the study."""
        self._kept_at = self._at
        self._study.set_attribute(SPENT, self._spent)

    def refusal(self, done: int, others: Collection[int] = ()) -> str | None:
        """Why a trial may not start or go on; None if it may.

        What the other trials need for their first epochs, at least one each, is theirs: so the
        epochs of a study never exceed their budget, and no trial is started in vain. Until an
        epoch was timed, hours refuse nothing but what is used up.

        Args:
            done: Epochs that the trial has had.
            others: Epochs of each other trial that runs.

        Returns:
            The reason, as the trial's record is to have it.
        """
        need = self._needed(done)
        taken = sum(map(self._needed, others))
        most = self._options.max_trial_epochs
        if most is not None and self._epochs + taken + need > most:
            left = most - self._epochs
            used_up = "is used up" if left <= 0 else f"has {left} left, of which {taken} are taken"
            return f"budget: search.max_trial_epochs = {most} {used_up}"
        timed = self._spent["epochs"]
        hours_per_epoch = self._spent["trials"] / timed / 3600 if timed and not done else 0.0
        for name, used, needed in (
            ("max_hours", self._spent["driver"] / 3600, need * hours_per_epoch),
            (
                "max_gpu_hours",
                self._spent["gpus"] / 3600,
                (need + taken) * hours_per_epoch * self._share,
            ),
        ):
            limit = getattr(self._options, name)
            if limit is not None and used >= limit:
                return f"budget: search.{name} = {limit:g} is used up"
            if limit is not None and used + needed > limit:
                return (
                    f"budget: search.{name} = {limit:g} has {limit - used:.3g} left, and "
                    f"{needed:.3g} are needed to start another trial"
                )
        return None

    def _needed(self, done: int) -> int:
        return max(1, self._first_epochs - done)


def trained_epochs(study: Study) -> int:
    """Epochs that the trials of a study have had, in all."""
    return sum(len(trial.intermediate_values) for trial in study.trials())


def usage(study: Study) -> dict[str, tuple[float, float | None]]:
    """What a study has used, and may use by the options of its last driver, by option."""
    spent, budget = study.attribute(SPENT, {}), study.attribute(BUDGET, {})
    used = {
        "max_trial_epochs": float(trained_epochs(study)),
        "max_hours": spent.get("driver", 0.0) / 3600,
        "max_gpu_hours": spent.get("gpus", 0.0) / 3600,
    }
    return {name: (used[name], budget.get(name)) for name in OPTIONS}


def first_epochs(config: SearchConfig) -> int:
    """Epochs of a trial up to the first rung; one without a scheduler."""
    if config.scheduler.name == "none":
        return 1
    return min(config.scheduler.grace_epochs, config.training.max_epochs)


def check_budget(config: SearchConfig, gpus_per_trial: float) -> None:
    """Raises ConfigError if no trial could be started, or no budget used up."""
    options, first = config.search, first_epochs(config)
    if options.max_trial_epochs is not None and options.max_trial_epochs < first:
        raise ConfigError(
            f"search.max_trial_epochs must be at least {first}, the first rung of a trial "
            f"(scheduler.grace_epochs), got {options.max_trial_epochs}"
        )
    if options.max_gpu_hours is not None and not gpus_per_trial:
        raise ConfigError(
            f"search.max_gpu_hours is {options.max_gpu_hours}, but trials use no GPU: give "
            "training.device=cuda, or search.max_hours instead"
        )


def describe(options: SearchOptions) -> str | None:
    """The budgets of a search, for people; None where it has none."""
    words = {
        "max_trial_epochs": "{:,} epochs of all trials together",
        "max_hours": "{:g} hours",
        "max_gpu_hours": "{:g} GPU hours",
    }
    given = {name: getattr(options, name) for name in OPTIONS}
    parts = [words[name].format(value) for name, value in given.items() if value is not None]
    return f"Budget: ends at {', or '.join(parts)}, if not before" if parts else None
