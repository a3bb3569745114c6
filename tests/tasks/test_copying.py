"""Copying memory: the sequences of the paper, drawn afresh at every step, and its baseline."""

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rum.errors import ConfigError
from rum.tasks import Batch, CopyingConfig, CopyingTask, Totals

Numbers = NDArray[np.int64]


def copying(seed: int = 0, **options: int) -> CopyingTask:
    return CopyingConfig(**options).load(seed=seed)  # type: ignore[arg-type]


def symbols(batches: Iterable[Batch]) -> Numbers:
    """The ten symbols to copy, one row a sequence."""
    return np.concatenate([batch.input[:10].t().numpy() for batch in batches])


def rows(batches: Iterable[Batch]) -> set[tuple[int, ...]]:
    return {tuple(row) for row in symbols(batches).tolist()}


@pytest.mark.parametrize("delay", [1, 3, 200])
def test_layout_is_the_papers(delay: int) -> None:
    batch = copying(delay=delay, batch_size=6).training_batch(0)

    assert batch.input.shape == batch.target.shape == (delay + 20, 6)
    assert batch.input.dtype == batch.target.dtype == torch.long
    assert not batch.carry_state
    for column in range(6):
        input = batch.input[:, column].tolist()
        target = batch.target[:, column].tolist()
        data = input[:10]
        assert set(data) <= set(range(1, 9))
        assert input == data + [0] * (delay - 1) + [9] + [0] * 10
        assert input.index(9) == delay + 9
        assert target == [0] * (delay + 10) + data


def test_the_first_answer_is_due_one_step_after_the_marker() -> None:
    batch = copying(delay=4, batch_size=1).training_batch(0)
    marker = batch.input[:, 0].tolist().index(9)
    assert batch.target[: marker + 1].sum() == 0
    assert batch.target[marker + 1, 0] == batch.input[0, 0]


def test_symbols_are_uniform_at_every_place() -> None:
    task = copying(delay=1, batch_size=500)
    drawn = symbols(task.training_batch(step) for step in range(16))
    assert drawn.shape == (8000, 10)

    counts = np.stack([(drawn == symbol).sum(0) for symbol in range(1, 9)])

    assert counts.sum() == 80_000  # nothing but 1 to 8
    # chi-squared with 7 degrees of freedom: beyond 29.9 in one place of ten thousand
    assert (((counts - 1000) ** 2) / 1000).sum(0).max() < 29.9
    pooled = ((counts.sum(1) - 10_000) ** 2 / 10_000).sum()
    assert pooled < 29.9


def test_neighbouring_symbols_are_independent() -> None:
    drawn = symbols(copying(delay=1, batch_size=6400).training_batch(s) for s in range(2))
    pairs = np.zeros((8, 8))
    np.add.at(pairs, (drawn[:, :-1].ravel() - 1, drawn[:, 1:].ravel() - 1), 1)
    expected = drawn.shape[0] * 9 / 64
    # 63 degrees of freedom: beyond 114 in one case of ten thousand
    assert (((pairs - expected) ** 2) / expected).sum() < 114


def test_every_step_is_fresh_and_can_be_had_again() -> None:
    task = copying(delay=2, batch_size=128)
    steps = [*range(40), 10**6, 10**9]
    assert len(rows(task.training_batch(step) for step in steps)) == len(steps) * 128

    again = copying(delay=2, batch_size=128)
    for step in (10**9, 7, 0):
        assert torch.equal(task.training_batch(step).input, again.training_batch(step).input)


def test_training_does_not_depend_on_torchs_generator() -> None:
    task = copying(delay=2, batch_size=4)
    torch.manual_seed(1)
    first = task.training_batch(5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = task.training_batch(5)

    assert torch.equal(first.input, second.input)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # and does not advance it


def test_another_seed_is_other_training_data() -> None:
    first, second = (copying(seed, delay=2) for seed in (0, 1))
    assert not rows(first.training_batch(s) for s in range(20)) & rows(
        second.training_batch(s) for s in range(20)
    )


def test_validation_is_the_same_for_every_seed() -> None:
    first, second = (
        list(copying(seed, delay=2, evaluation_batches=3).evaluation_batches("validation"))
        for seed in (0, 1)
    )
    assert len(first) == len(second) == 3
    assert all(torch.equal(a.input, b.input) for a, b in zip(first, second, strict=True))
    assert len(rows(first)) == 3 * 128


def test_training_validation_and_test_have_nothing_in_common() -> None:
    task = copying(delay=2, evaluation_batches=4)
    training = rows(task.training_batch(step) for step in range(40))
    validation = rows(task.evaluation_batches("validation"))
    test = rows(task.evaluation_batches("test"))

    assert (len(training), len(validation), len(test)) == (40 * 128, 4 * 128, 4 * 128)
    assert not training & validation
    assert not training & test
    assert not validation & test


def test_an_evaluation_can_have_another_batch_size() -> None:
    task = copying(delay=2, evaluation_batches=2)
    assert [batch.input.shape for batch in task.evaluation_batches("test", 3)] == [(22, 3)] * 2


@pytest.mark.parametrize(("delay", "nats"), [(200, 0.0945), (500, 0.0400), (1000, 0.0204)])
def test_baseline_is_the_papers(delay: int, nats: float) -> None:
    (value,) = copying(delay=delay).baselines().values()
    assert round(value, 4) == nats


def test_baseline_is_the_loss_of_knowing_everything_but_the_symbols() -> None:
    task = copying(delay=7, batch_size=3)
    batch = task.training_batch(0)
    logits = torch.full((27, 3, 9), -1e9, dtype=torch.float64)
    logits[:17, :, 0] = 0.0  # blanks, surely
    logits[17:, :, 1:] = 0.0  # one of eight

    loss = task.loss(logits, batch.target).item()

    assert loss == pytest.approx(task.baselines()["memoryless"], rel=1e-12)
    assert task.training_metrics(loss) == {"cross_entropy": loss}


def test_loss_is_the_mean_over_all_positions() -> None:
    task = copying(delay=3, batch_size=5)
    target = task.training_batch(0).target
    logits = np.random.default_rng(0).normal(size=(23, 5, 9)) * 2
    total = 0.0
    for t in range(23):
        for b in range(5):
            shares = np.exp(logits[t, b])
            total -= math.log(shares[target[t, b]] / shares.sum())

    assert task.loss(torch.tensor(logits), target).item() == pytest.approx(total / (23 * 5))


def test_metrics_are_over_all_positions() -> None:
    task = copying(delay=30, batch_size=4)
    target = torch.cat([b.target for b in task.evaluation_batches("validation")], 1)
    always_blank = Totals(
        cross_entropy=12.0,
        correct=int((target == 0).sum()),
        count=target.numel(),
        correct_answers=3,
        answers=40,
    )
    metrics = task.metrics(always_blank)
    assert metrics["accuracy"] == pytest.approx((30 + 10) / (30 + 20))
    assert metrics["cross_entropy"] == pytest.approx(12.0 / (4 * 50))
    assert metrics["answer_accuracy"] == pytest.approx(3 / 40)


def test_sizes_are_ten_symbols_and_nine_classes() -> None:
    task = copying(delay=1)
    assert (task.vocab_size, task.num_classes, task.embedding_size) == (10, 9, None)


def test_data_of_another_delay_is_known_to_be_other_data() -> None:
    tasks = [copying(delay=delay) for delay in (2, 3)]
    assert len({task.checksum for task in tasks}) == 2
    assert len({task.corpus for task in tasks}) == 2


def test_another_validation_set_is_another_protocol() -> None:
    options: list[dict[str, int]] = [{}, {"evaluation_batches": 2}, {"batch_size": 4}]
    assert len({copying(delay=2, **each).protocol for each in options}) == 3


@pytest.mark.parametrize("name", ["delay", "batch_size", "steps_per_epoch", "evaluation_batches"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_a_count_below_one_is_an_error_that_names_the_option(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be an integer >= 1, got"):
        CopyingConfig(**{name: value})  # type: ignore[arg-type]
