"""MLflow's record against real SQLite files: found or made, each thing written once."""

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from rum.errors import TrackingError
from rum.tasks import CopyingConfig
from rum.train import TrackingConfig
from rum.tune import tracking
from rum.tune.tracking import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    KILLED,
    Tracker,
    artifact_location,
    connect,
    trial_run,
)

TASK = CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5).load(seed=0)
PARAMETERS = {"model.hidden_size": 8, "model.eta": None, "task.corpus": "a b"}


def report(epoch: int, value: float) -> dict[str, float]:
    return {"epoch": epoch, "step": 5 * epoch, "validation/cross_entropy": value}


@pytest.fixture
def open_tracker(output_dir: Path) -> Iterator[Callable[[], Tracker]]:
    """Opens the tracker of one study as a new driver does."""
    opened = []

    def open_tracker() -> Tracker:
        client, experiment_id = connect(TrackingConfig(), output_dir)
        tags = {"rum.metric": TASK.metric}
        tracker = Tracker(client, experiment_id, "study", TASK, tags, {"search.num_trials": 3})
        opened.append(tracker)
        return tracker

    yield open_tracker
    for tracker in opened:
        tracker.close(INTERRUPTED)


def run_of(tracker: Tracker, number: int) -> Run:
    tracker.flush()
    return tracker.client.get_run(tracker.run_id(number))


def points(tracker: Tracker, number: int, key: str) -> list[tuple[int, float]]:
    history = tracker.client.get_metric_history(run_of(tracker, number).info.run_id, key)
    return sorted((point.step, point.value) for point in history)


# Where


def test_artifacts_get_an_absolute_place_below_the_output_folder(
    output_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client, experiment_id = connect(TrackingConfig(), Path("outputs"))
    location = client.get_experiment(experiment_id).artifact_location
    assert location == (output_dir / "mlartifacts").as_uri()
    run = client.create_run(experiment_id)
    client.log_text(run.info.run_id, "text", "note.txt")
    assert [path.read_text() for path in output_dir.rglob("note.txt")] == ["text"]


def test_nothing_is_written_into_the_working_directory(
    output_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    client, experiment_id = connect(TrackingConfig(), output_dir)
    client.log_text(client.create_run(experiment_id).info.run_id, "text", "note.txt")
    assert list(elsewhere.iterdir()) == []


def test_connecting_again_finds_the_same_experiment(output_dir: Path) -> None:
    ids = {connect(TrackingConfig(experiment="mine"), output_dir)[1] for _ in range(2)}
    assert len(ids) == 1
    assert connect(TrackingConfig(experiment="other"), output_dir)[1] not in ids


def test_the_environment_says_where_unless_the_configuration_does(
    output_dir: Path, tmp_path: Path, mlflow_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = {name: f"sqlite:///{tmp_path}/{name}.db" for name in ("environment", "configured")}
    for name in uris:
        shutil.copy(mlflow_tables, tmp_path / f"{name}.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uris["environment"])
    connect(TrackingConfig(experiment="first"), output_dir)
    connect(TrackingConfig(experiment="second", uri=uris["configured"]), output_dir)
    found = {
        name: {e.name for e in MlflowClient(uri).search_experiments()} - {"Default"}
        for name, uri in uris.items()
    }
    assert found == {"environment": {"first"}, "configured": {"second"}}
    local = MlflowClient(f"sqlite:///{output_dir}/mlflow.db")
    assert {e.name for e in local.search_experiments()} <= {"Default"}


@pytest.mark.parametrize(
    ("uri", "is_here"),
    [
        ("sqlite:////srv/mlflow.db", True),
        ("postgresql://rum@db/mlflow", True),
        ("postgresql+psycopg2://rum@db/mlflow", True),
        ("mysql+pymysql://rum@db/mlflow", True),
        ("file:/srv/mlruns", True),
        ("http://db:5000", False),
        ("https://db", False),
        ("databricks", False),
    ],
)
def test_who_says_where_artifacts_go(uri: str, is_here: bool, tmp_path: Path) -> None:
    expected = (tmp_path / "mlartifacts").as_uri() if is_here else None
    assert artifact_location(uri, tmp_path) == expected


# Servers that are not there


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where connections are accepted and nothing is ever answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted = []

        def accept() -> None:
            while True:
                try:
                    accepted.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    for connection in accepted:
        connection.close()


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def failure(uri: str, output_dir: Path) -> tuple[str, float]:
    began = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        connect(TrackingConfig(uri=uri), output_dir)
    return str(caught.value), time.monotonic() - began


def test_a_server_that_never_answers_is_named_without_its_password(
    output_dir: Path, silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the thread left behind ends soon
    monkeypatch.setattr(tracking, "CONNECT_SECONDS", 1.0)
    uri = f"http://reader:hunter2@127.0.0.1:{silent_port}"
    message, seconds = failure(uri, output_dir)
    assert f"127.0.0.1:{silent_port} did not answer within 1 s" in message
    assert "hunter2" not in message
    assert "reader" not in message
    assert seconds < 3.0


def test_the_time_to_answer_is_ten_seconds() -> None:
    assert tracking.CONNECT_SECONDS == 10.0


def test_a_database_that_refuses_the_connection_is_named_at_once(
    output_dir: Path, closed_port: int
) -> None:
    pytest.importorskip("psycopg2", reason="needs rum-torch[postgres]")
    uri = f"postgresql+psycopg2://reader:hunter2@127.0.0.1:{closed_port}/mlflow"
    message, seconds = failure(uri, output_dir)
    assert f"127.0.0.1:{closed_port}/mlflow cannot be used" in message
    assert "refused" in message
    assert "hunter2" not in message
    assert seconds < tracking.CONNECT_SECONDS


def test_a_database_whose_driver_is_missing_is_named(output_dir: Path) -> None:
    message, _ = failure("postgresql+none://rum@127.0.0.1/mlflow", output_dir)
    assert "cannot be used" in message
    assert "postgresql.none" in message


def test_a_server_that_refuses_the_connection_is_named(
    output_dir: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    message, seconds = failure(f"http://127.0.0.1:{closed_port}", output_dir)
    assert f"MLflow at http://127.0.0.1:{closed_port} cannot be used: " in message
    assert "Connection refused" in message
    assert seconds < 12.0


@pytest.mark.parametrize("server", ["http://{}@127.0.0.1:{}", "htps://{}@127.0.0.1:{}"])
def test_what_mlflow_says_of_a_bad_address_is_passed_on_without_the_password(
    output_dir: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    message, _ = failure(server.format("reader:hunter2", closed_port), output_dir)
    assert f"127.0.0.1:{closed_port}" in message
    assert "hunter2" not in message


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"this is no database" * 100)
    message, _ = failure(f"sqlite:///{path}", tmp_path)
    assert f"MLflow at sqlite:///{path} cannot be used" in message


def test_a_deleted_experiment_is_an_error_that_says_so(output_dir: Path) -> None:
    client, experiment_id = connect(TrackingConfig(), output_dir)
    client.delete_experiment(experiment_id)
    with pytest.raises(TrackingError, match="deleted"):
        Tracker(*connect(TrackingConfig(), output_dir), "study", TASK, {}, {"a": 1})


def test_a_study_may_have_a_quote_in_its_name(output_dir: Path) -> None:
    client, experiment_id = connect(TrackingConfig(), output_dir)
    tracker = Tracker(client, experiment_id, "tom's", TASK, {}, {"a": 1})
    tracker.close(FINISHED)
    assert client.get_run(tracker.parent_id).data.tags["rum.study"] == "tom's"


# What is written


def test_a_trials_run_holds_parameters_tags_and_data_set(
    open_tracker: Callable[[], Tracker],
) -> None:
    tracker = open_tracker()
    tracker.start_trial(3, "study-0003", PARAMETERS, {"rum.seed": "1"})
    run = run_of(tracker, 3)
    assert run.info.run_name == "study-0003"
    assert run.info.status == "RUNNING"
    assert run.data.params == {
        "model.hidden_size": "8",
        "model.eta": "null",
        "task.corpus": "'a b'",
    }
    expected = {
        "rum.study": "study",
        "rum.trial": "3",
        "rum.metric": "cross_entropy",
        "rum.seed": "1",
        "mlflow.parentRunId": tracker.parent_id,
    }
    assert {key: run.data.tags.get(key) for key in expected} == expected
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("T3", TASK.checksum[:16])
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "training")]


def test_the_parent_run_holds_the_options_of_the_search(
    open_tracker: Callable[[], Tracker],
) -> None:
    tracker = open_tracker()
    run = tracker.client.get_run(tracker.parent_id)
    assert run.data.params == {"search.num_trials": "3"}
    assert run.data.tags["rum.study"] == "study"
    assert "rum.trial" not in run.data.tags
    assert run.info.status == "RUNNING"


def test_a_trial_that_continues_another_is_its_child(open_tracker: Callable[[], Tracker]) -> None:
    tracker = open_tracker()
    tracker.start_trial(0, "study-0000", PARAMETERS, {}, parent_id="0123456789abcdef")
    assert run_of(tracker, 0).data.tags["mlflow.parentRunId"] == "0123456789abcdef"


def test_an_epoch_is_written_as_points_at_its_step(open_tracker: Callable[[], Tracker]) -> None:
    tracker = open_tracker()
    tracker.start_trial(0, "study-0000", PARAMETERS, {})
    tracker.log_report(0, report(1, 2.5))
    tracker.log_report(0, report(2, 2.0))
    assert points(tracker, 0, "validation/cross_entropy") == [(1, 2.5), (2, 2.0)]
    assert points(tracker, 0, "step") == [(1, 5.0), (2, 10.0)]
    assert set(run_of(tracker, 0).data.metrics) == {"validation/cross_entropy", "step"}


def test_an_epoch_that_is_written_twice_has_one_point(open_tracker: Callable[[], Tracker]) -> None:
    tracker = open_tracker()
    tracker.start_trial(0, "study-0000", PARAMETERS, {})
    tracker.log_report(0, report(1, 2.5))
    tracker.log_report(0, report(1, 2.5))
    assert points(tracker, 0, "validation/cross_entropy") == [(1, 2.5)]


def test_the_studys_best_is_on_the_parent_by_number_of_trials(
    open_tracker: Callable[[], Tracker],
) -> None:
    tracker = open_tracker()
    tracker.log_best("cross_entropy", 2.5, 1)
    tracker.log_best("cross_entropy", 2.0, 2)
    tracker.flush()
    history = tracker.client.get_metric_history(tracker.parent_id, "best/cross_entropy")
    assert [(point.step, point.value) for point in history] == [(1, 2.5), (2, 2.0)]


@pytest.mark.parametrize(
    ("status", "expected"),
    [(FINISHED, "FINISHED"), (KILLED, "KILLED"), (FAILED, "FAILED"), (INTERRUPTED, "SCHEDULED")],
)
def test_a_trial_ends_with_its_status_and_tags(
    open_tracker: Callable[[], Tracker], status: str, expected: str
) -> None:
    tracker = open_tracker()
    tracker.start_trial(0, "study-0000", PARAMETERS, {})
    tracker.mark_trial(0, status, {"rum.state": "X", "rum.reason": "r" * 6000})
    run = run_of(tracker, 0)
    assert run.info.status == expected
    assert run.data.tags["rum.state"] == "X"
    assert run.data.tags["rum.reason"] == "r" * 5000  # as much as MLflow takes
    assert (run.info.end_time is None) is (status == INTERRUPTED)


@pytest.mark.parametrize("status", [FINISHED, INTERRUPTED])
def test_closing_writes_what_is_left_and_ends_the_parent_run(
    output_dir: Path, status: str
) -> None:
    client, experiment_id = connect(TrackingConfig(), output_dir)
    tracker = Tracker(client, experiment_id, "study", TASK, {}, {"search.num_trials": 3})
    tracker.start_trial(0, "study-0000", PARAMETERS, {})
    tracker.close(status)
    assert tracker.client.get_run(tracker.parent_id).info.status == status
    assert run_of_number(tracker, 0).info.status == "RUNNING"


def run_of_number(tracker: Tracker, number: int) -> Run:
    experiment = tracker.client.get_experiment_by_name("rum")
    return trial_run(tracker.client, experiment.experiment_id, "study", number)


# A driver that died


def test_another_tracker_finds_the_runs_of_the_first(open_tracker: Callable[[], Tracker]) -> None:
    first = open_tracker()
    first.start_trial(0, "study-0000", PARAMETERS, {})
    first.log_report(0, report(1, 2.5))
    first.mark_trial(0, INTERRUPTED, {})
    first.flush()

    second = open_tracker()
    second.start_trial(0, "study-0000", PARAMETERS, {})
    second.log_report(0, report(1, 2.5))
    second.log_report(0, report(2, 2.0))
    assert second.parent_id == first.parent_id
    assert run_of(second, 0).info.run_id == first.run_id(0)
    assert run_of(second, 0).info.status == "RUNNING"
    assert points(second, 0, "validation/cross_entropy") == [(1, 2.5), (2, 2.0)]
    experiment = second.client.get_experiment_by_name("rum")
    assert len(second.client.search_runs([experiment.experiment_id])) == 2


def test_a_run_without_parameters_is_completed(
    open_tracker: Callable[[], Tracker], output_dir: Path
) -> None:
    """A driver may die between making a run and filling it."""
    first = open_tracker()
    experiment = first.client.get_experiment_by_name("rum")
    tags = {"rum.study": "study", "rum.trial": "0", "mlflow.parentRunId": first.parent_id}
    half = first.client.create_run(experiment.experiment_id, tags=tags)
    second = open_tracker()
    second.start_trial(0, "study-0000", PARAMETERS, {})
    run = run_of(second, 0)
    assert run.info.run_id == half.info.run_id
    assert set(run.data.params) == set(PARAMETERS)
    assert len(run.inputs.dataset_inputs) == 1


def test_the_status_that_an_earlier_driver_left_is_known(
    open_tracker: Callable[[], Tracker],
) -> None:
    first = open_tracker()
    first.start_trial(0, "study-0000", PARAMETERS, {})
    first.mark_trial(0, KILLED, {})
    first.flush()
    second = open_tracker()
    assert [second.known_status(number) for number in (0, 1)] == ["KILLED", None]
    assert [tracking.ended(second.known_status(number)) for number in (0, 1)] == [True, False]


def test_another_study_has_runs_of_its_own(
    open_tracker: Callable[[], Tracker], output_dir: Path
) -> None:
    first = open_tracker()
    first.start_trial(0, "study-0000", PARAMETERS, {})
    first.flush()
    client, experiment_id = connect(TrackingConfig(), output_dir)
    other = Tracker(client, experiment_id, "study-2", TASK, {}, {})
    other.start_trial(0, "study-2-0000", PARAMETERS, {})
    other.flush()
    assert other.parent_id != first.parent_id
    assert other.run_id(0) != first.run_id(0)
    other.close(FINISHED)


def test_a_trial_without_a_run_is_an_error_that_names_it(
    open_tracker: Callable[[], Tracker],
) -> None:
    tracker = open_tracker()
    with pytest.raises(TrackingError, match="no run of trial 7 of study study"):
        run_of_number(tracker, 7)


# Errors of the thread that writes


def test_an_error_while_writing_surfaces_in_flush_and_says_that_nothing_is_lost(
    output_dir: Path,
) -> None:
    client, experiment_id = connect(TrackingConfig(), output_dir)
    tracker = Tracker(client, experiment_id, "study", TASK, {}, {"search.num_trials": 3})
    bad: dict[str, Any] = {"a name with | in it": 1}
    tracker.start_trial(0, "study-0000", bad, {})
    with pytest.raises(TrackingError, match=r"stopped taking records: .*a name with"):
        tracker.flush()
    with pytest.raises(TrackingError, match="resume=yes writes what is missing"):
        tracker.close(FINISHED)


def test_after_an_error_nothing_more_is_written_and_calls_still_return(
    output_dir: Path,
) -> None:
    client, experiment_id = connect(TrackingConfig(), output_dir)
    tracker = Tracker(client, experiment_id, "study", TASK, {}, {"search.num_trials": 3})
    tracker.mark_trial(9, FINISHED, {})  # has no run
    tracker.start_trial(0, "study-0000", PARAMETERS, {})
    with pytest.raises(TrackingError, match="trial 9 has no run"):
        tracker.close(FINISHED)
    assert client.get_run(tracker.parent_id).info.status == "RUNNING"
    with pytest.raises(TrackingError, match="no run of trial 0"):
        trial_run(client, experiment_id, "study", 0)


def test_an_error_while_writing_does_not_name_the_password(
    output_dir: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client, experiment_id = connect(TrackingConfig(), output_dir)
    tracker = Tracker(client, experiment_id, "study", TASK, {}, {"search.num_trials": 3})
    tracker.client = MlflowClient(f"http://reader:hunter2@127.0.0.1:{closed_port}")
    tracker.start_trial(0, "study-0000", PARAMETERS, {})  # the server has gone away
    with pytest.raises(TrackingError, match=f"127.0.0.1:{closed_port}") as caught:
        tracker.close(FINISHED)
    assert "hunter2" not in str(caught.value)
