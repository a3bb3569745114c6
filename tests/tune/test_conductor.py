"""The books of a search without Ray: trials handed out by hand, messages told by hand."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from rum.cells import RUMConfig
from rum.experiment import ExperimentConfig
from rum.parameters import flatten
from rum.tasks import CopyingConfig
from rum.train import TrackingConfig
from rum.training.checkpoint import CheckpointStore, read_checkpoint
from rum.training.config import TrainingConfig
from rum.tune.conductor import Conductor
from rum.tune.config import Domain, SamplerConfig
from rum.tune.database import open_storage
from rum.tune.messages import CRASHED, DIVERGED, FINISHED, OUT_OF_MEMORY, RUNNING, Workplace
from rum.tune.ray_adapters import ConductedScheduler
from rum.tune.schedulers import Population, Scheduler
from rum.tune.schedulers.halving import Halving
from rum.tune.space import apply
from rum.tune.study import ORIGIN, PAUSED, RUNG, Study, ensure_study, is_paused
from rum.tune.succession import has_successor
from rum.tune.tracking import INTERRUPTED, Tracker, connect

BASE = ExperimentConfig(
    model=RUMConfig(hidden_size=8),
    task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
    training=TrainingConfig(max_epochs=4),
)
SPACE = {
    "model.hidden_size": Domain(type="int", low=4, high=12),
    "training.learning_rate": Domain(type="float", low=1e-4, high=1e-1, log=True),
}
TASK = BASE.task.load(seed=0)
BEST = "validation/best_cross_entropy"
WORKER = {"host": "elsewhere", "device": "cpu", "pid": 123}
AT = {"worker": WORKER}


def reports(*values: float, first: int = 1) -> list[dict[str, float]]:
    """What a trial reports that measures `values` in its epochs."""
    return [
        {
            "epoch": epoch,
            "step": 5 * epoch,
            "validation/cross_entropy": value,
            BEST: min(values[: epoch - first + 1]),
        }
        for epoch, value in enumerate(values, first)
    ]


def message(number: int, report: dict[str, float], status: str = RUNNING) -> dict[str, Any]:
    return {"number": number, "status": status, "report": report, "worker": WORKER}


def end(number: int, status: str, reason: str) -> dict[str, Any]:
    return {"number": number, "status": status, "reason": reason, "worker": WORKER}


class Driver:
    """A conductor with its books, as one process of a search has them."""

    def __init__(
        self, output_dir: Path, target: int, scheduler: Scheduler, gpus_per_trial: float
    ) -> None:
        storage = open_storage(output_dir)
        ensure_study(storage, "study", {"mode": "min"})
        self.study = Study(storage, "study", SPACE, SamplerConfig(name="random"))
        self.study.target = target
        self.workplace = Workplace(
            dataclasses.asdict(BASE), str(output_dir / "studies" / "study"), None, gpus_per_trial
        )
        client, experiment_id = connect(TrackingConfig(), output_dir)
        tags = {"rum.metric": TASK.metric}
        self.tracker = Tracker(
            client, experiment_id, "study", TASK, tags, {"a": 1}, study_id=self.study.id
        )
        self.conductor = Conductor(
            self.study, BASE, TASK, scheduler, self.tracker, self.workplace, max_failures=2
        )

    def start(self) -> int:
        spec = self.conductor.next_trial()
        assert spec is not None
        return spec.number

    def tell(self, number: int, *values: float) -> bool:
        """Reports epochs as a worker would that trains from the start; returns the last answer."""
        stop = False
        for report in reports(*values):
            last = report["epoch"] == BASE.training.max_epochs
            status = FINISHED if last else RUNNING
            stop = self.conductor.on_message(message(number, report, status))
        return stop

    def save_checkpoint(self, number: int, *values: float) -> None:
        CheckpointStore(self.workplace.trial_folder(number)).save(
            {"weights": torch.zeros(1)},
            {
                "step": 5 * len(values),
                "epoch": len(values),
                "best_step": None,
                "reports": reports(*values),
            },
        )


@pytest.fixture
def driver(output_dir: Path) -> Iterator[Callable[..., Driver]]:
    """Opens the study as a new driver; one that was opened before is as good as dead."""
    opened: list[Driver] = []

    def driver(
        target: int = 4,
        milestones: tuple[int, ...] = (),
        pauses: bool = False,
        scheduler: Scheduler | None = None,
        gpus_per_trial: float = 0.0,
    ) -> Driver:
        for dead in opened:
            dead.tracker.flush()
        halving = Halving(list(milestones), 2, "min", pauses)
        opened.append(Driver(output_dir, target, scheduler or halving, gpus_per_trial))
        return opened[-1]

    yield driver
    for each in opened:
        each.tracker.close(INTERRUPTED)


@pytest.fixture
def books(
    output_dir: Path,
    trials_of: Callable[[Path, str], list[FrozenTrial]],
    runs_of: Callable[..., dict[int | None, Run]],
    check_books: Callable[..., None],
) -> Callable[[Driver], tuple[list[FrozenTrial], dict[int | None, Run]]]:
    """Reads both books when all is written, and checks that they agree."""

    def books(driver: Driver) -> tuple[list[FrozenTrial], dict[int | None, Run]]:
        driver.tracker.flush()
        check_books(output_dir, "study", "cross_entropy")
        return trials_of(output_dir, "study"), runs_of(output_dir, "study")

    return books


# How trials end


def test_a_finished_trial(driver: Callable[..., Driver], books: Callable[..., Any]) -> None:
    search = driver()
    number = search.start()
    assert search.tell(number, 2.0, 1.0, 1.5, 1.25) is False
    trials, runs = books(search)
    assert trials[0].state == TrialState.COMPLETE
    assert trials[0].intermediate_values == {1: 2.0, 2: 1.0, 3: 1.0, 4: 1.0}  # the best so far
    assert trials[0].value == 1.0
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.metrics["validation/cross_entropy"] == 1.25  # as measured
    assert runs[0].data.tags["rum.worker_host"] == "elsewhere"


def test_a_trial_stopped_at_a_rung(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    search = driver(milestones=(2,))
    good, bad = search.start(), search.start()
    assert search.tell(good, 2.0, 1.0) is False
    assert search.tell(bad, 2.0) is False  # no rung yet
    assert search.tell(bad, 2.0, 1.5) is True
    search.conductor.interrupt()
    trials, runs = books(search)
    assert trials[bad].state == TrialState.PRUNED
    assert trials[bad].value == 1.5
    assert runs[bad].info.status == "KILLED"
    assert runs[bad].data.tags["rum.rung"] == "2"
    assert runs[bad].data.tags["rum.reason"] == "stopped by the scheduler: 1.5000 at rung 2"
    assert trials[good].state == TrialState.RUNNING


def test_a_trial_is_not_stopped_after_its_last_epoch(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    search = driver(milestones=(4,))
    for value in (1.0, 2.0):
        assert search.tell(search.start(), value, value, value, value) is False
    trials, _ = books(search)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2


def test_a_diverged_trial_keeps_its_values_and_is_not_ranked(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    search = driver()
    number = search.start()
    search.tell(number, 0.5)
    reason = "diverged: loss is not finite at update 7"
    assert search.conductor.on_message(end(number, DIVERGED, reason)) is True
    trials, runs = books(search)
    assert trials[0].state == TrialState.PRUNED
    assert trials[0].intermediate_values == {1: 0.5}
    assert runs[0].info.status == "FAILED"
    assert runs[0].data.tags["rum.reason"] == reason
    assert search.conductor.best is None


def test_a_crashed_trial(driver: Callable[..., Driver], books: Callable[..., Any]) -> None:
    search = driver()
    number = search.start()
    reason = "crashed: ValueError: x\nTraceback"
    assert search.conductor.on_message(end(number, CRASHED, reason)) is True
    trials, runs = books(search)
    assert (trials[0].state, trials[0].value) == (TrialState.FAIL, None)
    assert runs[0].info.status == "FAILED"
    assert runs[0].data.tags["rum.reason"] == reason


def test_a_trial_whose_process_died_too_often(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    search = driver()
    number = search.start()
    search.tell(number, 2.0)
    search.conductor.on_lost(number, "its process died")
    trials, runs = books(search)
    assert trials[0].state == TrialState.FAIL
    assert trials[0].intermediate_values == {1: 2.0}
    assert runs[0].data.tags["rum.reason"] == "crashed: its process died"


def test_what_an_ended_trial_still_says_changes_nothing(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    search = driver()
    number = search.start()
    search.conductor.on_message(end(number, CRASHED, "crashed: x"))
    assert search.tell(number, 2.0) is True  # it is to stop
    search.conductor.on_lost(number, "its process died")
    trials, runs = books(search)
    assert (trials[0].state, trials[0].intermediate_values) == (TrialState.FAIL, {})
    assert runs[0].data.tags["rum.reason"] == "crashed: x"


def test_interrupted_trials_are_marked_to_be_gone_on_with(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    search = driver()
    done, half = search.start(), search.start()
    search.tell(done, 2.0, 1.0, 1.5, 1.25)
    search.tell(half, 2.0)
    search.conductor.interrupt()
    trials, runs = books(search)
    assert (trials[done].state, trials[half].state) == (TrialState.COMPLETE, TrialState.RUNNING)
    assert (runs[done].info.status, runs[half].info.status) == ("FINISHED", "SCHEDULED")


# What a run holds


def test_a_trials_run_holds_every_option_of_its_experiment(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    search = driver()
    spec = search.conductor.next_trial()
    search.conductor.interrupt()
    _, runs = books(search)
    experiment = apply(BASE, spec.parameters)
    assert set(runs[0].data.params) == set(flatten(experiment))
    assert runs[0].data.params["model.hidden_size"] == str(experiment.model.hidden_size)
    assert runs[0].data.params["task.delay"] == "3"
    assert runs[0].data.tags["rum.model"] == "rum"
    assert runs[0].data.tags["mlflow.parentRunId"] == runs[None].info.run_id


def test_a_continued_trial_is_a_child_of_the_run_it_comes_from(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    search = driver()
    origin = {"study": "other", "trial": 3, "run_id": "0123abcd", "checkpoint": "/c"}
    parameters = {"model.hidden_size": 8, "training.learning_rate": 0.01}
    search.study.enqueue(parameters, {ORIGIN: origin})
    assert search.conductor.next_trial().origin == origin
    search.conductor.interrupt()
    _, runs = books(search)
    assert runs[0].data.tags["mlflow.parentRunId"] == "0123abcd"
    assert runs[0].data.tags["rum.origin_study"] == "other"
    assert runs[0].data.tags["rum.origin_trial"] == "3"


def test_the_best_so_far_stands_on_the_parent_by_trials_ended(
    driver: Callable[..., Driver],
    curve_of: Callable[..., Any],
    books: Callable[..., Any],
    output_dir: Path,
) -> None:
    search = driver()
    for value in (2.0, 3.0, 1.0):
        search.tell(search.start(), *[value] * 4)
    _, runs = books(search)
    assert curve_of(output_dir, runs[None], "best/cross_entropy") == {1: 2.0, 2: 2.0, 3: 1.0}
    assert search.conductor.best.number == 2


# How many


def test_trials_are_handed_out_up_to_the_target(driver: Callable[..., Driver]) -> None:
    search = driver(target=2)
    assert (search.start(), search.start()) == (0, 1)
    assert search.conductor.next_trial() is None
    assert (search.conductor.num_open, search.conductor.num_ended) == (2, 0)
    search.tell(0, 2.0, 2.0, 2.0, 2.0)
    search.conductor.on_message(end(1, CRASHED, "crashed: x"))
    assert (search.conductor.num_open, search.conductor.num_ended) == (0, 2)
    assert search.conductor.next_trial() is None


def test_queued_trials_count_as_part_of_the_target(driver: Callable[..., Driver]) -> None:
    first = driver()
    parameters = {"model.hidden_size": 8, "training.learning_rate": 0.01}
    for trial in range(2):
        origin = {"study": "other", "trial": trial, "run_id": "0123", "checkpoint": "/c"}
        first.study.enqueue(parameters, {ORIGIN: origin})
    second = driver(target=2)
    specs = [second.conductor.next_trial() for _ in range(3)]
    assert [spec.origin["trial"] for spec in specs[:2]] == [0, 1]
    assert specs[2] is None


def test_an_extended_study_gets_as_many_more(driver: Callable[..., Driver]) -> None:
    first = driver(target=1)
    first.tell(first.start(), 2.0, 2.0, 2.0, 2.0)
    second = driver(target=3)
    assert (second.start(), second.start()) == (1, 2)
    assert second.conductor.next_trial() is None


# Epochs that are heard again, and drivers that die


def test_an_epoch_that_is_heard_again_is_taken_once(
    driver: Callable[..., Driver],
    books: Callable[..., Any],
    output_dir: Path,
    curve_of: Callable[..., Any],
) -> None:
    search = driver(milestones=(1,))
    other, number = search.start(), search.start()
    search.tell(other, 2.0)
    search.tell(number, 1.0, 0.5)
    search.tell(number, 1.0, 0.5, 0.25)  # its process died: the worker tells all again
    search.conductor.interrupt()
    trials, runs = books(search)
    assert trials[number].intermediate_values == {1: 1.0, 2: 0.5, 3: 0.25}
    assert curve_of(output_dir, runs[number], "step") == {1: 5, 2: 10, 3: 15}


def test_a_new_driver_takes_over_what_was_running_under_the_same_numbers(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    first = driver(target=3)
    specs = [first.conductor.next_trial() for _ in range(2)]
    first.tell(1, 2.0)
    second = driver(target=3)
    assert [second.conductor.next_trial() for _ in range(2)] == specs
    assert second.start() == 2
    assert second.conductor.next_trial() is None
    for number in range(3):
        second.tell(number, 2.0, 1.0, 1.0, 1.0)  # told from the start again
    trials, runs = books(second)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert [runs[number].info.status for number in range(3)] == ["FINISHED"] * 3


def test_a_trial_that_had_all_its_epochs_ends_when_they_are_heard_again(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    first = driver(target=1)
    spec = first.conductor.next_trial()
    for report in reports(2.0, 1.0, 1.0, 1.0):  # the driver dies before it ends the trial
        first.study.report(spec.number, report["epoch"], report[BEST])
    first.save_checkpoint(0, 2.0, 1.0, 1.0, 1.0)
    second = driver(target=1)
    assert second.start() == spec.number
    second.tell(0, 2.0, 1.0, 1.0, 1.0)
    trials, _ = books(second)
    assert (trials[0].state, trials[0].value) == (TrialState.COMPLETE, 1.0)
    assert second.conductor.num_open == 0


def test_a_new_driver_judges_against_the_values_of_the_old_one(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    first = driver(milestones=(1,))
    first.tell(first.start(), 1.0, 1.0, 1.0, 1.0)
    first.tell(first.start(), 1.1)  # stopped
    second = driver(milestones=(1,))
    assert second.tell(second.start(), 1.05) is True
    assert second.tell(second.start(), 0.9) is False
    second.conductor.interrupt()
    trials, _ = books(second)
    assert [trial.state for trial in trials] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.PRUNED,
        TrialState.RUNNING,
    ]


def test_a_diverged_trial_of_the_old_driver_is_no_rival(driver: Callable[..., Driver]) -> None:
    first = driver(milestones=(1,))
    number = first.start()
    first.tell(number, 0.1)
    first.conductor.on_message(end(number, DIVERGED, "diverged: loss is not finite"))
    second = driver(milestones=(1,))
    assert second.tell(second.start(), 5.0) is False


def test_a_trial_that_the_dead_driver_had_stopped_ends_as_stopped(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    first = driver(milestones=(1,))
    first.start()
    number = first.start()
    first.study.note(number, RUNG, 1)  # the order in which a stop is written; here the driver dies
    first.study.report(number, 1, 9.0)
    first.save_checkpoint(number, 9.0)
    second = driver(milestones=(1,))
    assert (second.start(), second.start()) == (0, 2)  # it is not run again
    second.conductor.interrupt()
    trials, runs = books(second)
    assert trials[number].state == TrialState.PRUNED
    assert runs[number].info.status == "KILLED"
    assert runs[number].data.tags["rum.reason"] == "stopped by the scheduler: 9.0000 at rung 1"


def test_a_trial_that_goes_on_after_all_is_not_ended_by_the_dead_drivers_note(
    driver: Callable[..., Driver],
) -> None:
    first = driver(milestones=(1,))
    first.tell(first.start(), 1.0)
    number = first.start()
    first.study.note(number, RUNG, 1)  # 2.0 against 1.0; the driver dies before the report
    second = driver(milestones=(1,))
    started = [second.start() for _ in range(4)]
    assert started == [0, number, 2, 3]
    second.tell(2, 3.0)
    second.tell(3, 4.0)
    assert second.tell(number, 2.0) is False  # now among the better half of four
    third = driver(milestones=(1,))
    assert third.study.trials()[number].state == TrialState.RUNNING


def test_mlflow_gets_the_epochs_of_an_adopted_trial_from_its_checkpoint(
    driver: Callable[..., Driver],
    books: Callable[..., Any],
    output_dir: Path,
    curve_of: Callable[..., Any],
) -> None:
    first = driver()
    number = first.start()
    for report in reports(2.0, 1.0):  # into Optuna; MLflow's writer does not get to it
        first.study.report(number, report["epoch"], report[BEST])
    first.save_checkpoint(number, 2.0, 1.0, 0.5)  # the third was on its way to the driver
    second = driver()
    assert second.start() == number
    second.conductor.interrupt()
    _, runs = books(second)
    assert curve_of(output_dir, runs[number], "validation/cross_entropy") == {1: 2.0, 2: 1.0}

    third = driver()
    third.start()
    third.tell(number, 2.0, 1.0, 0.5, 0.25)
    trials, runs = books(third)
    assert trials[number].intermediate_values == {1: 2.0, 2: 1.0, 3: 0.5, 4: 0.25}
    assert curve_of(output_dir, runs[number], "validation/cross_entropy") == {
        1: 2.0,
        2: 1.0,
        3: 0.5,
        4: 0.25,
    }


@pytest.mark.parametrize(
    ("state", "status"), [(TrialState.COMPLETE, "FINISHED"), (TrialState.FAIL, "FAILED")]
)
def test_mlflow_gets_a_trial_that_ended_while_it_was_not_written(
    driver: Callable[..., Driver], books: Callable[..., Any], state: TrialState, status: str
) -> None:
    first = driver()
    spec = first.study.ask()  # past the tracker: MLflow hears of nothing
    first.study.report(spec.number, 1, 2.0)
    first.study.report(spec.number, 2, 1.0)
    first.study.finish(spec.number, state, 1.0 if state == TrialState.COMPLETE else None)
    first.save_checkpoint(spec.number, 2.0, 1.0)
    second = driver()
    _, runs = books(second)
    assert runs[spec.number].info.status == status
    assert second.start() == spec.number + 1


def test_a_third_driver_writes_nothing_again(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    first = driver(target=1)
    first.tell(first.start(), 2.0, 1.0, 1.0, 1.0)
    first.save_checkpoint(0, 2.0, 1.0, 1.0, 1.0)
    ended_at = books(first)[1][0].info.end_time
    for _ in range(2):
        again = driver(target=1)
        assert again.conductor.num_open == 0
    assert books(again)[1][0].info.end_time == ended_at


def test_a_damaged_checkpoint_fails_its_trial_and_not_the_search(
    driver: Callable[..., Driver],
) -> None:
    first = driver()
    first.tell(first.start(), 2.0)
    first.save_checkpoint(0, 2.0)
    (state,) = first.workplace.trial_folder(0).rglob("state.pt")
    state.write_bytes(b"damaged")
    second = driver()
    assert [second.start() for _ in range(4)] == [0, 1, 2, 3]  # the worker reports the damage


def test_a_trial_that_ended_is_written_to_mlflow_also_with_a_damaged_checkpoint(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    first = driver()
    spec = first.study.ask()  # past the tracker: MLflow hears of nothing
    first.study.finish(spec.number, TrialState.FAIL)
    first.save_checkpoint(spec.number, 2.0)
    (state,) = first.workplace.trial_folder(spec.number).rglob("state.pt")
    state.write_bytes(b"damaged")
    second = driver()
    _, runs = books(second)
    assert runs[spec.number].info.status == "FAILED"
    assert second.start() == spec.number + 1


# How it stands


def test_progress_counts_trials_by_how_they_ended_and_names_the_best(
    driver: Callable[..., Driver],
) -> None:
    search = driver(target=6, milestones=(1,))
    assert search.conductor.progress() == "0/6 trials"
    for _ in range(5):
        search.start()
    search.tell(0, 2.0, 1.5, 1.0, 1.0)
    search.tell(1, 3.0)  # stopped
    search.conductor.on_message(end(2, DIVERGED, "diverged: loss is not finite"))
    search.conductor.on_message(end(3, CRASHED, "crashed: x"))
    parts = search.conductor.progress().split(" | ")
    assert parts[:-1] == [
        "4/6 trials",
        "1 running",
        "1 finished",
        "1 stopped early",
        "2 failed",
        "best 1.0000 cross_entropy",
    ]
    assert parts[-1].startswith("about ")
    assert parts[-1].endswith(" left")


def test_progress_of_a_study_that_is_done_names_no_time(driver: Callable[..., Driver]) -> None:
    search = driver(target=1)
    search.tell(search.start(), 2.0, 1.5, 1.0, 1.0)
    assert search.conductor.progress() == "1/1 trials | 1 finished | best 1.0000 cross_entropy"


# Pausing


def test_a_paused_trial_goes_on_when_it_is_among_the_best(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    search = driver(target=3, milestones=(1,), pauses=True)
    a, b, c = search.start(), search.start(), search.start()
    assert search.tell(a, 0.5)  # alone at its rung, without a place
    assert search.conductor.next_trial() is None
    assert not search.conductor.is_done
    assert is_paused(search.study.trial(a))
    search.tracker.flush()
    tags = search.tracker.client.get_run(search.tracker.run_id(a)).data.tags
    assert (tags["rum.state"], tags["rum.paused_after"]) == ("paused", "1")

    assert search.tell(b, 0.7)
    assert search.start() == a  # the best of two
    search.tracker.flush()
    assert not search.tell(a, 0.5, 0.4, 0.3, 0.2)  # the first epoch is known
    assert search.tell(c, 0.6)
    assert search.conductor.next_trial() is None  # nothing runs: the others end
    assert search.conductor.is_done
    trials, runs = books(search)
    states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]
    assert [trial.state for trial in trials] == states
    assert trials[a].intermediate_values == {1: 0.5, 2: 0.4, 3: 0.3, 4: 0.2}
    assert runs[b].data.tags["rum.reason"] == "not promoted: 0.7000 at rung 1"
    assert runs[b].info.status == "KILLED"


def test_a_paused_trial_outlives_its_driver(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    first = driver(target=3, milestones=(1,), pauses=True)
    a, b = first.start(), first.start()
    assert first.tell(a, 0.4)
    assert first.tell(b, 0.5)
    assert first.start() == a
    c = first.start()
    second = driver(target=3, milestones=(1,), pauses=True)
    assert [second.start(), second.start()] == [a, c]  # adopted; b still waits
    assert second.conductor.next_trial() is None
    second.tell(a, 0.4, 0.3, 0.2, 0.1)
    second.tell(c, 0.9)
    assert second.conductor.next_trial() is None
    trials, _ = books(second)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "PRUNED"]


def test_a_pause_that_was_noted_and_not_reported_is_judged_anew(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    first = driver(target=1, milestones=(1,), pauses=True)
    number = first.start()
    first.study.note(number, PAUSED, 1)  # and here the driver dies
    second = driver(target=1, milestones=(1,), pauses=True)
    assert second.start() == number
    assert second.tell(number, 0.5)
    trials, _ = books(second)
    assert is_paused(trials[number])


def test_the_sampler_learns_from_paused_trials(driver: Callable[..., Driver]) -> None:
    search = driver(target=2, milestones=(1,), pauses=True)
    number = search.start()
    search.start()
    search.tell(number, 0.5)
    shown = search.study._sampled.get_trials()
    assert [trial.state for trial in shown] == [TrialState.PRUNED, TrialState.RUNNING]
    assert shown[0].intermediate_values == {1: 0.5}
    assert search.study.trial(number).state == TrialState.RUNNING


def test_a_pause_that_is_judged_otherwise_leaves_no_trace(driver: Callable[..., Driver]) -> None:
    first = driver(target=2, milestones=(1,), pauses=True)
    a, b = first.start(), first.start()
    first.study.note(a, PAUSED, 1)  # and here the driver dies
    second = driver(target=2, milestones=(1,), pauses=True)
    assert [second.start(), second.start()] == [a, b]
    assert second.tell(b, 0.9)
    assert not second.tell(a, 0.5)  # the better of two
    assert not is_paused(second.study.trial(a))


def test_a_pause_of_which_mlflow_did_not_hear_is_caught_up_with(
    driver: Callable[..., Driver],
    books: Callable[..., Any],
    output_dir: Path,
    runs_of: Callable[..., dict[int | None, Run]],
) -> None:
    first = driver(target=1, milestones=(1,), pauses=True)
    number = first.start()
    first.save_checkpoint(number, 0.5)
    first.study.note(number, PAUSED, 1)
    first.study.report(number, 1, 0.5)  # and here the driver dies
    second = driver(target=1, milestones=(1,), pauses=True)
    second.tracker.flush()
    run = runs_of(output_dir, "study")[number]
    assert run.data.tags["rum.state"] == "paused"
    assert json.loads(run.data.tags["rum.attributes"]) == {"rum.paused": 1}
    assert second.conductor.next_trial() is None
    trials, _ = books(second)
    assert trials[number].intermediate_values == {1: 0.5}


# Population-based training


def population() -> Population:
    scheduler = Population(
        "min", 1, 0, {"training.learning_rate": SPACE["training.learning_rate"]}
    )
    scheduler._space = SPACE  # this study's also has a size, which a copy would refuse to change
    return scheduler


def test_a_copy_of_the_best_takes_the_place_of_the_worst(driver: Callable[..., Driver]) -> None:
    search = driver(target=4, scheduler=population())
    numbers = [search.start() for _ in range(4)]
    for number, value in zip(numbers, (0.9, 0.1, 0.2, 0.3), strict=True):
        search.save_checkpoint(number, value)
        assert search.tell(number, value)  # paused until all have come as far
    spec = search.conductor.next_trial()  # the first is beaten
    assert spec is not None
    assert spec.number == 4
    assert search.study.target == 5
    trials = search.study.trials()
    assert [trial.state.name for trial in trials] == ["PRUNED", *["RUNNING"] * 4]
    origin = trials[4].user_attrs["rum.origin"]
    assert (origin["trial"], origin["replaces"]) == (1, 0)
    copied = read_checkpoint(Path(origin["checkpoint"]))
    assert copied.description["reports"] == reports(0.1)

    was, now = (trials[1].params["training.learning_rate"], spec.parameters)
    factor = now["training.learning_rate"] / was
    assert factor == pytest.approx(0.8) or factor == pytest.approx(1.2)

    assert search.start() == 1  # the next goes on
    assert search.study.trial(0).user_attrs["rum.rung"] == 1
    assert has_successor(search.study, 0)
    assert not has_successor(search.study, 1)

    again = driver(target=5, scheduler=population())  # the old one died: nothing is queued twice
    assert again.study.target == 5
    assert len(again.study.trials()) == 5


def test_a_trial_whose_process_died_before_it_ran_starts_again(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    search = driver(target=2)
    number = search.start()
    for _ in range(2):
        assert search.conductor.on_not_started(number) is not None
        assert search.start() == number
    assert not search.tell(number, 0.5, 0.4, 0.3, 0.2)
    other = search.start()
    for _ in range(2):
        search.conductor.on_not_started(other)
        assert search.start() == other
    assert search.conductor.on_not_started(other) is None
    trials, runs = books(search)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL"]
    assert runs[other].data.tags["rum.reason"] == "crashed: its process died before it ran"


def test_a_trial_that_runs_out_of_memory_gets_more_of_the_gpu(
    driver: Callable[..., Driver], books: Callable[..., Any]
) -> None:
    search = driver(target=2, gpus_per_trial=1 / 4)
    number = search.start()
    assert not search.tell(number, 0.5)
    said = {"number": number, "status": OUT_OF_MEMORY, "reason": "out of memory: 2 GiB", **AT}
    for expected in (1 / 3, 1 / 2):
        assert search.conductor.on_message(said), "its process ends"
        spec = search.conductor.next_trial()
        assert spec is not None
        assert (spec.number, spec.gpus) == (number, expected)
    search = driver(target=2, gpus_per_trial=1 / 4)  # the driver died meanwhile
    spec = search.conductor.next_trial()
    assert spec is not None
    assert (spec.number, spec.gpus) == (number, 1 / 2)
    assert search.conductor.on_message(said)
    spec = search.conductor.next_trial()
    assert spec is not None
    assert spec.gpus == 1.0
    assert search.conductor.on_message(said), "there is no more than a whole one"
    other = search.conductor.next_trial()
    assert other is not None
    assert (other.number, other.gpus) == (1, None)
    assert not search.tell(1, 0.5, 0.4, 0.3, 0.2)

    trials, runs = books(search)
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE"]
    assert trials[0].intermediate_values == {1: 0.5}
    assert runs[0].data.tags["rum.reason"] == "out of memory: 2 GiB"
    assert json.loads(runs[0].data.tags["rum.attributes"])["rum.gpu_share"] == 1.0


def test_without_a_gpu_there_is_no_more_memory_to_give(driver: Callable[..., Driver]) -> None:
    search = driver(target=1)
    number = search.start()
    said = {"number": number, "status": OUT_OF_MEMORY, "reason": "out of memory: 2 GiB", **AT}
    assert search.conductor.on_message(said)
    assert search.study.trial(number).state == TrialState.FAIL


def test_of_two_processes_on_one_trial_the_later_has_the_say(
    driver: Callable[..., Driver],
) -> None:
    """Ray may restart a trial's process by itself and report it as lost as well."""
    search = driver(target=1)
    scheduler = ConductedScheduler(search.conductor)

    def hand_out() -> Trial:
        trial = Trial("rum", config={"number": search.start()}, stub=True)
        scheduler.on_trial_add(None, trial)
        return trial

    def say(trial: Trial, status: str, epoch: int = 1) -> str:
        report = reports(*[0.5] * epoch)[-1]
        sent = {**message(0, report, status), "reason": "crashed: its files are gone"}
        return scheduler.on_trial_result(None, trial, {"message": json.dumps(sent)})

    first = hand_out()
    assert say(first, RUNNING) == TrialScheduler.CONTINUE
    scheduler.on_trial_complete(None, first, {})  # its process is gone, no end was heard of
    second = hand_out()
    assert second.config == first.config
    assert say(first, RUNNING, 2) == TrialScheduler.STOP
    assert say(first, CRASHED) == TrialScheduler.STOP
    scheduler.on_trial_error(None, first)
    assert search.study.trial(0).state.name == "RUNNING"
    assert search.study.trial(0).intermediate_values == {1: 0.5}
    assert say(second, RUNNING, 2) == TrialScheduler.CONTINUE
    say(second, FINISHED, 3)
    scheduler.on_trial_complete(None, second, {})
    assert search.study.trial(0).state.name == "COMPLETE"
    assert sorted(search.study.trial(0).intermediate_values) == [1, 2, 3]
    assert search.conductor.is_done
