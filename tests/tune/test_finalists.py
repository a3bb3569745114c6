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
from scipy import stats

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
from rum.tune.finalists import check_finalists, describe_finalists, rank_finalists
from rum.tune.opening import define
from rum.tune.search import run_search
from rum.tune.space import apply
from rum.tune.study import Study, ensure_study
from rum.tune.tracking import FINISHED, Tracker, connect, read_text, study_runs

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
        error = statistics.stdev(values) / len(values) ** 0.5
        expected = stats.t.interval(0.95, len(values) - 1, statistics.fmean(values), error)
        assert each["interval"] == pytest.approx(expected)
        for seed, run_id in each["run_ids"].items():
            tags = client.get_run(run_id).data.tags
            assert (tags["rum.finalist_trial"], tags["rum.finalist_seed"]) == (
                str(each["trial"]),
                seed,
            )
    (seeds_parent,) = (
        run for number, run in study_runs(client, experiment_id, "small-seeds") if number is None
    )
    assert parent.data.tags["rum.finalists"] == "small-seeds"
    assert seeds_parent.data.tags["rum.finalists_of"] == "small"
    assert recorded[0]["mean"] <= recorded[1]["mean"]
    assert parent.data.metrics["finalists/best_mean"] == recorded[0]["mean"]
    assert summary.startswith("Finalists of small:\n")
    assert f"{recorded[0]['mean']:.4f}" in summary

    version = client.get_model_version_by_alias("rum-copying-T3", "best")
    run = client.get_run(version.run_id)
    assert run.data.tags["rum.finalist_trial"] == str(recorded[0]["trial"])
    assert float(version.tags["mean"]) == recorded[0]["mean"]
    assert json.loads(version.tags["interval"]) == recorded[0]["interval"]
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


class Books:
    """A search whose trials have ended, and the study of its finalists; no Ray."""

    def __init__(self, config: SearchConfig, values: list[float]) -> None:
        self.config = config
        self.task = config.task.load(seed=config.training.seed)
        self.storage = open_storage(Path(config.output_dir))
        self.client, self.experiment_id = connect(config.tracking, Path(config.output_dir))
        self.search = self._study("small", config)
        for value in values:
            self.end(self.search, value)
        self.record(self.search)
        self.of_finalists = finalists._of_finalists(config)
        self.seeds = self._study("small-seeds", self.of_finalists)

    def _study(self, name: str, config: SearchConfig) -> Study:
        ensure_study(self.storage, name, define(config, self.task))
        return Study(self.storage, name, config.space, config.sampler)

    def end(self, study: Study, value: float | None) -> None:
        """Ends the next trial; None: it diverges."""
        number = study.ask().number
        if value is None:
            study.note(number, "rum.reason", "diverged: loss is nan")
            study.finish(number, TrialState.PRUNED)
            return
        study.report(number, 1, value)
        study.finish(number, TrialState.COMPLETE, value)

    def record(self, study: Study) -> None:
        """Gives the study and its trials runs in MLflow."""
        tracker = Tracker(
            self.client, self.experiment_id, study.name, self.task, {}, {"a": 1}, study_id=study.id
        )
        for trial in study.trials():
            tracker.start_trial(trial.number, f"{trial.number}", {"a": 1}, {})
        tracker.close(FINISHED)

    def queue(self) -> None:
        ranked = self.search.ranked()[: self.config.search.finalists]
        finalists._queue(
            self.of_finalists, self.search, self.seeds, ranked, self.client, self.experiment_id
        )

    def rank(self) -> str:
        return rank_finalists(
            self.config, self.search, self.task, self.storage, self.client, self.experiment_id
        )

    def notes(self) -> list[tuple[int, int]]:
        notes = [trial.user_attrs.get("rum.finalist") for trial in self.seeds.trials()]
        return [(note["trial"], note["seed"]) for note in notes if note]

    def parent(self, study: str) -> Any:
        runs = study_runs(self.client, self.experiment_id, study)
        return next(run for number, run in runs if number is None)


def test_a_driver_that_dies_while_it_queues_doubles_and_loses_nothing(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = Books(config, [0.3, 0.1, 0.2])
    enqueue, calls = Study.enqueue, []

    def dies(self: Study, *given: Any) -> None:
        calls.append(given)
        if len(calls) == 3:
            raise OSError("no space left")
        enqueue(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Study, "enqueue", dies)
        with pytest.raises(OSError, match="no space left"):
            books.queue()
    assert books.notes() == [(1, 8), (1, 9)]
    books.queue()
    books.queue()
    assert books.notes() == [(1, 8), (1, 9), (2, 8), (2, 9)]


def test_a_finalist_without_all_seeds_comes_after_those_that_have_them(
    config: SearchConfig,
) -> None:
    books = Books(config, [0.3, 0.1, 0.2])
    books.queue()
    for value in (0.05, None, 0.5, 0.7):
        books.end(books.seeds, value)
    books.seeds.enqueue({"training.seed": 99})  # by hand: it repeats nothing
    books.end(books.seeds, 0.01)
    text = books.rank()
    lines = [line.split() for line in text.splitlines()]
    assert lines[2][:2] == ["2", "0.6000"]
    assert lines[3][:2] == ["1", "0.0500"]
    assert "1, 1 failed" in text
    recorded = json.loads(
        read_text(books.client, books.parent("small").info.run_id, "finalists.json")
    )
    assert [each["trial"] for each in recorded] == [2, 1]
    assert recorded[1]["failed_seeds"] == [9]
    assert (recorded[1]["half_width"], recorded[1]["interval"]) == (None, None)

    books.rank()  # as a driver does that takes over: each point stays a single one
    history = books.client.get_metric_history(
        books.parent("small").info.run_id, "finalists/best_mean"
    )
    assert [(point.step, point.value) for point in history] == [(5, 0.6)]

    # Under one more seed, the former finalists are compared where all have it.
    more = dataclasses.replace(config.search, seeds=3)
    books.of_finalists = finalists._of_finalists(dataclasses.replace(config, search=more))
    books.queue()
    assert books.notes()[4:] == [(1, 10), (2, 10)]


def test_no_model_is_registered_if_no_finalist_has_all_seeds(
    config: SearchConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    books = Books(config, [0.3, 0.1])
    books.queue()
    for value in (0.1, None, None, 0.2):
        books.end(books.seeds, value)
    books.rank()
    assert "not registered: no finalist finished under all seeds" in capsys.readouterr().err
    assert books.client.search_model_versions("name = 'rum-copying-T3'") == []


def test_what_cannot_be_ranked_by_seeds_is_refused(tmp_path: Path) -> None:
    config = search(tmp_path)
    check_finalists(config)
    seeds = {"training.seed": Domain(type="int", low=0, high=9)}
    with pytest.raises(ConfigError, match=r"search\.seeds=2, but training\.seed is searched"):
        check_finalists(dataclasses.replace(config, space={**RATE, **seeds}))
    with pytest.raises(ConfigError, match="does not go with scheduler=pbt"):
        check_finalists(dataclasses.replace(config, scheduler=SchedulerConfig(name="pbt")))
    largest = TrainingConfig(max_epochs=2, seed=2**31 - 2)
    with pytest.raises(ConfigError, match=r"must be at most 2147483647, got 2147483646 \+ 2"):
        check_finalists(dataclasses.replace(config, training=largest))
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
