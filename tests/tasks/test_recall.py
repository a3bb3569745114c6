"""Associative recall against what the paper and the released code say."""

import math
from collections import Counter

import pytest
import torch

from rum.errors import ConfigError
from rum.tasks import RecallConfig, RecallTask, Totals


def recall(**options: int) -> RecallTask:
    sizes = {"train_size": 300, "validation_size": 70, "test_size": 50, "batch_size": 32}
    return RecallConfig(**{**sizes, **options}).load(seed=0)


@pytest.mark.parametrize(("length", "vocab_size"), [(30, 26), (50, 36), (2, 12)])
def test_sizes_are_those_of_the_paper(length: int, vocab_size: int) -> None:
    task = recall(length=length)
    assert (task.vocab_size, task.num_classes) == (vocab_size, 10)
    batch = task.training_batch(0)
    assert batch.input.shape == (length + 3, 32)
    assert batch.target.shape == (1, 32)
    assert not batch.carry_state


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_sequence_is_pairs_two_marks_and_a_question_with_its_answer(split: str) -> None:
    task = recall(length=10)
    batches = (
        [task.training_batch(step) for step in range(3)]
        if split == "train"
        else list(task.evaluation_batches(split))
    )
    for batch in batches:
        for sequence, answer in zip(batch.input.t().tolist(), batch.target[0], strict=True):
            keys, values = sequence[0:10:2], sequence[1:10:2]
            assert sorted(keys) == [1, 2, 3, 4, 5]
            assert all(6 <= value <= 15 for value in values)
            assert sequence[10:12] == [0, 0]
            pairs = dict(zip(keys, values, strict=True))
            assert pairs[sequence[12]] - 6 == answer.item()


def test_values_questions_and_orders_are_uniform() -> None:
    task = recall(length=4, train_size=60_000)
    batch = task.training_batch(0)
    everything = [task.training_batch(step) for step in range(60_000 // 32)]
    input = torch.cat([batch.input for batch in everything], 1)
    target = torch.cat([batch.target for batch in everything], 1)
    count = input.shape[1]
    for values, kinds in ((target[0], 10), (input[1], 10), (input[6], 2), (input[0], 2)):
        seen = Counter(values.tolist())
        assert len(seen) == kinds
        for times in seen.values():  # five standard deviations
            spread = math.sqrt(count * (1 / kinds) * (1 - 1 / kinds))
            assert abs(times - count / kinds) < 5 * spread
    assert batch.input.dtype == torch.long


def test_training_goes_round_the_same_set_in_order() -> None:
    task = recall(train_size=50, batch_size=32)
    whole = torch.cat([task.training_batch(0).input, task.training_batch(1).input], 1)
    assert torch.equal(whole[:, 50:], whole[:, :14])
    assert torch.equal(task.training_batch(25).input, task.training_batch(0).input)


def test_all_questions_of_a_split_are_asked_once() -> None:
    task = recall()
    sizes = [batch.input.shape[1] for batch in task.evaluation_batches("validation")]
    assert sizes == [32, 32, 6]
    whole = torch.cat([b.input for b in task.evaluation_batches("validation")], 1)
    at_once = next(iter(task.evaluation_batches("validation", 70))).input
    assert torch.equal(whole, at_once)


def test_data_depend_on_the_data_seed_and_not_on_the_training_seed() -> None:
    config = RecallConfig(train_size=40, validation_size=4, test_size=4, batch_size=8)
    first, second = config.load(seed=0), config.load(seed=1)
    assert torch.equal(first.training_batch(2).input, second.training_batch(2).input)
    assert first.checksum == second.checksum
    other = recall(train_size=40, validation_size=4, test_size=4, data_seed=1)
    assert other.checksum != first.checksum
    assert not torch.equal(first.training_batch(0).input, other.training_batch(0).input[:, :8])


def test_splits_have_no_sequence_in_common() -> None:
    task = recall(length=30)
    sets = []
    for split in ("validation", "test"):
        batches = task.evaluation_batches(split)
        sets.append({tuple(column) for b in batches for column in b.input.t().tolist()})
    train = torch.cat([task.training_batch(step).input for step in range(10)], 1)
    sets.append({tuple(column) for column in train.t().tolist()})
    assert not sets[0] & sets[1]
    assert not (sets[0] | sets[1]) & sets[2]


def test_metrics_loss_and_baseline() -> None:
    task = recall()
    metrics = task.metrics(Totals(35.0, 63, 70, 63, 70))
    assert metrics == pytest.approx({"accuracy": 0.9, "cross_entropy": 0.5})
    assert task.baselines()["memoryless"] == 0.1
    logits = torch.zeros(1, 4, 10, dtype=torch.float64)
    logits[0, :, 3] = math.log(11)  # 11 / 20 for the fourth digit
    target = torch.tensor([[3, 3, 3, 0]])
    expected = -(3 * math.log(11 / 20) + math.log(1 / 20)) / 4
    assert task.loss(logits, target).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be an integer >= 2, got 0"),
        ({"length": 31}, r"length must be even .* got 31"),
        ({"train_size": 0}, "train_size must be an integer >= 1, got 0"),
        ({"test_size": -1}, "test_size must be an integer >= 1, got -1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be an integer >= 1, got 0"),
        ({"data_seed": -1}, "data_seed must be an integer >= 0, got -1"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RecallConfig(**options)  # type: ignore[arg-type]
