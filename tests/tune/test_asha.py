"""Which trials go on at a rung, against the rule written another way."""

import random

import pytest

from rum.tune.asha import Rungs, expected_epochs, milestones


def stops(earlier: list[float], value: float, reduction_factor: int, mode: str) -> bool:
    """Counts who is better instead of sorting: not among the best 1 / factor, at least one."""
    arrived = len(earlier) + 1
    go_on = max(1, arrived // reduction_factor)
    better = sum(other < value if mode == "min" else other > value for other in earlier)
    return better >= go_on


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("reduction_factor", [2, 3, 4])
def test_judge_equals_the_rule_counted_out_on_random_arrivals(
    mode: str, reduction_factor: int
) -> None:
    generator = random.Random(reduction_factor)
    for _ in range(50):
        rungs = Rungs([1, 2, 4], reduction_factor, mode)
        seen: dict[int, list[float]] = {1: [], 2: [], 4: []}
        arrivals = [(number, epoch) for number in range(15) for epoch in seen]
        generator.shuffle(arrivals)
        for number, epoch in arrivals:
            value = generator.choice([0.5, 1.0, 1.5, generator.random()])  # with ties
            expected = stops(seen[epoch], value, reduction_factor, mode)
            assert rungs.judge(number, epoch, value) is expected
            seen[epoch].append(value)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_judge_lets_ties_go_on(mode: str) -> None:
    rungs = Rungs([1], 4, mode)
    assert [rungs.judge(number, 1, 2.5) for number in range(9)] == [False] * 9


@pytest.mark.parametrize(("mode", "worst"), [("min", 1e9), ("max", -1e9)])
def test_judge_lets_the_first_go_on_however_bad(mode: str, worst: float) -> None:
    assert Rungs([1], 2, mode).judge(0, 1, worst) is False


def test_judge_stops_nobody_between_rungs_and_files_nothing() -> None:
    rungs = Rungs([1, 4], 2, "min")
    rungs.judge(0, 1, 0.0)
    assert [rungs.judge(1, epoch, 9.0) for epoch in (2, 3, 5)] == [False] * 3
    assert [rungs.size(epoch) for epoch in (1, 2, 3, 4, 5)] == [1, 0, 0, 0, 0]


def test_judge_counts_a_trial_once_at_a_rung() -> None:
    rungs = Rungs([1], 2, "min")
    rungs.judge(0, 1, 1.0)
    assert rungs.judge(1, 1, 2.0) is True
    assert rungs.judge(1, 1, 2.0) is False  # heard again: it was judged
    assert rungs.size(1) == 2


@pytest.mark.parametrize("mode", ["min", "max"])
def test_filed_curves_give_the_decisions_of_judged_ones(mode: str) -> None:
    generator = random.Random(1)
    curves = {n: {epoch: generator.random() for epoch in range(1, 10)} for n in range(20)}
    judged = Rungs([1, 3, 9], 3, mode)
    filed = Rungs([1, 3, 9], 3, mode)
    for number in range(10):
        for epoch, value in curves[number].items():
            judged.judge(number, epoch, value)
        filed.file(number, curves[number])
    for number in range(10, 20):
        for epoch, value in curves[number].items():
            assert filed.judge(number, epoch, value) is judged.judge(number, epoch, value)


def test_file_takes_only_the_rungs_that_a_curve_reached() -> None:
    rungs = Rungs([1, 3], 2, "min")
    rungs.file(0, {1: 0.5, 2: 0.4})
    assert (rungs.size(1), rungs.size(3)) == (1, 0)
    assert rungs.judge(1, 3, 99.0) is False  # the first there


@pytest.mark.parametrize(
    ("grace", "factor", "epochs", "expected"),
    [
        (1, 3, 100, [1, 3, 9, 27, 81]),
        (3, 3, 100, [3, 9, 27, 81]),
        (1, 2, 3, [1, 2]),
        (1, 2, 4, [1, 2]),  # nothing to decide at the last epoch
        (4, 2, 4, []),
        (5, 2, 4, []),
    ],
)
def test_milestones_are_grace_times_powers_below_the_last_epoch(
    grace: int, factor: int, epochs: int, expected: list[int]
) -> None:
    assert milestones(grace, factor, epochs) == expected


def test_expected_epochs_without_rungs_is_all_of_them() -> None:
    assert expected_epochs([], 3, 100) == 100.0


def test_expected_epochs_weighs_each_stretch_with_the_share_that_trains_it() -> None:
    # All train 1 epoch, half of them one more, a quarter the last one.
    assert expected_epochs([1, 2], 2, 3) == pytest.approx(1 + 1 / 2 + 1 / 4)
    # All 3, a third 6 more, a ninth 18, a 27th 54, an 81st 19.
    expected = 3 + 6 / 3 + 18 / 9 + 54 / 27 + 19 / 81
    assert expected_epochs([3, 9, 27, 81], 3, 100) == pytest.approx(expected)
