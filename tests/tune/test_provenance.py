"""What a run says of itself: above all the command that repeats it."""

import itertools
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import rum
from rum.cells import FSLSTMConfig, FSRUMConfig, LSTMCellConfig, LSTMConfig, RUMConfig
from rum.cells.rum import RUMCellConfig, UpperRUMConfig
from rum.configs import register_configs
from rum.experiment import ExperimentConfig
from rum.tasks import CharacterLMConfig, CopyingConfig
from rum.training.config import ScheduleConfig, TrainingConfig
from rum.tune.provenance import command, common_tags, lambda_of, option_text, trial_tags

ROOT = Path(__file__).parents[2]
EXPERIMENTS = {
    "defaults": ExperimentConfig(model=RUMConfig(), task=CopyingConfig()),
    "nested": ExperimentConfig(
        model=FSRUMConfig(
            fast=LSTMCellConfig(hidden_size=24, zoneout_c=0.125),
            slow=RUMCellConfig(hidden_size=32, eta=0.3, lambda_=1),
            dropout=1e-05,
        ),
        task=CharacterLMConfig(corpus="pydoc", embedding_size=None, train_characters=4000),
        training=TrainingConfig(
            seed=7,
            threads=2,
            learning_rate=0.00123456789012345,
            schedule=ScheduleConfig(name="drop", drop_at=0.7),
            max_grad_norm=None,
        ),
    ),
    "a file with backslashes": ExperimentConfig(
        model=RUMConfig(), task=CharacterLMConfig(corpus="/tmp/a\\b\\'c\\.txt")
    ),
    "a file with blanks and quotes": ExperimentConfig(
        model=LSTMConfig(layer_norm=True),
        task=CharacterLMConfig(corpus='/tmp/it\'s, my "text" (1) = {x}.txt'),
    ),
}


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(experiment, id=name) for name, experiment in EXPERIMENTS.items()],
)
def test_the_command_of_a_run_composes_to_the_same_experiment(
    experiment: ExperimentConfig,
) -> None:
    python, script, *overrides = shlex.split(command(experiment))
    assert (python, script) == ("python", "pipelines/train.py")
    register_configs()
    with initialize_config_dir(str(ROOT / "search_spaces"), version_base="1.3"):
        config: Any = OmegaConf.to_object(compose("train", overrides))
    assert config.model == experiment.model
    assert config.task == experiment.task
    assert config.training == experiment.training


def test_a_runs_tags_say_model_lambda_seed_device_and_command() -> None:
    experiment = EXPERIMENTS["nested"]
    assert trial_tags(experiment) == {
        "rum.model": "fs_rum",
        "rum.lambda": "1",
        "rum.seed": "7",
        "rum.device": "cpu",
        "rum.command": command(experiment),
    }


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (RUMConfig(), "0"),
        (RUMConfig(lambda_=1), "1"),
        (LSTMConfig(), "none"),
        (FSLSTMConfig(), "none"),
    ],
)
def test_lambda_of_a_model(model: Any, expected: str) -> None:
    assert lambda_of(model) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (0.25, "0.25"),
        ("pre_sigmoid", "pre_sigmoid"),
        ("it's", r"'it\'s'"),
        ("", "''"),
        (r"a\b", r"'a\b'"),
    ],
)
def test_an_option_is_written_as_in_an_override(value: object, text: str) -> None:
    assert option_text(value) == text


@pytest.mark.parametrize("length", range(1, 6))
def test_hydra_reads_any_row_of_backslashes_quotes_and_letters_as_it_was(length: int) -> None:
    parser = OverridesParser.create()
    for letters in itertools.product("\\'a", repeat=length):
        value = "".join(letters)
        assert parser.parse_override(f"x={option_text(value)}").value() == value


def test_common_tags_say_data_metric_and_versions() -> None:
    task = CopyingConfig(delay=3).load(seed=0)
    tags = common_tags(task, "copying")
    expected = {
        "rum.task": "copying",
        "rum.corpus": "T3",
        "rum.data_checksum": task.checksum,
        "rum.metric": "cross_entropy",
        "rum.protocol": task.protocol,
        "rum.version": rum.__version__,
    }
    assert {key: tags[key] for key in expected} == expected
    assert torch.__version__.startswith(tags["rum.torch"].split("+")[0])
    assert {"rum.ray", "rum.optuna", "rum.mlflow", "rum.python", "mlflow.user"} <= set(tags)


def test_common_tags_name_the_commit_of_the_checkout() -> None:
    inside = subprocess.run(
        ["git", "ls-files", "--error-unmatch", "rum/__init__.py"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if inside.returncode != 0:
        pytest.skip("this is no checkout")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tags = common_tags(CopyingConfig(delay=3).load(seed=0), "copying")
    assert tags["mlflow.source.git.commit"] == head.stdout.strip()
    assert tags["rum.git_dirty"] in ("true", "false")


def test_the_powers_are_those_that_are_given() -> None:
    assert lambda_of(RUMConfig(lambda_=0.5)) == "0.5"
    upper = UpperRUMConfig(lambda_=1.0)
    assert lambda_of(RUMConfig(num_layers=2, lambda_=0.5, upper=upper)) == "0.5 1"
