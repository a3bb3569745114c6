"""The rungs against a naive form of the rule."""

import random

import pytest

from rum.tune.asha import Rungs, expected_epochs, milestones


def test_rungs_are_powers_of_the_factor_below_the_end() -> None:
    assert milestones(1, 3, 100) == [1, 3, 9, 27, 81]
    assert milestones(2, 2, 16) == [2, 4, 8]
    assert milestones(5, 3, 5) == []


def test_expected_epochs_by_hand() -> None:
    # All train 1 epoch, half of them 1 more, a quarter 2 more.
    assert expected_epochs([1, 2], 2, 4) == 1 + 0.5 * 1 + 0.25 * 2
    assert expected_epochs([], 3, 7) == 7


def goes_on(before: list[float], value: float, factor: int, mode: str) -> bool:
    """Among all that reached the rung, this one included, is it in the best 1/factor?"""
    everyone = [*before, value]
    better = sum(x < value if mode == "min" else x > value for x in everyone)
    return better < max(1, len(everyone) // factor)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_trial_goes_on_if_it_is_among_the_best_that_came(factor: int, mode: str) -> None:
    generator = random.Random(factor)
    rungs = Rungs([2], factor, mode)
    before: list[float] = []
    for number in range(60):
        value = generator.choice([generator.random(), 0.5])  # with ties
        stops = rungs.judge(number, 2, value)
        assert stops is not goes_on(before, value, factor, mode)
        before.append(value)
    assert rungs.size(2) == 60


def test_only_rungs_judge_and_each_trial_once() -> None:
    rungs = Rungs([1, 3], 3, "min")
    assert not rungs.judge(0, 1, 0.5)
    assert not rungs.judge(0, 2, 9.0)
    assert rungs.judge(1, 1, 0.6)
    assert not rungs.judge(1, 1, 0.6)
    assert not rungs.judge(0, 3, 9.0)


def test_filed_curves_decide_as_if_they_had_been_judged() -> None:
    generator = random.Random(1)
    curves = [{1: generator.random(), 3: generator.random()} for _ in range(9)]
    judged, filed = Rungs([1, 3], 3, "min"), Rungs([1, 3], 3, "min")
    for number, curve in enumerate(curves):
        for epoch, value in curve.items():
            judged.judge(number, epoch, value)
        filed.file(number, curve)

    for number in range(100, 140):
        value = generator.random()
        assert judged.judge(number, 1, value) is filed.judge(number, 1, value)
        assert judged.judge(number, 3, value) is filed.judge(number, 3, value)
