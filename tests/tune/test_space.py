"""Search spaces: what is refused before anything starts, what is sampled, what a trial gets."""

import math
import re
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler

from rum.cells import RUMConfig
from rum.errors import ConfigError
from rum.experiment import ExperimentConfig
from rum.parameters import flatten
from rum.tasks import CharacterLMConfig
from rum.tune.config import Domain
from rum.tune.space import (
    apply,
    check_space,
    differences,
    distribution,
    space_to_plain,
    suggest,
)

BASE = ExperimentConfig(model=RUMConfig(), task=CharacterLMConfig(corpus="pydoc"))


def categorical(*choices: Any, **options: Any) -> Domain:
    return Domain(type="categorical", choices=list(choices), **options)


def number(type: str, low: float | None, high: float | None, **options: Any) -> Domain:
    return Domain(type=type, low=low, high=high, **options)


def refusal(space: dict[str, Domain]) -> str:
    with pytest.raises(ConfigError) as caught:
        check_space(BASE, space)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "domain", "value"),
    [
        ("model.zoneout", number("float", 0.0, 1.0), "1.0"),
        ("model.zoneout", number("float", -0.1, 0.5), "-0.1"),
        ("model.dropout", number("float", 0.0, 1.5), "1.5"),
        ("model.hidden_size", number("int", 0, 64), "0"),
        ("model.hidden_size", number("float", 8.0, 64.0), "8.0"),
        ("model.hidden_size", categorical(64, 64.5), "64.5"),
        ("model.hidden_size", categorical(64, True), "True"),
        ("model.eta", number("float", 0.0, 2.0), "0.0"),
        ("model.eta", number("float", -1.0, 2.0), "-1.0"),
        ("model.eta", categorical(None, -2.0), "-2.0"),
        ("model.lambda_", number("float", -0.5, 1.0), "-0.5"),
        ("model.lambda_", categorical(0, -1), "-1"),
        ("model.layer_norm_gate", categorical("pre_sigmoid", "sigmoid"), "sigmoid"),
        ("training.learning_rate", number("float", 0.0, 0.1), "0.0"),
        ("training.learning_rate", number("float", 1e-3, math.inf), "inf"),
        ("training.schedule.name", categorical("constant", "cosine"), "cosine"),
        ("training.schedule.drop_at", number("float", 0.5, 1.0), "1.0"),
        ("task.bptt_length", number("int", 0, 150), "0"),
        ("model.num_layers", number("int", 1, 2, step=0.5), "0.5"),
        ("model.num_layers", number("int", 1, 2.5), "2.5"),
        ("model.hidden_size", number("int", 64, 32), "64"),
        ("model.zoneout", number("float", 0.0, 0.5, log=True), "0.0"),
        ("model.zoneout", number("float", -0.5, 0.5, log=True), "-0.5"),
        ("model.zoneout", number("float", 0.1, 0.5, log=True, step=0.1), "0.1"),
        ("model.zoneout", number("float", 0.1, 0.5, step=-0.1), "-0.1"),
        ("model.hidden_size", number("int", 8, 64, step=0), "0"),
        ("model.hidden_size", number("int", None, 64), "None"),
        ("model.hidden_size", number("integer", 8, 64), "integer"),
        ("model.zoneout", number("float", math.nan, 0.5), "nan"),
    ],
)
def test_a_domain_that_no_configuration_accepts_is_refused_by_name_and_value(
    name: str, domain: Domain, value: str
) -> None:
    message = refusal({name: domain})
    assert name in message
    assert value in message


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        (Domain(type="categorical"), "must have choices"),
        (Domain(type="categorical", choices=[]), "must have choices"),
        (Domain(type="categorical", choices=[0.1], low=0.0), "takes choices only"),
        (Domain(type="categorical", choices=[0.1], log=True), "takes choices only"),
        (Domain(type="float", choices=[0.1, 0.2]), "choices belong to a categorical"),
        (Domain(type="int", low=1, high=2, choices=[1]), "choices belong to a categorical"),
    ],
)
def test_choices_go_with_categorical_domains_alone(domain: Domain, expected: str) -> None:
    message = refusal({"model.zoneout": domain})
    assert message.startswith("space: model.zoneout: ")
    assert expected in message


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("model.hiden_size", "model.hidden_size"),
        ("model.lambda", "model.lambda_"),
        ("training.lerning_rate", "training.learning_rate"),
        ("training.schedule.drop_att", "training.schedule.drop_at"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(misspelt: str, meant: str) -> None:
    message = refusal({misspelt: number("int", 8, 16)})
    assert message == f"space: unknown option {misspelt!r}; did you mean {meant!r}?"


@pytest.mark.parametrize(
    "name", ["model", "training.schedule", "search.num_trials", "sampler.seed", "hidden_size"]
)
def test_what_is_no_option_of_an_experiment_is_refused(name: str) -> None:
    assert f"unknown option {name!r}" in refusal({name: number("int", 8, 16)})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.name", "lstm"),
        ("task.name", "copying"),
        ("task.corpus", "ptb"),
        ("training.max_epochs", 3),
        ("training.device", "cpu"),
        ("training.threads", 2),
        ("training.checkpoint_seconds", 60.0),
    ],
)
def test_an_option_that_cannot_be_searched_is_refused_with_the_reason(
    name: str, value: object
) -> None:
    message = refusal({name: categorical(value)})
    assert re.fullmatch(f"space: {re.escape(name)} cannot be searched: \\w.*", message)


def test_an_empty_space_is_refused() -> None:
    assert refusal({}) == "space must name at least one option to search, got none"


def test_a_condition_on_an_option_outside_the_space_is_refused_with_the_nearest() -> None:
    message = refusal(
        {
            "training.schedule.name": categorical("constant", "drop"),
            "training.schedule.drop_at": number(
                "float", 0.3, 0.8, when={"training.schedul.name": "drop"}
            ),
        }
    )
    assert message.startswith("space: training.schedule.drop_at: when must name options")
    assert "'training.schedul.name'; did you mean 'training.schedule.name'?" in message


def test_a_condition_on_an_option_further_down_is_refused() -> None:
    message = refusal(
        {
            "training.schedule.drop_at": number(
                "float", 0.3, 0.8, when={"training.schedule.name": "drop"}
            ),
            "training.schedule.name": categorical("constant", "drop"),
        }
    )
    assert "stand above it in the space, got 'training.schedule.name'" in message


def test_a_condition_on_a_value_that_is_not_searched_is_refused() -> None:
    message = refusal(
        {
            "training.schedule.name": categorical("constant", "table6"),
            "training.schedule.drop_at": number(
                "float", 0.3, 0.8, when={"training.schedule.name": "drop"}
            ),
        }
    )
    assert "when training.schedule.name = 'drop'" in message
    assert "none of ['constant', 'table6']" in message


def test_a_condition_on_a_number_that_is_not_categorical_is_refused() -> None:
    message = refusal(
        {
            "model.num_layers": number("int", 1, 2),
            "model.dropout": number("float", 0.0, 0.5, when={"model.num_layers": 2}),
        }
    )
    assert "when model.num_layers = 2, which is none of None" in message


def test_a_value_is_checked_together_with_its_condition() -> None:
    # Only where the schedule is "drop" could drop_at matter; the bound is wrong there too.
    message = refusal(
        {
            "training.schedule.name": categorical("constant", "drop"),
            "training.schedule.drop_at": number(
                "float", 0.3, 1.0, when={"training.schedule.name": "drop"}
            ),
        }
    )
    assert "training.schedule.drop_at = 1.0 is not valid" in message


@pytest.mark.xfail(
    strict=True, reason="Optuna lowers `high` to the last step instead, with a mere warning"
)
@pytest.mark.filterwarnings("ignore:The distribution is specified by:UserWarning")
@pytest.mark.parametrize(
    "domain", [number("int", 10, 64, step=16), number("float", 0.0, 0.35, step=0.1)]
)
def test_a_range_that_is_no_multiple_of_its_step_is_refused(domain: Domain) -> None:
    name = "model.hidden_size" if domain.type == "int" else "model.zoneout"
    assert name in refusal({name: domain})


def samples(space: dict[str, Domain], count: int) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    return [suggest(study.ask(), space) for _ in range(count)]


CONDITIONAL = {
    "training.schedule.name": categorical("constant", "drop"),
    "training.schedule.drop_at": number(
        "float", 0.3, 0.8, when={"training.schedule.name": "drop"}
    ),
}


def test_suggest_samples_an_option_exactly_where_its_condition_holds() -> None:
    drawn = samples(CONDITIONAL, 100)
    with_drop = [values for values in drawn if values["training.schedule.name"] == "drop"]
    assert 20 < len(with_drop) < 80
    assert all("training.schedule.drop_at" in values for values in with_drop)
    assert sum("training.schedule.drop_at" in values for values in drawn) == len(with_drop)


def test_an_option_that_is_not_sampled_has_its_base_value() -> None:
    drawn = samples(CONDITIONAL, 20)
    constant = next(v for v in drawn if v["training.schedule.name"] == "constant")
    assert apply(BASE, constant).training.schedule.drop_at == BASE.training.schedule.drop_at


def test_a_condition_on_an_option_that_was_not_sampled_does_not_hold() -> None:
    space = {
        "model.layer_norm": categorical(True, False),
        "model.layer_norm_gate": categorical(
            "post_sigmoid", "pre_sigmoid", when={"model.layer_norm": True}
        ),
        "model.eta": categorical(0.3, 1.0, when={"model.layer_norm_gate": "post_sigmoid"}),
    }
    check_space(BASE, space)
    drawn = samples(space, 100)
    without = [values for values in drawn if not values["model.layer_norm"]]
    assert without
    assert {tuple(values) for values in without} == {("model.layer_norm",)}
    assert any("model.eta" in values for values in drawn)


def test_both_ends_of_an_int_domain_are_sampled_and_nothing_beyond() -> None:
    space = {
        "model.num_layers": number("int", 1, 3),
        "model.hidden_size": number("int", 8, 24, step=8),
        "task.bptt_length": number("int", 2, 5, log=True),
    }
    drawn = samples(space, 200)
    assert {values["model.num_layers"] for values in drawn} == {1, 2, 3}
    assert {values["model.hidden_size"] for values in drawn} == {8, 16, 24}
    assert {values["task.bptt_length"] for values in drawn} == {2, 3, 4, 5}
    assert {type(values["model.num_layers"]) for values in drawn} == {int}


def test_floats_stay_in_their_range_and_log_spreads_over_magnitudes() -> None:
    space = {
        "training.learning_rate": number("float", 1e-4, 1e-2, log=True),
        "model.zoneout": number("float", 0.1, 0.3, step=0.1),
    }
    drawn = samples(space, 200)
    rates = sorted(values["training.learning_rate"] for values in drawn)
    assert 1e-4 <= rates[0] < 2e-4
    assert 5e-3 < rates[-1] <= 1e-2
    assert 5e-4 < rates[100] < 2e-3  # the middle of the magnitudes, not of the values
    assert {round(values["model.zoneout"], 9) for values in drawn} == {0.1, 0.2, 0.3}


def test_suggest_leaves_what_a_trial_has_and_samples_the_rest() -> None:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    trial = study.ask()
    first = trial.suggest_int("model.hidden_size", 8, 80)
    space = {
        "model.hidden_size": number("int", 8, 80),
        "model.zoneout": number("float", 0.0, 0.5),
    }
    values = suggest(trial, space)
    assert values["model.hidden_size"] == first
    assert trial.params == values
    assert set(values) == set(space)


def test_a_domain_is_the_distribution_that_suggest_draws_from() -> None:
    space = {
        "model.hidden_size": number("int", 8, 80, step=8),
        "training.learning_rate": number("float", 1e-4, 1e-2, log=True),
        "model.eta": categorical(None, 0.3),
    }
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    trial = study.ask()
    suggest(trial, space)
    assert trial.distributions == {name: distribution(d) for name, d in space.items()}
    assert distribution(space["model.hidden_size"]) == IntDistribution(8, 80, step=8)
    assert distribution(space["training.learning_rate"]) == FloatDistribution(1e-4, 1e-2, log=True)
    assert distribution(space["model.eta"]) == CategoricalDistribution([None, 0.3])


def test_apply_changes_what_is_named_and_nothing_else() -> None:
    parameters = {"model.hidden_size": 40, "model.eta": 0.3, "training.schedule.name": "drop"}
    after = apply(BASE, parameters)
    assert flatten(after) == {**flatten(BASE), **parameters}
    assert BASE.model.hidden_size == RUMConfig().hidden_size


def test_a_plain_space_holds_what_is_set_in_the_order_of_the_space() -> None:
    plain = space_to_plain(CONDITIONAL)
    assert list(plain) == list(CONDITIONAL)
    assert plain == {
        "training.schedule.name": {"type": "categorical", "choices": ["constant", "drop"]},
        "training.schedule.drop_at": {
            "type": "float",
            "low": 0.3,
            "high": 0.8,
            "when": {"training.schedule.name": "drop"},
        },
    }


def test_a_plain_space_rebuilds_the_same_domains() -> None:
    space = {**CONDITIONAL, "model.hidden_size": number("int", 8, 16, step=8)}
    assert {name: Domain(**plain) for name, plain in space_to_plain(space).items()} == space


def test_differences_name_each_leaf_that_differs_and_both_values() -> None:
    ours = {"space": {"a": {"high": 2}}, "mode": "min", "new": None}
    theirs = {"space": {"a": {"high": 3}, "b": {"low": 1}}, "mode": "min"}
    assert differences(ours, theirs) == [
        "new: (absent) in the study, null now",
        "space.a.high: 3 in the study, 2 now",
        "space.b.low: 1 in the study, (absent) now",
    ]
    assert differences(theirs, theirs) == []
