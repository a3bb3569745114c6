"""What the tests of the search share: one Ray, MLflow tables made once, books that must agree."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from optuna.trial import FrozenTrial, TrialState

from rum.cells import RUMConfig
from rum.experiment import ExperimentConfig
from rum.tasks import CopyingConfig
from rum.train import TrackingConfig
from rum.training.config import TrainingConfig
from rum.tune.audit import check_study
from rum.tune.budget import Budget
from rum.tune.conductor import Conductor
from rum.tune.config import CheckConfig, Domain, SamplerConfig, SearchOptions
from rum.tune.database import open_storage
from rum.tune.messages import FINISHED, RUNNING, Workplace
from rum.tune.orders import Orders, obey
from rum.tune.schedulers.base import NoScheduler
from rum.tune.space import space_to_plain
from rum.tune.study import Study, ensure_study, is_paused
from rum.tune.tracking import (
    INTERRUPTED,
    STUDY_TAG,
    TRIAL_TAG,
    Tracker,
    connect,
    tracking_uri,
)


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the developer's servers nor torch's threads of an earlier test matter."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with MLflow's tables and nothing in them: making it takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def output_dir(tmp_path: Path, mlflow_tables: Path) -> Path:
    """An `output_dir` whose MLflow is ready."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    shutil.copy(mlflow_tables, folder / "mlflow.db")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Path]:
    """The one Ray of all searches in this process; gives the folder of its files."""
    folder = tempfile.mkdtemp(prefix="rum-test-")  # short: sockets lie in it
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield Path(folder)
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


Runs = Callable[..., dict[int | None, Run]]


@pytest.fixture
def runs_of() -> Runs:
    """Gives a study's MLflow runs by trial number (the parent's is None); each once."""

    def runs_of(output_dir: Path, study: str, uri: str | None = None) -> dict[int | None, Run]:
        client = MlflowClient(tracking_uri(TrackingConfig(uri=uri), output_dir))
        experiment = client.get_experiment_by_name("rum")
        runs: dict[int | None, Run] = {}
        for run in client.search_runs(
            [experiment.experiment_id], f"tags.`{STUDY_TAG}` = '{study}'"
        ):
            number = run.data.tags.get(TRIAL_TAG)
            key = None if number is None else int(number)
            assert key not in runs, f"trial {key} has two runs"
            runs[key] = run
        return runs

    return runs_of


@pytest.fixture
def trials_of() -> Callable[[Path, str], list[FrozenTrial]]:
    """Reads a study's trials as another process would."""

    def trials_of(output_dir: Path, study: str) -> list[FrozenTrial]:
        storage = open_storage(output_dir)
        return optuna.load_study(study_name=study, storage=storage).get_trials()

    return trials_of


@pytest.fixture
def curve_of() -> Callable[..., dict[int, float]]:
    """Gives a run's metric by epoch, each point written once."""

    def curve_of(output_dir: Path, run: Run, key: str, uri: str | None = None) -> dict[int, float]:
        client = MlflowClient(tracking_uri(TrackingConfig(uri=uri), output_dir))
        points: list[Metric] = client.get_metric_history(run.info.run_id, key)
        epochs = [point.step for point in points]
        assert sorted(set(epochs)) == sorted(epochs), f"{key} has a point twice: {sorted(epochs)}"
        return {point.step: point.value for point in points}

    return curve_of


Agree = Callable[..., None]


@pytest.fixture
def check_books(
    runs_of: Runs,
    trials_of: Callable[[Path, str], list[FrozenTrial]],
    curve_of: Callable[..., dict[int, float]],
) -> Agree:
    """Checks that Optuna and MLflow say the same of every trial."""

    def check_books(output_dir: Path, study: str, metric: str, uri: str | None = None) -> None:
        differences, agrees = check_study(
            CheckConfig(study=study, output_dir=str(output_dir), tracking=TrackingConfig(uri=uri))
        )
        assert agrees, differences
        for trial in trials_of(output_dir, study):
            run = runs_of(output_dir, study, uri)[trial.number]
            assert run.data.tags["rum.metric"] == metric
            open_still = trial.state == TrialState.RUNNING
            left = "paused" if is_paused(trial) else "interrupted"
            state = left if open_still else trial.state.name
            if str(trial.user_attrs.get("rum.reason")).startswith("infeasible"):
                state = "infeasible"
            assert run.data.tags["rum.state"] == state
            epochs = sorted(trial.intermediate_values)
            first = epochs[0] if epochs else 1
            assert epochs == list(range(first, first + len(epochs))), "an epoch is missing"

    return check_books


@pytest.fixture
def flushed() -> Callable[[Path], None]:
    """Puts the write-ahead log of a study's SQLite file into the file, to copy the folder."""

    def flushed(output_dir: Path) -> None:
        import sqlite3

        with sqlite3.connect(output_dir / "optuna.db") as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        assert os.stat(output_dir / "optuna.db").st_size > 0

    return flushed


class SmallDriver:
    """A conductor of tiny trials with its books, its clock and the orders from outside."""

    def __init__(self, output_dir: Path, options: SearchOptions, **settings: Any) -> None:
        self.base = ExperimentConfig(
            model=RUMConfig(hidden_size=8),
            task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
            training=TrainingConfig(max_epochs=4),
        )
        space = {
            "model.hidden_size": Domain(type="int", low=4, high=12),
            "training.learning_rate": Domain(type="float", low=1e-4, high=1e-1, log=True),
        }
        task = self.base.task.load(seed=0)
        storage = open_storage(output_dir)
        ensure_study(storage, "small", {"mode": "min", "space": space_to_plain(space)})
        self.study = Study(storage, "small", space, SamplerConfig(name="random"))
        self.study.target = max(self.study.target, options.num_trials)
        self.folder = output_dir / "studies" / "small"
        self.orders = Orders(self.folder)
        client, experiment_id = connect(TrackingConfig(), output_dir)
        tags = {"rum.metric": task.metric}
        self.tracker = Tracker(
            client, experiment_id, "small", task, tags, {"a": 1}, study_id=self.study.id
        )
        self.seconds = 0.0
        self.budget = Budget(
            self.study,
            options,
            gpus_per_trial=settings.get("gpus", 0.0),
            first_epochs=settings.get("first_epochs", 1),
            clock=lambda: self.seconds,
        )
        self.workplace = Workplace(asdict(self.base), str(self.folder), None)
        self.conductor = Conductor(
            self.study,
            self.base,
            task,
            settings.get("scheduler") or NoScheduler(),
            self.tracker,
            self.workplace,
            budget=self.budget,
            max_failures=settings.get("max_failures", 0),
        )

    def start(self) -> int:
        spec = self.conductor.next_trial()
        assert spec is not None
        return spec.number

    def tell(self, number: int, epoch: int, value: float = 1.0) -> bool:
        """Reports an epoch as a worker would; returns whether the trial is to stop."""
        status = FINISHED if epoch == self.base.training.max_epochs else RUNNING
        report = {"epoch": epoch, "step": 5 * epoch, "validation/best_cross_entropy": value}
        worker = {"host": "elsewhere", "device": "cpu", "pid": 123}
        return self.conductor.on_message(
            {"number": number, "status": status, "report": report, "worker": worker}
        )

    def obey(self) -> None:
        obey(self.orders, self.study, self.conductor)


@pytest.fixture
def small_driver(output_dir: Path) -> Iterator[Callable[..., SmallDriver]]:
    """Opens one study as a new driver; one that was opened before is as good as dead."""
    opened: list[SmallDriver] = []

    def small_driver(num_trials: int = 4, **settings: Any) -> SmallDriver:
        for dead in opened:
            dead.tracker.flush()
        names = {field.name for field in fields(SearchOptions)} - {"max_failures"}
        options = {name: settings.pop(name) for name in names & set(settings)}
        search = SearchOptions(num_trials=num_trials, **options)
        opened.append(SmallDriver(output_dir, search, **settings))
        return opened[-1]

    yield small_driver
    for each in opened:
        each.tracker.close(INTERRUPTED)
