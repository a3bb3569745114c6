"""Associative recall: say the digit that followed a character (Ba et al. 2016).

For T = 6: `c 5 a 2 b 7 ? ? a` is answered `2`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rum.checks import check_at_least
from rum.errors import ConfigError
from rum.seeding import derive_seed
from rum.tasks.base import Batch, Task, TaskConfig, register_task

NUM_DIGITS = 10
QUERY = 0  # the symbol `?`


class RecallTask(Task):
    """Sequences of length T + 3: K = T / 2 pairs of key and digit, `? ?`, one of the keys.

    Symbols: 0 the query mark, 1..K the keys, K + 1 .. K + 10 the digits. The keys are a
    permutation of all K, the digits uniform, the asked key uniform. The target, at the last step
    only, is the digit (0-9) that followed the asked key. The three sets are drawn once, from
    `data_seed`; training walks through its set in order, again and again, never shuffled.

    Loss: mean cross-entropy in nats. Metric `accuracy`: share of sequences answered right.

    Source: paper section 4.2 and RUM-Tensorflow/recall_task.py.
    """

    metric = "accuracy"
    mode = "max"
    num_classes = NUM_DIGITS
    embedding_size = None
    initialization = "uniform"
    answers_last = True
    answer_steps = 1
    plateau_metric = "accuracy"
    vocabulary: list[int] = []  # noqa: RUF012  # abstract symbols

    def __init__(self, config: "RecallConfig") -> None:
        self._config = config
        self.corpus = f"T{config.length}"
        self.vocab_size = config.length // 2 + 1 + NUM_DIGITS
        self.steps_per_epoch = config.steps_per_epoch
        sizes = (config.train_size, config.validation_size, config.test_size)
        self.checksum = (
            f"generated-recall-{config.length}-{config.data_seed}-{'-'.join(map(str, sizes))}"
        )
        self.source = "generated"
        self.protocol = (
            f"accuracy of the answer; T {config.length}; {config.validation_size} fixed sequences"
        )
        self._sets = {
            split: _generate(
                config.length // 2, size, derive_seed("recall", config.data_seed, split)
            )
            for split, size in zip(("train", "validation", "test"), sizes, strict=True)
        }

    def training_batch(self, step: int) -> Batch:
        """The sequences of update `step`, going round the training set."""
        size = self._config.batch_size
        return self._batch("train", torch.arange(step * size, (step + 1) * size))

    def evaluation_batches(self, split: str, batch_size: int | None = None) -> Iterator[Batch]:
        """All of a split; the last batch may be smaller."""
        for indices in torch.arange(len(self._sets[split][0])).split(
            batch_size or self._config.batch_size
        ):
            yield self._batch(split, indices)

    def _batch(self, split: str, indices: Tensor) -> Batch:
        sequences, answers = self._sets[split]
        picked = indices % len(sequences)
        return Batch(
            sequences[picked].t().long().contiguous(),
            answers[picked].long().unsqueeze(0),
            carry_state=False,
        )

    def baselines(self) -> dict[str, float]:
        """Always the most frequent digit of the sequence, on validation; any digit: one in ten.

        The first asks to remember digits but not what they belong to: training finds it soon, and
        then stays there.
        """
        sequences, answers = self._sets["validation"]
        digits = sequences[:, 1 : self._config.length : 2].long() - self._config.length // 2 - 1
        counts = torch.zeros(len(digits), NUM_DIGITS).scatter_add_(
            1, digits, torch.ones(digits.shape)
        )
        hits = counts.argmax(1) == answers.long()
        return {
            "most_frequent_digit": hits.double().mean().item(),
            "memoryless": 1 / NUM_DIGITS,
        }


def _generate(num_keys: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences `(count, 2 num_keys + 3)` and answers `(count,)`, in the smallest integer type."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(count, num_keys, generator=generator).argsort(1)
    digits = torch.randint(NUM_DIGITS, (count, num_keys), generator=generator)
    asked = torch.randint(num_keys, (count, 1), generator=generator)
    sequences = torch.full((count, 2 * num_keys + 3), QUERY, dtype=torch.int16)
    sequences[:, 0 : 2 * num_keys : 2] = (keys + 1).short()
    sequences[:, 1 : 2 * num_keys : 2] = (digits + num_keys + 1).short()
    sequences[:, -1] = (keys.gather(1, asked) + 1).squeeze(1).short()
    return sequences, digits.gather(1, asked).squeeze(1).short()


@register_task
@dataclass(kw_only=True)
class RecallConfig(TaskConfig):
    """Associative recall; the defaults are the T = 30 column of the paper's Table 1."""

    name: str = "recall"
    length: int = 30
    """T of the paper, even and >= 2: T / 2 pairs of key and digit."""
    steps_per_epoch: int = 1000
    """Updates between two validations (released: 1000, 100 times)."""
    train_size: int = 100_000
    """Sequences of the fixed training set."""
    validation_size: int = 10_000
    test_size: int = 20_000
    data_seed: int = 0
    """Of the three sets; the same for all models and training seeds."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the task does not accept."""
        super().__post_init__()
        check_at_least("length", self.length, 2)
        if self.length % 2:
            raise ConfigError(f"length must be even (pairs of key and digit), got {self.length}")
        for name in ("steps_per_epoch", "train_size", "validation_size", "test_size"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("data_seed", self.data_seed, 0)

    def load(self, *, seed: int, data_dir: Path | None = None) -> RecallTask:
        """Nothing is read: sequences are generated."""
        return RecallTask(self)
