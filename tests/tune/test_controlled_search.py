"""Real searches on Ray: one that another process extends and stops, one with a budget."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial

from rum.cells import RUMConfig
from rum.tasks import CopyingConfig
from rum.training.config import TrainingConfig
from rum.tune.conducting import InterruptedSearchError
from rum.tune.config import Domain, SchedulerConfig, SearchConfig, SearchOptions, StudyConfig
from rum.tune.control import control
from rum.tune.search import run_search

# Its arguments are output_dir and the deadline in seconds.
OTHER_PROCESS = """
import json, sys, time
from rum.tune.config import StudyConfig
from rum.tune.control import control

output_dir, seconds = sys.argv[1], float(sys.argv[2])
deadline = time.monotonic() + seconds

def act(action, study="mine", **options):
    config = StudyConfig(action=action, study=study, output_dir=output_dir, json=True,
                         wait_seconds=seconds, **options)
    return json.loads(control(config))

def wait_for(is_there):
    while True:
        if act("list", None)["studies"]:
            trials = {each["trial"]: each for each in act("show")["trials"]}
            if is_there(trials):
                return
        assert time.monotonic() < deadline, act("list", None)
        time.sleep(0.05)

def trains(number):
    return lambda trials: number in trials and trials[number]["epochs"] > 0

def has_ended(number):
    return lambda trials: trials[number]["state"] == "PRUNED"

wait_for(trains(0))
wait_for(trains(1))
assert act("extend", by=1)["taken"]
assert act("stop_trial", trial=0)["taken"]  # the last of the first target make room
wait_for(has_ended(0))
assert act("stop_trial", trial=1)["taken"]
wait_for(has_ended(1))
wait_for(trains(2))
assert act("stop")["taken"]
"""
DEADLINE_SECONDS = 120.0


def small_search(
    output_dir: Path, training: TrainingConfig, search: SearchOptions
) -> SearchConfig:
    return SearchConfig(
        model=RUMConfig(hidden_size=4),
        task=CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5),
        training=training,
        space={"model.hidden_size": Domain(type="int", low=4, high=8)},
        scheduler=SchedulerConfig(name="none"),
        search=search,
        study="mine",
        output_dir=str(output_dir),
    )


@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(300)
def test_another_process_extends_a_running_search_and_stops_it(
    output_dir: Path,
    trials_of: Callable[[Path, str], list[FrozenTrial]],
    check_books: Callable[..., None],
) -> None:
    config = small_search(
        output_dir,
        TrainingConfig(max_epochs=100_000),  # they end by order alone
        SearchOptions(num_trials=2, max_concurrent=2),
    )
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, str(output_dir), str(DEADLINE_SECONDS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as other:
        with pytest.raises(
            InterruptedSearchError, match="interrupted with 1 trials open"
        ) as raised:
            run_search(config)
        said = other.communicate(timeout=DEADLINE_SECONDS)[0]
    assert other.returncode == 0, said
    assert "resume=yes" in str(raised.value)
    states = [trial.state.name for trial in trials_of(output_dir, "mine")]
    assert states == ["PRUNED", "PRUNED", "RUNNING"]
    check_books(output_dir, "mine", "cross_entropy")

    stop = StudyConfig(action="stop_trial", study="mine", trial=2, output_dir=str(output_dir))
    assert control(stop) == "study mine: trial 2 has ended"
    summary = run_search(replace(config, resume="yes"))
    assert "stopped by hand" in summary
    check_books(output_dir, "mine", "cross_entropy")


@pytest.mark.usefixtures("ray_session")
def test_a_search_ends_with_its_budget_and_goes_on_with_a_larger_one(
    output_dir: Path,
    trials_of: Callable[[Path, str], list[FrozenTrial]],
    check_books: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def search(max_trial_epochs: int, resume: str = "yes") -> str:
        options = SearchOptions(num_trials=3, max_trial_epochs=max_trial_epochs)
        config = small_search(output_dir, TrainingConfig(max_epochs=4), options)
        return run_search(replace(config, resume=resume))

    def epochs() -> int:
        return sum(len(trial.intermediate_values) for trial in trials_of(output_dir, "mine"))

    used_up = r"Ended with \d of 3 trials open: budget: search.max_trial_epochs = 5 is used up"
    assert re.search(used_up, search(5, resume="no"))
    assert "Budget: ends at 5 epochs of all trials together" in capsys.readouterr().err
    assert epochs() == 5
    assert re.search(used_up, search(5))
    assert "Ray: " not in capsys.readouterr().err  # nothing was started
    assert "Ended with" not in search(50)
    assert 5 < epochs() <= 12
    assert len(trials_of(output_dir, "mine")) == 3
    check_books(output_dir, "mine", "cross_entropy")
