"""The median rule (Golovin et al. 2017): a trial worse than half of the others stops."""

from collections.abc import Mapping
from statistics import median

from rum.tune.schedulers.base import Verdict


class MedianRule:
    """Stops a trial whose best value is worse than the median of the others' at the same epoch."""

    def __init__(self, mode: str, grace_epochs: int, startup_trials: int) -> None:
        """Makes the rule.

        Args:
            mode: "min" or "max".
            grace_epochs: No trial stops before this epoch has ended.
            startup_trials: Nor while fewer others have a value at the epoch.
        """
        self._mode = mode
        self._grace_epochs = grace_epochs
        self._startup_trials = startup_trials
        self._curves: dict[int, dict[int, float]] = {}

    def file(self, number: int, curve: Mapping[int, float]) -> None:
        """Keeps the curve."""
        self._curves[number] = dict(curve)

    def forget(self, number: int) -> None:
        """Drops the curve."""
        self._curves.pop(number, None)

    def judge(self, number: int, epoch: int, value: float) -> Verdict:
        """Keeps the value and compares it."""
        others = [
            curve[epoch]
            for other, curve in self._curves.items()
            if other != number and epoch in curve
        ]
        self._curves.setdefault(number, {})[epoch] = value
        if epoch < self._grace_epochs or len(others) < self._startup_trials:
            return Verdict.GO_ON
        middle = median(others)
        is_worse = value > middle if self._mode == "min" else value < middle
        return Verdict.STOP if is_worse else Verdict.GO_ON

    def promoted(self, paused: Mapping[int, int], *, is_idle: bool) -> int | None:
        """Nothing was paused."""
        return None

    def mean_epochs(self, max_epochs: int) -> float:
        """If half of the trials stop at once, and the rest not."""
        return (self._grace_epochs + max_epochs) / 2
