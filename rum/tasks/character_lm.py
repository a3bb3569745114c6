"""Character-level language modelling: predict the next byte of a text.

Penn Treebank starts ` aer banknote berlitz calloway centrust cluett fromstein gitano ...`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rum.checks import check_at_least, check_choice
from rum.data.corpora import Corpus, load_corpus
from rum.errors import ConfigError, DataError
from rum.tasks.base import Batch, Task, TaskConfig, Totals, register_task

COUNTED_AT_ONCE = 10_000_000  # pairs of symbols, 80 MB


class CharacterLMTask(Task):
    """A stream of bytes in `batch_size` contiguous rows, read window by window.

    The stream is cut to a multiple of the batch size; window i of an epoch is columns
    [i T, i T + T), its target one to the right; what does not fill a window is dropped. The state
    is carried from window to window with the gradient cut, and starts from zero at each epoch and
    each evaluation. Symbols are numbered by (-frequency, byte) of the training text, or as another
    text's were.

    Loss: summed over the T steps of a window, mean over the batch, *before* gradient clipping.
    Metric `bits_per_character`: negative log2-likelihood over the characters scored; validation
    with the training batch size, test with batch sizes 1 (headline), 20 and 128.

    Source: paper section 4.4, RUM-Tensorflow/reader.py and ptb_task.py.
    """

    metric = "bits_per_character"
    mode = "min"
    initialization = "orthogonal"

    def __init__(
        self, config: "CharacterLMConfig", corpus: Corpus, vocabulary: list[int] | None = None
    ) -> None:
        self._config = config
        self.corpus = corpus.name
        self.source = corpus.source
        self.checksum = corpus.checksum
        self.embedding_size = config.embedding_size
        self._loss_divisor = config.bptt_length if config.loss_over_time == "mean" else 1
        train = corpus.train[: config.train_characters]
        parts = {"train": train, "validation": corpus.validation, "test": corpus.test}
        for split, text in parts.items():
            self._check_fills_window(split, len(text), config.batch_size)
        own = _vocabulary(corpus)
        self.vocabulary = vocabulary if vocabulary and set(own) <= set(vocabulary) else own
        self.vocab_size = self.num_classes = len(self.vocabulary)
        number = bytearray(256)
        for index, byte in enumerate(self.vocabulary):
            number[byte] = index
        self._streams = {
            split: torch.frombuffer(bytearray(text.translate(number)), dtype=torch.uint8)
            for split, text in parts.items()
        }
        self.steps_per_epoch = _num_windows(
            len(self._streams["train"]), config.batch_size, config.bptt_length
        )
        self._train_rows = _rows(self._streams["train"], config.batch_size)
        self.protocol = (
            f"bits_per_character of raw bytes; validation batch {config.batch_size}, "
            f"window {config.bptt_length}, carried state"
        )

    def _check_fills_window(self, split: str, num_symbols: int, batch_size: int) -> None:
        length = self._config.bptt_length
        if _num_windows(num_symbols, batch_size, length) < 1:
            raise DataError(
                f"{split} text of corpus {self.corpus!r} must fill a window of batch_size "
                f"{batch_size} x (bptt_length {length} + 1) characters, got {num_symbols}"
            )

    def training_batch(self, step: int) -> Batch:
        """Window `step` modulo the windows of an epoch."""
        return self._window(self._train_rows, step % self.steps_per_epoch)

    def evaluation_batches(self, split: str, batch_size: int | None = None) -> Iterator[Batch]:
        """All full windows of a split."""
        stream = self._streams[split]
        size = batch_size or self._config.batch_size
        self._check_fills_window(split, len(stream), size)
        rows = _rows(stream, size)
        for window in range(_num_windows(len(stream), size, self._config.bptt_length)):
            yield self._window(rows, window)

    def _window(self, rows: Tensor, window: int) -> Batch:
        length = self._config.bptt_length
        first = window * length
        return Batch(
            rows[first : first + length].long(),
            rows[first + 1 : first + length + 1].long(),
            carry_state=window > 0,
        )

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Nats, mean over the batch; summed over time, or the mean, as `loss_over_time` says."""
        total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        return total / (target.shape[1] * self._loss_divisor)

    def training_metrics(self, mean_loss: float) -> dict[str, float]:
        """Bits per character from the loss of a window."""
        steps = self._config.bptt_length / self._loss_divisor
        return {"bits_per_character": mean_loss / steps / math.log(2)}

    def metrics(self, totals: Totals) -> dict[str, float]:
        """Bits per character, and the share of characters predicted first."""
        return {
            "bits_per_character": totals.cross_entropy / totals.count / math.log(2),
            "accuracy": totals.correct / totals.count,
        }

    def baselines(self) -> dict[str, float]:
        """Unigram and bigram model of the training text on validation, counts plus one."""
        train, validation = self._streams["train"], self._streams["validation"].long()
        size = self.vocab_size
        unigram = torch.bincount(train, minlength=size).double() + 1
        unigram_bits = -(unigram / unigram.sum()).log2()
        pairs = torch.ones(size * size, dtype=torch.double)
        for first, second in zip(
            train[:-1].split(COUNTED_AT_ONCE), train[1:].split(COUNTED_AT_ONCE), strict=True
        ):
            pairs += torch.bincount(first.long() * size + second, minlength=size * size)
        pairs = pairs.view(size, size)
        bigram_bits = -(pairs / pairs.sum(1, keepdim=True)).log2()
        return {
            "unigram": unigram_bits[validation[1:]].mean().item(),
            "bigram": bigram_bits[validation[:-1], validation[1:]].mean().item(),
        }

    @property
    def headline_batch_sizes(self) -> tuple[int | None, ...]:
        """Batch 1 as at submission; 20 as in the code released later; 128 as in validation."""
        return (1, 20, 128)


def _vocabulary(corpus: Corpus) -> list[int]:
    """Bytes of the training text by (-frequency, byte), then those seen only elsewhere."""
    counts = torch.bincount(
        torch.frombuffer(bytearray(corpus.train), dtype=torch.uint8), minlength=256
    ).tolist()
    seen = set(corpus.train) | set(corpus.validation) | set(corpus.test)
    return sorted(seen, key=lambda byte: (-counts[byte], byte))


def _num_windows(num_symbols: int, batch_size: int, bptt_length: int) -> int:
    return max(0, (num_symbols // batch_size - 1) // bptt_length)


def _rows(stream: Tensor, batch_size: int) -> Tensor:
    """`(columns, batch_size)`: contiguous rows of the stream, time first."""
    columns = len(stream) // batch_size
    return stream[: columns * batch_size].view(batch_size, columns).t().contiguous()


@register_task
@dataclass(kw_only=True)
class CharacterLMConfig(TaskConfig):
    """Character-level language modelling; the defaults are the paper's on Penn Treebank."""

    name: str = "character_lm"
    corpus: str = "ptb"
    """"ptb" (raw bytes of Mikolov's word-level files, 50 symbols), "ptb_char" (without the blanks
    around each line), "enwik8", "text8", "pydoc" or a text file."""
    bptt_length: int = 150
    """T, the window of truncated backpropagation through time."""
    embedding_size: int | None = 128
    """Features of the character embedding; null feeds one-hot vectors."""
    loss_over_time: str = "sum"
    """"sum" over the window's steps, before the gradient is clipped (released code), or "mean":
    another algorithm under the same `max_grad_norm`."""
    train_characters: int | None = None
    """Train on this many characters from the start only; null takes all."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the task does not accept."""
        super().__post_init__()
        if not self.corpus:
            raise ConfigError("corpus must be a name or the path of a text file, got ''")
        check_at_least("bptt_length", self.bptt_length, 1)
        if self.embedding_size is not None:
            check_at_least("embedding_size", self.embedding_size, 1)
        check_choice("loss_over_time", self.loss_over_time, ("sum", "mean"))
        if self.train_characters is not None:
            check_at_least("train_characters", self.train_characters, 1)

    def load(
        self, *, seed: int, data_dir: Path | None = None, vocabulary: list[int] | None = None
    ) -> CharacterLMTask:
        """Reads the corpus; see `rum.data.corpora.load_corpus`.

        Args:
            seed: Nothing is generated.
            data_dir: Where corpora are looked for first.
            vocabulary: Numbers the symbols in this order, if all are in it.
        """
        return CharacterLMTask(self, load_corpus(self.corpus, data_dir), vocabulary)
