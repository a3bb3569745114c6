"""An experiment: one model, one task, one training; the one place where the three meet."""

import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rum.memory_network  # noqa: F401  # registers the one model that is not in rum.cells
from rum.cells import MODELS, ModelConfig, StoryLayout
from rum.errors import CheckpointError, ConfigError
from rum.models import ModelSizes, build_model, build_on_meta, count_parameters
from rum.parameters import flatten, from_plain
from rum.plugins import load_plugins
from rum.tasks import TASKS, Task, TaskConfig
from rum.training.checkpoint import Checkpoint, CheckpointStore, load_state
from rum.training.config import TrainingConfig
from rum.training.loop import Progress, Report, Trainer, Turn, train

WEIGHTLESS = ("zoneout", "zoneout_h", "zoneout_c", "eta", "dropout")
"""Options of models that change no weight's shape or meaning: they may change in mid-training."""


@dataclass(kw_only=True)
class ExperimentConfig:
    """Everything that decides what a training run computes."""

    model: ModelConfig
    task: TaskConfig
    training: TrainingConfig = field(default_factory=TrainingConfig)


def experiment_from_plain(plain: Mapping[str, Any]) -> ExperimentConfig:
    """Rebuilds a configuration from `dataclasses.asdict` of it, as kept in a checkpoint.

    Raises:
        ConfigError: If a name or value is not known to this version.
    """
    load_plugins()
    sections: dict[str, Any] = {}
    registries: dict[str, Mapping[str, type]] = {"model": MODELS, "task": TASKS}
    for section, registry in registries.items():
        name = plain.get(section, {}).get("name")
        if name not in registry:
            raise ConfigError(f"{section}.name must be one of {sorted(registry)}, got {name!r}")
        sections[section] = from_plain(registry[name], plain[section], section)
    training = from_plain(TrainingConfig, plain.get("training", {}), "training")
    return ExperimentConfig(model=sections["model"], task=sections["task"], training=training)


def model_sizes(task: Task) -> ModelSizes:
    """What a model needs to know of a task."""
    return ModelSizes(
        vocab_size=task.vocab_size,
        num_classes=task.num_classes,
        embedding_size=task.embedding_size,
        initialization=task.initialization,
        answers_last=task.answers_last,
        story=None if task.story is None else StoryLayout(*task.story),
    )


def parameter_count(config: ModelConfig, task: Task) -> int:
    """Number of trainable scalars, computed without building the weights."""
    return count_parameters(build_on_meta(config, model_sizes(task)))


def check_device(device: str) -> None:
    """Raises ConfigError if torch cannot compute on `device` here."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"training.device is {device!r}, but torch sees no CUDA device here")


def run_experiment(
    config: ExperimentConfig,
    task: Task,
    folder: Path,
    report: Callable[[Report], None],
    *,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    begin_from: Checkpoint | None = None,
    last_epoch: int | None = None,
) -> Progress:
    """Trains, from the last checkpoint in `folder` if there is one.

    Args:
        config: What to train.
        task: `config.task`, loaded.
        folder: Where the run's checkpoints are and go.
        report: Called after each epoch.
        on_step: Called after each update with its number in the epoch and their count.
        begin_from: Checkpoint of another run to go on from where `folder` has none.
        last_epoch: Where to stop before `max_epochs`, which the schedule still goes by.

    Raises:
        DivergedError: If loss or gradient norm is not finite.
        CheckpointError: If the checkpoint is damaged or does not fit.
        SupersededError: If another process has gone on with this run meanwhile.
    """
    check_device(config.training.device)
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    random.seed(config.training.seed)
    torch.manual_seed(config.training.seed)
    model = build_model(config.model, model_sizes(task))
    trainer = open_trainer(
        config, task, folder, model, begin_from=begin_from, last_epoch=last_epoch
    )

    def decide(turn: Turn, lanes: list[Trainer]) -> list[Trainer]:
        for _, error in turn.errors:
            raise error
        for _, each in turn.reports:
            report(each)
        return lanes

    def count(lane: Trainer) -> None:
        on_step((lane.step_in_epoch or task.steps_per_epoch), task.steps_per_epoch)

    train([trainer], decide, on_step=count)
    return trainer.progress


def open_trainer(
    config: ExperimentConfig,
    task: Task,
    folder: Path,
    model: nn.Module,
    *,
    begin_from: Checkpoint | None = None,
    last_epoch: int | None = None,
    generator: torch.Generator | None = None,
) -> Trainer:
    """Takes a run up where it stands.

    Args:
        config: What to train.
        task: `config.task`, loaded.
        folder: Where the run's checkpoints are and go.
        model: `config.model`, built.
        begin_from: Checkpoint of another run to go on from where `folder` has none.
        last_epoch: Where to stop before `max_epochs`, which the schedule still goes by.
        generator: Of the model's masks; None: torch's default generator.

    Raises:
        CheckpointError: If the checkpoint is damaged or does not fit.
    """
    store = CheckpointStore(folder)
    trainer = Trainer(
        model,
        task,
        config.training,
        store,
        describe(config, task),
        last_epoch=last_epoch,
        generator=generator,
    )
    store.claim()
    checkpoint = store.last()
    if checkpoint is not None:
        _check_same_model(config, checkpoint)
        trainer.restore(checkpoint)
    elif begin_from is not None:
        _check_same_model(config, begin_from, apart_from=WEIGHTLESS)
        trainer.restore(begin_from)
        # The origin keeps its reports and its best weights: here both begin afresh.
        origin = trainer.progress
        trainer.progress = Progress(step=origin.step, before=[*origin.before, *origin.reports])
    return trainer


def describe(config: ExperimentConfig, task: Task) -> dict[str, Any]:
    """What every checkpoint of a run says of itself."""
    return {
        "experiment": dataclasses.asdict(config),
        "task": {
            "checksum": task.checksum,
            "vocabulary": task.vocabulary,
            "steps_per_epoch": task.steps_per_epoch,
            "metric": task.metric,
            "mode": task.mode,
            "protocol": task.protocol,
            "corpus": task.corpus,
        },
        "torch": torch.__version__,
    }


def _check_same_model(
    config: ExperimentConfig, checkpoint: Checkpoint, apart_from: tuple[str, ...] = ()
) -> None:
    before = flatten(checkpoint.description.get("experiment", {}).get("model") or {})
    now = flatten(dataclasses.asdict(config.model))
    different = [
        f"{name}: {before.get(name)}, expected {now.get(name)}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name) and name.rpartition(".")[2] not in apart_from
    ]
    if different:
        raise CheckpointError(f"{checkpoint.path} is of another model: {'; '.join(different)}")


def load_model(checkpoint: Checkpoint, task: Task, device: str) -> nn.Module:
    """Builds the model of a checkpoint with its weights.

    Raises:
        CheckpointError: If it does not fit the task's symbols.
    """
    described = checkpoint.description
    if described.get("task", {}).get("vocabulary") != task.vocabulary:
        raise CheckpointError(
            f"{checkpoint.path} was trained on corpus "
            f"{described.get('task', {}).get('corpus')!r} with other symbols than {task.corpus!r}"
        )
    config = experiment_from_plain(described["experiment"])
    model = build_model(config.model, model_sizes(task))
    try:
        model.load_state_dict(load_state(checkpoint, device)["model"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} is of another model: {error}") from error
    return model.to(device)
