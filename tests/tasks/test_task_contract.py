"""What every registered task promises."""

import dataclasses
import math
import os
from typing import Any

import pytest
import torch

from rum.errors import ConfigError
from rum.parameters import from_plain
from rum.tasks import (
    TASKS,
    BabiConfig,
    Batch,
    CharacterLMConfig,
    CopyingConfig,
    RecallConfig,
    Task,
    TaskConfig,
    Totals,
)

# Small configurations; a task that is not here is tested with its defaults and batches of 4.
SMALL: dict[str, TaskConfig] = {
    "babi": BabiConfig(subtask=15, edition="en", batch_size=4, steps_per_epoch=6),
    "recall": RecallConfig(
        length=6,
        batch_size=4,
        steps_per_epoch=6,
        train_size=50,
        validation_size=11,
        test_size=9,
    ),
    "character_lm": CharacterLMConfig(
        corpus="pydoc", batch_size=4, bptt_length=11, embedding_size=3, train_characters=600
    ),
    "copying": CopyingConfig(delay=5, batch_size=4, steps_per_epoch=6, evaluation_batches=2),
}


@pytest.fixture(params=sorted(TASKS))
def config(request: pytest.FixtureRequest) -> TaskConfig:
    name: str = request.param
    if name == "babi" and not os.environ.get("RUM_DATA_DIR"):
        pytest.skip("RUM_DATA_DIR is not set: no bAbI here")
    return SMALL.get(name) or TASKS[name](batch_size=4)


@pytest.fixture
def task(config: TaskConfig) -> Task:
    return config.load(seed=3)


def evaluation(task: Task) -> list[Batch]:
    return [batch for split in ("validation", "test") for batch in task.evaluation_batches(split)]


def assert_equal(first: Batch, second: Batch) -> None:
    assert torch.equal(first.input, second.input)
    assert torch.equal(first.target, second.target)
    assert first.carry_state == second.carry_state


def test_every_small_configuration_is_of_a_registered_task() -> None:
    assert {name: type(config) for name, config in SMALL.items()} == {
        name: TASKS[name] for name in SMALL
    }


def test_batches_are_numbers_of_symbols_and_classes(config: TaskConfig, task: Task) -> None:
    batches = [task.training_batch(step) for step in range(task.steps_per_epoch)]
    assert {batch.input.shape[1] for batch in batches} == {config.batch_size}
    batches += evaluation(task)
    for batch in batches:
        assert batch.input.dim() == 2
        assert 1 <= batch.input.shape[1] <= config.batch_size
        steps = 1 if task.answers_last else len(batch.input)
        assert batch.target.shape == (steps, batch.input.shape[1])
        assert batch.input.dtype == batch.target.dtype == torch.long
        assert batch.input.min() >= 0
        assert batch.input.max() < task.vocab_size
        assert batch.target.min() >= 0
        assert batch.target.max() < task.num_classes
        assert isinstance(batch.carry_state, bool)


def test_an_epoch_begins_with_a_fresh_state(task: Task) -> None:
    assert not task.training_batch(0).carry_state
    assert not task.training_batch(task.steps_per_epoch).carry_state
    for split in ("validation", "test"):
        assert not next(iter(task.evaluation_batches(split))).carry_state


def test_a_training_batch_is_a_function_of_the_step_alone(config: TaskConfig, task: Task) -> None:
    steps = [0, 1, task.steps_per_epoch - 1, 2 * task.steps_per_epoch + 1]
    forwards = {step: task.training_batch(step) for step in steps}
    list(task.evaluation_batches("validation"))
    torch.manual_seed(99)
    other = config.load(seed=3)
    for step in reversed(steps):
        assert_equal(other.training_batch(step), forwards[step])
        assert_equal(task.training_batch(step), forwards[step])


def test_training_batches_of_an_epoch_differ(task: Task) -> None:
    batches = {
        tuple(task.training_batch(step).input.flatten().tolist())
        for step in range(task.steps_per_epoch)
    }
    assert len(batches) == task.steps_per_epoch > 1


def test_an_evaluation_repeats(task: Task) -> None:
    first, second = evaluation(task), evaluation(task)
    assert len(first) == len(second) > 1
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)


def test_validation_and_test_differ(task: Task) -> None:
    validation, test = (
        next(iter(task.evaluation_batches(split))) for split in ("validation", "test")
    )
    assert not torch.equal(validation.input, test.input)


def test_the_loss_is_a_scalar_that_the_truth_makes_small(task: Task) -> None:
    target = task.training_batch(0).target
    truth = 20.0 * torch.nn.functional.one_hot(target, task.num_classes).float()
    indifferent = torch.zeros(*target.shape, task.num_classes, requires_grad=True)

    loss = task.loss(indifferent, target)
    loss.backward()  # type: ignore[no-untyped-call]

    assert loss.shape == ()
    assert task.loss(truth, target).item() < 1e-3 * loss.item()
    gradient = indifferent.grad
    assert gradient is not None
    # downhill is towards the truth and nowhere else
    picked = torch.nn.functional.one_hot(target, task.num_classes).bool()
    assert (gradient[picked] < 0).all()
    assert (gradient[~picked] > 0).all()


def test_the_metric_is_among_the_metrics_and_knows_better_from_worse(task: Task) -> None:
    good = task.metrics(Totals(2.0, 90, 100, 90, 100))
    bad = task.metrics(Totals(90.0, 10, 100, 10, 100))

    assert task.mode in ("min", "max")
    assert task.metric in good
    if task.mode == "min":
        assert good[task.metric] < bad[task.metric]
    else:
        assert good[task.metric] > bad[task.metric]
    assert all(math.isfinite(value) for value in (*good.values(), *bad.values()))


def test_training_and_validation_measure_the_same(task: Task) -> None:
    """An indifferent model's training loss, in the metric's unit, is its evaluation's metric."""
    target = task.training_batch(0).target
    logits = torch.zeros(*target.shape, task.num_classes, dtype=torch.float64)
    loss = task.loss(logits, target).item()
    totals = Totals(
        cross_entropy=target.numel() * math.log(task.num_classes),
        correct=0,
        count=target.numel(),
        correct_answers=0,
        answers=target.numel(),
    )
    for name, value in task.training_metrics(loss).items():
        assert value == pytest.approx(task.metrics(totals)[name], rel=1e-9)


def test_names_of_metrics_can_stand_after_a_slash(task: Task) -> None:
    totals = Totals(2.0, 1, 10, 1, 10)
    for name in {*task.metrics(totals), *task.training_metrics(1.0), *task.baselines()}:
        assert name.isidentifier()


def test_baselines_are_numbers_that_learning_can_beat(task: Task) -> None:
    baselines = task.baselines()
    assert baselines
    assert all(math.isfinite(value) and value > 0 for value in baselines.values())
    if task.mode == "min":  # worse than perfect, better than an indifferent model
        indifferent = Totals(100 * math.log(task.num_classes), 0, 100, 0, 100)
        assert max(baselines.values()) < task.metrics(indifferent)[task.metric]


def test_what_identifies_data_and_protocol_is_there(task: Task) -> None:
    for text in (task.checksum, task.protocol, task.corpus, task.source, task.metric):
        assert isinstance(text, str)
        assert text.strip()
    assert task.metric in task.protocol


def test_the_vocabulary_is_empty_or_complete(task: Task) -> None:
    assert len(task.vocabulary) in (0, task.vocab_size)
    assert len(set(task.vocabulary)) == len(task.vocabulary)
    kinds = {type(symbol) for symbol in task.vocabulary}
    assert kinds in (set(), {int}, {str})  # plain, for a JSON file


def test_headline_batch_sizes_are_the_protocols_or_positive(task: Task) -> None:
    sizes = task.headline_batch_sizes
    assert sizes
    assert all(size is None or size >= 1 for size in sizes)


def test_a_configuration_comes_back_from_plain_values(config: TaskConfig) -> None:
    plain: dict[str, Any] = dataclasses.asdict(config)
    assert from_plain(type(config), plain, "task") == config
    assert type(config)(**plain) == config


@pytest.mark.parametrize("name", sorted(TASKS))
def test_defaults_are_registered_under_their_own_name(name: str) -> None:
    assert TASKS[name]().name == name
    with pytest.raises(ConfigError, match="name"):
        TASKS[name](name="other")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_an_empty_batch_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="batch_size must be an integer >= 1, got 0"):
        TASKS[name](batch_size=0)
