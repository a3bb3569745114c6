"""`pipelines/check.py`: what Optuna and MLflow do not agree on is found and named."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from optuna.trial import TrialState

from rum.errors import StudyError
from rum.tasks import CopyingConfig
from rum.train import TrackingConfig
from rum.tune.audit import _is_recorded, check_study
from rum.tune.config import CheckConfig, Domain, SamplerConfig
from rum.tune.database import open_storage
from rum.tune.study import ORIGIN, REASON, Study, ensure_study
from rum.tune.tracking import FINISHED, KILLED, TRIAL_TAG, Tracker, connect

TASK = CopyingConfig(delay=3, batch_size=4, steps_per_epoch=2).load(seed=0)
SPACE = {"model.hidden_size": Domain(type="int", low=8, high=80)}
KEY = "validation/best_cross_entropy"
AGREE = "study mine: 3 trials, Optuna and MLflow agree"


@pytest.fixture
def books(output_dir: Path) -> tuple[CheckConfig, MlflowClient, list[str]]:
    """A study of a finished, a stopped and a waiting trial; MLflow and the runs' ids."""
    storage = open_storage(output_dir)
    ensure_study(storage, "mine", {"mode": "min"})
    study = Study(storage, "mine", SPACE, SamplerConfig(name="random"))
    client, experiment_id = connect(TrackingConfig(), output_dir)
    tags = {"rum.metric": TASK.metric}
    tracker = Tracker(client, experiment_id, "mine", TASK, tags, {"a": 1}, study_id=study.id)
    for number, (state, status) in enumerate(
        [(TrialState.COMPLETE, FINISHED), (TrialState.PRUNED, KILLED)]
    ):
        spec = study.ask()
        began = study.trial(number).datetime_start
        tracker.start_trial(number, f"mine-{number}", spec.parameters, {}, began=began)
        for epoch in (1, 2):
            study.report(number, epoch, 1 / epoch)
            tracker.log_report(number, {"epoch": epoch, KEY: 1 / epoch, "step": epoch})
        study.note(number, REASON, "why not")
        study.finish(number, state, 0.5 if state == TrialState.COMPLETE else None)
        ended = study.trial(number).datetime_complete
        tracker.mark_trial(number, status, {"rum.reason": "why not"}, at=ended)
    study.enqueue({"model.hidden_size": 9}, {ORIGIN: {"run_id": "x"}})
    tracker.close(FINISHED)
    config = CheckConfig(study="mine", output_dir=str(output_dir))
    return config, client, [tracker.run_id(number) for number in (0, 1)]


def test_books_that_agree(books: tuple[CheckConfig, MlflowClient, list[str]]) -> None:
    config, _, _ = books
    assert check_study(config) == (AGREE, True)
    report = json.loads(check_study(replace(config, json=True))[0])
    assert report == {
        "study": "mine",
        "trials": 3,
        "states": {"COMPLETE": 1, "PRUNED": 1, "WAITING": 1},
        "differences": [],
    }


Change = Callable[[MlflowClient, str], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "run deleted": (
        lambda client, run: client.delete_run(run),
        "trial 0: runs: 1 in the study, 0 in MLflow",
    ),
    "status": (
        lambda client, run: client.update_run(run, status="FAILED"),
        r"trial 0: state: COMPLETE \(FINISHED\) in the study, FAILED in MLflow",
    ),
    "reason": (
        lambda client, run: client.set_tag(run, "rum.reason", "because"),
        "trial 0: reason: why not in the study, because in MLflow",
    ),
    "point more": (
        lambda client, run: client.log_metric(run, KEY, 0.25, step=3),
        f"trial 0: {KEY} of epoch 3: None in the study, 0.25 in MLflow",
    ),
    "point twice": (
        lambda client, run: client.log_batch(run, [Metric(KEY, 0.5, 7, 2)]),
        "trial 0: epoch 2: once in the study, 2 times in MLflow",
    ),
    "time": (
        lambda client, run: client.set_terminated(run, end_time=1000),
        "trial 0: time: .* to 20.* in the study, .* to 1970-01-01 .* in MLflow",
    ),
    "another run": (
        lambda client, run: client.set_tag(run, TRIAL_TAG, "7"),
        "trial 0: runs: 1 in the study, 0 in MLflow\n"
        "trial 7: trial: no such trial in the study, a run in MLflow",
    ),
    "two runs": (
        lambda client, run: client.set_tag(run, TRIAL_TAG, "1"),
        "trial 1: runs: 1 in the study, 2 in MLflow",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_difference_is_named(
    books: tuple[CheckConfig, MlflowClient, list[str]], change: Change, message: str
) -> None:
    config, client, run_ids = books
    change(client, run_ids[0])
    text, agrees = check_study(config)
    assert not agrees
    assert re.search(message, text)
    text, agrees = check_study(replace(config, json=True))
    assert not agrees
    assert json.loads(text)["differences"][0]["trial"] in (0, 1)


def test_what_is_not_there_is_an_error_and_nothing_is_made(
    books: tuple[CheckConfig, MlflowClient, list[str]], tmp_path: Path
) -> None:
    config, _, _ = books
    with pytest.raises(StudyError, match="there is no study 'mime'; did you mean 'mine'"):
        check_study(replace(config, study="mime"))
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(StudyError, match="has no studies"):
        check_study(replace(config, output_dir=str(elsewhere)))
    assert not elsewhere.exists()


def test_whole_numbers_may_be_recorded_in_the_type_of_their_option() -> None:
    agree = [(1, "1"), (1, "1.0"), (0.5, "0.5"), (True, "true"), (None, "null"), ("relu", "relu")]
    differ = [(1, "1.5"), (1, "one"), (True, "1.0"), (0.5, "0.50"), (None, "0")]
    assert all(_is_recorded(value, text) for value, text in agree)
    assert not any(_is_recorded(value, text) for value, text in differ)
