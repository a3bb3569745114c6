"""What a new study trains first: read, fitted into the space, queued once."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from optuna.trial import FrozenTrial

from rum.cells import RUMConfig
from rum.errors import ConfigError
from rum.setting import SettingConfig
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
    WarmStartConfig,
)
from rum.tune.database import open_storage
from rum.tune.search import run_search
from rum.tune.study import Study, ensure_study, queued_parameters
from rum.tune.tracking import study_runs
from rum.tune.warm_start import Candidate, given, inside, queue

SIZE, RATE, ETA = "model.hidden_size", "training.learning_rate", "model.eta"
GATE = "model.layer_norm_gate"
SPACE = {
    SIZE: Domain(type="int", low=4, high=12, step=4),
    RATE: Domain(type="float", low=1e-3, high=1e-1, log=True),
    GATE: Domain(type="categorical", choices=["post_sigmoid", "pre_sigmoid"]),
    ETA: Domain(type="categorical", choices=[None, 0.5], when={GATE: "pre_sigmoid"}),
}


def config(folder: Path, num_trials: int = 8, **changes: Any) -> SearchConfig:
    base = SearchConfig(
        model=RUMConfig(hidden_size=8),
        task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
        training=TrainingConfig(max_epochs=1, learning_rate=0.02),
        space=SPACE,
        scheduler=SchedulerConfig(name="none"),
        search=SearchOptions(num_trials=num_trials),
        study="small",
        output_dir=str(folder),
    )
    return dataclasses.replace(base, **changes)


def table(folder: Path, *lines: str) -> WarmStartConfig:
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return WarmStartConfig(csv=str(path))


def test_a_table_gives_values_as_json_or_python_writes_them(tmp_path: Path) -> None:
    lines = (
        f"{SIZE},{RATE},{ETA},model.activation",
        "8,1e-2,null,relu",
        '12.0,,None,"tanh"',
        "4,0.05,0.5,relu",
    )
    candidates = given(config(tmp_path, warm_start=table(tmp_path, *lines)))
    assert candidates == [
        Candidate(
            "table.csv line 2", {SIZE: 8, RATE: 0.01, ETA: None, "model.activation": "relu"}
        ),
        Candidate("table.csv line 3", {SIZE: 12.0, ETA: None, "model.activation": "tanh"}),
        Candidate("table.csv line 4", {SIZE: 4, RATE: 0.05, ETA: 0.5, "model.activation": "relu"}),
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["model.hiden_size", "8"], r"must name options, got 'model\.hiden_size'; did you mean"),
        ([f"{SIZE},{RATE}", "8"], "line 2: must have 2 values, as line 1"),
        ([SIZE, "8,9"], "line 2: must have 1 values, as line 1"),
        ([SIZE], "at least one line below the names"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        given(config(tmp_path, warm_start=table(tmp_path, *lines)))


def test_a_table_that_is_not_there_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"warm_start\.csv=/nowhere\.csv cannot be read"):
        given(config(tmp_path, warm_start=WarmStartConfig(csv="/nowhere.csv")))


def test_the_published_setting_comes_first_where_there_is_one(tmp_path: Path) -> None:
    setting = SettingConfig(name="table3/rum")
    (published,) = given(config(tmp_path, setting=setting))
    assert published.source == "published table3/rum"
    assert published.values == {SIZE: 8, RATE: 0.02, GATE: "post_sigmoid", ETA: None}
    (kept,) = inside([published], config(tmp_path))
    assert kept.values == {SIZE: 8, RATE: 0.02, GATE: "post_sigmoid"}, "eta is not searched there"
    off = WarmStartConfig(published=False)
    assert given(config(tmp_path, setting=setting, warm_start=off)) == []
    assert given(config(tmp_path)) == []


def test_what_is_outside_is_listed_and_skipped_or_clipped_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidates = [
        Candidate("a", {SIZE: 9, RATE: 0.5}),
        Candidate("b", {SIZE: 12.0, GATE: "pre_sigmoid", ETA: 0.5, "model.activation": "relu"}),
        Candidate("c", {GATE: "sideways", SIZE: 100}),
        Candidate("d", {SIZE: 100, ETA: 0.5}),
        Candidate("e", {"model.activation": "relu"}),
    ]
    kept = inside(candidates, config(tmp_path))
    assert [each.source for each in kept] == ["b"]
    assert kept[0].values == {SIZE: 12, GATE: "pre_sigmoid", ETA: 0.5}
    said = capsys.readouterr().err
    assert (
        "Skipped, outside of the space: a: model.hidden_size must be an int from 4 to 12 in steps "
        "of 4, got 9; training.learning_rate must be a number from 0.001 to 0.1, got 0.5" in said
    )
    assert "Not searched, so left as it is: model.activation" in said
    assert "First: b: model.hidden_size=12, " in said

    clips = config(tmp_path, warm_start=WarmStartConfig(outside="clip"))
    clipped = {each.source: each.values for each in inside(candidates, clips)}
    assert clipped["a"] == {SIZE: 8, RATE: 0.1}
    assert clipped["d"] == {SIZE: 12}, "without the gate, eta is sampled"
    assert "c" not in clipped, "a choice has no nearest"


def test_more_than_there_are_trials_is_refused(tmp_path: Path) -> None:
    candidates = [Candidate(str(number), {SIZE: 8}) for number in range(3)]
    with pytest.raises(ConfigError, match=r"num_trials is 2, but 3 configurations"):
        inside(candidates, config(tmp_path, num_trials=2))


def test_a_driver_that_dies_while_it_queues_neither_loses_nor_doubles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path)
    ensure_study(storage, "small", {"mode": "min"})
    candidates = [Candidate(f"line {number}", {SIZE: 4 * number}) for number in (1, 2, 3)]
    study = Study(storage, "small", SPACE, SamplerConfig())
    place = study.enqueue
    calls: list[Any] = []

    def dies(*arguments: Any) -> None:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(arguments)
        place(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(study, "enqueue", dies)
        with pytest.raises(KeyboardInterrupt):
            queue(study, candidates)
    again = Study(storage, "small", SPACE, SamplerConfig())
    for _ in range(2):
        queue(again, candidates)
    assert [queued_parameters(trial) for trial in again.trials()] == [
        candidate.values for candidate in candidates
    ]


@pytest.mark.usefixtures("ray_session")
def test_a_study_begins_with_what_others_found(
    tmp_path: Path, mlflow_tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(mlflow_tables, folder / "mlflow.db")
    first = config(folder, num_trials=4, study="earlier")
    run_search(first)
    (folder / "optuna.db").unlink()  # MLflow alone is asked

    space = {SIZE: Domain(type="int", low=4, high=40, step=4), RATE: SPACE[RATE]}
    options = table(tmp_path, SIZE, "36")
    second = config(
        folder,
        num_trials=5,
        space=space,
        setting=SettingConfig(name="table3/rum"),
        warm_start=dataclasses.replace(options, study="earlier", top=2),
    )
    with pytest.raises(ConfigError, match=r"MLflow has no study 'earlie'; did you mean 'earlier'"):
        run_search(
            dataclasses.replace(second, warm_start=WarmStartConfig(study="earlie"), study="x")
        )
    run_search(second)
    text, agrees = check_study(CheckConfig(study="small", output_dir=str(folder)))
    assert agrees, text

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment_id = client.get_experiment_by_name("rum").experiment_id
    earlier = {n: run for n, run in study_runs(client, experiment_id, "earlier") if n is not None}
    by_value = sorted(
        earlier, key=lambda n: float(earlier[n].data.metrics["validation/best_cross_entropy"])
    )

    def trials() -> list[FrozenTrial]:
        return Study(open_storage(folder), "small", space, SamplerConfig()).trials()

    asked = trials()
    sources = [trial.user_attrs.get("rum.warm_start") for trial in asked]
    assert sources == [
        "published table3/rum",
        "table.csv line 2",
        *(f"study earlier trial {number}" for number in by_value[:2]),
        None,
    ]
    assert asked[0].params == {SIZE: 8, RATE: 0.02}
    assert asked[1].params[SIZE] == 36
    for trial, number in zip(asked[2:4], by_value, strict=False):
        was = earlier[number].data.params
        assert {name: str(value) for name, value in trial.params.items()} == {
            name: was[name] for name in (SIZE, RATE)
        }
    runs = {n: run for n, run in study_runs(client, experiment_id, "small") if n is not None}
    assert [runs[n].data.tags.get("rum.warm_start") for n in range(5)] == sources

    # An extension queues nothing again, nor does a rebuilt study.
    (folder / "optuna.db").unlink()
    run_search(dataclasses.replace(second, resume="from_mlflow"))
    assert [(t.params, t.user_attrs) for t in trials()] == [
        (t.params, t.user_attrs) for t in asked
    ]
    extended = dataclasses.replace(second, search=SearchOptions(num_trials=1))
    run_search(extended)
    assert [trial.user_attrs.get("rum.warm_start") for trial in trials()] == [*sources, None]
