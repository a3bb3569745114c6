"""Spaces are checked before anything starts, and sampled as they say."""

import re
from dataclasses import dataclass, replace
from typing import Any

import optuna
import pytest

from rum.cells import EUNNConfig, FSRUMConfig, RUMConfig
from rum.errors import ConfigError
from rum.experiment import ExperimentConfig
from rum.tasks import CopyingConfig, RecallConfig
from rum.training.config import TrainingConfig
from rum.tune.config import Domain
from rum.tune.space import apply, check_space, differences, space_to_plain, suggest

BASE = ExperimentConfig(model=RUMConfig(), task=CopyingConfig(), training=TrainingConfig())


def number(type: str, low: float, high: float, **rest: Any) -> Domain:
    return Domain(type=type, low=low, high=high, **rest)


def choice(*choices: Any, **rest: Any) -> Domain:
    return Domain(type="categorical", choices=list(choices), **rest)


GATE = {"model.layer_norm_gate": choice("post_sigmoid", "pre_sigmoid")}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "at least one"),
        ({"model.hiden_size": number("int", 1, 2)}, "did you mean 'model.hidden_size'"),
        ({"model.hidden_size": number("int", 0, 9)}, "model.hidden_size = 0 .* >= 1, got 0"),
        ({"model.zoneout": number("float", 0, 1)}, r"model.zoneout = 1.* \[0, 1\), got 1"),
        ({"model.eta": number("float", 0, 1)}, "model.eta = 0.* > 0, got 0"),
        (
            {"model.lambda_": choice(0, -1)},
            "model.lambda_ = -1 .* must be in .0, 1. or a whole",
        ),
        ({"model.lambda_": choice(0, "one")}, "'one' .* must be float"),
        ({"model.hidden_size": number("float", 1, 2)}, "must be int, got 1.0"),
        ({"model.layer_norm": choice(1)}, "must be bool, got 1"),
        ({"model.zoneout": number("float", 0.5, 0.1)}, "low must be <= high, got 0.5 > 0.1"),
        ({"model.zoneout": number("float", float("nan"), 0.1)}, "low must be <= high"),
        ({"model.zoneout": number("float", 0.0, 0.1, log=True)}, "log needs low > 0, got 0.0"),
        ({"model.zoneout": number("float", 0.1, 0.2, step=0.1, log=True)}, "not with log"),
        ({"model.zoneout": number("float", 0.1, 0.2, step=-1)}, "step must be > 0"),
        ({"model.hidden_size": number("int", 1.5, 3)}, "whole bounds and step, got 1.5"),
        ({"model.zoneout": Domain(type="float", low=0.1)}, "low and high must be given"),
        ({"model.zoneout": Domain(type="floot", low=0, high=0.1)}, "type must be"),
        ({"model.zoneout": Domain(type="float", choices=[0.1])}, "choices belong to"),
        ({"model.activation": choice()}, "must have choices"),
        ({"model.activation": choice("relu", low=1.0)}, "takes choices only"),
        ({"model.activation": choice("relu", "rely")}, "'rely' is not valid"),
        ({"training.max_epochs": number("int", 1, 2)}, "cannot be searched: it is the budget"),
        ({"task.name": choice("copying")}, "cannot be searched"),
        ({"model.eta": choice(1.0, when={"model.layer_norm_gate": "post_sigmoid"})}, "above it"),
        ({**GATE, "model.eta": choice(1.0, when={"model.layer_norm_gat": "x"})}, "did you mean"),
        ({**GATE, "model.eta": choice(1.0, when={"model.layer_norm_gate": "x"})}, "none of"),
    ],
)
def test_a_space_that_cannot_work_is_refused(space: dict[str, Domain], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space(BASE, space)


def test_whole_numbers_between_the_ends_are_checked_too() -> None:
    base = ExperimentConfig(model=BASE.model, task=RecallConfig(), training=BASE.training)
    check_space(base, {"task.length": number("int", 10, 20, step=2)})
    with pytest.raises(ConfigError, match=r"task\.length = 11 is not valid"):
        check_space(base, {"task.length": number("int", 10, 20)})
    base = ExperimentConfig(
        model=EUNNConfig(style="fft", hidden_size=8), task=BASE.task, training=BASE.training
    )
    with pytest.raises(ConfigError, match=r"hidden_size = 1053 is not valid: .* power of two"):
        check_space(base, {"model.hidden_size": number("int", 4, 2**20)})


def test_nested_options_are_checked_too() -> None:
    base = ExperimentConfig(model=FSRUMConfig(), task=BASE.task, training=BASE.training)
    check_space(base, {"model.slow.hidden_size": number("int", 1, 5)})
    with pytest.raises(ConfigError, match=r"model\.slow\.eta = 0"):
        check_space(base, {"model.slow.eta": choice(0)})


def sample(space: dict[str, Domain], count: int) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    return [suggest(study.ask(), space) for _ in range(count)]


def test_samples_fill_the_space_with_both_ends_and_make_valid_experiments() -> None:
    space = {
        "model.hidden_size": number("int", 4, 10, step=2),
        "model.zoneout": number("float", 0.0, 0.4),
        "training.learning_rate": number("float", 1e-4, 1e-2, log=True),
        "model.lambda_": choice(0, 1),
    }
    check_space(BASE, space)
    samples = sample(space, 200)

    assert {values["model.hidden_size"] for values in samples} == {4, 6, 8, 10}
    assert {values["model.lambda_"] for values in samples} == {0, 1}
    assert all(0.0 <= values["model.zoneout"] <= 0.4 for values in samples)
    rates = sorted(values["training.learning_rate"] for values in samples)
    assert 5e-4 < rates[100] < 2e-3  # the median of a log-uniform choice
    experiment = apply(BASE, samples[0])
    assert experiment.model == RUMConfig(
        hidden_size=samples[0]["model.hidden_size"],
        zoneout=samples[0]["model.zoneout"],
        lambda_=samples[0]["model.lambda_"],
    )


def test_a_conditional_option_is_sampled_only_under_its_condition() -> None:
    space = {**GATE, "model.eta": choice(0.5, when={"model.layer_norm_gate": "post_sigmoid"})}
    check_space(BASE, space)
    samples = sample(space, 50)

    assert {values["model.layer_norm_gate"] for values in samples} == {
        "post_sigmoid",
        "pre_sigmoid",
    }
    for values in samples:
        assert ("model.eta" in values) is (values["model.layer_norm_gate"] == "post_sigmoid")
        eta = apply(BASE, values).model.eta  # type: ignore[attr-defined]
        assert eta == (0.5 if "model.eta" in values else None)


NESTED = {
    "model.layer_norm": choice(True, False),
    "model.layer_norm_gate": choice(
        "post_sigmoid", "pre_sigmoid", when={"model.layer_norm": True}
    ),
    "model.eta": choice(0.5, 1.0, when={"model.layer_norm_gate": "post_sigmoid"}),
    "model.zoneout": number("float", 0.1, 0.2, when={"model.eta": [0.5]}),
}


def test_a_condition_holds_only_where_the_conditions_of_its_options_do() -> None:
    check_space(BASE, NESTED)
    samples = sample(NESTED, 200)
    seen = {tuple(values) for values in samples}
    norm, gate, eta, zoneout = NESTED
    assert seen == {(norm,), (norm, gate), (norm, gate, eta), (norm, gate, eta, zoneout)}
    for values in samples:
        assert (gate in values) is values[norm]
        assert (eta in values) is (values.get(gate) == "post_sigmoid")
        assert (zoneout in values) is (values.get(eta) == 0.5)


def test_a_list_of_values_means_any_of_them() -> None:
    names = choice("constant", "drop", "step", "plateau")
    factor = number("float", 0.1, 0.5, when={"training.schedule.name": ["drop", "step"]})
    space = {"training.schedule.name": names, "training.schedule.drop_factor": factor}
    check_space(BASE, space)
    for values in sample(space, 60):
        name = values["training.schedule.name"]
        assert ("training.schedule.drop_factor" in values) is (name in ("drop", "step"))


def test_null_in_a_condition_is_a_value_and_not_the_lack_of_one() -> None:
    space = {
        "model.layer_norm": choice(True, False),
        "model.eta": choice(None, 1.0, when={"model.layer_norm": True}),
        "model.zoneout": choice(0.1, when={"model.eta": None}),
    }
    check_space(BASE, space)
    for values in sample(space, 60):
        assert ("model.zoneout" in values) is (
            "model.eta" in values and values["model.eta"] is None
        )


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {**NESTED, "model.activation": choice("relu", when={"model.eta": [0.5, 2.0]})},
            r"model\.eta = 2\.0, which is none of",
        ),
        (
            {
                **NESTED,
                "model.activation": choice(
                    "relu", when={"model.layer_norm": False, "model.eta": 0.5}
                ),
            },
            "model.activation: its conditions .* never hold together",
        ),
    ],
)
def test_conditions_that_cannot_hold_are_refused(space: dict[str, Domain], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space(BASE, space)


@dataclass(kw_only=True)
class PickyTraining(TrainingConfig):
    """Refuses one combination, which only a branch three conditions deep has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        schedule = self.schedule
        if (self.optimizer, schedule.name, schedule.step_epochs) == ("sgd", "step", 9):
            raise ConfigError("sgd, step and 9 do not go together")


def test_every_value_is_checked_in_every_branch_that_leads_to_it() -> None:
    base = replace(BASE, training=PickyTraining())
    space = {
        "training.optimizer": choice("adam", "sgd"),
        "training.schedule.name": choice(
            "step", "cosine", when={"training.optimizer": ["adam", "sgd"]}
        ),
        "training.schedule.step_epochs": number(
            "int", 1, 9, when={"training.schedule.name": "step"}
        ),
    }
    with pytest.raises(ConfigError) as error:
        check_space(base, space)
    assert str(error.value).startswith(
        "space: training.schedule.step_epochs = 9, training.optimizer = 'sgd', "
        "training.schedule.name = 'step' is not valid: "
    )
    space["training.schedule.step_epochs"].high = 8
    check_space(base, space)


def test_zero_bounds_survive_being_written_down() -> None:
    space = {"model.zoneout": number("float", 0.0, 0.4)}
    plain = space_to_plain(space)

    assert plain == {"model.zoneout": {"type": "float", "low": 0.0, "high": 0.4}}
    assert {name: Domain(**domain) for name, domain in plain.items()} == space


def test_differences_name_each_leaf() -> None:
    ours = {"space": {"a": {"low": 1}}, "mode": "min"}
    theirs = {"space": {"a": {"low": 2}, "b": {"low": 3}}, "mode": "min"}

    lines = differences(ours, theirs)

    assert lines == [
        "space.a.low: 2 in the study, 1 now",
        "space.b.low: 3 in the study, (absent) now",
    ]


def test_messages_name_the_option_first() -> None:
    with pytest.raises(ConfigError) as error:
        check_space(BASE, {"model.zoneout": number("float", 0, 2)})
    assert re.match(r"space: model\.zoneout = 2", str(error.value))
