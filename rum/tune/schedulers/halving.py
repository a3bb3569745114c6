"""Successive halving: at each rung the best share of the trials goes on.

Asynchronous (ASHA, Li et al. 2020), in both of its forms: the others stop, or they are paused and
may be promoted later, when the rung has filled. HyperBand (Li et al. 2018) is several of them with
different first rungs. On tasks with a plateau, rungs below the break-through would rank noise:
`Plateau` keeps them from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rum.tune.schedulers.base import Verdict


@dataclass(frozen=True)
class Plateau:
    """Where the curves of a task lie before they break through, whatever the configuration.

    A trial has escaped when its best value has closed more than `band` of the gap between the
    baseline and a perfect value.
    """

    baseline: float
    """Value of the task's metric without the memory that it asks for."""
    perfect: float
    band: float

    def standing(self, value: float) -> int:
        """0 escaped, 1 within the band, 2 not there yet."""
        closed = (value - self.baseline) / (self.perfect - self.baseline)
        return 0 if closed > self.band else 1 if closed >= -self.band else 2


@dataclass
class Halving:
    """The values that trials had at each rung, and the rule.

    Of the n trials that have reached a rung, the best n // `reduction_factor` go on. A trial is
    judged when it arrives, against those that came before it.

    - Stopping: at least one goes on, ties too; the others end.
    - Promotion (`pauses`): the others wait, and go on as soon as they are among the best of those
      that came later, too. Higher rungs first.

    With a plateau, trials that have escaped are ranked before all others, then those within its
    band, in the order in which they came, then those that have not come to it. Whoever has not
    escaped is not lost at a rung whose places are not all taken by escaped trials: it is not
    stopped there, and if paused it goes on when nothing else is left to do, by turns the one that
    is furthest behind and the one that is furthest ahead: whether escapes come early or late, half
    of the epochs go where they are.
    """

    milestones: list[int]
    """Epochs of the rungs, ascending."""
    reduction_factor: int
    mode: str
    pauses: bool = False
    plateau: Plateau | None = None
    _rungs: dict[int, dict[int, float]] = field(default_factory=dict)

    def file(self, number: int, curve: Mapping[int, float]) -> None:
        """Files what a trial of an earlier driver had at each rung."""
        for milestone in self.milestones:
            if milestone in curve:
                self._rungs.setdefault(milestone, {})[number] = curve[milestone]

    def forget(self, number: int) -> None:
        """Takes a trial out of all rungs."""
        for rung in self._rungs.values():
            rung.pop(number, None)

    def judge(self, number: int, epoch: int, value: float) -> Verdict:
        """Files a trial's value; between rungs every trial goes on."""
        if epoch not in self.milestones:
            return Verdict.GO_ON
        rung = self._rungs.setdefault(epoch, {})
        if number in rung:
            return Verdict.GO_ON
        rung[number] = value
        if self.pauses:
            goes_on = number in self._ranked(epoch)[: self._places(rung)]
            return Verdict.GO_ON if goes_on else Verdict.PAUSE
        if self._is_undecided(rung) and self._standing(value) > 0:
            return Verdict.GO_ON
        last = self._ranked(epoch)[self._places(rung) - 1]
        goes_on = self._rank(number, value)[:2] <= self._rank(last, rung[last])[:2]  # ties too
        return Verdict.GO_ON if goes_on else Verdict.STOP

    def promoted(self, paused: Mapping[int, int], *, is_idle: bool) -> int | None:
        """The best paused trial of the highest rung that has a free place."""
        for epoch in reversed(self.milestones):
            for number in self._ranked(epoch)[: self._places(self._rungs.get(epoch, {}))]:
                if paused.get(number) == epoch:
                    return number
        if is_idle:
            waiting = [
                (epoch, number)
                for epoch in self.milestones
                for number in self._ranked(epoch)
                if paused.get(number) == epoch and self._is_undecided(self._rungs[epoch])
            ]
            if waiting:
                turn = sum(len(rung) for rung in self._rungs.values()) % 2
                ahead = max(epoch for epoch, _ in waiting)
                return waiting[0][1] if turn else dict(reversed(waiting))[ahead]
        return None

    def mean_epochs(self, max_epochs: int) -> float:
        """If 1 / `reduction_factor` of those at each rung go on."""
        total, share, before = 0.0, 1.0, 0
        for rung in [*self.milestones, max_epochs]:
            total += share * (rung - before)
            share /= self.reduction_factor
            before = rung
        return total

    def _places(self, rung: Mapping[int, float]) -> int:
        """How many of a rung go on."""
        return max(0 if self.pauses else 1, len(rung) // self.reduction_factor)

    def _ranked(self, epoch: int) -> list[int]:
        """The trials of a rung, best first."""
        rung = self._rungs.get(epoch, {})
        return sorted(rung, key=lambda n: self._rank(n, rung[n]))

    def _rank(self, number: int, value: float) -> tuple[int, float, int]:
        standing = self._standing(value)
        signed = value if self.mode == "min" else -value
        return standing, 0.0 if standing == 1 else signed, number

    def _standing(self, value: float) -> int:
        return 0 if self.plateau is None else self.plateau.standing(value)

    def _is_undecided(self, rung: Mapping[int, float]) -> bool:
        """Whether trials on the plateau may still be among the best of a rung."""
        escaped = sum(self._standing(value) == 0 for value in rung.values())
        return self.plateau is not None and escaped < max(1, self._places(rung))


def milestones(grace_epochs: int, reduction_factor: int, max_epochs: int) -> list[int]:
    """Epochs of the rungs: grace_epochs x reduction_factor^k, below `max_epochs`."""
    rungs = []
    epoch = grace_epochs
    while epoch < max_epochs:
        rungs.append(epoch)
        epoch *= reduction_factor
    return rungs


class HyperBand:
    """Brackets of `Halving`, each with a later first rung than the one before.

    The trials are dealt to them by number, so that each bracket gets about the same epochs.
    """

    def __init__(self, brackets: list[Halving], max_epochs: int) -> None:
        self._brackets = brackets
        self._costs = [bracket.mean_epochs(max_epochs) for bracket in brackets]
        self._dealt: list[int] = []

    def file(self, number: int, curve: Mapping[int, float]) -> None:
        """Files the curve in its bracket."""
        self._bracket(number).file(number, curve)

    def forget(self, number: int) -> None:
        """As its bracket does."""
        self._bracket(number).forget(number)

    def judge(self, number: int, epoch: int, value: float) -> Verdict:
        """As its bracket says."""
        return self._bracket(number).judge(number, epoch, value)

    def promoted(self, paused: Mapping[int, int], *, is_idle: bool) -> int | None:
        """The first that a bracket promotes."""
        for bracket in self._brackets:
            number = bracket.promoted(paused, is_idle=is_idle)
            if number is not None:
                return number
        return None

    def mean_epochs(self, max_epochs: int) -> float:
        """Of a bracket that has as many epochs as each other."""
        return len(self._costs) / sum(1 / cost for cost in self._costs)

    def _bracket(self, number: int) -> Halving:
        while len(self._dealt) <= number:  # to the bracket that has had the fewest epochs
            spent = [
                cost * (self._dealt.count(index) + 1) for index, cost in enumerate(self._costs)
            ]
            self._dealt.append(spent.index(min(spent)))
        return self._brackets[self._dealt[number]]
