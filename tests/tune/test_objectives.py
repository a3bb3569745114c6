"""Two objectives for the sampler, one for the record."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rum.cells import RUMConfig
from rum.errors import ConfigError, StudyError
from rum.experiment import parameter_count
from rum.tasks import CopyingConfig
from rum.training.config import TrainingConfig
from rum.tune.audit import check_study
from rum.tune.config import (
    CheckConfig,
    Domain,
    ResumeConfig,
    SamplerConfig,
    SchedulerConfig,
    SearchConfig,
    SearchOptions,
)
from rum.tune.database import open_storage
from rum.tune.objectives import cost_of
from rum.tune.pareto import hypervolume
from rum.tune.search import run_search
from rum.tune.study import Study, ensure_study
from rum.tune.tracking import read_text, study_runs

SIZE, RATE = "model.hidden_size", "training.learning_rate"
SPACE = {
    SIZE: Domain(type="int", low=4, high=100),
    RATE: Domain(type="float", low=1e-4, high=1e-1, log=True),
}
BOTH = ["metric", "parameters"]


def config(folder: Path, sampler: str = "tpe", **options: Any) -> SearchConfig:
    return SearchConfig(
        model=RUMConfig(hidden_size=8),
        task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
        training=TrainingConfig(max_epochs=2),
        space=SPACE,
        sampler=SamplerConfig(name=sampler, startup_trials=6),
        scheduler=SchedulerConfig(name="asha", reduction_factor=2, plateau_band=None),
        search=SearchOptions(**{"num_trials": 4, **options}),
        study="small",
        output_dir=str(folder),
    )


TASK = config(Path()).task.load(seed=0)


def metric(parameters: dict[str, Any]) -> float:
    """The larger the better; the right rate is another matter, and each model needs it."""
    rate = math.log10(parameters[RATE])
    return float(1.2 - parameters[SIZE] / 100 + 0.4 * abs(rate + 2))


def searched(
    storage: Any, sampler: str, objectives: list[str], trials: int, *, reopen: bool = False
) -> Study:
    """A study of synthetic trials, each third of them stopped early."""
    search = config(Path(), sampler, objectives=objectives)
    ensure_study(storage, "small", {"mode": "min"})

    def opened() -> Study:
        return Study(storage, "small", SPACE, search.sampler, cost=cost_of(search, TASK))

    study = opened()
    for number in range(trials):
        spec = study.ask()
        value = metric(spec.parameters)
        study.report(spec.number, 1, value + 0.1)
        study.report(spec.number, 2, value)
        if number % 3 == 1:
            study.finish(spec.number, TrialState.PRUNED)
        else:
            study.finish(spec.number, TrialState.COMPLETE, value)
        if reopen:
            study = opened()
    return study


def area(study: Study) -> float:
    """The hypervolume as a share of all there is."""

    def size(width: int) -> float:
        return float(parameter_count(RUMConfig(hidden_size=width), TASK))

    points = [(metric(trial.params), size(trial.params[SIZE])) for trial in study.trials()]
    reference = (1.2, size(100))
    every = [(metric({SIZE: width, RATE: 0.01}), size(width)) for width in range(4, 101)]
    return hypervolume(points, reference) / hypervolume(every, reference)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_the_sampler_finds_more_of_the_front_than_with_the_metric_alone(sampler: str) -> None:
    one, two = (
        area(searched(optuna.storages.InMemoryStorage(), sampler, objectives, 150))
        for objectives in (["metric"], BOTH)
    )
    assert two > one + 0.05, (one, two)


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "qmc", "gp"])
def test_the_record_has_one_objective_and_every_curve(tmp_path: Path, sampler: str) -> None:
    searched(open_storage(tmp_path), sampler, BOTH, 12)
    record = optuna.load_study(study_name="small", storage=open_storage(tmp_path))
    assert record.directions == [StudyDirection.MINIMIZE]
    for trial in record.trials:
        value = metric(trial.params)
        assert trial.intermediate_values == {1: value + 0.1, 2: value}
        assert trial.value == value
    assert [trial.state.name for trial in record.trials[:3]] == ["COMPLETE", "PRUNED", "COMPLETE"]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp"])
def test_a_study_that_is_opened_again_asks_the_same(sampler: str) -> None:
    asked: list[list[FrozenTrial]] = []
    for reopen in (False, True):
        storage = optuna.storages.InMemoryStorage()
        asked.append(searched(storage, sampler, BOTH, 14, reopen=reopen).trials())
    assert [t.params for t in asked[0]] == [t.params for t in asked[1]]


def test_what_has_no_cost_or_value_is_not_shown_and_what_waits_is(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    ensure_study(storage, "small", {"mode": "min"})
    costs = {0: 5.0, 1: None, 2: 7.0, 3: 9.0, 4: 1.0}
    study = Study(storage, "small", SPACE, SamplerConfig(), cost=lambda trial: costs[trial.number])
    for number in range(5):
        assert study.ask().number == number
    for number in (0, 1, 3):
        study.report(number, 1, 0.5)
    study.finish(0, TrialState.COMPLETE, 0.5)
    study.finish(1, TrialState.COMPLETE, 0.5)
    study.note(2, "rum.reason", "diverged: loss is not finite")
    study.finish(2, TrialState.PRUNED)
    study.note(3, "rum.paused", 1)
    study.constrain(4, {"parameters": 0.5})
    study.finish(4, TrialState.PRUNED)
    seen = study._sampled.get_trials(deepcopy=False)
    assert [trial.state.name for trial in seen] == [
        "COMPLETE",
        "FAIL",  # its cost is not known
        "FAIL",  # diverged
        "COMPLETE",  # waits
        "PRUNED",  # infeasible: known by its constraint
    ]
    assert seen[0].values == [0.5, 5.0]
    assert seen[3].values == [0.5, 9.0]
    assert seen[4].constraints == {"parameters": 0.5}
    study.ask()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("second", ["parameters", "training_seconds"])
def test_a_search_with_two_objectives(tmp_path: Path, mlflow_tables: Path, second: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(mlflow_tables, folder / "mlflow.db")
    search = config(folder, objectives=["metric", second])
    summary = run_search(search)
    text, agrees = check_study(CheckConfig(study="small", output_dir=str(folder)))
    assert agrees, text
    assert f"Pareto front of cross_entropy and {second.replace('_', ' ')}" in summary
    with pytest.raises(StudyError, match="objectives"):
        run_search(dataclasses.replace(search, search=SearchOptions(num_trials=1)))

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment_id = client.get_experiment_by_name("rum").experiment_id
    runs = dict(study_runs(client, experiment_id, "small"))
    found = json.loads(read_text(client, runs[None].info.run_id, "pareto.json"))[second]
    assert found["front"]
    trials = Study(open_storage(folder), "small", SPACE, SamplerConfig()).trials()
    for trial in trials:
        noted = trial.user_attrs.get("rum.training_seconds")
        if second == "parameters":
            assert noted is None
            continue
        history = client.get_metric_history(
            runs[trial.number].info.run_id, "time/training_seconds"
        )
        assert noted == pytest.approx(sum(point.value for point in history))
    for point in found["front"]:
        trial = trials[point["trial"]]
        assert point["cross_entropy"] == trial.value
        if second == "parameters":
            model = RUMConfig(hidden_size=trial.params[SIZE])
            assert point[second] == parameter_count(model, TASK)
        else:
            assert point[second] == trial.user_attrs["rum.training_seconds"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda f: config(f, objectives=["parameters"]),
            r"objectives must be one of \[metric\], ",
        ),
        (lambda f: config(f, "cmaes", objectives=BOTH), "sampler=cmaes knows one objective only"),
        (
            lambda f: config(
                f,
                objectives=["metric", "training_seconds"],
                deterministic=True,
                max_concurrent=2,
            ),
            "no two runs take the same time",
        ),
        (
            lambda f: dataclasses.replace(
                config(f, objectives=BOTH), scheduler=SchedulerConfig(name="pbt")
            ),
            "does not go with scheduler=pbt",
        ),
        (
            lambda f: ResumeConfig(study="x", search=SearchOptions(objectives=BOTH)),
            "here nothing is sampled",
        ),
    ],
)
def test_objectives_that_make_no_sense_are_refused(
    tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path)
