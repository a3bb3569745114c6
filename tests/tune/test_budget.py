"""What a study may use in all: counted over drivers, and what happens when it is used up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState

from rum.cells import RUMConfig
from rum.errors import ConfigError
from rum.tasks import CopyingConfig
from rum.training.config import TrainingConfig
from rum.tune.budget import check_budget, describe, usage
from rum.tune.config import SchedulerConfig, SearchConfig, SearchOptions
from rum.tune.schedulers.halving import Halving

Open = Callable[..., Any]
HOUR = 3600.0


def states(driver: Any) -> list[str]:
    return [trial.state.name for trial in driver.study.trials()]


def reason(driver: Any, number: int) -> str:
    return str(driver.study.trial(number).user_attrs["rum.reason"])


# Epochs


def test_epochs_of_all_trials_never_exceed_their_budget(
    small_driver: Open,
    check_books: Callable[..., None],
    runs_of: Callable[..., dict[int | None, Run]],
    output_dir: Path,
) -> None:
    search = small_driver(max_trial_epochs=5)
    a, b = search.start(), search.start()
    assert not search.tell(a, 1)
    assert not search.tell(b, 1)
    assert not search.tell(a, 2)  # one is left beside it for each of the two
    assert search.conductor.next_trial() is None  # two are left, and both are taken
    assert not search.conductor.is_done  # trials run
    assert search.tell(b, 2)  # the last one is a's
    assert not search.conductor.is_done
    assert search.tell(a, 3)
    assert search.conductor.next_trial() is None
    assert search.conductor.is_done
    assert search.conductor.num_open == 2
    used_up = "budget: search.max_trial_epochs = 5 is used up"
    assert search.conductor.out_of_budget == used_up
    assert states(search) == ["PRUNED", "PRUNED"]
    assert reason(search, a) == used_up
    assert (
        reason(search, b) == "budget: search.max_trial_epochs = 5 has 1 left, of which 1 are taken"
    )
    assert sum(len(t.intermediate_values) for t in search.study.trials()) == 5
    search.tracker.flush()
    check_books(output_dir, "small", "cross_entropy")
    run = runs_of(output_dir, "small")[a]
    assert (run.info.status, run.data.tags["rum.reason"]) == ("KILLED", used_up)


def test_a_trial_that_ends_by_itself_with_the_last_epoch_is_finished(small_driver: Open) -> None:
    search = small_driver(max_trial_epochs=4)
    number = search.start()
    assert [search.tell(number, epoch) for epoch in (1, 2, 3, 4)] == [False] * 4
    assert states(search) == ["COMPLETE"]
    assert search.conductor.is_done


def test_no_trial_is_started_that_cannot_reach_the_first_rung(small_driver: Open) -> None:
    search = small_driver(max_trial_epochs=5, first_epochs=2, scheduler=Halving([2], 2, "min"))
    a, _ = search.start(), search.start()
    assert search.conductor.next_trial() is None  # 1 left, 4 taken by two that run
    assert not search.tell(a, 1)
    assert not search.tell(a, 2)
    assert search.tell(a, 3)  # the other two epochs are b's
    assert not search.tell(1, 1)
    assert search.tell(1, 2, 9.0)
    assert reason(search, 1) == "stopped by the scheduler: 9.0000 at rung 2"
    assert search.conductor.is_done


def test_a_larger_budget_goes_on_and_the_same_does_not(small_driver: Open) -> None:
    first = small_driver(max_trial_epochs=2)
    first.tell(first.start(), 1)
    assert first.tell(0, 2)
    same = small_driver(max_trial_epochs=2)
    assert same.conductor.is_done
    assert same.conductor.out_of_budget == "budget: search.max_trial_epochs = 2 is used up"
    assert same.conductor.next_trial() is None
    larger = small_driver(max_trial_epochs=3)
    assert not larger.conductor.is_done
    number = larger.start()
    assert number == 1
    assert larger.tell(number, 1)
    assert states(larger) == ["PRUNED", "PRUNED"]


def test_paused_trials_stay_paused_when_the_budget_is_used_up(small_driver: Open) -> None:
    first = small_driver(
        max_trial_epochs=2, scheduler=Halving([1], 2, "min", pauses=True), num_trials=3
    )
    a, b = first.start(), first.start()
    assert first.tell(a, 1, 0.5)
    assert first.tell(b, 1, 0.7)
    assert first.conductor.next_trial() is None
    assert first.conductor.is_done
    assert states(first) == ["RUNNING", "RUNNING"]
    second = small_driver(
        max_trial_epochs=9, scheduler=Halving([1], 2, "min", pauses=True), num_trials=3
    )
    assert second.start() == a  # promoted
    assert [second.tell(a, epoch, 0.5) for epoch in (2, 3, 4)] == [False] * 3
    assert second.study.trial(a).state == TrialState.COMPLETE


def test_trials_left_running_by_a_dead_driver_wait_for_a_larger_budget(
    small_driver: Open,
) -> None:
    first = small_driver()
    first.tell(first.start(), 1)
    smaller = small_driver(max_trial_epochs=1)
    assert smaller.conductor.is_done
    smaller.conductor.interrupt()
    assert states(smaller) == ["RUNNING"]
    larger = small_driver(max_trial_epochs=2)
    assert larger.start() == 0
    assert larger.tell(0, 2)


# Hours


def test_hours_add_up_over_drivers(small_driver: Open) -> None:
    first = small_driver(max_hours=3.0)
    number = first.start()
    first.seconds = HOUR
    assert not first.tell(number, 1)  # here it is killed
    second = small_driver(max_hours=3.0)
    second.seconds = 100 * HOUR  # what lies between drivers does not count
    second = small_driver(max_hours=3.0)
    assert second.start() == number
    second.seconds = 1.5 * HOUR
    assert not second.tell(number, 2)
    assert usage(second.study)["max_hours"] == (pytest.approx(2.5), 3.0)
    second.seconds = 2 * HOUR
    assert second.tell(number, 3)
    assert reason(second, number) == "budget: search.max_hours = 3 is used up"
    assert second.conductor.is_done


def test_no_trial_is_started_that_takes_longer_than_what_is_left(small_driver: Open) -> None:
    search = small_driver(max_hours=3.0, first_epochs=2)
    a = search.start()
    search.seconds = HOUR
    search.tell(a, 1)
    search.seconds = 1.5 * HOUR
    search.conductor.advance()
    search.seconds = 2 * HOUR
    search.tell(a, 2)  # an hour each: two until the first rung, one left
    assert search.conductor.next_trial() is None
    search.seconds = 2.5 * HOUR
    assert not search.tell(a, 3)  # it goes on itself
    assert not search.tell(a, 4)
    assert search.conductor.out_of_budget is not None
    assert search.conductor.out_of_budget.startswith("budget: search.max_hours = 3 has 0.5 left")


def test_gpu_hours_are_share_times_time_of_the_trials_that_run(small_driver: Open) -> None:
    search = small_driver(max_gpu_hours=10.0, gpus=0.5)
    a = search.start()
    search.seconds = HOUR  # 1 trial
    b = search.start()
    search.seconds = 2 * HOUR  # 2 trials
    search.conductor.on_lost(b, "its process died")  # what a failed trial used is used
    search.seconds = 4 * HOUR  # 1 trial
    search.tell(a, 1)
    expected = 0.5 * (1 + 2 + 2)
    assert usage(search.study)["max_gpu_hours"] == (pytest.approx(expected), 10.0)
    again = small_driver(max_gpu_hours=2.6, gpus=1.0)  # killed; another share now
    assert again.start() == a
    again.seconds = 0.2 * HOUR
    assert again.tell(a, 2)
    assert usage(again.study)["max_gpu_hours"] == (pytest.approx(expected + 0.2), 2.6)
    assert reason(again, a) == "budget: search.max_gpu_hours = 2.6 is used up"


# What is refused, and what is said


def config(options: SearchOptions, scheduler: SchedulerConfig) -> SearchConfig:
    return SearchConfig(
        model=RUMConfig(hidden_size=8),
        task=CopyingConfig(delay=3),
        search=options,
        scheduler=scheduler,
        training=TrainingConfig(max_epochs=9),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_trial_epochs": 0}, "max_trial_epochs must be an integer >= 1, got 0"),
        ({"max_hours": 0.0}, "max_hours must be a finite number > 0, got 0"),
        ({"max_hours": float("inf")}, "max_hours must be a finite number > 0, got inf"),
        ({"max_gpu_hours": -1.0}, "max_gpu_hours must be a finite number > 0, got -1"),
        (
            {"max_hours": 1.0, "deterministic": True, "max_concurrent": 2},
            "max_hours cannot go with search.deterministic=true",
        ),
        ({"max_trial_epochs": 2}, "max_trial_epochs must be at least 3, the first rung"),
        ({"max_gpu_hours": 1.0}, "max_gpu_hours is 1.0, but trials use no GPU"),
    ],
)
def test_contradictory_budgets_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_budget(
            config(SearchOptions(**options), SchedulerConfig(grace_epochs=3)), gpus_per_trial=0.0
        )


def test_without_a_scheduler_one_epoch_is_enough() -> None:
    options = SearchOptions(max_trial_epochs=1)
    none = SchedulerConfig(name="none", grace_epochs=3)
    check_budget(config(options, none), gpus_per_trial=0.0)


def test_budgets_are_said() -> None:
    assert describe(SearchOptions()) is None
    assert describe(SearchOptions(max_trial_epochs=1000, max_hours=2.5)) == (
        "Budget: ends at 1,000 epochs of all trials together, or 2.5 hours, if not before"
    )


def test_trials_ended_by_the_budget_are_ranked(
    small_driver: Open, trials_of: Callable[[Path, str], list[FrozenTrial]]
) -> None:
    search = small_driver(max_trial_epochs=1)
    assert search.tell(search.start(), 1, 0.25)
    assert search.conductor.best.value == 0.25
