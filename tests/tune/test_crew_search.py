"""A search whose trials share processes, with real Ray, Optuna and MLflow."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from optuna.trial import TrialState

from rum.cells import LSTMConfig, RUMConfig
from rum.errors import ConfigError
from rum.experiment import run_experiment
from rum.tasks import CopyingConfig
from rum.training.config import TrainingConfig
from rum.tune.audit import check_study
from rum.tune.config import (
    CheckConfig,
    Domain,
    SamplerConfig,
    SchedulerConfig,
    SearchConfig,
    SearchOptions,
)
from rum.tune.database import open_storage
from rum.tune.search import run_search
from rum.tune.space import apply
from rum.tune.study import Study


def search(folder: Path, tables: Path) -> SearchConfig:
    folder.mkdir()
    shutil.copy(tables, folder / "mlflow.db")
    return SearchConfig(
        model=RUMConfig(hidden_size=6, eta=1.0),
        task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=20),
        training=TrainingConfig(max_epochs=4),
        space={
            "training.learning_rate": Domain(type="float", low=1e-3, high=1e-1, log=True),
            "model.zoneout": Domain(type="float", low=0.0, high=0.5),
            "model.hidden_size": Domain(type="categorical", choices=[6, 8]),
        },
        scheduler=SchedulerConfig(name="promotion", reduction_factor=2, plateau_band=None),
        sampler=SamplerConfig(name="random"),
        search=SearchOptions(num_trials=8, replicas=3),
        study="small",
        output_dir=str(folder),
    )


@pytest.mark.usefixtures("ray_session")
def test_trials_of_crews_are_what_they_are_alone_though_a_process_is_killed(
    tmp_path: Path, mlflow_tables: Path
) -> None:
    config = search(tmp_path / "out", mlflow_tables)
    trials_folder = tmp_path / "out/studies/small/trials"
    killed: list[int] = []

    def kill_after_first_checkpoint() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not killed:
            if list(trials_folder.glob("*/step_*")):
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
    text, agrees = check_study(CheckConfig(study="small", output_dir=config.output_dir))
    assert agrees, text
    study = Study(open_storage(tmp_path / "out"), "small", config.space, config.sampler)
    trials = study.trials()
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert len(trials) == 8
    for trial in trials:
        curve: dict[int, float] = {}
        experiment = apply(config, trial.params)
        run_experiment(
            experiment,
            experiment.task.load(seed=experiment.training.seed),
            tmp_path / str(trial.number),
            lambda r, curve=curve: curve.update(  # type: ignore[misc]
                {int(r["epoch"]): r["validation/best_cross_entropy"]}
            ),
        )
        length = max(trial.intermediate_values)
        assert trial.intermediate_values == {e: v for e, v in curve.items() if e <= length}


def test_a_model_without_replicas_is_refused_before_any_trial(
    tmp_path: Path, mlflow_tables: Path
) -> None:
    config = search(tmp_path / "out", mlflow_tables)
    config.model = LSTMConfig(hidden_size=6)
    del config.space["model.zoneout"]
    with pytest.raises(ConfigError, match=r"search\.replicas is 3, but only stacks of RUM cells"):
        run_search(config)
    assert not (tmp_path / "out/studies").exists()
