"""The table of what a search found."""

from pathlib import Path

import pytest
from optuna.trial import TrialState

from rum.tasks import CopyingConfig
from rum.tune.config import Domain, SamplerConfig
from rum.tune.database import open_storage
from rum.tune.results import best_trials, failures
from rum.tune.study import REASON, RUNG, Study, ensure_study

TASK = CopyingConfig(delay=3).load(seed=0)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    storage = open_storage(tmp_path)
    ensure_study(storage, "study", {"mode": "min"})
    space = {"training.learning_rate": Domain(type="float", low=0.01, high=0.01)}
    return Study(storage, "study", space, SamplerConfig(name="random"))


def end(study: Study, state: TrialState, *values: float, reason: str = "", rung: int = 0) -> None:
    number = study.ask().number
    for epoch, value in enumerate(values, 1):
        study.report(number, epoch, value)
    if reason:
        study.note(number, REASON, reason)
    if rung:
        study.note(number, RUNG, rung)
    study.finish(number, state, values[-1] if state == TrialState.COMPLETE else None)


def test_the_table_shows_the_best_first_and_how_they_ended(study: Study) -> None:
    end(study, TrialState.COMPLETE, 3.0, 2.0, 1.5)
    end(study, TrialState.PRUNED, 1.75, reason="stopped by the scheduler", rung=1)
    end(study, TrialState.COMPLETE, 2.0, 1.25, 1.25)
    end(study, TrialState.PRUNED, 0.5, reason="diverged: loss is not finite")
    end(study, TrialState.FAIL, 0.5, reason="crashed: x")
    lines = [line.split() for line in best_trials(study, TASK).splitlines()]
    assert lines[1] == ["trial", "cross_entropy", "epochs", "ended", "training.learning_rate"]
    assert lines[2] == ["2", "1.2500", "3", "finished", "0.01"]
    assert lines[3] == ["0", "1.5000", "3", "finished", "0.01"]
    assert lines[4] == ["1", "1.7500", "1", "stopped", "at", "rung", "1", "0.01"]
    assert lines[5] == ["memoryless", "baseline:", "0.9041", "cross_entropy"]
    assert len(lines) == 6


def test_the_table_shows_five(study: Study) -> None:
    for value in range(9):
        end(study, TrialState.COMPLETE, float(value))
    lines = best_trials(study, TASK).splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["0", "1", "2", "3", "4"]


def test_a_wide_table_is_turned(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    ensure_study(storage, "wide", {"mode": "min"})
    names = [f"model.slow.some_option_{letter}" for letter in "abcdef"]
    space = {name: Domain(type="int", low=5, high=5) for name in names}
    study = Study(storage, "wide", space, SamplerConfig(name="random"))
    for value in (1.0, 2.0):
        end(study, TrialState.COMPLETE, value)
    lines = [line.split() for line in best_trials(study, TASK).splitlines()]
    assert lines[1] == ["trial", "0", "1"]
    assert lines[2] == ["cross_entropy", "1.0000", "2.0000"]
    assert lines[5:11] == [[name, "5", "5"] for name in names]


def test_a_study_without_values_says_so(study: Study) -> None:
    end(study, TrialState.FAIL, reason="crashed: x")
    assert best_trials(study, TASK) == "No trial has a value."


def test_failures_are_named_with_the_first_line_of_their_reason(study: Study) -> None:
    end(study, TrialState.COMPLETE, 3.0)
    end(study, TrialState.FAIL, reason="crashed: ValueError: x\nTraceback")
    end(study, TrialState.PRUNED, 1.0, reason="stopped by the scheduler", rung=1)
    end(study, TrialState.PRUNED, 1.0, reason="diverged: loss is not finite at update 7")
    assert failures(study) == [
        "trial 1 failed: crashed: ValueError: x",
        "trial 3 failed: diverged: loss is not finite at update 7",
    ]
