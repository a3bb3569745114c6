"""Copying memory: repeat ten symbols after a delay (Hochreiter and Schmidhuber 1997).

For delay 3 and data 5 2 7 ...: `5 2 7 ... 0 0 9 0 0 0 ...` becomes `0 0 0 ... 5 2 7 ...`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rum.checks import check_at_least
from rum.seeding import derive_seed
from rum.tasks.base import Batch, Task, TaskConfig, Totals, register_task

NUM_SYMBOLS = 10  # symbols to copy
NUM_DATA_SYMBOLS = 8
BLANK = 0
MARKER = 9


class CopyingTask(Task):
    """Fresh sequences of length delay + 20 at every step.

    Input: ten data symbols (1-8, uniform), delay - 1 blanks (0), the marker (9) at index
    delay + 9, ten blanks. Target: delay + 10 blanks, then the ten symbols. Loss and metric:
    cross-entropy in nats, mean over *all* positions; accuracy likewise, so a model that always
    answers "blank" scores (delay + 10) / (delay + 20); `answer_accuracy` is over the ten answers.

    Source: paper section 4.1 and RUM-Tensorflow/copying_task.py.
    """

    metric = "cross_entropy"
    mode = "min"
    vocab_size = NUM_DATA_SYMBOLS + 2
    num_classes = NUM_DATA_SYMBOLS + 1  # the marker is never an answer
    embedding_size = None
    initialization = "uniform"
    answer_steps = NUM_SYMBOLS
    plateau_metric = "answer_accuracy"
    vocabulary: list[int] = []  # noqa: RUF012  # same for all instances, never changed
    source = "generated"

    def __init__(self, config: "CopyingConfig", seed: int) -> None:
        self._config = config
        self._seed = seed
        self.corpus = f"T{config.delay}"
        self.steps_per_epoch = config.steps_per_epoch
        self.checksum = f"generated-copying-{config.delay}"
        self.protocol = (
            f"cross_entropy in nats over all positions; delay {config.delay}; "
            f"{config.evaluation_batches} x {config.batch_size} fixed sequences"
        )

    def _batch(self, batch_size: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        size = (NUM_SYMBOLS, batch_size)
        data = torch.randint(1, NUM_DATA_SYMBOLS + 1, size, generator=generator)
        delay = self._config.delay
        input = torch.full((delay + 2 * NUM_SYMBOLS, batch_size), BLANK)
        input[:NUM_SYMBOLS] = data
        input[delay + NUM_SYMBOLS - 1] = MARKER
        target = torch.full_like(input, BLANK)
        target[-NUM_SYMBOLS:] = data
        return Batch(input, target, carry_state=False)

    def training_batch(self, step: int) -> Batch:
        """Fresh sequences for every step."""
        return self._batch(self._config.batch_size, derive_seed(self._seed, "train", step))

    def evaluation_batches(self, split: str, batch_size: int | None = None) -> Iterator[Batch]:
        """The same sequences for every model and seed; the two splits have nothing in common."""
        size = batch_size or self._config.batch_size
        for index in range(self._config.evaluation_batches):
            yield self._batch(size, derive_seed("copying", split, index))

    def metrics(self, totals: Totals) -> dict[str, float]:
        """Cross-entropy in nats and accuracy over all positions; accuracy of the ten answers."""
        return {
            **super().metrics(totals),
            "answer_accuracy": totals.correct_answers / totals.answers,
        }

    def baselines(self) -> dict[str, float]:
        """A model without memory guesses the ten symbols: 10 ln 8 / (delay + 20) nats."""
        length = self._config.delay + 2 * NUM_SYMBOLS
        return {"memoryless": NUM_SYMBOLS * math.log(NUM_DATA_SYMBOLS) / length}


@register_task
@dataclass(kw_only=True)
class CopyingConfig(TaskConfig):
    """Copying memory; the defaults are the T = 200 panel of the paper's Figure 2."""

    name: str = "copying"
    delay: int = 200
    """T of the paper, >= 1: the sequence has T + 20 symbols."""
    steps_per_epoch: int = 200
    """Updates between two validations; the task itself has no epochs."""
    evaluation_batches: int = 1
    """Batches of the validation and of the test set."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the task does not accept."""
        super().__post_init__()
        check_at_least("delay", self.delay, 1)
        check_at_least("steps_per_epoch", self.steps_per_epoch, 1)
        check_at_least("evaluation_batches", self.evaluation_batches, 1)

    def load(self, *, seed: int, data_dir: Path | None = None) -> CopyingTask:
        """Nothing is read: sequences are generated."""
        return CopyingTask(self, seed)
