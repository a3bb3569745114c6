"""Sizes solved for a number of parameters, against trying every size."""

import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest

from rum.cells import FSRUMConfig, LSTMCellConfig, RUMCellConfig
from rum.errors import ConfigError
from rum.experiment import ExperimentConfig, model_sizes, parameter_count
from rum.tasks import CopyingConfig
from rum.training.config import TrainingConfig
from rum.tune.config import Domain, SamplerConfig, SearchConfig, SearchOptions
from rum.tune.database import open_storage
from rum.tune.forecast import forecast
from rum.tune.limits import check_feasible, limits_of
from rum.tune.prediction import Predictor
from rum.tune.sizing import fitting
from rum.tune.space import apply, check_space, distribution, suggest
from rum.tune.study import ORIGIN, Study, ensure_study

BASE = ExperimentConfig(
    model=FSRUMConfig(
        fast=LSTMCellConfig(hidden_size=48, layer_norm=True),
        slow=RUMCellConfig(hidden_size=64, layer_norm=True, eta=1.0),
    ),
    task=CopyingConfig(delay=3, batch_size=4, steps_per_epoch=2),
    training=TrainingConfig(threads=1),
)
TASK = BASE.task.load(seed=0)
FIT = fitting(BASE, model_sizes(TASK))
FAST, SLOW = "model.fast.hidden_size", "model.slow.hidden_size"
BUDGET = 60_000


def solved(low: int = 20, high: int = 200, **rest: Any) -> Domain:
    return Domain(type="int", low=low, high=high, **{"parameters": BUDGET, **rest})


SPACE = {
    SLOW: solved(),  # solved after what stands below it, too
    FAST: Domain(type="int", low=24, high=60),
    "model.num_fast_cells": Domain(type="categorical", choices=[2, 3]),
}


def count(values: dict[str, Any]) -> int:
    return parameter_count(apply(BASE, values).model, TASK)


def sample(trials: int, sampler: str = "RandomSampler") -> list[optuna.Trial]:
    study = optuna.create_study(sampler=getattr(optuna.samplers, sampler)(seed=1))
    asked = []
    for _ in range(trials):
        trial = study.ask()
        values = suggest(trial, SPACE, FIT)
        assert trial.params == values, "what was solved is recorded like what was sampled"
        study.tell(trial, float(values[FAST]))
        asked.append(trial)
    return asked


@pytest.mark.parametrize("sampler", ["RandomSampler", "TPESampler", "NSGAIISampler"])
def test_every_sample_has_the_number_of_parameters(sampler: str) -> None:
    trials = sample(25, sampler)
    assert len({trial.params[FAST] for trial in trials}) > 5
    for trial in trials:
        assert count(trial.params) == pytest.approx(BUDGET, rel=0.01)


def test_a_trial_can_be_made_again_from_its_values() -> None:
    (trial,) = sample(1)
    made = {name: distribution(SPACE[name], value) for name, value in trial.params.items()}
    assert made == trial.distributions
    assert made[SLOW].single()


@pytest.mark.parametrize("fast", [24, 41, 60])
@pytest.mark.parametrize(("low", "high"), [(20, 200), (20, 30), (190, 200), (77, 77)])
def test_the_size_is_the_one_that_comes_closest(fast: int, low: int, high: int) -> None:
    others = {FAST: fast, "model.num_fast_cells": 3}
    by_trial = min(
        range(low, high + 1), key=lambda size: abs(count({**others, SLOW: size}) - BUDGET)
    )
    assert FIT(others, SLOW, solved(low, high)) == by_trial


def search(space: dict[str, Domain]) -> SearchConfig:
    return SearchConfig(
        model=BASE.model,
        task=BASE.task,
        training=BASE.training,
        space=space,
        search=SearchOptions(num_trials=2),
    )


def test_a_candidate_that_cannot_come_within_one_percent_is_infeasible() -> None:
    config = search({**SPACE, SLOW: solved(20, 30)})
    limits = limits_of(config, Predictor(config, TASK))
    values = {FAST: 24, SLOW: 30, "model.num_fast_cells": 2}
    verdict = limits.judge(apply(config, values))
    assert verdict.reason == f"infeasible: {count(values):,} parameters, not within 1% of 60,000"
    assert verdict.excess["budget"] == pytest.approx(1 - count(values) / BUDGET - 0.01)
    exact = limits.judge(apply(config, sample(1)[0].params))
    assert exact.reason is None
    assert exact.excess["budget"] <= 0


def test_a_space_that_has_no_such_model_is_refused_with_what_it_has() -> None:
    config = search({**SPACE, SLOW: solved(parameters=5_000_000)})
    largest = count({FAST: 60, SLOW: 200, "model.num_fast_cells": 3})
    with pytest.raises(ConfigError, match=f"has 5,000,000 parameters: .* to {largest:,}"):
        check_feasible(config, limits_of(config, Predictor(config, TASK)))
    config = search(SPACE)
    check_feasible(config, limits_of(config, Predictor(config, TASK)))


def test_a_forecast_is_of_models_of_that_size(tmp_path: Path) -> None:
    config = search(SPACE)
    limits = limits_of(config, Predictor(config, TASK))
    prediction = forecast(config, TASK, tmp_path, 1, limits)
    for cost in (prediction.smallest, prediction.typical, prediction.largest):
        assert cost.parameters == pytest.approx(BUDGET, rel=0.01)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({SLOW: solved(parameters=0)}, "parameters must be >= 1 and belong to an int domain"),
        ({SLOW: solved(step=10)}, "with low and high only"),
        ({SLOW: solved(log=True)}, "with low and high only"),
        ({**SPACE, SLOW: solved(when={FAST: 1})}, "with low and high only"),
        ({SLOW: solved(), FAST: solved()}, "one option can be solved for parameters"),
        ({SLOW: solved(low=0)}, r"model\.slow\.hidden_size = 0 is not valid"),
    ],
)
def test_domains_that_cannot_be_solved_are_refused(space: dict[str, Domain], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space(BASE, space)


def test_a_study_that_is_opened_again_and_one_that_continues_it_have_the_same_sizes(
    tmp_path: Path,
) -> None:
    storage = open_storage(tmp_path)

    def open_study(name: str) -> Study:
        ensure_study(storage, name, {"mode": "min"})
        return Study(storage, name, SPACE, SamplerConfig(name="random"), FIT)

    spec = open_study("first").ask()
    (frozen,) = open_study("first").trials()
    assert open_study("first").adopt(frozen).parameters == spec.parameters == frozen.params
    later = open_study("later")
    later.enqueue(frozen.params, {ORIGIN: {"trial": 0}})
    assert later.ask().parameters == spec.parameters
    base = dataclasses.replace(BASE)
    assert parameter_count(apply(base, later.trials()[0].params).model, TASK) == count(
        spec.parameters
    )
