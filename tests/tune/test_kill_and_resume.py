"""A search whose driver is killed goes on; a second driver waits; Ctrl-C is clean."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow import MlflowClient
from optuna.trial import FrozenTrial, TrialState

PIPELINE = Path(__file__).parents[2] / "pipelines" / "tune_ptb.py"
STUDY = "character_lm-pydoc-rum-quick"
DEADLINE_SECONDS = 120.0
NUM_TRIALS = 4


class Driver:
    """`pipelines/tune_ptb.py` as a process of its own, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            str(PIPELINE),
            "preset=quick",
            "task.train_characters=20000",
            f"search.num_trials={NUM_TRIALS}",
            "space={model.lambda_: {choices: [0]}}",
            *overrides,
        ]
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
        }
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def trials(self) -> list[FrozenTrial]:
        storage = f"sqlite:///{self.folder}/outputs/optuna.db"
        return optuna.load_study(study_name=STUDY, storage=storage).trials

    def num_epochs(self) -> int:
        """Read without Optuna, which would make the tables itself where it finds none."""
        database = self.folder / "outputs" / "optuna.db"
        try:
            with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
                query = "SELECT count(*) FROM trial_intermediate_values"
                return int(connection.execute(query).fetchone()[0])
        except sqlite3.OperationalError:  # not made yet
            return 0

    def wait_for_epochs(self, process: subprocess.Popen[str], more_than: int) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.num_epochs() <= more_than:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no trial reported an epoch"
            time.sleep(0.1)

    def statuses(self) -> dict[str | None, str]:
        client = MlflowClient(f"sqlite:///{self.folder}/outputs/mlflow.db")
        experiment = client.get_experiment_by_name("rum")
        runs = client.search_runs([experiment.experiment_id])
        statuses = {run.data.tags.get("rum.trial"): run.info.status for run in runs}
        assert len(statuses) == len(runs), "a trial has two runs"
        return statuses


@pytest.fixture
def driver(tmp_path: Path, mlflow_tables: Path) -> Iterator[Driver]:
    (tmp_path / "outputs").mkdir()
    shutil.copy(mlflow_tables, tmp_path / "outputs" / "mlflow.db")  # making it takes seconds
    driver = Driver(tmp_path)
    yield driver
    for process in driver.started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def survivors(group: int) -> list[str]:
    """Processes of a driver's session that still run."""
    found = []
    for process in psutil.process_iter(["pid", "name", "status"]):
        try:
            if os.getsid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.name())
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@pytest.mark.timeout(600)
def test_a_killed_and_an_interrupted_search_go_on_to_the_same_records(driver: Driver) -> None:
    first = driver.start()
    driver.wait_for_epochs(first, 0)

    os.kill(first.pid, signal.SIGSTOP)  # so that it cannot end before the second one asks
    second = driver.start("resume=yes")
    refused = second.communicate(timeout=DEADLINE_SECONDS)[0]
    assert second.returncode != 0
    assert f'"pid": {first.pid}' in refused
    assert first.poll() is None

    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while survivors(first.pid):
        assert time.monotonic() < deadline, survivors(first.pid)
        time.sleep(0.1)
    killed_at = driver.trials()
    assert any(trial.state == TrialState.RUNNING for trial in killed_at)

    third = driver.start("resume=yes")
    driver.wait_for_epochs(third, driver.num_epochs())
    os.killpg(third.pid, signal.SIGINT)
    said = third.communicate(timeout=DEADLINE_SECONDS)[0]
    assert third.returncode != 0
    assert "resume=yes" in said
    assert "RUNNING" not in driver.statuses().values()
    assert driver.statuses()[None] == "SCHEDULED"

    last = driver.start("resume=yes")
    said = last.communicate(timeout=3 * DEADLINE_SECONDS)[0]
    assert last.returncode == 0, said
    trials = driver.trials()
    assert [trial.number for trial in trials] == list(range(NUM_TRIALS))
    for before, after in zip(killed_at, trials, strict=False):
        assert before.params == {k: after.params[k] for k in before.params}
        known = before.intermediate_values
        assert {epoch: after.intermediate_values[epoch] for epoch in known} == known
    client = MlflowClient(f"sqlite:///{driver.folder}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("rum")
    runs = {
        run.data.tags.get("rum.trial"): run
        for run in client.search_runs([experiment.experiment_id])
    }
    assert driver.statuses()[None] == "FINISHED"
    for trial in trials:
        status = "FINISHED" if trial.state == TrialState.COMPLETE else "KILLED"
        assert driver.statuses()[str(trial.number)] == status
        run_id = runs[str(trial.number)].info.run_id
        points = client.get_metric_history(run_id, "validation/best_bits_per_character")
        assert [point.step for point in points] == list(range(1, len(points) + 1))
        values = {point.step: point.value for point in points}
        assert values == pytest.approx(trial.intermediate_values)


@pytest.mark.timeout(600)
def test_a_small_campaign_of_kills(tmp_path: Path) -> None:
    """Workers, drivers and everything, at random moments; the large one is a benchmark."""
    script = PIPELINE.parents[1] / "benchmarks" / "kill_campaign.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "3", "--out", str(tmp_path / "result.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert sum(result["kills"].values()) == 3
    assert result["trials_each"] == 8
