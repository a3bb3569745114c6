"""Trials side by side in one process, the driver's side and the process's, without Ray."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

from rum.cells import LSTMConfig, RUMConfig
from rum.errors import ConfigError
from rum.experiment import run_experiment
from rum.lanes import SideBySide
from rum.tasks import CopyingConfig
from rum.training.checkpoint import CheckpointStore
from rum.training.config import TrainingConfig
from rum.tune import roster
from rum.tune.cluster import concurrent
from rum.tune.config import Domain, SearchConfig, SearchOptions
from rum.tune.crew_size import replicas, with_replicas
from rum.tune.crew_trial import run_crew
from rum.tune.crews import Crews
from rum.tune.messages import FINISHED, RUNNING
from rum.tune.schedulers import Scheduler
from rum.tune.schedulers.halving import Halving
from rum.tune.space import apply
from rum.tune.study import PAUSED

EPOCHS = 4
BEST = "validation/best_cross_entropy"
WORKER = {"host": "elsewhere", "device": "cpu", "pid": 123}


class Driver:
    """A driver of crews with its books."""

    def __init__(self, small: Any, lanes: int, crews: int) -> None:
        self.small = small
        self.study = small.study
        self.conductor = small.conductor
        self.folder: Path = small.folder
        self.workplace = small.workplace
        self.crews = Crews(small.conductor, small.base, self.workplace, lanes=lanes, crews=crews)
        self.reports = 0

    def open(self) -> str:
        crew = self.crews.open()
        assert crew is not None
        return crew

    def held(self, crew: str) -> list[int]:
        return [trial["number"] for trial in roster.read(self.folder, crew).trials]

    def tell(self, crew: str, *numbers: int, epoch: int, value: float = 1.0) -> bool:
        """Reports an epoch of some trials of a crew; returns whether the crew is to stop."""
        self.reports += 1
        messages = [
            {
                "number": number,
                "status": FINISHED if epoch == EPOCHS else RUNNING,
                "report": {
                    "epoch": epoch,
                    "step": 5 * epoch,
                    "validation/best_cross_entropy": value,
                },
                "worker": WORKER,
            }
            for number in numbers
        ]
        stop = self.crews.on_report(crew, f"report-{self.reports}", messages)
        assert roster.read(self.folder, crew).answers == f"report-{self.reports}"
        return stop

    def work(self, crew: str, die_at: int | None = None) -> None:
        """Runs a crew's process, which is killed at a report, before the driver hears of it."""
        count = 0

        def report(sent: dict[str, str]) -> None:
            nonlocal count
            count += 1
            if count == die_at:
                raise SystemExit
            self.crews.on_report(crew, sent["report"], json.loads(sent["messages"]))

        run_crew({"crew": crew}, self.workplace, report)


@pytest.fixture
def driver(small_driver: Callable[..., Any]) -> Callable[..., Driver]:
    """Opens the study as a new driver of crews, its first trials of the sizes given."""

    def driver(
        *sizes: int,
        target: int = 4,
        lanes: int = 2,
        crews: int = 1,
        scheduler: Scheduler | None = None,
        rates: tuple[float, ...] = (),
    ) -> Driver:
        small = small_driver(num_trials=target, scheduler=scheduler, max_failures=2)
        for index, size in enumerate(sizes):
            rate = rates[index] if rates else 0.01 * (index + 1)
            small.study.enqueue({"model.hidden_size": size, "training.learning_rate": rate})
        return Driver(small, lanes, crews)

    return driver


Books = Callable[[Driver], list[FrozenTrial]]


@pytest.fixture
def books(
    output_dir: Path,
    trials_of: Callable[[Path, str], list[FrozenTrial]],
    check_books: Callable[..., None],
) -> Books:
    """Reads the trials when all is written, and checks that Optuna and MLflow agree."""

    def books(driver: Driver) -> list[FrozenTrial]:
        driver.small.tracker.flush()
        check_books(output_dir, "small", "cross_entropy")
        return trials_of(output_dir, "small")

    return books


def test_a_crew_takes_trials_of_one_shape_and_others_wait_for_theirs(
    driver: Callable[..., Driver],
) -> None:
    at_work = driver(6, 8, 6, 8, 6, 6, target=6, lanes=3)
    first = at_work.open()
    assert at_work.held(first) == [0, 2, 4]  # 1 and 3 wait
    second = at_work.open()
    assert at_work.held(second) == [1, 3]
    for epoch in range(1, EPOCHS):
        assert not at_work.tell(first, 0, 2, 4, epoch=epoch)
        assert at_work.held(first) == [0, 2, 4]
    assert not at_work.tell(first, 0, 2, 4, epoch=EPOCHS)
    assert at_work.held(first) == [5]
    assert at_work.crews.open() is None
    for epoch in range(1, EPOCHS + 1):
        assert at_work.tell(first, 5, epoch=epoch) == (epoch == EPOCHS)
        assert at_work.tell(second, 1, 3, epoch=epoch) == (epoch == EPOCHS)
    assert at_work.crews.is_done


def test_no_more_wait_than_a_crew_has_places(driver: Callable[..., Driver]) -> None:
    at_work = driver(6, 8, 9, 10, 6, target=5)
    crew = at_work.open()
    assert at_work.held(crew) == [0]  # 1 and 2 wait; 3 and 4 are not asked for yet
    assert len(at_work.study.trials(TrialState.WAITING)) == 2
    at_work.tell(crew, 0, epoch=EPOCHS)
    assert at_work.held(crew) == []
    assert at_work.held(at_work.open()) == [1]


def test_trials_are_dealt_to_all_processes(driver: Callable[..., Driver]) -> None:
    at_work = driver(6, 6, 6, 6, 6, target=5, lanes=4, crews=2)
    assert [at_work.held(at_work.open()) for _ in range(2)] == [[0, 1, 2], [3, 4]]


def test_a_paused_trial_makes_place_and_goes_on_in_any_crew(
    driver: Callable[..., Driver],
) -> None:
    at_work = driver(6, 6, 6, 6, target=4, scheduler=Halving([1], 2, "min", True))
    crew = at_work.open()
    at_work.tell(crew, 0, epoch=1, value=2.0)
    assert at_work.held(crew) == [1, 2]
    at_work.tell(crew, 1, epoch=1, value=3.0)  # one of two goes on: 0
    assert at_work.held(crew) == [2, 0]
    at_work.tell(crew, 2, epoch=EPOCHS, value=1.0)
    assert at_work.held(crew) == [0, 3]
    at_work.tell(crew, 0, epoch=EPOCHS, value=1.5)
    assert at_work.held(crew) == [3]
    assert at_work.tell(crew, 3, epoch=1, value=4.0)
    trials = at_work.study.trials()
    complete, pruned = TrialState.COMPLETE, TrialState.PRUNED
    assert [trial.state for trial in trials] == [complete, pruned, complete, pruned]
    assert trials[0].user_attrs[PAUSED] == 1
    assert trials[1].user_attrs["rum.reason"].startswith("not promoted")


def test_a_crew_is_not_heard_on_trials_that_it_does_not_hold(
    driver: Callable[..., Driver],
) -> None:
    at_work = driver(6, 6, 6, 6)
    first = at_work.open()
    at_work.crews.on_gone(first)  # before it ran: its trials start again in another
    second = at_work.open()
    assert at_work.held(second) == [0, 1]
    at_work.crews.on_report(first, "late", [])
    at_work.crews.on_report(second, "a", [{"number": 7, "status": "crashed"}])
    at_work.tell(second, 0, 1, epoch=EPOCHS)
    assert at_work.held(second) == [2, 3]


def test_a_crew_that_is_lost_loses_its_trials(driver: Callable[..., Driver]) -> None:
    at_work = driver(6, 8, 6, 6)
    crew = at_work.open()
    at_work.crews.on_gone(crew, "its process died")
    trials = at_work.study.trials()
    assert [trials[number].state for number in (0, 2)] == [TrialState.FAIL] * 2
    assert trials[0].user_attrs["rum.reason"] == "crashed: its process died"
    assert trials[1].state == TrialState.RUNNING  # it waits


def alone(at_work: Driver, trial: FrozenTrial, folder: Path) -> dict[int, float]:
    """The curve of a trial that trains by itself."""
    curve: dict[int, float] = {}
    experiment = apply(at_work.small.base, trial.params)
    run_experiment(
        experiment,
        experiment.task.load(seed=experiment.training.seed),
        folder,
        lambda r: curve.update({int(r["epoch"]): r[BEST]}),
    )
    return curve


@pytest.mark.parametrize("die_at", [None, 1, 3])
def test_trials_in_a_crew_are_what_they_are_alone(
    die_at: int | None, driver: Callable[..., Driver], books: Books, tmp_path: Path
) -> None:
    at_work = driver(6, 8, 6, 6, 8, target=5)
    if die_at is not None:
        crew = at_work.open()
        with pytest.raises(SystemExit):
            at_work.work(crew, die_at=die_at)
        at_work.work(crew)  # Ray starts it again: the checkpoints' epochs are reported again
    while (crew := at_work.crews.open()) is not None:
        at_work.work(crew)
    trials = books(at_work)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 5
    for trial in trials:
        assert trial.intermediate_values == alone(at_work, trial, tmp_path / str(trial.number))


def test_a_dead_drivers_crews_are_gone_on_with_by_the_next(
    driver: Callable[..., Driver], books: Books, tmp_path: Path
) -> None:
    first = driver(6, 8, 6, 6)
    with pytest.raises(SystemExit):
        first.work(first.open(), die_at=3)  # two trials with epochs, one that waited
    second = driver(lanes=3)
    while (crew := second.crews.open()) is not None:
        second.work(crew)
    trials = books(second)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    for trial in trials:
        assert trial.intermediate_values == alone(second, trial, tmp_path / str(trial.number))


def test_a_trial_that_cannot_go_on_ends_alone(
    driver: Callable[..., Driver], books: Books, tmp_path: Path
) -> None:
    at_work = driver(6, 6, 6, 6, lanes=3)
    damaged = CheckpointStore(at_work.workplace.trial_folder(1))
    path = damaged.save({"weights": torch.zeros(1)}, {"step": 5, "best_step": None, "reports": []})
    (path / "state.pt").write_bytes(b"damaged")
    at_work.work(at_work.open())
    trials = books(at_work)
    assert [trial.state for trial in trials] == [
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.COMPLETE,
    ]
    assert "damaged" in trials[1].user_attrs["rum.reason"]
    for trial in (trials[0], trials[2]):
        assert trial.intermediate_values == alone(at_work, trial, tmp_path / str(trial.number))


def test_what_goes_wrong_for_all_ends_all_and_the_next_take_their_place(
    driver: Callable[..., Driver], books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work = driver(6, 6, 6, 6)
    together, count = SideBySide.__call__, 0

    def out_of_memory_once(self: SideBySide, calls: Any) -> Any:
        nonlocal count
        count += 1
        if count == 8:  # in the second epoch
            raise RuntimeError("out of memory")
        return together(self, calls)

    monkeypatch.setattr(SideBySide, "__call__", out_of_memory_once)
    at_work.work(at_work.open())
    trials = books(at_work)
    assert [trial.state for trial in trials] == [TrialState.FAIL] * 2 + [TrialState.COMPLETE] * 2
    for trial in trials[:2]:
        assert trial.user_attrs["rum.reason"].startswith("crashed: RuntimeError: out of memory")


def search(replicas: int | str = 4, size: int = 48, **changes: Any) -> SearchConfig:
    options = {"model": RUMConfig(hidden_size=size), **changes}
    limits = options.pop("limits", {})
    return SearchConfig(
        task=CopyingConfig(delay=30, batch_size=8),
        training=TrainingConfig(),
        search=SearchOptions(replicas=replicas, **limits),
        **options,
    )


def number(config: SearchConfig) -> int:
    return replicas(with_replicas(config, config.task.load(seed=0)))


def test_auto_takes_replicas_where_they_pay() -> None:
    sizes = {"model.hidden_size": Domain(type="int", low=16, high=100)}
    larger = {"model.hidden_size": Domain(type="categorical", choices=[16, 101])}
    assert number(search("auto", size=100)) == number(search("auto", space=sizes)) == 16
    assert number(search("auto", size=101)) == number(search("auto", space=larger)) == 1
    assert number(search("auto", model=LSTMConfig())) == 1
    assert number(search("auto", limits={"cpus_per_trial": 2})) == 1
    assert number(search("auto", limits={"deterministic": True, "max_concurrent": 2})) == 1
    config = search("auto")
    config.training.device = "cuda"
    assert number(config) == 1
    assert number(search(4, size=1000)) == 4


def test_max_concurrent_counts_trials_of_all_crews() -> None:
    machine = {"CPU": 8, "GPU": 0}
    limits = ({"max_concurrent": most} for most in (1, 4, 5, 100))
    assert [concurrent(search(4, limits=each), machine) for each in limits] == [1, 1, 2, 8]


def test_replicas_of_what_cannot_be_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"search\.replicas is 4, but only stacks of RUM cells"):
        number(search(4, model=LSTMConfig()))
    with pytest.raises(ConfigError, match=r"search\.cpus_per_trial must be 1 then, got 2"):
        number(search(4, limits={"cpus_per_trial": 2}))
    with pytest.raises(ConfigError, match=r"replicas cannot go with search\.deterministic=true"):
        SearchOptions(replicas=2, deterministic=True, max_concurrent=2)
    for wrong in (0, "many", 1.5):
        with pytest.raises(ConfigError, match=r"search\.replicas must be an integer >= 1"):
            SearchOptions(replicas=wrong)  # type: ignore[arg-type]
