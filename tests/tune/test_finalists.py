"""The best trials of a search under several seeds, with real Ray, Optuna and MLflow."""

import dataclasses
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from optuna.trial import FrozenTrial, TrialState

from rum.cells import RUMConfig
from rum.errors import ConfigError
from rum.experiment import run_experiment
from rum.tasks import CopyingConfig
from rum.training.config import TrainingConfig
from rum.tune import finalists
from rum.tune.audit import check_study
from rum.tune.conducting import InterruptedSearchError
from rum.tune.config import (
    CheckConfig,
    Domain,
    ResumeConfig,
    SchedulerConfig,
    SearchConfig,
    SearchOptions,
)
from rum.tune.database import open_storage
from rum.tune.finalists import check_finalists, describe_finalists
from rum.tune.search import run_search
from rum.tune.space import apply
from rum.tune.study import Study
from rum.tune.tracking import read_text, study_runs

RATE = {"training.learning_rate": Domain(type="float", low=1e-3, high=1e-1, log=True)}


def search(folder: Path, **options: Any) -> SearchConfig:
    return SearchConfig(
        model=RUMConfig(hidden_size=6),
        task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
        training=TrainingConfig(max_epochs=2, seed=7),
        space=RATE,
        scheduler=SchedulerConfig(name="asha", reduction_factor=2, plateau_band=None),
        search=SearchOptions(**{"num_trials": 3, "seeds": 2, "finalists": 2, **options}),
        study="small",
        output_dir=str(folder),
    )


@pytest.fixture
def config(tmp_path: Path, mlflow_tables: Path) -> SearchConfig:
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(mlflow_tables, folder / "mlflow.db")
    return search(folder)


def trials_of(config: SearchConfig, study: str) -> list[FrozenTrial]:
    storage = open_storage(Path(config.output_dir))
    return Study(storage, study, {}, config.sampler).trials()


def agree(config: SearchConfig, *studies: str) -> None:
    for study in studies:
        text, agrees = check_study(CheckConfig(study=study, output_dir=config.output_dir))
        assert agrees, text


@pytest.mark.usefixtures("ray_session")
def test_the_best_are_trained_under_several_seeds_and_ranked_by_their_mean(
    config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> Any:
        raise OSError("no space left")

    with monkeypatch.context() as patch:  # between the search and its finalists
        patch.setattr(finalists, "_queue", dies)
        with pytest.raises(InterruptedSearchError, match="no space left") as raised:
            run_search(config)
    assert str(raised.value).endswith("study=small resume=yes")
    summary = run_search(dataclasses.replace(config, resume="yes"))
    agree(config, "small", "small-seeds")

    searched = trials_of(config, "small")
    assert len(searched) == 3, "the search was extended, not gone on with"
    ranked = sorted(
        (t for t in searched if t.value is not None), key=lambda trial: trial.value or 0.0
    )[:2]
    trained = trials_of(config, "small-seeds")
    assert [trial.state for trial in trained] == [TrialState.COMPLETE] * 4
    pairs = {(t.user_attrs["rum.finalist"]["trial"], t.params["training.seed"]) for t in trained}
    assert pairs == {(trial.number, seed) for trial in ranked for seed in (8, 9)}

    # One of them again, by itself.
    one = trained[-1]
    experiment = apply(config, one.params)
    alone = run_experiment(
        experiment, experiment.task.load(seed=experiment.training.seed), tmp_path / "alone", print
    )
    assert alone.best_value == one.value

    client = MlflowClient(f"sqlite:///{config.output_dir}/mlflow.db")
    experiment_id = client.get_experiment_by_name("rum").experiment_id
    (parent,) = (
        run for number, run in study_runs(client, experiment_id, "small") if number is None
    )
    recorded = json.loads(read_text(client, parent.info.run_id, "finalists.json"))
    for each in recorded:
        values = [
            trial.value or 0.0
            for trial in trained
            if trial.user_attrs["rum.finalist"]["trial"] == each["trial"]
        ]
        assert each["mean"] == pytest.approx(statistics.fmean(values))
        assert each["std"] == pytest.approx(statistics.stdev(values))
        assert each["value_in_search"] == searched[each["trial"]].value
    assert recorded[0]["mean"] <= recorded[1]["mean"]
    assert parent.data.metrics["finalists/best_mean"] == recorded[0]["mean"]
    assert summary.startswith("Finalists of small:\n")
    assert f"{recorded[0]['mean']:.4f}" in summary

    version = client.get_model_version_by_alias("rum-copying-T3", "best")
    run = client.get_run(version.run_id)
    assert run.data.tags["rum.finalist_trial"] == str(recorded[0]["trial"])
    assert float(version.tags["mean"]) == recorded[0]["mean"]
    assert float(version.tags["value"]) == min(recorded[0]["values"].values())
    assert len(client.search_model_versions("name = 'rum-copying-T3'")) == 1

    # A longer search trains only what is new; a lost database is rebuilt with its finalists.
    longer = dataclasses.replace(config.search, num_trials=1, finalists=3)
    run_search(dataclasses.replace(config, resume="yes", search=longer))
    assert len(trials_of(config, "small")) == 4
    more = trials_of(config, "small-seeds")
    assert [trial.params for trial in more[:4]] == [trial.params for trial in trained]
    assert len({t.user_attrs["rum.finalist"]["trial"] for t in more}) == len(more) / 2
    (Path(config.output_dir) / "optuna.db").unlink()
    run_search(dataclasses.replace(config, resume="from_mlflow", search=longer))
    rebuilt = trials_of(config, "small-seeds")
    assert [(t.params, t.value) for t in rebuilt] == [(t.params, t.value) for t in more]
    agree(config, "small", "small-seeds")


def test_what_cannot_be_ranked_by_seeds_is_refused(tmp_path: Path) -> None:
    config = search(tmp_path)
    check_finalists(config)
    seeds = {"training.seed": Domain(type="int", low=0, high=9)}
    with pytest.raises(ConfigError, match=r"search\.seeds=2, but training\.seed is searched"):
        check_finalists(dataclasses.replace(config, space={**RATE, **seeds}))
    with pytest.raises(ConfigError, match="does not go with scheduler=pbt"):
        check_finalists(dataclasses.replace(config, scheduler=SchedulerConfig(name="pbt")))
    with pytest.raises(ConfigError, match=r"search\.seeds must be an integer >= 1, got 0"):
        search(tmp_path, seeds=0)
    with pytest.raises(ConfigError, match=r"search\.finalists must be an integer >= 1, got 0"):
        search(tmp_path, finalists=0)
    with pytest.raises(ConfigError, match="continued trials keep theirs"):
        ResumeConfig(study="small", search=SearchOptions(seeds=3))


def test_the_cost_is_said_beforehand(tmp_path: Path) -> None:
    said = describe_finalists(search(tmp_path, seeds=3, finalists=4))
    assert said == "Finalists: 4 trials x 3 seeds x 2 epochs come on top"
    assert describe_finalists(search(tmp_path, seeds=1)) is None
