"""Asynchronous successive halving, stopping type (Li et al. 2020): which trials go on at a rung.

The rungs are a function of the values that Optuna's study holds, so that they need no state of
their own and survive a restart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Rungs:
    """The values that trials had at each rung, and the rule.

    At a rung the best 1 / `reduction_factor` of the trials that have reached it go on, at least
    one; ties go on. A trial is judged when it arrives, against those that came before it.
    """

    milestones: list[int]
    """Epochs of the rungs, ascending."""
    reduction_factor: int
    mode: str
    _values: dict[int, dict[int, float]] = field(default_factory=dict)

    def file(self, number: int, curve: Mapping[int, float]) -> None:
        """Files what a trial of an earlier run had at each rung, without judging it."""
        for milestone in self.milestones:
            if milestone in curve:
                self._values.setdefault(milestone, {})[number] = curve[milestone]

    def judge(self, number: int, epoch: int, value: float) -> bool:
        """Files a trial's value and says whether it stops here; False between rungs."""
        if epoch not in self.milestones:
            return False
        rung = self._values.setdefault(epoch, {})
        if number in rung:
            return False
        rung[number] = value
        ranked = sorted(rung.values(), reverse=self.mode == "max")
        last_to_go_on = ranked[max(1, len(ranked) // self.reduction_factor) - 1]
        return value > last_to_go_on if self.mode == "min" else value < last_to_go_on

    def size(self, epoch: int) -> int:
        """How many trials have reached the rung at `epoch`."""
        return len(self._values.get(epoch, {}))


def milestones(grace_epochs: int, reduction_factor: int, max_epochs: int) -> list[int]:
    """Epochs of the rungs: grace_epochs x reduction_factor^k, below `max_epochs`."""
    rungs = []
    epoch = grace_epochs
    while epoch < max_epochs:
        rungs.append(epoch)
        epoch *= reduction_factor
    return rungs


def expected_epochs(rungs: list[int], reduction_factor: int, max_epochs: int) -> float:
    """Mean epochs of a trial if 1 / `reduction_factor` of those at each rung go on."""
    total, share, before = 0.0, 1.0, 0
    for rung in [*rungs, max_epochs]:
        total += share * (rung - before)
        share /= reduction_factor
        before = rung
    return total
