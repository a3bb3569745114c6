"""Options by dotted name: read, changed, rebuilt, and refused where they do not fit."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest

from rum.cells import MODELS, FSRUMConfig, LSTMCellConfig, ModelConfig, RUMCellConfig, RUMConfig
from rum.errors import ConfigError
from rum.experiment import ExperimentConfig, experiment_from_plain
from rum.parameters import convert, flatten, from_plain, nearest, replace, unflatten
from rum.tasks import CharacterLMConfig, CopyingConfig
from rum.training.config import ScheduleConfig, TrainingConfig


@dataclass(kw_only=True)
class Inner:
    size: int = 3
    rate: float = 0.5


@dataclass(kw_only=True)
class Outer:
    name: str = "outer"
    flag: bool = False
    limit: float | None = None
    inner: Inner = field(default_factory=Inner)


def small_fs_rum(**options: Any) -> FSRUMConfig:
    return FSRUMConfig(
        fast=LSTMCellConfig(hidden_size=6, zoneout_c=0.3),
        slow=RUMCellConfig(hidden_size=7, eta=1.0),
        **options,
    )


def experiment() -> ExperimentConfig:
    return ExperimentConfig(
        model=small_fs_rum(),
        task=CharacterLMConfig(corpus="pydoc", train_characters=5000),
        training=TrainingConfig(schedule=ScheduleConfig(name="table6"), max_grad_norm=None),
    )


def test_flatten_names_every_leaf_in_order() -> None:
    assert list(flatten(Outer(limit=2.0)).items()) == [
        ("name", "outer"),
        ("flag", False),
        ("limit", 2.0),
        ("inner.size", 3),
        ("inner.rate", 0.5),
    ]


def test_flatten_takes_nested_dicts_too() -> None:
    assert flatten({"a": 1, "b": {"c": None, "d": {"e": "x"}}}) == {
        "a": 1,
        "b.c": None,
        "b.d.e": "x",
    }


def test_flatten_of_a_dataclass_is_flatten_of_its_dict() -> None:
    config = experiment()
    assert flatten(config) == flatten(dataclasses.asdict(config))
    assert flatten(config)["model.slow.eta"] == 1.0
    assert flatten(config)["training.schedule.name"] == "table6"


def test_unflatten_is_the_inverse_of_flatten() -> None:
    plain = dataclasses.asdict(experiment())
    assert unflatten(flatten(plain)) == plain


def test_replace_changes_the_named_leaves_and_nothing_else() -> None:
    before = experiment()
    after = replace(
        before,
        {
            "model.slow.hidden_size": 11,
            "model.slow.eta": None,
            "model.fast.zoneout_h": 0.25,
            "model.dropout": 0.5,
            "training.schedule.drop_at": 0.5,
            "task.train_characters": None,
        },
    )
    changed = {k: v for k, v in flatten(after).items() if flatten(before)[k] != v}
    assert changed == {
        "model.slow.hidden_size": 11,
        "model.slow.eta": None,
        "model.fast.zoneout_h": 0.25,
        "model.dropout": 0.5,
        "training.schedule.drop_at": 0.5,
        "task.train_characters": None,
    }
    assert type(after.model) is FSRUMConfig
    assert type(after.model.slow) is RUMCellConfig


def test_replace_leaves_its_argument_alone() -> None:
    config = experiment()
    replace(config, {"model.slow.hidden_size": 11, "training.seed": 5})
    assert config == experiment()


def test_replace_of_nothing_is_an_equal_configuration() -> None:
    assert replace(experiment(), {}) == experiment()


def test_replace_takes_what_flatten_gives() -> None:
    other = ExperimentConfig(
        model=FSRUMConfig(), task=CharacterLMConfig(), training=TrainingConfig(seed=4)
    )
    assert replace(other, flatten(experiment())) == experiment()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("model.slow.hiden_size", "model.slow.hidden_size"),
        ("model.slow.lambda", "model.slow.lambda_"),
        ("training.learning_rat", "training.learning_rate"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(experiment(), {"training.seed": 1, name: 1})
    assert str(error.value) == f"unknown option {name!r}; did you mean {meant!r}?"


@pytest.mark.parametrize("name", ["model.slow", "training", "model.slow.eta.x", ""])
def test_a_section_is_not_an_option(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown option"):
        replace(experiment(), {name: 1})


def test_a_name_like_no_other_gets_no_hint() -> None:
    assert nearest("zzzzzz", ["hidden_size", "eta"]) == ""
    assert nearest("hidden_sice", ["eta", "hidden_size"]) == "; did you mean 'hidden_size'?"


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("model.slow.hidden_size", 5.0, "int, got 5.0"),
        ("model.slow.hidden_size", True, "int, got True"),
        ("model.slow.hidden_size", "5", "int, got '5'"),
        ("model.slow.hidden_size", None, "int, got None"),
        ("model.slow.zoneout", "0.1", "float, got '0.1'"),
        ("model.slow.zoneout", True, "float, got True"),
        ("model.slow.zoneout", None, "float, got None"),
        ("model.slow.eta", "none", "float or null, got 'none'"),
        ("model.slow.eta", False, "float or null, got False"),
        ("model.slow.layer_norm", 1, "bool, got 1"),
        ("model.slow.layer_norm", "yes", "bool, got 'yes'"),
        ("model.slow.activation", 3, "str, got 3"),
        ("model.slow.activation", None, "str, got None"),
        ("task.train_characters", 10.0, "int or null, got 10.0"),
        ("training.schedule.drop_at", [0.5], "float, got [0.5]"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any, must: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(experiment(), {name: value})
    assert str(error.value) == f"{name} must be {must}"


@pytest.mark.parametrize("name", ["model.slow.eta", "task.train_characters", "training.threads"])
def test_null_is_taken_where_the_type_has_it(name: str) -> None:
    assert flatten(replace(experiment(), {name: None}))[name] is None


def test_an_int_may_stand_for_a_float_and_becomes_one() -> None:
    config = replace(experiment(), {"model.slow.eta": 2, "training.learning_rate": 1})
    for name in ("model.slow.eta", "training.learning_rate"):
        value = flatten(config)[name]
        assert type(value) is float
    assert flatten(config)["model.slow.eta"] == 2.0


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, int),
        (2.5, float),
        ("x", str),
        (True, bool),
        (None, float | None),
        (7, int | None),
        (1.5, float | None),
    ],
)
def test_convert_gives_back_what_fits(value: Any, hint: Any) -> None:
    got = convert(value, hint, "option")
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.slow.zoneout", 1.0, r"^model\.slow\.zoneout must be in \[0, 1\), got 1\.0"),
        ("model.fast.hidden_size", 0, r"^model\.fast\.hidden_size must be an integer >= 1, got 0"),
        (
            "model.slow.lambda_",
            -1,
            r"^model\.slow\.lambda_ must be in \[0, 1\] or a whole number",
        ),
        ("model.num_fast_cells", 1, r"^model\.num_fast_cells must be an integer >= 2, got 1"),
        ("training.learning_rate", 0.0, r"^training\.learning_rate must be a finite number > 0"),
        ("task.bptt_length", 0, r"^task\.bptt_length must be an integer >= 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_refused_under_its_dotted_name(
    name: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(experiment(), {name: value})
    section = name.split(".")[0]
    plain = unflatten({**flatten(experiment()), name: value})
    config = getattr(experiment(), section)
    with pytest.raises(ConfigError, match=message):
        from_plain(type(config), plain[section], section)


@pytest.mark.parametrize(
    "config",
    [
        *(MODELS[name]() for name in sorted(MODELS)),
        small_fs_rum(num_fast_cells=3),
        RUMConfig(eta=0.3, lambda_=1.0, num_layers=2),
        CharacterLMConfig(embedding_size=None),
        CopyingConfig(delay=3),
        TrainingConfig(schedule=ScheduleConfig(name="drop", drop_at=0.5), threads=2),
    ],
    ids=lambda config: getattr(config, "name", "training"),
)
def test_plain_values_rebuild_a_configuration(config: Any) -> None:
    rebuilt = from_plain(type(config), dataclasses.asdict(config), "section")
    assert rebuilt == config
    assert type(rebuilt) is type(config)


def test_plain_values_rebuild_the_parts_with_their_types() -> None:
    rebuilt = from_plain(FSRUMConfig, dataclasses.asdict(small_fs_rum()), "model")
    assert type(rebuilt.fast) is LSTMCellConfig
    assert type(rebuilt.slow) is RUMCellConfig


def test_missing_plain_values_take_the_defaults() -> None:
    assert from_plain(TrainingConfig, {"seed": 3}, "training") == TrainingConfig(seed=3)


def test_an_unknown_plain_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as error:
        from_plain(FSRUMConfig, {"slow": {"hidden_sizes": 5}}, "model")
    assert str(error.value) == (
        "unknown option model.slow.hidden_sizes; did you mean 'hidden_size'?"
    )


def test_a_plain_value_in_place_of_a_section_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.slow must be RUMCellConfig, got 5$"):
        from_plain(FSRUMConfig, {"slow": 5}, "model")


def test_a_plain_value_of_another_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.slow\.hidden_size must be int, got 5\.0$"):
        from_plain(FSRUMConfig, {"slow": {"hidden_size": 5.0}}, "model")


def test_a_whole_experiment_comes_back_from_plain_values() -> None:
    config = experiment()
    assert experiment_from_plain(dataclasses.asdict(config)) == config


@pytest.mark.parametrize("section", ["model", "task"])
def test_an_experiment_of_an_unknown_part_is_refused_with_the_choices(section: str) -> None:
    plain = dataclasses.asdict(experiment())
    plain[section]["name"] = "nothing"
    with pytest.raises(ConfigError, match=rf"{section}\.name must be one of .* got 'nothing'"):
        experiment_from_plain(plain)


def test_a_model_cannot_take_another_models_name() -> None:
    model: ModelConfig = RUMConfig()
    with pytest.raises(ConfigError, match=r"^name of this model must be 'rum', got 'lstm'$"):
        replace(model, {"name": "lstm"})


def test_a_schedule_out_of_range_is_refused_under_its_dotted_name() -> None:
    with pytest.raises(ConfigError, match=r"^training\.schedule\.drop_at must be in \(0, 1\)"):
        replace(experiment(), {"training.schedule.drop_at": 2.0})
