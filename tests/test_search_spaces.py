"""Everything below search_spaces/ composes, fits the typed options, and is used."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from optuna.samplers import RandomSampler

from rum.cells import MODELS, StoryLayout
from rum.configs import register_configs
from rum.errors import ConfigError
from rum.experiment import ExperimentConfig
from rum.models import ModelSizes, build_on_meta, count_parameters
from rum.parameters import flatten
from rum.setting import ProfileConfig
from rum.tasks import TASKS, CharacterLMConfig
from rum.train import TrainConfig
from rum.tune.config import (
    SAMPLERS,
    SCHEDULERS,
    CheckConfig,
    EvaluateConfig,
    ResumeConfig,
    SearchConfig,
    StudyConfig,
)
from rum.tune.sizing import fitting
from rum.tune.space import apply, check_space, suggest

ROOT = Path(__file__).parents[1] / "search_spaces"
PRIMARIES = sorted(path.stem for path in ROOT.glob("*.yaml") if path.stem != "pipeline")
SPACES = sorted(path.stem for path in (ROOT / "space").glob("*.yaml"))
EXPERIMENTS = sorted(
    path.relative_to(ROOT / "experiment").with_suffix("").as_posix()
    for path in (ROOT / "experiment").rglob("*.yaml")
)
PRESETS = sorted(path.stem for path in (ROOT / "preset").glob("*.yaml"))
FIGURES = ("figure2", "figure4", "figure6")
PIPELINE = {
    "copying": "tune_copying",
    "recall": "tune_recall",
    "babi": "tune_babi",
    "character_lm": "tune_ptb",
}
REQUIRED = {"resume": ["study=s"], "evaluate": ["checkpoint=c"], "check": ["study=s"]}


@pytest.fixture(autouse=True)
def hydra_root() -> Iterator[None]:
    register_configs()
    with initialize_config_dir(str(ROOT), version_base="1.3"):
        yield


@lru_cache(maxsize=1000)  # composing takes a tenth of a second; nobody changes what it gives
def options(primary: str, *overrides: str) -> Any:
    """The typed configuration of a primary, with what it cannot do without."""
    return OmegaConf.to_object(compose(primary, [*REQUIRED.get(primary, []), *overrides]))


def search(space: str) -> SearchConfig:
    """The search that takes a space by default; for `memory` that of bAbI: every model does it.

    A space that is no preset's own is chosen by name.
    """
    model, variant = space.split("__")
    pipeline = "tune_babi" if variant == "memory" else "tune_ptb"
    preset = variant if variant in PRESETS else "quick"
    by_name = [] if variant in (*PRESETS, "memory") else [f"space={space}"]
    config = options(pipeline, f"model={model}", f"preset={preset}", *by_name)
    assert isinstance(config, SearchConfig)
    return config


# What there is


def test_each_pipeline_has_a_primary_configuration() -> None:
    pipelines = sorted(path.stem for path in (ROOT.parent / "pipelines").glob("*.py"))
    assert pipelines == PRIMARIES


@pytest.mark.parametrize(
    ("primary", "schema"),
    [
        *((f"tune_{task}", SearchConfig) for task in ("ptb", "copying", "recall", "babi")),
        ("train", TrainConfig),
        ("check", CheckConfig),
        ("study", StudyConfig),
        ("resume", ResumeConfig),
        ("evaluate", EvaluateConfig),
    ],
)
def test_each_primary_composes_to_its_typed_options(primary: str, schema: type) -> None:
    assert type(options(primary)) is schema


@pytest.mark.parametrize("primary", PRIMARIES)
def test_no_pipeline_lets_hydra_write_files_or_change_folders(primary: str) -> None:
    cfg = compose(primary, REQUIRED.get(primary, []), return_hydra_config=True)
    assert cfg.hydra.run.dir == "."
    assert cfg.hydra.output_subdir is None
    assert cfg.hydra.job.chdir is False
    assert "file" not in str(cfg.hydra.job_logging.handlers)


def test_every_folder_is_a_group_of_options_that_some_pipeline_has() -> None:
    used = {
        str(group)
        for primary in PRIMARIES
        for entry in OmegaConf.load(ROOT / f"{primary}.yaml").defaults
        if not isinstance(entry, str)
        for group in (name.removeprefix("optional ") for name in entry)
        if "/" not in group
    }
    assert {path.name for path in ROOT.iterdir() if path.is_dir()} == used - {"model", "task"}


def test_every_model_has_a_space_and_every_space_a_model() -> None:
    assert {space.split("__")[0] for space in SPACES} == set(MODELS)
    by_default = {space for space in SPACES if space.split("__")[1] in (*PRESETS, "memory")}
    assert set(SPACES) - by_default == {
        "rum__schedule",
        "rum__layers",
        "fs_rum__cells",
        "fs_rum__budget",
    }


def test_the_family_of_the_paper_has_a_space_everywhere() -> None:
    everywhere = {f"{model}__{kind}" for model in ("rum", "lstm", "gru") for kind in PRESETS}
    assert everywhere | {"rum__memory", "lstm__memory", "gru__memory"} <= set(SPACES)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("task", PIPELINE)
def test_every_searched_task_has_a_budget_for_every_preset(task: str, preset: str) -> None:
    config = options(PIPELINE[task], f"preset={preset}")
    assert (config.task.name, config.preset) == (task, preset)
    assert config.scheduler.grace_epochs < config.training.max_epochs


@pytest.mark.parametrize("task", TASKS)
def test_every_task_says_how_it_is_trained(task: str) -> None:
    assert (ROOT / "training" / f"{task}.yaml").is_file()


# Published settings


@pytest.mark.parametrize("profile", ["reference", "paper"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_published_setting_composes_and_says_what_it_is(experiment: str, profile: str) -> None:
    config = options("train", f"experiment={experiment}", f"profile={profile}")
    assert isinstance(config, TrainConfig)
    assert (config.setting.name, config.profile.name) == (experiment, profile)
    assert config.setting.version >= 1
    assert config.setting.row
    assert (config.setting.published is None) == (config.setting.metric is None)
    text = (ROOT / "experiment" / f"{experiment}.yaml").read_text()
    assert f"python pipelines/train.py experiment={experiment}\n" in text
    assert f"source: {config.setting.source}\n" in text


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_published_setting_can_be_searched(experiment: str) -> None:
    single = options("train", f"experiment={experiment}", "profile=reference")
    pipeline = PIPELINE[single.task.name]
    config = options(pipeline, f"experiment={experiment}")
    assert (config.model, config.task, config.training) == (
        single.model,
        single.task,
        single.training,
    )
    check_space(config, config.space)


def test_there_is_a_setting_for_every_row_and_curve() -> None:
    count = {
        part: sum(name.startswith(f"{part}/") for name in EXPERIMENTS)
        for part in ("table1", "table2", "table3", "table4", "table7", *FIGURES)
    }
    assert count == {
        "table1": 5 * 2,  # systems, T = 30 and 50
        "table2": 4,
        "table3": 9,
        "table4": 4,  # columns; task.subtask chooses the row
        "table7": 8,
        "figure2": 6 * 3,  # curves, panels
        "figure4": 3,
        "figure6": 10,
    }


def test_published_numbers_are_those_of_the_paper() -> None:
    """From tables 1-3 and 7 of the paper, typed again."""
    expected = {
        "table1/lstm_30": 0.256,
        "table1/lstm_50": 0.205,
        "table1/goru_30": 0.218,
        "table1/goru_50": 0.189,
        "table1/fw_ln_30": 1.0,
        "table1/fw_ln_50": 0.208,
        "table1/weinet_reconstructed_30": 1.0,
        "table1/weinet_reconstructed_50": 1.0,
        "table1/rum_30": 1.0,
        "table1/rum_50": 1.0,
        "table2/lstm": 0.49,
        "table2/goru": 0.60,
        "table2/memn2n": 0.86,
        "table2/rum": 0.732,
        "table4/lstm": 0.5,
        "table4/goru": 0.46,
        "table4/memn2n": 1.0,
        "table4/rum": 0.797,
        "table3/zoneout_lstm": 1.27,
        "table3/rum_2000": 1.28,
        "table3/rum_1500_2_layers": 1.26,
        "table3/hm_lstm": 1.24,
        "table3/hyper_lstm": 1.219,
        "table3/nas": 1.214,
        "table3/fs_lstm_4": 1.193,
        "table3/fs_lstm_2": 1.190,
        "table3/fs_rum_2": 1.189,
        "table7/fs_lstm_4": 1.193,
        "table7/fs_lstm_2": 1.190,
        "table7/fs_rum_2_1000_1000": 1.194,
        "table7/fs_rum_2_1000_1200": 1.193,
        "table7/fs_rum_2_900_1200": 1.192,
        "table7/fs_rum_2_lr": 1.190,
        "table7/fs_rum_2_800_1100": 1.189,
        "table7/fs_rum_2": 1.189,
    }
    published = {
        name: options("train", f"experiment={name}", "profile=reference").setting.published
        for name in EXPERIMENTS
    }
    assert {k: v for k, v in published.items() if v is not None} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("system", "mean", "last"),
    [("rum", 0.73195, 0.98), ("lstm", 0.492, 0.91), ("goru", 0.606, 0.98), ("memn2n", 0.862, 1.0)],
)
def test_each_row_of_table_4_has_its_number(system: str, mean: float, last: float) -> None:
    rows = [
        options("train", f"experiment=table4/{system}", f"task.subtask={number}").setting.published
        for number in range(1, 21)
    ]
    assert sum(rows) / 20 == pytest.approx(mean)  # recomputed from the printed rows
    assert rows[-1] == last


@pytest.mark.parametrize(
    ("experiment", "parameters"),
    [
        # without the embedding bias, as counted in the specification; and with it
        ("table3/rum_2000", (8_890_450, 8_892_450)),
        ("table3/rum_1500_2_layers", (16_431_450, 16_434_450)),
        ("table3/fs_rum_2", (11_247_450, 11_248_450)),
        ("table7/fs_rum_2_800_1100", (14_187_250, 14_188_350)),
        ("table7/fs_rum_2_900_1200", (17_467_050, 17_468_250)),
        ("table7/fs_rum_2_1000_1000", (17_604_450, 17_605_450)),
        ("table7/fs_rum_2_1000_1200", (19_886_050, 19_887_250)),
        ("figure6/fs_rum_3", (8_818_450, 8_819_450)),
        ("table3/fs_lstm_2", (7_225_050, 7_225_050)),
        ("table3/fs_lstm_4", (6_565_050, 6_565_050)),
    ],
)
@pytest.mark.parametrize("embedding_bias", [False, True])
def test_settings_have_the_published_size(
    experiment: str, parameters: tuple[int, int], embedding_bias: bool
) -> None:
    config = options(
        "train",
        f"experiment={experiment}",
        f"profile.embedding_bias={str(embedding_bias).lower()}",
    )
    sizes = ModelSizes(
        vocab_size=50, num_classes=50, embedding_size=128, initialization="orthogonal"
    )
    assert count_parameters(build_on_meta(config.model, sizes)) == parameters[embedding_bias]


@pytest.mark.parametrize(
    ("experiment", "millions"), [("table3/hyper_lstm", 14.4), ("table3/nas", 16.3)]
)
def test_quoted_systems_have_the_quoted_size(experiment: str, millions: float) -> None:
    config = options("train", f"experiment={experiment}", "profile=reference")
    sizes = ModelSizes(
        vocab_size=50, num_classes=50, embedding_size=128, initialization="orthogonal"
    )
    assert round(count_parameters(build_on_meta(config.model, sizes)) / 1e6, 1) == millions


def test_profiles_set_every_option_and_differ_where_paper_and_code_do() -> None:
    reference, paper = (
        flatten(options("train", f"profile={name}").profile) for name in ("reference", "paper")
    )
    for name in ("reference", "paper"):
        given = OmegaConf.load(ROOT / "profile" / f"{name}.yaml")
        assert set(given) == {field.name for field in dataclasses.fields(ProfileConfig)}
    assert reference == flatten(ProfileConfig())
    assert {name for name in reference if reference[name] != paper[name]} == {
        "name",
        "recall_optimizer",
        "character_lm_schedule",
        "character_lm_epochs",
        "rum_dropout",
        "babi_epochs",
        "goru_zero_last_unit",
    }


@pytest.mark.parametrize(
    ("overrides", "option", "expected"),
    [
        (["task=recall"], "training.optimizer", "adam"),
        (["task=recall", "profile=paper"], "training.optimizer", "rmsprop_tensorflow"),
        (["task=recall", "profile.recall_optimizer=rmsprop"], "training.optimizer", "rmsprop"),
        (["task=copying"], "training.optimizer", "rmsprop_tensorflow"),
        (["task=copying"], "training.max_grad_norm", None),
        (["task=character_lm", "model=rum"], "training.max_grad_norm", 1.0),
        (["experiment=table3/rum_2000"], "model.dropout", 0.0),
        (["experiment=table3/rum_2000", "profile=paper"], "model.dropout", 0.35),
        (["experiment=table3/fs_rum_2"], "training.schedule.name", "drop"),
        (["experiment=table3/fs_rum_2", "profile=paper"], "training.schedule.name", "table6"),
        (["experiment=table1/goru_50"], "model.zero_last_unit", True),
        (["experiment=table1/goru_50", "profile=paper"], "model.zero_last_unit", False),
        (["experiment=table4/rum", "profile=paper"], "training.max_epochs", 28),
    ],
)
def test_a_profile_reaches_the_option(overrides: list[str], option: str, expected: Any) -> None:
    assert flatten(options("train", *overrides))[option] == expected


# Spaces


@pytest.mark.parametrize("space", SPACES)
def test_a_space_passes_the_checks_with_its_model_and_preset(space: str) -> None:
    config = search(space)
    assert config.model.name == space.split("__")[0]
    assert list(config.space) == list(OmegaConf.load(ROOT / "space" / f"{space}.yaml"))
    check_space(config, config.space)


@pytest.mark.parametrize("space", SPACES)
def test_every_sample_of_a_space_is_a_valid_experiment_with_just_its_values(space: str) -> None:
    config = search(space)
    base = ExperimentConfig(model=config.model, task=config.task, training=config.training)
    before = flatten(base)
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    sizes = ModelSizes(
        vocab_size=50,
        num_classes=50,
        embedding_size=32,
        initialization="orthogonal",
        story=StoryLayout(question_length=4, sentence_ends=(1,)),
    )
    fit = fitting(base, sizes)
    drawn = [suggest(study.ask(), config.space, fit) for _ in range(200)]
    models = {}
    for values in drawn:
        experiment = apply(base, values)
        assert flatten(experiment) == {**before, **values}
        models[repr(experiment.model)] = experiment.model
    budget = next((each.parameters for each in config.space.values() if each.parameters), None)
    for model in models.values():
        count = count_parameters(build_on_meta(model, sizes))
        assert count == (pytest.approx(budget, rel=0.01) if budget else count)
    assert {name for values in drawn for name in values} == set(config.space)
    for name, domain in config.space.items():
        for values in drawn:
            holds = all(
                k in values and (values[k] in v if isinstance(v, list) else values[k] == v)
                for k, v in (domain.when or {}).items()
            )
            assert (name in values) is holds


@pytest.mark.parametrize("space", SPACES)
def test_the_ends_of_a_range_are_a_whole_number_of_steps_apart(space: str) -> None:
    for name, domain in search(space).space.items():
        if domain.step is not None:
            assert domain.low is not None
            assert domain.high is not None
            assert (domain.high - domain.low) % domain.step == 0, name


def test_one_bound_is_changed_from_the_command_line_and_the_rest_stays() -> None:
    before = options("tune_ptb", "preset=quick").space
    after = options("tune_ptb", "preset=quick", "space={model.hidden_size: {high: 80}}").space
    assert after["model.hidden_size"].high == 80
    after["model.hidden_size"].high = before["model.hidden_size"].high
    assert after == before


@pytest.mark.parametrize("share", ["auto", 1, 0.25])
def test_the_share_of_a_gpu_is_a_number_or_a_word(share: str | float) -> None:
    given = options("tune_ptb", f"search.gpus_per_trial={share}").search.gpus_per_trial
    assert (type(given), given) == (type(share), share)


def test_a_misspelt_word_of_a_domain_is_refused() -> None:
    with pytest.raises(ConfigCompositionException, match="space"):
        compose("tune_ptb", ["preset=quick", "space={model.hidden_size: {hi: 80}}"])


# Samplers, schedulers, presets


@pytest.mark.parametrize(("group", "known"), [("sampler", SAMPLERS), ("scheduler", SCHEDULERS)])
def test_every_sampler_and_scheduler_is_an_option_and_every_option_is_one(
    group: str, known: tuple[str, ...]
) -> None:
    files = sorted(path.stem for path in (ROOT / group).glob("*.yaml"))
    assert files == sorted(known)
    for name in files:
        assert getattr(options("tune_ptb", f"{group}={name}"), group).name == name


@pytest.mark.parametrize("primary", PRIMARIES)
def test_runs_of_every_pipeline_can_be_recorded(primary: str) -> None:
    assert options(primary, "tracking=mlflow").tracking.name == "mlflow"


def test_a_single_run_need_not_be_recorded_and_a_search_must() -> None:
    assert options("train").tracking.name == "none"
    with pytest.raises(ConfigError, match="a search is recorded: tracking must be mlflow"):
        options("tune_ptb", "tracking=none")


def test_the_full_preset_is_the_papers_setting() -> None:
    config = options("tune_ptb")
    assert config.preset == "full"
    assert config.task == CharacterLMConfig(corpus="ptb", batch_size=128, bptt_length=150)
    assert config.training.max_epochs == 100
    assert config.model.name == "rum"
    assert (config.sampler.name, config.scheduler.name) == ("tpe", "asha")


def test_the_quick_preset_needs_no_download_and_few_epochs() -> None:
    config = options("tune_ptb", "preset=quick")
    assert config.preset == "quick"
    assert config.task.corpus == "pydoc"
    assert config.training.max_epochs <= 3
    assert config.search.num_trials <= 8


def test_an_option_on_the_command_line_wins_over_the_preset() -> None:
    config = options("tune_ptb", "preset=quick", "task.corpus=ptb", "search.num_trials=3")
    assert (config.task.corpus, config.search.num_trials) == ("ptb", 3)
    assert config.task.bptt_length == 50


# Help


def examples(primary: str) -> list[list[str]]:
    """Overrides of the commands in a primary's --help; what follows two blanks is a comment."""
    cfg = OmegaConf.load(ROOT / f"{primary}.yaml")
    assert isinstance(cfg, DictConfig)
    found = []
    for line in cfg.hydra.help.header.splitlines():
        if line.strip().startswith("python pipelines/"):
            command = re.split(r"\s{2,}", line.strip())[0]
            found.append([word for word in shlex.split(command)[1:] if word != "..."])
    return found


def _filled_in(override: str) -> str:
    """With a name in the place of <...>."""
    return re.sub(r"<\w+>", "name", override)


@pytest.mark.parametrize("primary", PRIMARIES)
def test_the_commands_in_help_work(primary: str) -> None:
    commands = examples(primary)
    assert commands
    for script, *overrides in commands:
        assert script == f"pipelines/{primary}.py"
        cfg = compose(primary, [_filled_in(o) for o in overrides])
        for override in overrides:
            name, value = override.split("=", 1)
            if name not in ("model", "task", "tracking", "preset", "experiment"):
                expected = _filled_in(value)
                assert str(OmegaConf.select(cfg, name)) in (expected, expected.capitalize())
        if primary not in REQUIRED or any(o.startswith("checkpoint=") for o in overrides):
            OmegaConf.to_object(cfg)


def test_the_options_in_the_help_of_a_search_exist() -> None:
    cfg = OmegaConf.load(ROOT / "tune_ptb.yaml")
    assert isinstance(cfg, DictConfig)
    names = set(re.findall(r"([a-z_.]+)=", cfg.hydra.help.header))
    assert {"sampler", "search.num_trials", "space", "study", "output_dir", "data_dir"} <= names
    groups = {path.name for path in ROOT.iterdir() if path.is_dir()} | {"model", "task"}
    known = flatten(OmegaConf.to_container(compose("tune_ptb")))
    assert names - groups <= set(known)
