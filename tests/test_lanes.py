"""Experiments side by side are what they are alone: numbers, checkpoints, ends."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from rum.cells import LSTMConfig, RUMConfig
from rum.errors import ConfigError, DivergedError, RumError, SupersededError
from rum.experiment import ExperimentConfig, run_experiment
from rum.lanes import Run, check_same_shape, run_side_by_side
from rum.parameters import replace
from rum.tasks import CharacterLMConfig, CopyingConfig, TaskConfig
from rum.training.checkpoint import CheckpointStore, load_state
from rum.training.config import TrainingConfig
from rum.training.loop import Report

COPYING = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5)
BASE = ExperimentConfig(
    model=RUMConfig(hidden_size=8, num_layers=2, eta=1.0),
    task=COPYING,
    training=TrainingConfig(max_epochs=3, threads=1, learning_rate=0.01),
)
LANES: tuple[dict[str, Any], ...] = (
    {"training.seed": 1, "model.zoneout": 0.2, "model.dropout": 0.1},
    {"training.seed": 2, "model.eta": 0.5, "training.learning_rate": 0.1},
    {
        "training.seed": 3,
        "model.dropout": 0.3,
        "training.optimizer": "rmsprop",
        "training.max_grad_norm": 0.01,
        "training.max_epochs": 2,
        "training.schedule.name": "cosine",
    },
    {"training.seed": 4, "model.zoneout": 0.5, "training.max_grad_norm": None},
)


@pytest.fixture(scope="module")
def language_task(tmp_path_factory: pytest.TempPathFactory) -> TaskConfig:
    """Seven updates an epoch, the state carried from one to the next."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chr(97 + (i * i + 3 * i) % 11) for i in range(6000)))
    return CharacterLMConfig(
        corpus=str(path),
        batch_size=8,
        bptt_length=20,
        embedding_size=6,
        train_characters=8 * (7 * 20 + 1),
    )


def run(folder: Path, config: ExperimentConfig, **options: Any) -> Run:
    task = config.task.load(seed=config.training.seed)
    return Run(config=config, task=task, folder=folder, **options)


def alone(folder: Path, config: ExperimentConfig) -> None:
    run_experiment(config, run(folder, config).task, folder, lambda _: None)


def outcome(folder: Path) -> tuple[list[Report], dict[str, torch.Tensor]]:
    """All reports without timings, and all final weights."""
    last = CheckpointStore(folder).last()
    assert last is not None
    reports = [
        {name: value for name, value in report.items() if not name.startswith("time/")}
        for report in last.reports
    ]
    return reports, load_state(last, "cpu")["model"]


def assert_same(first: Path, second: Path) -> None:
    (reports, weights), (other_reports, other_weights) = outcome(first), outcome(second)
    assert reports == other_reports
    assert list(weights) == list(other_weights)
    for name, tensor in weights.items():
        assert torch.equal(tensor, other_weights[name]), name


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, False),
        ({}, True),
        ({"model.lambda_": 1.0, "model.layer_norm": True}, True),
        ({"model.lambda_": 0.5}, False),
    ],
    ids=["plain", "text", "memory", "reference"],
)
def test_each_lane_is_the_run_that_it_is_alone(
    options: dict[str, Any], text: bool, language_task: TaskConfig, tmp_path: Path
) -> None:
    base = replace(BASE, options)
    if text:
        base = dataclasses.replace(base, task=language_task)
    configs = [replace(base, lane) for lane in LANES]
    reported: list[tuple[Path, float]] = []

    def report(each: Run, metrics: Report) -> bool:
        reported.append((each.folder, metrics["epoch"]))
        return True

    runs = [run(tmp_path / f"lane{index}", each) for index, each in enumerate(configs)]
    before = torch.get_rng_state()
    run_side_by_side(runs, 3, report)  # the fourth takes the place of the third

    assert torch.equal(torch.get_rng_state(), before)
    for index, each in enumerate(configs):
        epochs = each.training.max_epochs
        expected = [(tmp_path / f"lane{index}", epoch) for epoch in range(1, epochs + 1)]
        assert [pair for pair in reported if pair[0] == tmp_path / f"lane{index}"] == expected
        alone(tmp_path / f"alone{index}", each)
        assert_same(tmp_path / f"lane{index}", tmp_path / f"alone{index}")


class InterruptedRunError(Exception):
    """Stands for whatever ends a process."""


def test_lanes_and_ordinary_runs_go_on_from_each_other(
    language_task: TaskConfig, tmp_path: Path
) -> None:
    base = dataclasses.replace(BASE, task=language_task)
    configs = [replace(base, lane) for lane in LANES[:2]]
    always = {"training.checkpoint_seconds": 1e-9}
    for index, each in enumerate(configs):  # within different epochs, at different updates
        steps = 0

        def stop(step: int, total: int, last: int = 4 + 6 * index) -> None:
            nonlocal steps
            steps += 1
            if steps == last:
                raise InterruptedRunError

        task, folder = run(tmp_path, each).task, tmp_path / str(index)
        with pytest.raises(InterruptedRunError):
            run_experiment(replace(each, always), task, folder, lambda _: None, on_step=stop)
    lengths = {
        CheckpointStore(tmp_path / str(index)).last().description["step"] for index in (0, 1)
    }  # type: ignore[union-attr]
    assert lengths == {3, 9}

    def interrupt(each: Run, metrics: Report) -> bool:
        if metrics["epoch"] == 2:
            raise InterruptedRunError
        return True

    runs = [run(tmp_path / str(index), each) for index, each in enumerate(configs)]
    with pytest.raises(InterruptedRunError):
        run_side_by_side(runs, 2, interrupt)
    for index, each in enumerate(configs):
        alone(tmp_path / str(index), each)
        alone(tmp_path / f"alone{index}", each)
        assert_same(tmp_path / str(index), tmp_path / f"alone{index}")


def test_a_lane_that_diverges_ends_alone(tmp_path: Path) -> None:
    bad = {"training.learning_rate": 1e30, "training.max_grad_norm": None}
    configs = [replace(BASE, LANES[0]), replace(BASE, bad), replace(BASE, LANES[1])]
    runs = [run(tmp_path / f"lane{index}", each) for index, each in enumerate(configs)]
    errors: list[tuple[Run, RumError]] = []
    run_side_by_side(runs, 2, on_error=lambda each, error: errors.append((each, error)))

    ((ended, error),) = errors
    assert ended is runs[1]
    assert isinstance(error, DivergedError)
    assert CheckpointStore(tmp_path / "lane1").last() is None
    for index in (0, 2):  # one beside it, one in its place
        alone(tmp_path / f"alone{index}", configs[index])
        assert_same(tmp_path / f"lane{index}", tmp_path / f"alone{index}")
    with pytest.raises(DivergedError):
        run_side_by_side([run(tmp_path / "again", configs[1])], 1)


def test_a_lane_whose_folder_was_taken_over_ends_alone(tmp_path: Path) -> None:
    configs = [replace(BASE, LANES[index]) for index in (0, 1)]
    runs = [run(tmp_path / f"lane{index}", each) for index, each in enumerate(configs)]
    errors: list[RumError] = []

    def report(each: Run, metrics: Report) -> bool:
        if each is runs[1] and metrics["epoch"] == 1:
            CheckpointStore(each.folder).claim()
        return True

    run_side_by_side(runs, 2, report, lambda _, error: errors.append(error))

    (error,) = errors
    assert isinstance(error, SupersededError)
    assert len(outcome(tmp_path / "lane0")[0]) == 3
    assert len(outcome(tmp_path / "lane1")[0]) == 1


def test_a_lane_that_is_stopped_makes_place(tmp_path: Path) -> None:
    runs = [
        run(tmp_path / str(index), replace(BASE, {"training.seed": index})) for index in range(4)
    ]
    order: list[int] = []

    def report(each: Run, metrics: Report) -> bool:
        order.append(runs.index(each))
        return each is not runs[0]

    run_side_by_side(iter(runs), 2, report)
    # the first is stopped after an epoch, the others train three each, two at a time
    assert order == [0, 1, 1, 2, 1, 2, 2, 3, 3, 3]
    assert len(outcome(tmp_path / "0")[0]) == 1
    run_side_by_side(runs, 4, report)  # those at their end are left out
    assert order[10:] == [0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.hidden_size": 9}, r"model\.hidden_size: 9, in the first 8$"),
        ({"model.lambda_": 1.0}, r"model\.lambda_: 1\.0"),
        ({"model.eta": None}, r"model\.eta: None, in the first a number"),
        ({"task.batch_size": 5, "task.delay": 4}, r"task\.batch_size: 5.*; task\.delay: 4"),
        ({"training.threads": 2}, r"training\.threads"),
    ],
    ids=str,
)
def test_another_shape_is_refused_by_name(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    other = replace(BASE, change)
    check_same_shape(BASE, replace(BASE, LANES[2]))
    with pytest.raises(ConfigError, match=f"replicas must be of equal shapes.*{named}"):
        run_side_by_side([run(tmp_path / "a", BASE), run(tmp_path / "b", other)], 2)
    assert not (tmp_path / "b").exists()


def test_other_models_are_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, model=LSTMConfig(hidden_size=8))
    with pytest.raises(ConfigError, match=r"only stacks of RUM cells run as replicas.*got 'lstm'"):
        run_side_by_side([run(tmp_path / "a", config)], 2)
