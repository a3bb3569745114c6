"""What a scheduler is asked, and what it may answer."""

from collections.abc import Mapping
from enum import Enum
from typing import Protocol


class Verdict(Enum):
    """What becomes of a trial after an epoch."""

    GO_ON = "go on"
    STOP = "stop"
    PAUSE = "pause"
    """Its worker is free for others; from its checkpoint it can go on later."""


class Scheduler(Protocol):
    """Which trials go on.

    Values are the best so far of the task's metric, by epoch. What a scheduler knows is a function
    of the curves in Optuna's study, so that it survives a restart without a state of its own.
    """

    def file(self, number: int, curve: Mapping[int, float]) -> None:
        """Takes the curve of a trial that an earlier driver judged."""

    def forget(self, number: int) -> None:
        """Takes that a trial diverged: it is no rival to others any more."""

    def judge(self, number: int, epoch: int, value: float) -> Verdict:
        """Takes the value of a running trial after an epoch and says what becomes of it."""

    def promoted(self, paused: Mapping[int, int], *, is_idle: bool) -> int | None:
        """The paused trial to go on with now, None if there is none.

        Args:
            paused: The epochs at which trials were paused, by number.
            is_idle: Whether no new trial is left to start.
        """

    def mean_epochs(self, max_epochs: int) -> float:
        """Epochs that a trial is expected to get, on average."""


class NoScheduler:
    """Every trial gets all of its epochs."""

    def file(self, number: int, curve: Mapping[int, float]) -> None:
        """Nothing to remember."""

    def forget(self, number: int) -> None:
        """Nothing to forget."""

    def judge(self, number: int, epoch: int, value: float) -> Verdict:
        """Always goes on."""
        return Verdict.GO_ON

    def promoted(self, paused: Mapping[int, int], *, is_idle: bool) -> int | None:
        """Nothing was paused."""
        return None

    def mean_epochs(self, max_epochs: int) -> float:
        """All."""
        return max_epochs
