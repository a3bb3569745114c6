"""A search end to end with real Ray, Optuna and MLflow."""

import dataclasses
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState

from rum.cells import RUMConfig
from rum.errors import ConfigError, StudyError
from rum.experiment import ExperimentConfig, run_experiment
from rum.parameters import flatten
from rum.tasks import CopyingConfig
from rum.training.checkpoint import CheckpointStore
from rum.training.config import TrainingConfig
from rum.tune.config import (
    ContinuedTrainingConfig,
    Domain,
    ResumeConfig,
    SchedulerConfig,
    SearchConfig,
    SearchOptions,
    TrackingConfig,
)
from rum.tune.continuation import continue_best
from rum.tune.search import run_search
from rum.tune.space import apply
from rum.tune.study import Study, open_storage

pytestmark = pytest.mark.usefixtures("ray_session")

Make = Callable[..., SearchConfig]
SPACE = {
    "model.hidden_size": Domain(type="int", low=4, high=8),
    "model.eta": Domain(type="categorical", choices=[0.5, 1.0]),
    "training.learning_rate": Domain(type="float", low=1e-3, high=1e-1, log=True),
    "training.schedule.name": Domain(type="categorical", choices=["constant", "drop"]),
    "training.schedule.drop_at": Domain(
        type="float", low=0.3, high=0.8, when={"training.schedule.name": "drop"}
    ),
}
STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}


@pytest.fixture
def small_search(tmp_path: Path, mlflow_tables: Path) -> Make:
    """Makes a search of seconds: copying memory, tiny models, MLflow's tables already there."""

    def make(*, tables: bool = True, **changes: Any) -> SearchConfig:
        database = tmp_path / "out" / "mlflow.db"
        if tables and not database.exists():
            database.parent.mkdir()
            shutil.copy(mlflow_tables, database)
        options: dict[str, Any] = {
            "model": RUMConfig(hidden_size=6),
            "task": CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
            "training": TrainingConfig(max_epochs=4),
            "space": SPACE,
            "scheduler": SchedulerConfig(grace_epochs=1, reduction_factor=2),
            "search": SearchOptions(num_trials=6),
            "study": "small",
            "output_dir": str(tmp_path / "out"),
        }
        return SearchConfig(**{**options, **changes})

    return make


def trials_of(config: SearchConfig, name: str = "small") -> list[FrozenTrial]:
    storage = open_storage(Path(config.output_dir))
    return Study(storage, name, config.space, config.sampler).trials()


def client_of(config: SearchConfig) -> MlflowClient:
    return MlflowClient(f"sqlite:///{config.output_dir}/mlflow.db")


def runs_of(config: SearchConfig, name: str = "small") -> dict[str | None, Run]:
    client = client_of(config)
    experiment = client.get_experiment_by_name("rum")
    runs = client.search_runs([experiment.experiment_id], f"tags.`rum.study` = '{name}'")
    by_trial = {run.data.tags.get("rum.trial"): run for run in runs}
    assert len(by_trial) == len(runs), "a trial has two runs"
    return by_trial


def assert_records_agree(config: SearchConfig, name: str = "small") -> None:
    """Optuna and MLflow say the same of every trial, each epoch once."""
    client, runs = client_of(config), runs_of(config, name)
    trials = trials_of(config, name)
    assert set(runs) == {None, *(str(trial.number) for trial in trials)}
    for trial in trials:
        run = runs[str(trial.number)]
        diverged = str(trial.user_attrs.get("rum.reason")).startswith("diverged")
        assert run.info.status == ("FAILED" if diverged else STATUS[trial.state])
        points = client.get_metric_history(run.info.run_id, "validation/best_cross_entropy")
        assert [point.step for point in points] == sorted({point.step for point in points})
        assert {p.step: p.value for p in points} == pytest.approx(trial.intermediate_values)
        epochs = sorted(trial.intermediate_values)
        assert epochs == list(range(1, len(epochs) + 1))


def test_a_search_is_recorded_the_same_in_optuna_and_mlflow(small_search: Make) -> None:
    config = small_search()
    summary = run_search(config)

    trials = trials_of(config)
    assert len(trials) == 6
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert_records_agree(config)
    for trial in trials:
        epochs = max(trial.intermediate_values)
        assert trial.value == min(trial.intermediate_values.values())
        assert epochs == (
            4 if trial.state == TrialState.COMPLETE else trial.user_attrs["rum.rung"]
        )

    runs = runs_of(config)
    parent = runs.pop(None)
    assert parent.info.status == "FINISHED"
    best = min(trials, key=lambda trial: trial.value or 9.0)
    assert parent.data.metrics["best/cross_entropy"] == best.value
    for number, run in runs.items():
        assert number is not None
        trial = trials[int(number)]
        experiment = apply(config, trial.params)
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert float(run.data.params["training.learning_rate"]) == pytest.approx(
            experiment.training.learning_rate
        )
        assert run.data.params["model.hidden_size"] == str(trial.params["model.hidden_size"])
        expected = {*flatten(experiment.model), "name"}
        assert {f"model.{name}" for name in expected} <= set(run.data.params)
        assert run.data.tags["rum.lambda"] == "0"
        assert "pipelines/train.py" in run.data.tags["rum.command"]
        (dataset,) = run.inputs.dataset_inputs
        assert dataset.dataset.name == "T3"
        if trial.state == TrialState.PRUNED:
            assert run.data.tags["rum.rung"] == str(trial.user_attrs["rum.rung"])
            assert run.data.tags["rum.reason"].startswith("stopped by the scheduler")
        folders = list((Path(config.output_dir) / "studies/small/trials").glob(f"*{number}/*"))
        assert 1 <= len(folders) <= 2, "best and last are kept"

    version = client_of(config).get_model_version_by_alias("rum-copying-T3", "best")
    assert float(version.tags["value"]) == best.value
    assert version.run_id == runs[str(best.number)].info.run_id
    assert f"{best.value:.4f}" in summary
    for word in ("mlflow ui", "resume=yes", "pipelines/resume.py", "pipelines/evaluate.py"):
        assert word in summary


def test_a_trial_gives_what_the_same_run_gives_outside_of_the_search(
    small_search: Make, tmp_path: Path
) -> None:
    config = small_search(
        scheduler=SchedulerConfig(name="none"), search=SearchOptions(num_trials=1)
    )
    run_search(config)
    (trial,) = trials_of(config)

    training = dataclasses.replace(config.training, threads=1)
    experiment = apply(
        ExperimentConfig(model=config.model, task=config.task, training=training), trial.params
    )
    run_experiment(experiment, config.task.load(seed=0), tmp_path / "alone", lambda report: None)

    reports = []
    for folder in (tmp_path / "alone", tmp_path / "out/studies/small/trials/0000"):
        last = CheckpointStore(folder).last()
        assert last is not None
        reports.append(
            [{k: v for k, v in r.items() if not k.startswith("time/")} for r in last.reports]
        )
    assert reports[0] == reports[1]


def test_the_same_command_extends_a_finished_study(small_search: Make) -> None:
    run_search(small_search(search=SearchOptions(num_trials=2)))
    before = trials_of(small_search())

    config = small_search(search=SearchOptions(num_trials=3), resume="yes")
    run_search(config)

    after = trials_of(config)
    assert len(after) == 5
    for old, new in zip(before, after, strict=False):
        assert (old.params, old.intermediate_values, old.datetime_complete) == (
            new.params,
            new.intermediate_values,
            new.datetime_complete,
        )
    assert_records_agree(config)


def test_existing_studies_are_not_mixed_up(small_search: Make) -> None:
    few = SearchOptions(num_trials=1)
    run_search(small_search(search=few))

    other = {**small_search().space, "model.hidden_size": Domain(type="int", low=4, high=9)}
    with pytest.raises(StudyError, match=r"model\.hidden_size\.high: 8.* in the study, 9.* now"):
        run_search(small_search(space=other))
    with pytest.raises(StudyError, match=r"batch_size: 8 in the study, 4 now"):
        run_search(small_search(task=CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5)))
    with pytest.raises(StudyError, match="study_exists=error"):
        run_search(small_search(study_exists="error"))
    with pytest.raises(StudyError, match="no study 'smal'; did you mean 'small'"):
        run_search(small_search(study="smal", resume="yes"))
    run_search(small_search(study_exists="new", search=few))
    assert len(trials_of(small_search(), "small-2")) == 1
    assert len(trials_of(small_search())) == 1


def test_what_cannot_be_done_is_refused_before_anything_is_written(small_search: Make) -> None:
    for changes, message in (
        ({"search": SearchOptions(disk_reserve_gigabytes=1e9)}, "disk"),
        ({"search": SearchOptions(cpus_per_trial=10_000)}, "cpus_per_trial"),
        ({"training": TrainingConfig(device="cuda")}, "no CUDA device"),
        ({"space": {}}, "at least one option"),
    ):
        config = small_search(tables=False, **changes)
        with pytest.raises(ConfigError, match=message):
            run_search(config)
        assert not list(Path(config.output_dir).rglob("*.db"))


def test_a_dry_run_writes_nothing(small_search: Make) -> None:
    config = small_search(tables=False, dry_run=True)

    assert run_search(config) == "Dry run: nothing was started."
    assert not Path(config.output_dir).exists()


def test_trials_that_diverge_are_failed_with_a_reason_and_teach_the_sampler(
    small_search: Make,
) -> None:
    # Layer norm after the sigmoid without time normalisation: the state grows without bound.
    config = small_search(
        task=CopyingConfig(delay=400, batch_size=4, steps_per_epoch=10),
        space={
            "model.layer_norm": Domain(type="categorical", choices=[True]),
            "training.learning_rate": Domain(type="float", low=1e-3, high=1e-2),
        },
        search=SearchOptions(num_trials=2),
    )
    summary = run_search(config)

    for trial in trials_of(config):
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs["rum.reason"].startswith("diverged: ")
    assert_records_agree(config)
    assert "trial 0 failed: diverged" in summary


def test_no_secret_reaches_trials_or_files(
    small_search: Make, tmp_path: Path, mlflow_tables: Path
) -> None:
    secret = "hunter2"
    shutil.copy(mlflow_tables, tmp_path / f"{secret}.db")
    uri = f"sqlite:///{tmp_path}/{secret}.db"
    config = small_search(tracking=TrackingConfig(uri=uri), search=SearchOptions(num_trials=1))
    run_search(config)

    out = Path(config.output_dir)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert any(path.name == "optuna.db" for path in files)
    for path in files:
        assert secret not in str(path)
        assert secret.encode() not in path.read_bytes(), path
    client = MlflowClient(uri)
    for run in client.search_runs(["1"]):
        assert secret not in str(run.data.params) + str(run.data.tags)


def test_a_killed_worker_goes_on_from_its_checkpoint(small_search: Make) -> None:
    config = small_search(
        task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=60),
        training=TrainingConfig(max_epochs=6),
        scheduler=SchedulerConfig(name="none"),
        search=SearchOptions(num_trials=1),
    )
    folder = Path(config.output_dir) / "studies/small/trials/0000"
    killed: list[int] = []

    def kill_after_first_checkpoint() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not killed:
            if list(folder.glob("step_*")):
                for process in psutil.Process().children(recursive=True):
                    if process.name().startswith("ray::ImplicitFunc"):  # Ray's name of an actor
                        killed.append(process.pid)
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    thread = threading.Thread(target=kill_after_first_checkpoint)
    thread.start()
    run_search(config)
    thread.join()

    assert killed
    (trial,) = trials_of(config)
    assert trial.state == TrialState.COMPLETE
    assert sorted(trial.intermediate_values) == [1, 2, 3, 4, 5, 6]
    assert_records_agree(config)


def test_the_best_trials_continue_as_children_of_their_runs(small_search: Make) -> None:
    config = small_search(search=SearchOptions(num_trials=3))
    run_search(config)
    origins = {str(t.number): t for t in trials_of(config)}

    def resume(**changes: Any) -> str:
        options: dict[str, Any] = {
            "study": "small",
            "top": 2,
            "training": ContinuedTrainingConfig(max_epochs=6),
            "output_dir": config.output_dir,
        }
        return continue_best(ResumeConfig(**{**options, **changes}))

    resume()
    resume()  # again: nothing is left to do
    trials = trials_of(config, "small-to-6")
    ranked = sorted(origins.values(), key=lambda trial: trial.value or 9.0)
    assert [t.user_attrs["rum.origin"]["trial"] for t in trials] == [t.number for t in ranked[:2]]
    runs, origin_runs = runs_of(config, "small-to-6"), runs_of(config)
    for trial in trials:
        origin = origins[str(trial.user_attrs["rum.origin"]["trial"])]
        assert trial.state == TrialState.COMPLETE
        assert trial.params == origin.params
        first = max(origin.intermediate_values) + 1
        assert sorted(trial.intermediate_values) == list(range(first, 7))
        run = runs[str(trial.number)]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == origin_runs[str(origin.number)].info.run_id
        assert run.data.tags["rum.origin_study"] == "small"

    with pytest.raises(StudyError, match=r"top is 9, but study small has 3 trials"):
        resume(top=9)
    with pytest.raises(ConfigError, match="more than the 4"):
        resume(training=ContinuedTrainingConfig(max_epochs=4))
    with pytest.raises(ConfigError, match="was searched"):
        resume(training=ContinuedTrainingConfig(max_epochs=6, learning_rate=0.1))
    with pytest.raises(StudyError, match="no study 'smell'"):
        resume(study="smell")
