"""What every task promises: data by position, loss, metric with its unit, and a baseline."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

from rum.checks import check_at_least
from rum.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """Symbols of a batch, time first."""

    input: Tensor
    """`(T, B)`, integers in [0, vocab_size)."""
    target: Tensor
    """`(T, B)`, or `(1, B)` where the task answers last: integers in [0, num_classes)."""
    carry_state: bool
    """Whether the state after the previous batch goes on here (else it starts afresh)."""
    part: str = ""
    """What an evaluation also scores apart, as `<metric>_<part>`; empty where there is no such."""


@dataclass(frozen=True)
class Totals:
    """Sums over everything an evaluation scored."""

    cross_entropy: float
    """Negative log-likelihood in nats, summed."""
    correct: int
    """Predictions that hit the target."""
    count: int
    """Targets."""
    correct_answers: int
    """Predictions that hit the target at the task's `answer_steps`."""
    answers: int
    """Targets there."""


class Task(ABC):
    """Data, loss and metric; states the sizes of a model and never builds one.

    Training data is a function of the step alone, so that a resumed run sees the same batches.

    Attributes:
        corpus: What the task runs on, short, for names of studies and models.
        metric: Name of the selection metric, unit in the name or in the class docstring.
        mode: "min" or "max".
        vocab_size: Number of input symbols.
        num_classes: Number of output classes.
        embedding_size: Features of a learned embedding, None for one-hot inputs.
        initialization: Of embedding and read-out; see `rum.models.SequenceModel`.
        answers_last: Whether only the last step has a target.
        answer_steps: The last so many targets are the answer that needs memory; None for all.
        plateau_metric: Metric of a task on which training sits at the baseline and then breaks
            through: it is reported when it reached 0.9 and 0.99. None for other tasks.
        story: Of questions about stories: length of the question and symbols that end a sentence.
        steps_per_epoch: Updates between two validations.
        checksum: Identifies the data.
        protocol: How the validation metric is taken; values compare only where it is equal.
        vocabulary: The input symbols in the order of their numbers; empty where they are abstract.
        source: Where the data came from, for people.
    """

    corpus: str
    metric: str
    mode: str
    vocab_size: int
    num_classes: int
    embedding_size: int | None
    initialization: str
    answers_last: bool = False
    answer_steps: int | None = None
    plateau_metric: str | None = None
    story: tuple[int, tuple[int, ...]] | None = None
    steps_per_epoch: int
    checksum: str
    protocol: str
    vocabulary: list[int] | list[str]
    source: str

    @abstractmethod
    def training_batch(self, step: int) -> Batch:
        """The batch of update number `step`, counted from 0 over all epochs."""

    @abstractmethod
    def evaluation_batches(self, split: str, batch_size: int | None = None) -> Iterator[Batch]:
        """All of "validation" or "test", in order; `batch_size` None takes the protocol's."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The scalar that training minimises, from `(T, B, num_classes)` and a target.

        By default cross-entropy in nats, the mean over all targets.
        """
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    def training_metrics(self, mean_loss: float) -> dict[str, float]:
        """What the mean training loss of an epoch means in the metric's unit."""
        return {"cross_entropy": mean_loss}

    def metrics(self, totals: Totals) -> dict[str, float]:
        """Metrics of an evaluation, by name without prefix.

        By default accuracy over all targets, and cross-entropy in nats.
        """
        return {
            "accuracy": totals.correct / totals.count,
            "cross_entropy": totals.cross_entropy / totals.count,
        }

    @abstractmethod
    def baselines(self) -> dict[str, float]:
        """What a memoryless or short-memory model reaches, in the metric's unit.

        The first is the plateau: where training may stay for long before it breaks through.
        """

    @property
    def plateau(self) -> float:
        """The baseline at which training may stay for long before it breaks through."""
        return next(iter(self.baselines().values()))

    @property
    def headline_batch_sizes(self) -> tuple[int | None, ...]:
        """Batch sizes of a test evaluation, the headline first; None is the protocol's."""
        return (None,)


@dataclass(kw_only=True)
class TaskConfig(ABC):
    """The typed options of a task: one option of `task=`."""

    name: str = "???"
    """Registry key; each task sets its own."""
    batch_size: int = 128
    """Sequences in a batch."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the task does not accept."""
        registered = next((key for key, value in TASKS.items() if value is type(self)), self.name)
        if self.name != registered:
            raise ConfigError(f"name of this task must be {registered!r}, got {self.name!r}")
        check_at_least("batch_size", self.batch_size, 1)

    @abstractmethod
    def load(self, *, seed: int, data_dir: Path | None = None) -> Task:
        """Reads or prepares the data.

        Args:
            seed: Of generated data.
            data_dir: Where corpora are looked for first.

        Raises:
            DataError: If a corpus is missing or altered.
        """


TASKS: dict[str, type[TaskConfig]] = {}
"""Every task by name: an option of `task=` in Hydra and the key in a checkpoint."""

_Config = TypeVar("_Config", bound=type[TaskConfig])


def register_task(config: _Config) -> _Config:
    """Class decorator: makes a task known under its default `name`.

    Raises:
        ValueError: If the name is taken.
    """
    name = config.name
    if name in TASKS:
        raise ValueError(f"task {name!r} is registered twice")
    TASKS[name] = config
    return config
