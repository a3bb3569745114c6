"""Everything below search_spaces/ composes, fits the typed options, and is used."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from optuna.samplers import RandomSampler

from rum.cells import MODELS
from rum.configs import register_configs
from rum.errors import ConfigError
from rum.experiment import ExperimentConfig
from rum.parameters import flatten
from rum.tasks import CharacterLMConfig
from rum.train import TrainConfig
from rum.tune.config import (
    SAMPLERS,
    SCHEDULERS,
    EvaluateConfig,
    ResumeConfig,
    SearchConfig,
)
from rum.tune.space import apply, check_space, suggest

ROOT = Path(__file__).parents[1] / "search_spaces"
PRIMARIES = sorted(path.stem for path in ROOT.glob("*.yaml") if path.stem != "pipeline")
SPACES = sorted(path.stem for path in (ROOT / "space").glob("*.yaml"))
PRESETS = sorted(path.stem for path in (ROOT / "preset").glob("*.yaml"))
REQUIRED = {"resume": ["study=s"], "evaluate": ["checkpoint=c"]}


@pytest.fixture(autouse=True)
def hydra_root() -> Iterator[None]:
    register_configs()
    with initialize_config_dir(str(ROOT), version_base="1.3"):
        yield


def options(primary: str, *overrides: str) -> Any:
    """The typed configuration of a primary, with what it cannot do without."""
    return OmegaConf.to_object(compose(primary, [*REQUIRED.get(primary, []), *overrides]))


def search(space: str) -> SearchConfig:
    model, preset = space.split("__")
    config = options("tune_ptb", f"model={model}", f"preset={preset}")
    assert isinstance(config, SearchConfig)
    return config


# What there is


def test_each_pipeline_has_a_primary_configuration() -> None:
    pipelines = sorted(path.stem for path in (ROOT.parent / "pipelines").glob("*.py"))
    assert pipelines == PRIMARIES


@pytest.mark.parametrize(
    ("primary", "schema"),
    [
        ("tune_ptb", SearchConfig),
        ("train", TrainConfig),
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
        for group in entry
        if "/" not in group
    }
    assert {path.name for path in ROOT.iterdir() if path.is_dir()} == used - {"model", "task"}


def test_every_model_has_a_space_for_every_preset() -> None:
    assert sorted(f"{model}__{preset}" for model in MODELS for preset in PRESETS) == SPACES


# Spaces


@pytest.mark.parametrize("space", SPACES)
def test_a_space_passes_the_checks_with_its_model_and_preset(space: str) -> None:
    config = search(space)
    assert f"{config.model.name}__{config.preset}" == space
    assert list(config.space) == list(OmegaConf.load(ROOT / "space" / f"{space}.yaml"))
    check_space(config, config.space)


@pytest.mark.parametrize("space", SPACES)
def test_every_sample_of_a_space_is_a_valid_experiment_with_just_its_values(space: str) -> None:
    config = search(space)
    base = ExperimentConfig(model=config.model, task=config.task, training=config.training)
    before = flatten(base)
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    drawn = [suggest(study.ask(), config.space) for _ in range(200)]
    for values in drawn:
        assert flatten(apply(base, values)) == {**before, **values}
    conditional = {name for name, domain in config.space.items() if domain.when}
    assert conditional
    assert {name for values in drawn for name in values} == set(config.space)
    for name, domain in config.space.items():
        for values in drawn:
            holds = all(values.get(k) == v for k, v in (domain.when or {}).items())
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


@pytest.mark.parametrize("primary", PRIMARIES)
def test_the_commands_in_help_work(primary: str) -> None:
    commands = examples(primary)
    assert commands
    for script, *overrides in commands:
        assert script == f"pipelines/{primary}.py"
        cfg = compose(primary, [o.replace("<name>", "name") for o in overrides])
        for override in overrides:
            name, value = override.split("=", 1)
            if name not in ("model", "task", "tracking", "preset"):
                expected = value.replace("<name>", "name")
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
