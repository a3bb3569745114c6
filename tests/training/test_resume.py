"""An interrupted and resumed run equals an uninterrupted one bit for bit."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rum.cells import (
    FSRUMConfig,
    LSTMCellConfig,
    LSTMConfig,
    ModelConfig,
    RUMCellConfig,
    RUMConfig,
)
from rum.errors import CheckpointError, DivergedError, RumError
from rum.experiment import ExperimentConfig, experiment_from_plain, run_experiment
from rum.tasks import CharacterLMConfig, CopyingConfig, RecallConfig, Task, TaskConfig
from rum.training.checkpoint import CheckpointStore, load_state
from rum.training.config import ScheduleConfig, TrainingConfig
from rum.training.loop import Report


class InterruptedRunError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(topics[key] for key in sorted(topics))[:8000])
    return str(path)


def language_task(text: str, **options: int) -> CharacterLMConfig:
    """Seven updates an epoch."""
    settings = {"batch_size": 8, "bptt_length": 20, "embedding_size": 6, **options}
    settings["train_characters"] = settings["batch_size"] * (7 * settings["bptt_length"] + 1)
    return CharacterLMConfig(corpus=text, **settings)  # type: ignore[arg-type]


MODELS: dict[str, ModelConfig] = {
    "rum": RUMConfig(
        hidden_size=8, num_layers=2, layer_norm=True, eta=1.0, zoneout=0.2, dropout=0.1
    ),
    "rum_memory": RUMConfig(hidden_size=6, lambda_=1.0, eta=1.0, zoneout=0.2),
    "lstm": LSTMConfig(hidden_size=8, layer_norm=True, zoneout_h=0.1, zoneout_c=0.3),
    "fs_rum": FSRUMConfig(
        fast=LSTMCellConfig(hidden_size=6, layer_norm=True, zoneout_h=0.1, zoneout_c=0.3),
        slow=RUMCellConfig(hidden_size=7, eta=1.0, layer_norm=True, zoneout=0.1),
        dropout=0.2,
    ),
}


def train(
    model: ModelConfig,
    task: TaskConfig,
    folder: Path,
    *,
    stop_after: int | None = None,
    **training: Any,
) -> list[Report]:
    """Trains until done, or until `stop_after` updates of this process."""
    options = {"max_epochs": 2, "threads": 1, "learning_rate": 0.01, "seed": 3, **training}
    config = ExperimentConfig(model=model, task=task, training=TrainingConfig(**options))
    reports: list[Report] = []
    updates = 0

    def count(step: int, total: int) -> None:
        nonlocal updates
        updates += 1
        if updates == stop_after:
            raise InterruptedRunError

    run_experiment(config, loaded(task), folder, reports.append, on_step=count)
    return reports


def train_with_stops(
    model: ModelConfig, task: TaskConfig, folder: Path, *, stops: int, **training: Any
) -> None:
    """Trains, interrupted after every fourth update, mostly within an epoch."""
    for _ in range(stops):
        with pytest.raises(InterruptedRunError):
            train(model, task, folder, stop_after=4, **{**training, "checkpoint_seconds": 1e-9})
    train(model, task, folder, **training)


def loaded(task: TaskConfig) -> Task:
    return task.load(seed=3)


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


@pytest.mark.parametrize("epochs", [0.4, 1.0, 1.6])
@pytest.mark.parametrize("name", MODELS)
def test_resumed_training_equals_uninterrupted_training(
    name: str, epochs: float, text: str, tmp_path: Path
) -> None:
    task = language_task(text)
    stop_after = int(epochs * loaded(task).steps_per_epoch)
    train(MODELS[name], task, tmp_path / "whole")

    with pytest.raises(InterruptedRunError):
        train(
            MODELS[name],
            task,
            tmp_path / "parts",
            stop_after=stop_after,
            checkpoint_seconds=1e-9,  # a checkpoint after every update
        )
    train(MODELS[name], task, tmp_path / "parts")

    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "rmsprop_tensorflow"])
def test_every_optimizer_and_a_schedule_resume_exactly(optimizer: str, tmp_path: Path) -> None:
    task = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=3)
    options: dict[str, Any] = {
        "optimizer": optimizer,
        "schedule": ScheduleConfig(name="table6"),
        "max_epochs": 6,
        "max_grad_norm": None,
    }
    train(MODELS["rum"], task, tmp_path / "whole", **options)
    train_with_stops(MODELS["rum"], task, tmp_path / "parts", stops=4, **options)

    assert_same(tmp_path / "whole", tmp_path / "parts")
    rates = [report["train/learning_rate"] for report in outcome(tmp_path / "parts")[0]]
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.0005, 0.00005, 0.00005])


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleConfig(name="plateau", patience=1, drop_factor=0.5),
        ScheduleConfig(name="cosine", warmup_steps=4),
    ],
    ids=lambda schedule: schedule.name,
)
def test_recall_and_schedules_that_look_back_resume_exactly(
    schedule: ScheduleConfig, tmp_path: Path
) -> None:
    task = RecallConfig(
        length=4, batch_size=4, steps_per_epoch=3, train_size=20, validation_size=8, test_size=8
    )
    options: dict[str, Any] = {"optimizer": "sgd", "schedule": schedule, "max_epochs": 5}
    train(MODELS["rum_memory"], task, tmp_path / "whole", **options)
    train_with_stops(MODELS["rum_memory"], task, tmp_path / "parts", stops=3, **options)

    assert_same(tmp_path / "whole", tmp_path / "parts")


# Says when update `argv[3]` is done (or the checkpoint after it half written), and waits.
SCRIPT = """
import os, sys
from pathlib import Path
from rum.cells import RUMConfig
from rum.experiment import ExperimentConfig, experiment_from_plain, run_experiment
from rum.tasks import CopyingConfig
from rum.training.config import TrainingConfig

folder, moment, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
task = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=8)
config = ExperimentConfig(
    model=RUMConfig(hidden_size=8, zoneout=0.2, dropout=0.1),
    task=task,
    training=TrainingConfig(
        max_epochs=3, threads=1, checkpoint_seconds=1e-9, learning_rate=0.01, seed=3
    ),
)
updates = 0

def wait():
    print("ready", flush=True)
    sys.stdin.read()

def on_step(step, total):
    global updates
    updates += 1
    if updates == last and moment == "update":
        wait()
    if updates == last and moment == "write":
        os.fsync = lambda file: wait()

run_experiment(config, task.load(seed=3), folder, lambda report: None, on_step=on_step)
"""


def test_a_killed_process_resumes_exactly(tmp_path: Path) -> None:
    def kill_at(moment: str, update: int) -> None:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "parts"), moment, str(update)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL

    def last_step() -> int:
        last = CheckpointStore(tmp_path / "parts").last()
        assert last is not None
        return int(last.description["step"])

    kill_at("update", 7)
    assert last_step() == 6  # the seventh update was not written yet
    kill_at("write", 9)
    (half_written,) = (tmp_path / "parts").glob(".partial-*")
    assert [path.name for path in half_written.iterdir()] == ["state.pt"]
    assert last_step() == 6 + 8

    model = RUMConfig(hidden_size=8, zoneout=0.2, dropout=0.1)
    task = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=8)
    train(model, task, tmp_path / "parts", max_epochs=3)
    train(model, task, tmp_path / "whole", max_epochs=3)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    task = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5)
    assert len(train(MODELS["rum"], task, tmp_path)) == 2
    before = outcome(tmp_path)

    assert train(MODELS["rum"], task, tmp_path) == []
    assert outcome(tmp_path)[0] == before[0]


def test_a_longer_run_goes_on_as_if_it_had_been_longer_from_the_start(tmp_path: Path) -> None:
    task = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5)
    train(MODELS["rum"], task, tmp_path / "whole", max_epochs=4)
    train(MODELS["rum"], task, tmp_path / "parts", max_epochs=2)

    reports = train(MODELS["rum"], task, tmp_path / "parts", max_epochs=4)

    assert [report["epoch"] for report in reports] == [3, 4]
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_begins_from_another_keeps_its_training_state(tmp_path: Path) -> None:
    task = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5)
    train(MODELS["rum"], task, tmp_path / "whole", max_epochs=4)
    train(MODELS["rum"], task, tmp_path / "origin", max_epochs=2)
    origin = CheckpointStore(tmp_path / "origin").last()
    config = ExperimentConfig(
        model=MODELS["rum"],
        task=task,
        training=TrainingConfig(max_epochs=4, threads=1, learning_rate=0.01, seed=3),
    )

    run_experiment(config, loaded(task), tmp_path / "new", lambda _: None, begin_from=origin)

    reports, weights = outcome(tmp_path / "new")
    whole_reports, whole_weights = outcome(tmp_path / "whole")
    assert [report["epoch"] for report in reports] == [3, 4]
    assert all(torch.equal(weights[name], whole_weights[name]) for name in weights)
    values = [report["validation/cross_entropy"] for report in reports]
    assert values == [report["validation/cross_entropy"] for report in whole_reports[2:]]


def test_a_run_that_begins_from_another_keeps_its_plateaus(tmp_path: Path) -> None:
    task = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5)
    options: dict[str, Any] = {
        "learning_rate": 0.6,
        "max_grad_norm": None,
        "schedule": ScheduleConfig(name="plateau", patience=1, drop_factor=0.5),
    }
    train(MODELS["rum"], task, tmp_path / "whole", max_epochs=8, **options)
    train(MODELS["rum"], task, tmp_path / "origin", max_epochs=4, **options)
    origin = CheckpointStore(tmp_path / "origin").last()
    training = TrainingConfig(max_epochs=8, threads=1, seed=3, **options)
    config = ExperimentConfig(model=MODELS["rum"], task=task, training=training)
    reports: list[Report] = []

    def stop(step: int, total: int) -> None:
        if len(reports) == 2:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        run_experiment(
            config,
            loaded(task),
            tmp_path / "new",
            reports.append,
            on_step=stop,
            begin_from=origin,
        )
    run_experiment(config, loaded(task), tmp_path / "new", lambda _: None)  # keeps them as well

    def rates(folder: str) -> list[float]:
        return [report["train/learning_rate"] for report in outcome(tmp_path / folder)[0]]

    assert rates("whole")[4] < 0.6  # else this shows nothing
    assert rates("new") == rates("whole")[4:]


def test_best_checkpoint_is_that_of_the_best_measured_value(tmp_path: Path) -> None:
    task = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5)
    train(MODELS["rum"], task, tmp_path, max_epochs=6, learning_rate=0.6, max_grad_norm=None)

    store = CheckpointStore(tmp_path)
    best, last = store.best(), store.last()

    assert best is not None
    assert last is not None
    values = [report["validation/cross_entropy"] for report in last.reports]
    assert best.description["step"] == 5 * (1 + values.index(min(values)))
    assert best.reports[-1]["validation/cross_entropy"] == min(values)
    assert best.path != last.path, values  # else this shows nothing
    assert sorted(tmp_path.glob("step_*")) == [best.path, last.path]


def test_the_best_so_far_survives_an_interruption(tmp_path: Path) -> None:
    task = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5)
    noisy: dict[str, Any] = {"max_epochs": 6, "learning_rate": 0.6, "max_grad_norm": None}
    train(MODELS["rum"], task, tmp_path / "whole", **noisy)
    reports, _ = outcome(tmp_path / "whole")
    values = [report["validation/cross_entropy"] for report in reports]
    best_epoch = 1 + values.index(min(values))
    assert best_epoch < 5, values  # else this shows nothing

    with pytest.raises(InterruptedRunError):
        train(
            MODELS["rum"],
            task,
            tmp_path / "parts",
            stop_after=5 * best_epoch + 2,
            checkpoint_seconds=1e-9,
            **noisy,
        )
    train(MODELS["rum"], task, tmp_path / "parts", **noisy)

    assert_same(tmp_path / "whole", tmp_path / "parts")
    for folder in ("whole", "parts"):
        names = sorted(path.name for path in (tmp_path / folder).glob("step_*"))
        assert names == [f"step_{5 * best_epoch:09d}", "step_000000030"]
    best = CheckpointStore(tmp_path / "parts").best()
    assert best is not None
    assert best.description["best_value"] == min(values)


def test_a_damaged_checkpoint_is_never_trained_over(tmp_path: Path) -> None:
    task = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5)
    train(MODELS["rum"], task, tmp_path)
    last = CheckpointStore(tmp_path).last()
    assert last is not None
    (last.path / "state.pt").write_bytes(b"damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        train(MODELS["rum"], task, tmp_path, max_epochs=4)
    assert (last.path / "state.pt").read_bytes() == b"damaged"


def test_a_run_cannot_begin_from_another_model(tmp_path: Path) -> None:
    task = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5)
    train(MODELS["rum"], task, tmp_path / "origin")
    origin = CheckpointStore(tmp_path / "origin").last()
    assert origin is not None
    same = experiment_from_plain(origin.description["experiment"]).model
    other = dataclasses.replace(same, activation="tanh")  # the same weights
    config = ExperimentConfig(model=other, task=task, training=TrainingConfig(threads=1))

    with pytest.raises(CheckpointError, match=r"of another model: .*expected"):
        run_experiment(config, loaded(task), tmp_path / "new", lambda _: None, begin_from=origin)
    assert CheckpointStore(tmp_path / "new").last() is None
    # What no weight depends on may change in mid-training.
    other = dataclasses.replace(same, eta=2.0, zoneout=0.1)
    training = TrainingConfig(threads=1, max_epochs=3)
    config = ExperimentConfig(model=other, task=task, training=training)
    reports: list[Report] = []
    run_experiment(config, loaded(task), tmp_path / "new", reports.append, begin_from=origin)
    assert [report["epoch"] for report in reports] == [3]


@pytest.mark.parametrize(
    ("first", "second"),
    [("adam", "rmsprop"), ("rmsprop", "adam"), ("adam", "rmsprop_tensorflow")],
)
def test_another_optimizer_is_refused(first: str, second: str, tmp_path: Path) -> None:
    task = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5)
    train(MODELS["rum"], task, tmp_path, optimizer=first)
    with pytest.raises(RumError, match="optimizer"):
        train(MODELS["rum"], task, tmp_path, optimizer=second, max_epochs=3)


def test_another_batch_size_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(MODELS["rum"], language_task(text), tmp_path, stop_after=4, checkpoint_seconds=1e-9)
    with pytest.raises(RumError, match="batch"):  # as many updates an epoch
        train(MODELS["rum"], language_task(text, batch_size=10), tmp_path)


def test_another_model_or_other_data_are_refused(text: str, tmp_path: Path) -> None:
    train(MODELS["rum"], CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5), tmp_path)

    with pytest.raises(CheckpointError, match=r"of another model: .*expected"):
        train(MODELS["lstm"], CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5), tmp_path)
    with pytest.raises(CheckpointError, match="another checksum of the data"):
        train(MODELS["rum"], CopyingConfig(delay=4, batch_size=4, steps_per_epoch=5), tmp_path)
    with pytest.raises(CheckpointError, match="another checksum"):
        train(MODELS["rum"], language_task(text), tmp_path)
    with pytest.raises(
        CheckpointError, match="another steps_per_epoch of the data: 5, now it is 6"
    ):
        train(MODELS["rum"], CopyingConfig(delay=3, batch_size=4, steps_per_epoch=6), tmp_path)
    other = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5, evaluation_batches=2)
    with pytest.raises(CheckpointError, match="another protocol"):  # best values do not compare
        train(MODELS["rum"], other, tmp_path)


def test_a_loss_that_is_not_finite_stops_training_with_a_reason(tmp_path: Path) -> None:
    model = RUMConfig(hidden_size=8, layer_norm=True)  # without eta the gate makes the state grow
    task = CopyingConfig(delay=500, batch_size=4, steps_per_epoch=10)

    with pytest.raises(DivergedError, match="not finite at update 10"):
        train(model, task, tmp_path)
