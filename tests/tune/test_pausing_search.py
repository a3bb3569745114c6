"""Searches whose trials are paused, promoted and replaced, with real Ray, Optuna and MLflow."""

import shutil
from pathlib import Path

import pytest
from optuna.trial import TrialState

from rum.cells import RUMConfig
from rum.experiment import run_experiment
from rum.tasks import CopyingConfig
from rum.training.checkpoint import CheckpointStore
from rum.training.config import TrainingConfig
from rum.tune.audit import check_study
from rum.tune.config import CheckConfig, Domain, SchedulerConfig, SearchConfig, SearchOptions
from rum.tune.database import open_storage
from rum.tune.search import run_search
from rum.tune.space import apply
from rum.tune.study import Study

pytestmark = pytest.mark.usefixtures("ray_session")

RATE = {"training.learning_rate": Domain(type="float", low=1e-3, high=1e-1, log=True)}


def search(folder: Path, tables: Path, scheduler: str, **options: int) -> SearchConfig:
    folder.mkdir()
    shutil.copy(tables, folder / "mlflow.db")
    return SearchConfig(
        model=RUMConfig(hidden_size=6),
        task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
        training=TrainingConfig(max_epochs=4),
        space=RATE,
        scheduler=SchedulerConfig(name=scheduler, reduction_factor=2, plateau_band=None),
        search=SearchOptions(**options),
        study="small",
        output_dir=str(folder),
    )


def agree(config: SearchConfig) -> None:
    text, agrees = check_study(CheckConfig(study="small", output_dir=config.output_dir))
    assert agrees, text


def test_promoted_trials_give_what_they_give_undisturbed(
    tmp_path: Path, mlflow_tables: Path
) -> None:
    config = search(tmp_path / "out", mlflow_tables, "promotion", num_trials=6)
    summary = run_search(config)
    agree(config)
    study = Study(open_storage(tmp_path / "out"), "small", config.space, config.sampler)
    trials = study.trials()
    assert len(trials) == 6
    epochs = [max(trial.intermediate_values) for trial in trials]
    assert set(epochs) <= {1, 2, 4}
    promoted = [t for t in trials if "rum.resumed" in t.user_attrs]
    assert promoted, "of six trials at a rung that three pass, one at least comes too early"
    reasons = [str(t.user_attrs["rum.reason"]) for t in trials if t.state == TrialState.PRUNED]
    assert reasons
    assert all(reason.startswith("not promoted: ") for reason in reasons)
    assert "stopped at rung" in summary

    trial = max(promoted, key=lambda t: max(t.intermediate_values))
    curve: dict[int, float] = {}
    experiment = apply(config, trial.params)
    run_experiment(
        experiment,
        experiment.task.load(seed=experiment.training.seed, data_dir=None),
        tmp_path / "alone",
        lambda report: curve.update(
            {int(report["epoch"]): report["validation/best_cross_entropy"]}
        ),
    )
    length = max(trial.intermediate_values)
    assert trial.intermediate_values == {e: v for e, v in curve.items() if e <= length}


def test_a_population_passes_its_best_weights_on(tmp_path: Path, mlflow_tables: Path) -> None:
    config = search(tmp_path / "out", mlflow_tables, "pbt", num_trials=5)
    run_search(config)
    agree(config)
    study = Study(open_storage(tmp_path / "out"), "small", config.space, config.sampler)
    trials = study.trials()
    successors = trials[5:]
    assert successors
    assert sum(t.state == TrialState.PRUNED for t in trials) == len(successors)
    assert sum(t.state == TrialState.COMPLETE for t in trials) == 5
    for trial in successors:
        origin = trial.user_attrs["rum.origin"]
        source = trials[origin["trial"]]
        assert trials[origin["replaces"]].state == TrialState.PRUNED
        (folder,) = Path(origin["checkpoint"]).parents[0].glob("step_*")
        copied = CheckpointStore(folder.parent).last()
        assert copied is not None
        first = min(trial.intermediate_values)
        assert first == copied.description["epoch"] + 1
        ratio = trial.params["training.learning_rate"] / source.params["training.learning_rate"]
        assert min(abs(ratio - 0.8), abs(ratio - 1.2)) < 1e-9 or (
            trial.params["training.learning_rate"] in (1e-3, 1e-1)
        )
