"""A size that is not sampled but solved, so that a model has a given number of parameters."""

from collections.abc import Mapping
from typing import Any

from rum.experiment import ExperimentConfig
from rum.models import ModelSizes, build_on_meta, count_parameters
from rum.tune.config import Domain
from rum.tune.space import Fit, apply

TOLERANCE = 0.01
"""Largest share by which a solved model may miss its number of parameters."""


def fitting(base: ExperimentConfig, sizes: ModelSizes) -> Fit:
    """Gives the function that solves a domain with `parameters` for a trial's other values.

    The number of parameters must grow with the size. Where no size of the domain comes close, the
    nearest is given, and the limits of the search refuse the candidate.

    Args:
        base: The experiment around the searched options.
        sizes: Of the task.
    """

    def fit(values: Mapping[str, Any], name: str, domain: Domain) -> int:
        assert domain.low is not None
        assert domain.high is not None
        assert domain.parameters is not None
        wanted = domain.parameters

        def count(size: int) -> int:
            model = apply(base, {**values, name: size}).model
            return count_parameters(build_on_meta(model, sizes))

        low, high = int(domain.low), int(domain.high)
        first = low
        while low < high:  # the smallest size with as many parameters, or the largest of all
            middle = (low + high) // 2
            if count(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        below = max(first, low - 1)
        return min((below, low), key=lambda size: abs(count(size) - wanted))

    return fit
