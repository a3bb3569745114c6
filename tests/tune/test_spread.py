"""Means and their noise, against SciPy's own tests and tables."""

import math

import numpy as np
import pytest
from scipy import stats

from rum.tune.spread import Spread, is_beyond_noise


def test_the_interval_is_that_of_a_table() -> None:
    spread = Spread.of([1.0, 2.0, 3.0])
    assert (spread.mean, spread.std, spread.count) == (2.0, 1.0, 3)
    assert spread.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))  # t, 2 degrees
    low, high = stats.t.interval(0.95, 2, loc=2.0, scale=1 / math.sqrt(3))
    assert (spread.mean - spread.half_width, spread.mean + spread.half_width) == (
        pytest.approx(low),
        pytest.approx(high),
    )
    assert spread.interval == (pytest.approx(low), pytest.approx(high))
    assert str(spread) == "2.0000 ± 2.4841 (3 seeds)"


def test_a_single_run_says_nothing_of_noise() -> None:
    assert Spread.of([0.5]).half_width == math.inf
    assert str(Spread.of([0.5])) == "0.5000"
    assert is_beyond_noise(Spread.of([0.5]), Spread.of([0.5000001]))
    assert not is_beyond_noise(Spread.of([0.5]), Spread.of([0.5]))


def test_two_means_are_told_apart_as_welch_does() -> None:
    generator = np.random.default_rng(0)
    found = set()
    for _ in range(200):
        counts = generator.integers(2, 7, 2)
        one, other = (
            generator.normal(shift, scale, count).tolist()
            for shift, scale, count in zip(
                generator.uniform(0, 3, 2), generator.uniform(0.1, 2, 2), counts, strict=True
            )
        )
        expected = stats.ttest_ind(one, other, equal_var=False).pvalue < 0.05
        assert is_beyond_noise(Spread.of(one), Spread.of(other)) == expected
        found.add(bool(expected))
    assert found == {True, False}


def test_a_single_run_is_compared_with_what_a_further_run_may_give() -> None:
    """Under the null hypothesis, the single run is called different in one case of twenty."""
    generator = np.random.default_rng(1)
    runs = generator.normal(size=(20_000, 5))
    several = [Spread.of(row[:4].tolist()) for row in runs[:4000]]
    different = [
        is_beyond_noise(spread, Spread.of([float(row[4])]))
        for spread, row in zip(several, runs, strict=False)
    ]
    assert np.mean(different) == pytest.approx(0.05, abs=0.012)
    again = [
        is_beyond_noise(Spread.of([float(row[4])]), spread)
        for spread, row in zip(several, runs, strict=False)
    ]
    assert again == different


def test_runs_that_are_all_equal_have_no_noise() -> None:
    same = Spread.of([0.2, 0.2])
    assert is_beyond_noise(same, Spread.of([0.3, 0.3]))
    assert not is_beyond_noise(same, Spread.of([0.2, 0.2, 0.2]))
