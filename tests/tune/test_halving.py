"""The rungs against naive forms of the rules."""

import random

import pytest

from rum.tune.schedulers.base import Verdict
from rum.tune.schedulers.halving import Halving, HyperBand, Plateau, milestones

GO_ON, STOP, PAUSE = Verdict.GO_ON, Verdict.STOP, Verdict.PAUSE


def test_rungs_are_powers_of_the_factor_below_the_end() -> None:
    assert milestones(1, 3, 100) == [1, 3, 9, 27, 81]
    assert milestones(2, 2, 16) == [2, 4, 8]
    assert milestones(5, 3, 5) == []


def test_expected_epochs_by_hand() -> None:
    # All train 1 epoch, half of them 1 more, a quarter 2 more.
    assert Halving([1, 2], 2, "min").mean_epochs(4) == 1 + 0.5 * 1 + 0.25 * 2
    assert Halving([], 3, "min").mean_epochs(7) == 7


def goes_on(before: list[float], value: float, factor: int, mode: str) -> bool:
    """Among all that reached the rung, this one included, is it in the best 1/factor?"""
    everyone = [*before, value]
    better = sum(x < value if mode == "min" else x > value for x in everyone)
    return better < max(1, len(everyone) // factor)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_trial_goes_on_if_it_is_among_the_best_that_came(factor: int, mode: str) -> None:
    generator = random.Random(factor)
    rungs = Halving([2], factor, mode)
    before: list[float] = []
    for number in range(60):
        value = generator.choice([generator.random(), 0.5])  # with ties
        expected = GO_ON if goes_on(before, value, factor, mode) else STOP
        assert rungs.judge(number, 2, value) is expected
        before.append(value)


def test_only_rungs_judge_and_each_trial_once() -> None:
    rungs = Halving([1, 3], 3, "min")
    assert rungs.judge(0, 1, 0.5) is GO_ON
    assert rungs.judge(0, 2, 9.0) is GO_ON
    assert rungs.judge(1, 1, 0.6) is STOP
    assert rungs.judge(1, 1, 0.6) is GO_ON
    assert rungs.judge(0, 3, 9.0) is GO_ON


@pytest.mark.parametrize("pauses", [False, True])
def test_filed_curves_decide_as_if_they_had_been_judged(pauses: bool) -> None:
    generator = random.Random(1)
    curves = [{1: generator.random(), 3: generator.random()} for _ in range(9)]
    judged, filed = (Halving([1, 3], 3, "min", pauses) for _ in range(2))
    for number, curve in enumerate(curves):
        for epoch, value in curve.items():
            judged.judge(number, epoch, value)
        filed.file(number, curve)

    for number in range(100, 140):
        value = generator.random()
        assert judged.judge(number, 1, value) is filed.judge(number, 1, value)
        assert judged.judge(number, 3, value) is filed.judge(number, 3, value)


def test_what_diverged_is_no_rival() -> None:
    rungs = Halving([1], 2, "min")
    rungs.judge(0, 1, 0.1)
    rungs.forget(0)
    assert rungs.judge(1, 1, 5.0) is GO_ON


def test_promotion_by_hand() -> None:
    rungs = Halving([1, 3], 3, "min", pauses=True)
    paused = {}
    for number, value in enumerate(
        [0.5, 0.4, 0.6]
    ):  # one of three may go on, when three are there
        assert rungs.judge(number, 1, value) is PAUSE
        paused[number] = 1
    assert rungs.promoted({0: 1}, is_idle=True) is None
    assert rungs.promoted(paused, is_idle=False) == 1
    del paused[1]
    assert rungs.promoted(paused, is_idle=False) is None
    assert rungs.judge(3, 1, 0.3) is GO_ON  # the best of four
    for number, value in ((4, 0.7), (5, 0.8)):  # six: two places, 3 and 1 have them
        assert rungs.judge(number, 1, value) is PAUSE
        paused[number] = 1
    assert rungs.promoted(paused, is_idle=False) is None
    for number in (6, 7, 8):  # nine: a third place, for trial 0 which came first
        assert rungs.judge(number, 1, 0.9) is PAUSE
        paused[number] = 1
    assert rungs.promoted(paused, is_idle=False) == 0
    # The higher rung comes first.
    for number, value in ((3, 0.3), (1, 0.2), (0, 0.1)):
        rungs.judge(number, 3, value)
    assert rungs.promoted({**paused, 1: 3, 3: 3}, is_idle=False) == 0
    assert rungs.promoted({**paused, 0: 3, 3: 3}, is_idle=False) == 0


@pytest.mark.parametrize("mode", ["min", "max"])
def test_promotion_ends_where_ranking_all_at_once_would(mode: str) -> None:
    """When all have come, exactly the best third of each rung has gone on, whatever the order."""
    generator = random.Random(3)
    for _ in range(20):
        final = {number: generator.random() for number in range(27)}
        rungs = Halving([1, 3, 9], 3, mode, pauses=True)
        paused: dict[int, int] = {}
        waiting = list(final)
        reached: dict[int, set[int]] = {1: set(), 3: set(), 9: set(), 27: set()}
        while True:
            number = rungs.promoted(paused, is_idle=not waiting)
            begin = paused.pop(number) if number is not None else 0
            if number is None:
                if not waiting:
                    break
                number = waiting.pop(generator.randrange(len(waiting)))
            for epoch in range(begin + 1, 28):
                if epoch in reached:
                    reached[epoch].add(number)
                if rungs.judge(number, epoch, final[number]) is PAUSE:
                    paused[number] = epoch
                    break
        ranked = sorted(final, key=final.__getitem__, reverse=mode == "max")
        assert reached[1] == set(final)
        # Nobody among the best is lost; who was early may have gone on besides.
        assert reached[3] >= set(ranked[:9])
        assert reached[9] >= set(ranked[:3])
        assert reached[27] >= set(ranked[:1])
        assert len(reached[3]) <= 18


PLATEAU = Plateau(baseline=1.0, perfect=0.0, band=0.1)


def test_where_a_value_stands() -> None:
    assert [PLATEAU.standing(x) for x in (0.5, 0.89, 0.91, 1.0, 1.09, 1.11)] == [0, 0, 1, 1, 1, 2]
    accuracy = Plateau(baseline=0.25, perfect=1.0, band=0.1)
    assert [accuracy.standing(x) for x in (0.1, 0.2, 0.3, 0.33, 0.9)] == [2, 1, 1, 0, 0]


def test_on_the_plateau_nobody_is_stopped_for_noise() -> None:
    rungs = Halving([1], 3, "min", plateau=PLATEAU)
    for number, value in enumerate([0.98, 1.02, 0.95, 1.05, 0.92]):
        assert rungs.judge(number, 1, value) is GO_ON
    assert rungs.judge(5, 1, 0.5) is GO_ON  # escaped: of six, two have a place
    assert rungs.judge(6, 1, 1.0) is GO_ON
    assert rungs.judge(7, 1, 1.5) is GO_ON  # has not even come to the plateau
    assert rungs.judge(8, 1, 0.6) is GO_ON
    assert rungs.judge(9, 1, 0.7) is GO_ON  # ten: the third place
    assert rungs.judge(10, 1, 0.93) is STOP  # all places are taken by escaped trials
    assert rungs.judge(11, 1, 0.8) is GO_ON  # twelve: the fourth place
    assert rungs.judge(12, 1, 0.85) is STOP
    assert rungs.judge(13, 1, 0.75) is GO_ON


def test_paused_on_the_plateau_go_on_in_their_order_until_the_rung_is_decided() -> None:
    rungs = Halving([1, 3], 3, "min", pauses=True, plateau=PLATEAU)
    paused: dict[int, int] = {}
    for number, value in enumerate([1.0, 0.95, 0.92, 0.99, 1.3]):
        if rungs.judge(number, 1, value) is PAUSE:
            paused[number] = 1
    assert sorted(paused) == [0, 1, 2, 3, 4]
    assert rungs.promoted(paused, is_idle=False) == 0  # a third of them, by order not by value
    del paused[0]
    assert rungs.promoted(paused, is_idle=False) is None
    # Nothing else is left to do: by turns the furthest behind and the furthest ahead.
    assert rungs.promoted(paused, is_idle=True) == 1
    del paused[1]
    assert rungs.judge(0, 3, 0.99) is PAUSE
    paused[0] = 3
    assert rungs.promoted(paused, is_idle=True) == 0
    del paused[0]
    assert rungs.judge(1, 3, 0.98) is PAUSE
    paused[1] = 3
    assert rungs.promoted(paused, is_idle=True) == 2
    paused = {1: 1}
    rungs.judge(5, 1, 0.2)
    rungs.judge(6, 1, 0.2)
    assert rungs.promoted(paused, is_idle=True) is None  # both places are taken now


def test_hyperband_deals_equal_epochs_to_its_brackets() -> None:
    brackets = [Halving([1, 3, 9], 3, "min"), Halving([3, 9], 3, "min"), Halving([], 3, "min")]
    costs = [bracket.mean_epochs(27) for bracket in brackets]
    scheduler = HyperBand(brackets, 27)
    dealt = [scheduler._bracket(number) for number in range(300)]
    spent = [cost * dealt.count(bracket) for cost, bracket in zip(costs, brackets, strict=True)]
    assert max(spent) - min(spent) <= 27
    assert scheduler.mean_epochs(27) == pytest.approx(sum(spent) / 300, rel=0.05)
    # A bracket without rungs stops nobody.
    free = [number for number in range(300) if dealt[number] is brackets[2]]
    assert all(scheduler.judge(number, 1, float(number)) is GO_ON for number in free)
