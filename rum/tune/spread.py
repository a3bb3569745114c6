"""How far a result is from luck: the mean of runs under several seeds, and its interval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95
"""Of the intervals; a difference is beyond noise if its own interval leaves out zero."""


@dataclass(frozen=True)
class Spread:
    """What several runs of one configuration measured."""

    mean: float
    std: float
    """Of the runs (with n - 1); 0 for a single one."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), std, len(values))

    @property
    def half_width(self) -> float:
        """Of the t-interval of the mean; infinite for a single run."""
        if self.count == 1:
            return math.inf
        return _quantile(self.count - 1) * self.std / math.sqrt(self.count)

    @property
    def interval(self) -> tuple[float, float]:
        """The t-interval of the mean, its two ends."""
        return self.mean - self.half_width, self.mean + self.half_width

    def __str__(self) -> str:
        """For people."""
        if self.count == 1:
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} ± {self.half_width:.4f} ({self.count} seeds)"


def is_beyond_noise(one: Spread, other: Spread) -> bool:
    """Whether two means differ by more than luck would have it.

    Two-sided at `LEVEL`: Welch's t-test where both have several runs; where one is a single run,
    whether it lies outside of the other's prediction interval; of two single runs nothing is
    known of their noise, so that any difference counts.
    """
    difference = abs(one.mean - other.mean)
    errors = [each.std**2 / each.count for each in (one, other)]
    if one.count > 1 and other.count > 1:
        if sum(errors) == 0:
            return not math.isclose(one.mean, other.mean, rel_tol=1e-12)
        pairs = zip(errors, (one.count, other.count), strict=True)
        freedom = sum(errors) ** 2 / sum(error**2 / (count - 1) for error, count in pairs)
        return difference > _quantile(freedom) * math.sqrt(sum(errors))
    if one.count == other.count:
        return difference > 0
    several = max(one, other, key=lambda each: each.count)
    width = _quantile(several.count - 1) * several.std * math.sqrt(1 + 1 / several.count)
    return difference > width


def _quantile(freedom: float) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))
