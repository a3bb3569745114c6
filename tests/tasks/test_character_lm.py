"""Character-level language modelling against counting and batching written without torch."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rum.cells import LSTMConfig
from rum.errors import ConfigError, DataError
from rum.models import SequenceModel
from rum.tasks import Batch, CharacterLMConfig, CharacterLMTask, Totals
from rum.training.evaluation import evaluate

Numbers = NDArray[np.int64]


@pytest.fixture(scope="module")
def data_dir() -> Path:
    folder = os.environ.get("RUM_DATA_DIR")
    if not folder:
        pytest.skip("RUM_DATA_DIR is not set: no Penn Treebank here")
    assert (Path(folder) / "ptb").is_dir(), "RUM_DATA_DIR is set, but there is no Penn Treebank"
    return Path(folder)


@pytest.fixture(scope="module")
def ptb(data_dir: Path) -> CharacterLMTask:
    """The paper's task, with the defaults."""
    return CharacterLMConfig().load(seed=0, data_dir=data_dir)


@pytest.fixture(scope="module")
def text() -> bytes:
    """2003 bytes over seven symbols of unequal frequency, each depending on the one before."""
    rng = np.random.default_rng(5)
    symbols = b"e at\nzq"
    tables = rng.dirichlet(np.array([3, 2, 1.5, 1, 0.7, 0.4, 0.3]), size=len(symbols))
    current, out = 0, bytearray()
    for draw in rng.random(2003):
        current = min(int(np.searchsorted(np.cumsum(tables[current]), draw)), len(symbols) - 1)
        out.append(symbols[current])
    return bytes(out)


@pytest.fixture
def corpus(text: bytes, tmp_path: Path) -> str:
    path = tmp_path / "tiny.txt"
    path.write_bytes(text)
    return str(path)


# Rows of 1802 // 4 = 450 columns in training: 64 windows of 7 and a tail; 100 // 4 = 25 columns in
# validation (100 bytes) and 101 // 4 = 25 in test (101 bytes).
BATCH_SIZE, LENGTH = 4, 7
TRAIN, VALIDATION = slice(0, 1802), slice(1802, 1902)
TEST = slice(1902, 2003)


def tiny(corpus: str, **options: object) -> CharacterLMTask:
    settings: dict[str, object] = {"batch_size": BATCH_SIZE, "bptt_length": LENGTH, **options}
    return CharacterLMConfig(corpus=corpus, **settings).load(seed=0)  # type: ignore[arg-type]


def naive_numbers(text: bytes, part: slice) -> list[int]:
    """Numbers of the symbols of a part, by (-frequency in training, byte)."""
    counts = Counter(text[TRAIN])
    order = sorted(set(text), key=lambda byte: (-counts[byte], byte))
    return [order.index(byte) for byte in text[part]]


def naive_windows(
    numbers: list[int], batch_size: int, length: int
) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """Inputs and targets of each window as rows of the batch, one symbol after the other."""
    columns = len(numbers) // batch_size
    rows = [numbers[row * columns : (row + 1) * columns] for row in range(batch_size)]
    start = 0
    while start + length + 1 <= columns:
        yield (
            [row[start : start + length] for row in rows],
            [row[start + 1 : start + 1 + length] for row in rows],
        )
        start += length


def by_row(symbols: Tensor) -> list[list[int]]:
    rows: list[list[int]] = symbols.t().tolist()
    return rows


def assert_windows(
    batches: list[Batch], numbers: list[int], batch_size: int = BATCH_SIZE, length: int = LENGTH
) -> None:
    windows = list(naive_windows(numbers, batch_size, length))
    assert len(batches) == len(windows)
    assert len(windows) > 1
    for index, (batch, (input, target)) in enumerate(zip(batches, windows, strict=True)):
        assert by_row(batch.input) == input
        assert by_row(batch.target) == target
        assert batch.carry_state == (index > 0)


def test_training_windows_are_those_of_contiguous_rows(corpus: str, text: bytes) -> None:
    task = tiny(corpus)
    batches = [task.training_batch(step) for step in range(task.steps_per_epoch)]
    assert len(batches) == 64
    assert_windows(batches, naive_numbers(text, TRAIN))


def test_rows_that_divide_exactly_lose_only_the_last_target(corpus: str, text: bytes) -> None:
    # 1802 / 2 = 901 columns: 100 windows of 9 and exactly one more column, the last target
    task = tiny(corpus, batch_size=2, bptt_length=9)
    batches = [task.training_batch(step) for step in range(task.steps_per_epoch)]
    assert len(batches) == 100
    assert_windows(batches, naive_numbers(text, TRAIN), 2, 9)
    assert by_row(batches[-1].target)[1][-1] == naive_numbers(text, TRAIN)[-1]


def test_an_epoch_begins_like_the_first_one(corpus: str) -> None:
    task = tiny(corpus)
    for step in (0, 1, 63):
        first, later = task.training_batch(step), task.training_batch(step + 3 * 64)
        assert torch.equal(first.input, later.input)
        assert torch.equal(first.target, later.target)
        assert first.carry_state == later.carry_state == (step > 0)


@pytest.mark.parametrize(("split", "part"), [("validation", VALIDATION), ("test", TEST)])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_evaluation_windows_are_those_of_contiguous_rows(
    split: str, part: slice, batch_size: int | None, corpus: str, text: bytes
) -> None:
    batches = list(tiny(corpus).evaluation_batches(split, batch_size))
    assert_windows(batches, naive_numbers(text, part), batch_size or BATCH_SIZE)


def test_fewer_training_characters_are_those_at_the_start(corpus: str, text: bytes) -> None:
    task = tiny(corpus, train_characters=200)
    batches = [task.training_batch(step) for step in range(task.steps_per_epoch)]
    assert_windows(batches, naive_numbers(text, slice(0, 200)))
    assert task.vocabulary == tiny(corpus).vocabulary


def test_symbols_are_numbered_by_falling_frequency_then_byte(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    # `b` thrice, then the ties `A`, `a` and `c`, and `z` once
    path.write_bytes(b"zcabAcabAb" * 90 + b"ab" * 50)
    task = tiny(str(path), batch_size=2, bptt_length=2)
    counts = Counter(path.read_bytes()[:900])
    assert (counts[ord("A")], counts[ord("a")], counts[ord("c")]) == (180, 180, 180)
    assert bytes(task.vocabulary) == b"bAacz"
    assert task.vocab_size == task.num_classes == 5


def test_symbols_that_training_lacks_come_last(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    # 90 % training without `Y`, `X`; validation has `X` first, test both
    path.write_bytes(b"ab" * 45 + b"aXXXa" + b"YYYXY")
    task = tiny(str(path), batch_size=1, bptt_length=2)

    assert bytes(task.vocabulary) == b"abXY"
    (first, _) = task.evaluation_batches("validation")
    assert first.input.flatten().tolist() == [0, 2]
    assert all(math.isfinite(value) for value in task.baselines().values())


def test_loss_is_summed_over_time_and_averaged_over_the_batch(corpus: str) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(LENGTH, BATCH_SIZE, 7)) * 3
    target = rng.integers(0, 7, size=(LENGTH, BATCH_SIZE))
    expected = 0.0
    for t in range(LENGTH):
        for b in range(BATCH_SIZE):
            shares = np.exp(logits[t, b]) / np.exp(logits[t, b]).sum()
            expected -= math.log(shares[target[t, b]]) / BATCH_SIZE

    loss = tiny(corpus).loss(torch.tensor(logits), torch.tensor(target))

    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_metrics_are_bits_and_a_share_of_the_characters(corpus: str) -> None:
    task = tiny(corpus)
    # 40 characters, each with probability 1 / 8: 3 bits each
    metrics = task.metrics(Totals(40 * math.log(8), 10, 40, 10, 40))
    assert metrics == pytest.approx({"bits_per_character": 3.0, "accuracy": 0.25})
    # a window's loss, LENGTH characters at 3 bits
    assert task.training_metrics(LENGTH * math.log(8)) == pytest.approx(
        {"bits_per_character": 3.0}
    )


class StatelessTable(nn.Module):
    """Logits from the last symbol alone; remembers in which mode it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 7)
        self.seen_training: list[bool] = []

    def forward(self, symbols: Tensor, state: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.seen_training.append(self.training)
        return self.table(symbols), ()


@pytest.mark.parametrize("batch_size", [None, 1])
def test_evaluation_is_one_pass_over_each_row(
    batch_size: int | None, corpus: str, text: bytes
) -> None:
    task = tiny(corpus)
    torch.manual_seed(0)
    model = SequenceModel(
        LSTMConfig(hidden_size=5, dropout=0.5),
        vocab_size=task.vocab_size,
        num_classes=task.num_classes,
        embedding_size=3,
        initialization="uniform",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the state before a window matters

    got = evaluate(model, task, "validation", "cpu", batch_size)

    # Without windows: the whole row at once, from the zero state, with what fills no window cut.
    rows = batch_size or BATCH_SIZE
    numbers = naive_numbers(text, VALIDATION)
    columns = len(numbers) // rows
    used = (columns - 1) // LENGTH * LENGTH
    lines = np.array(numbers[: rows * columns]).reshape(rows, columns)
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor(lines[:, :used].T))[0].double().numpy()
    logits -= logits.max(-1, keepdims=True)
    bits = np.log2(np.exp(logits).sum(-1, keepdims=True)) - logits / math.log(2)
    targets = lines[:, 1 : used + 1].T
    scored = np.take_along_axis(bits, targets[..., None], -1)
    assert got["bits_per_character"] == pytest.approx(scored.mean(), rel=1e-6)
    assert got["accuracy"] == pytest.approx((logits.argmax(-1) == targets).mean(), rel=1e-12)


def test_an_evaluation_that_no_window_fits_is_an_error_for_the_user(corpus: str) -> None:
    task = tiny(corpus)  # 101 test bytes: one column in each of the 100 rows
    with pytest.raises(DataError):
        evaluate(StatelessTable(), task, "test", "cpu", batch_size=100)


def test_evaluation_leaves_the_model_as_it_was(corpus: str) -> None:
    module = StatelessTable().train()
    evaluate(module, tiny(corpus), "validation", "cpu")
    assert set(module.seen_training) == {False}
    assert module.training


def test_baselines_are_those_of_counting(corpus: str, text: bytes) -> None:
    train, validation = text[TRAIN], text[VALIDATION]
    size = len(set(text))
    unigrams, bigrams = Counter(train), Counter(pairwise(train))
    before = Counter(train[:-1])
    unigram, bigram = [], []
    for previous, current in pairwise(validation):
        unigram.append(-math.log2((unigrams[current] + 1) / (len(train) + size)))
        bigram.append(-math.log2((bigrams[previous, current] + 1) / (before[previous] + size)))

    assert tiny(corpus).baselines() == pytest.approx(
        {"unigram": np.mean(unigram), "bigram": np.mean(bigram)}, rel=1e-12
    )
    assert np.mean(bigram) < np.mean(unigram)


def test_penn_treebank_has_fifty_symbols_by_falling_frequency(
    ptb: CharacterLMTask, data_dir: Path
) -> None:
    raw = np.fromfile(data_dir / "ptb" / "ptb.train.txt", dtype=np.uint8)
    counts = np.bincount(raw, minlength=256)
    numbers = [int(counts[byte]) for byte in ptb.vocabulary]

    assert ptb.vocab_size == ptb.num_classes == 50
    assert set(ptb.vocabulary) == set(np.flatnonzero(counts).tolist())
    assert numbers == sorted(numbers, reverse=True)
    assert bytes(ptb.vocabulary[:3]) == b" et"
    assert set(bytes(ptb.vocabulary)) == set(
        b"\n #$&'*-./0123456789<>N\\abcdefghijklmnopqrstuvwxyz"
    )


def test_penn_treebank_first_window_spells_the_text(ptb: CharacterLMTask) -> None:
    batch = ptb.training_batch(0)
    assert batch.input.shape == batch.target.shape == (150, 128)
    spelt = bytes(ptb.vocabulary[number] for number in batch.input[:, 0].tolist())
    target = bytes(ptb.vocabulary[number] for number in batch.target[:, 0].tolist())
    assert spelt.startswith(b" aer banknote berlitz calloway")
    assert target[:-1] == spelt[1:]


def test_penn_treebank_has_the_papers_number_of_windows(
    ptb: CharacterLMTask, data_dir: Path
) -> None:
    longer = CharacterLMConfig(bptt_length=200).load(seed=0, data_dir=data_dir)

    assert ptb.steps_per_epoch == 265
    assert longer.steps_per_epoch == 199
    assert ptb.headline_batch_sizes == (1, 20, 128)  # the headline as at submission comes first
    sizes = {"validation": (None,), "test": ptb.headline_batch_sizes}
    windows = {
        (split, size): len(list(ptb.evaluation_batches(split, size)))
        for split, of_split in sizes.items()
        for size in of_split
    }
    assert windows == {
        ("validation", None): 20,
        ("test", 1): 2999,
        ("test", 20): 149,
        ("test", 128): 23,  # (449945 // 128 - 1) // 150
    }


def test_penn_treebank_scores_the_papers_characters(ptb: CharacterLMTask) -> None:
    scored = {
        (split, size): sum(batch.target.numel() for batch in ptb.evaluation_batches(split, size))
        for split, size in (("validation", 128), ("test", 1), ("test", 20))
    }
    assert scored == {("validation", 128): 384_000, ("test", 1): 449_850, ("test", 20): 447_000}


def test_penn_treebank_bigrams_are_those_of_counting(ptb: CharacterLMTask, data_dir: Path) -> None:
    train, valid = (
        np.fromfile(data_dir / "ptb" / f"ptb.{part}.txt", dtype=np.uint8).astype(np.int64)
        for part in ("train", "valid")
    )
    pairs = np.bincount(train[:-1] * 256 + train[1:], minlength=256 * 256).reshape(256, 256)
    share = (pairs[valid[:-1], valid[1:]] + 1) / (pairs.sum(1)[valid[:-1]] + 50)

    baseline = ptb.baselines()["bigram"]

    assert baseline == pytest.approx(-np.log2(share).mean(), rel=1e-9)
    assert round(baseline, 3) == 3.336


@pytest.mark.parametrize(("size", "split", "got"), [(60, "train", 54), (1000, "validation", 50)])
def test_a_text_too_short_is_an_error_with_the_numbers(
    size: int, split: str, got: int, tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"ab" * (size // 2))

    with pytest.raises(DataError) as error:
        tiny(str(path), batch_size=5, bptt_length=10)

    message = str(error.value)
    for word in (f"{split} text", "'short'", "batch_size 5", "bptt_length 10", f"got {got}"):
        assert word in message


@pytest.mark.parametrize("size", [0, 10])
def test_a_text_with_an_empty_part_is_an_error_for_the_user(size: int, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"ab" * (size // 2))
    with pytest.raises(DataError, match="must fill a window"):
        tiny(str(path), batch_size=1, bptt_length=1)


def test_a_text_that_just_fills_one_window_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"ab" * 550)  # 55 bytes of validation and of test: 5 rows of 11
    task = tiny(str(path), batch_size=5, bptt_length=10)
    assert len(list(task.evaluation_batches("validation"))) == 1
    assert len(list(task.evaluation_batches("test"))) == 1


def test_too_few_training_characters_are_an_error(corpus: str) -> None:
    with pytest.raises(DataError, match=r"train text .* got 31"):
        tiny(corpus, train_characters=31)  # 4 rows of 8 are needed
    assert tiny(corpus, train_characters=32).steps_per_epoch == 1


@pytest.mark.parametrize(
    "options",
    [
        {"corpus": ""},
        {"bptt_length": 0},
        {"batch_size": 0},
        {"embedding_size": 0},
        {"train_characters": 0},
    ],
)
def test_an_option_out_of_range_is_an_error_that_names_it(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        CharacterLMConfig(**options)  # type: ignore[arg-type]
