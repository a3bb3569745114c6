"""A search end to end with real Ray, Optuna and MLflow."""

import dataclasses
import errno
import json
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
import ray
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from rum.cells import RUMConfig
from rum.errors import ConfigError, StudyError
from rum.experiment import ExperimentConfig, run_experiment
from rum.parameters import flatten
from rum.tasks import CopyingConfig
from rum.training.checkpoint import CheckpointStore
from rum.training.config import TrainingConfig
from rum.tune.cluster import concurrent
from rum.tune.conducting import InterruptedSearchError
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
from rum.tune.database import open_storage
from rum.tune.opening import define
from rum.tune.search import run_search
from rum.tune.space import apply
from rum.tune.study import Study, ensure_study
from rum.tune.study_folder import claim_folder, locked

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
    artifact = client_of(config).download_artifacts(parent.info.run_id, "pareto.json")
    for cost, front in json.loads(Path(artifact).read_text()).items():
        assert front["front"][0]["trial"] == best.number
        assert parent.data.metrics[f"pareto/hypervolume_{cost}"] == front["hypervolume"]
        assert f"Pareto front of cross_entropy and {cost.replace('_', ' ')} (hyper" in summary
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
        ({"search": SearchOptions(gpus_per_trial=99)}, "gpus_per_trial is 99, but there are"),
        ({"training": TrainingConfig(threads=2)}, "per_trial, which is 1, got 2"),
        ({"space": {}}, "at least one option"),
    ):
        config = small_search(tables=False, **changes)
        with pytest.raises(ConfigError, match=message):
            run_search(config)
        assert not list(Path(config.output_dir).rglob("*.db"))


@pytest.mark.parametrize(
    ("device", "options", "machine", "expected"),
    [
        ("cpu", {}, {"CPU": 16.0}, 16),
        ("cpu", {"cpus_per_trial": 3}, {"CPU": 16.0}, 5),
        ("cpu", {"max_concurrent": 4}, {"CPU": 16.0}, 4),
        ("cpu", {"max_concurrent": 40}, {"CPU": 16.0}, 16),
        ("cuda", {}, {"CPU": 16.0, "GPU": 1.0}, 1),
        ("cuda", {}, {"CPU": 16.0, "GPU": 4.0}, 4),
        ("cuda", {"cpus_per_trial": 8}, {"CPU": 16.0, "GPU": 4.0}, 2),
        ("cuda", {"gpus_per_trial": 2.0}, {"CPU": 16.0, "GPU": 5.0}, 2),
        ("cuda", {"gpus_per_trial": 0.1}, {"CPU": 16.0, "GPU": 1.0}, 10),
        ("cuda", {"gpus_per_trial": 0.4}, {"CPU": 16.0, "GPU": 3.0}, 6),  # two on each
        ("cuda:0", {"max_concurrent": 2}, {"CPU": 16.0, "GPU": 4.0}, 2),
    ],
)
def test_as_many_trials_at_a_time_as_fit_cpus_and_gpus(
    small_search: Make,
    device: str,
    options: dict[str, Any],
    machine: dict[str, float],
    expected: int,
) -> None:
    config = small_search(
        tables=False,
        training=TrainingConfig(device=device),
        search=SearchOptions(**options),
    )
    assert concurrent(config, machine) == expected


def test_a_search_on_gpus_needs_one_in_the_cluster(small_search: Make) -> None:
    config = small_search(tables=False, training=TrainingConfig(device="cuda"))
    with pytest.raises(ConfigError, match=r"gpus_per_trial is 1, but there are 0 GPUs"):
        concurrent(config, {"CPU": 16.0})


def test_threads_as_many_as_cpus_are_accepted(small_search: Make) -> None:
    config = small_search(tables=False, dry_run=True, training=TrainingConfig(threads=1))
    assert run_search(config) == "Dry run: nothing was started."


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


def left_by_a_dead_driver(config: SearchConfig) -> Path:
    """A study of which trial 0 had two epochs when its driver died; gives that trial's folder."""
    out = Path(config.output_dir)
    task = config.task.load(seed=0)
    storage = open_storage(out)
    ensure_study(storage, "small", define(config, task))
    study = Study(storage, "small", config.space, config.sampler)
    study.target = config.search.num_trials
    with locked(out / "studies/small"):
        claim_folder(out / "studies/small", study.id)
    parameters = study.ask().parameters
    folder = out / "studies/small/trials/0000"
    experiment = apply(
        ExperimentConfig(
            model=config.model,
            task=config.task,
            training=dataclasses.replace(config.training, max_epochs=2, threads=1),
        ),
        parameters,
    )
    run_experiment(experiment, task, folder, lambda report: None)
    return folder


@pytest.mark.parametrize("older_is_intact", [False, True])
def test_a_damaged_checkpoint_costs_at_most_its_own_trial(
    small_search: Make, older_is_intact: bool
) -> None:
    config = small_search(
        scheduler=SchedulerConfig(name="none"),
        search=SearchOptions(num_trials=2),
        space={"model.hidden_size": Domain(type="int", low=4, high=8)},
        resume="yes",
    )
    folder = left_by_a_dead_driver(config)
    if older_is_intact:  # as when the first epoch is the best
        shutil.copytree(folder / "step_000000010", folder / "step_000000011")
    else:
        shutil.rmtree(folder / "step_000000005", ignore_errors=True)
    newest = max(folder.iterdir())
    (newest / "state.pt").write_bytes(b"damaged")
    summary = run_search(config)

    damaged, other = trials_of(config)
    assert other.state == TrialState.COMPLETE
    if older_is_intact:
        assert damaged.state == TrialState.COMPLETE
        assert sorted(damaged.intermediate_values) == [1, 2, 3, 4]
    else:
        assert damaged.state == TrialState.FAIL
        reason = f"crashed: CheckpointError: {newest / 'state.pt'} is damaged"
        assert damaged.user_attrs["rum.reason"].startswith(reason)
        assert f"trial 0 failed: {reason}" in summary
    assert_records_agree(config)


def test_a_study_whose_best_checkpoint_is_damaged_is_concluded_all_the_same(
    small_search: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_search(
        scheduler=SchedulerConfig(name="none"), search=SearchOptions(num_trials=1)
    )
    run_search(config)
    for state in Path(config.output_dir).glob("studies/small/trials/0000/*/state.pt"):
        state.write_bytes(b"damaged")
    storage = open_storage(Path(config.output_dir))
    study = Study(storage, "small", config.space, config.sampler)
    study.target = 1
    study._study.set_user_attr("rum.concluded", 0)  # the driver died just before

    run_search(dataclasses.replace(config, resume="yes"))
    assert study.is_concluded
    assert "The best model is not registered: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        (
            "report",
            StorageInternalError("An exception is raised during the commit"),
            "StorageInternalError: An exception is raised during the commit",
        ),
        ("ask", OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ],
)
def test_what_fails_around_a_search_is_said_with_the_command_that_goes_on(
    small_search: Make, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception, said: str
) -> None:
    config = small_search(
        search=SearchOptions(num_trials=3), scheduler=SchedulerConfig(name="none")
    )
    original = getattr(Study, place)
    calls: list[object] = []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Study, place, failing)
        with pytest.raises(InterruptedSearchError) as raised:
            run_search(config)
    assert said in str(raised.value)
    assert str(raised.value).endswith("tune_ptb.py study=small resume=yes")
    assert runs_of(config)[None].info.status == "SCHEDULED"

    run_search(dataclasses.replace(config, resume="yes"))
    assert [trial.state for trial in trials_of(config)] == [TrialState.COMPLETE] * 3
    assert_records_agree(config)


def test_a_fault_of_the_code_keeps_its_traceback(
    small_search: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> Any:
        raise AssertionError("a fault")

    monkeypatch.setattr(Study, "ask", failing)
    with pytest.raises(AssertionError, match="a fault"):
        run_search(small_search())


def test_a_cluster_that_is_not_there_is_said_with_the_command_that_goes_on(
    small_search: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: Any) -> None:
        assert options["address"] == "auto"
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(InterruptedSearchError, match="not find any running Ray") as raised:
        run_search(small_search())
    assert str(raised.value).endswith("tune_ptb.py study=small resume=yes")


def test_trials_continue_where_they_were_trained_unless_told_otherwise(
    small_search: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_search(search=SearchOptions(num_trials=1))
    run_search(config)
    for path in Path(config.output_dir).glob("studies/small/trials/0000/*/checkpoint.json"):
        path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def resume(device: str | None) -> None:
        training = ContinuedTrainingConfig(max_epochs=5, device=device)
        continue_best(
            ResumeConfig(study="small", top=1, training=training, output_dir=config.output_dir)
        )

    with pytest.raises(ConfigError, match="is 'cuda', but torch sees no CUDA device"):
        resume(None)
    assert "Device: cuda, as trial 0 of study small had" in capsys.readouterr().err
    resume("cpu")
    assert "Device: " not in capsys.readouterr().err
    last = CheckpointStore(Path(config.output_dir) / "studies/small-to-5/trials/0000").last()
    assert last is not None
    assert last.description["experiment"]["training"]["device"] == "cpu"


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
