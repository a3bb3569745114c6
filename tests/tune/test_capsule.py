"""A run's capsule repeats it: the same curve bit for bit, and what is not as it was is said."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

import rum
from rum.cells import RUMConfig
from rum.data.corpora import load_corpus
from rum.errors import CheckpointError, DataError, RumError, TrackingError
from rum.experiment import ExperimentConfig, experiment_from_plain
from rum.tasks import CharacterLMConfig, CopyingConfig
from rum.train import TrackingConfig, TrainConfig
from rum.training.config import ScheduleConfig, TrainingConfig
from rum.tune import capsule
from rum.tune.capsule import DIFF_BYTES, changes, make_capsule, read_capsule
from rum.tune.config import (
    ContinuedTrainingConfig,
    Domain,
    ResumeConfig,
    SchedulerConfig,
    SearchConfig,
    SearchOptions,
)
from rum.tune.continuation import continue_best
from rum.tune.recorder import train_or_repeat
from rum.tune.repeat import NotRepeatedError, compare
from rum.tune.search import run_search

ROOT = Path(__file__).parents[2]
EXPERIMENT = ExperimentConfig(
    model=RUMConfig(hidden_size=6, zoneout=0.1),
    task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
    training=TrainingConfig(
        max_epochs=4,
        seed=3,
        learning_rate=0.1 / 3,
        threads=1,
        schedule=ScheduleConfig(name="drop", drop_at=0.4),
    ),
)
TASK = EXPERIMENT.task.load(seed=3)


def client_of(output_dir: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")


def config_of(output_dir: Path, **changes: Any) -> TrainConfig:
    options = {name: getattr(EXPERIMENT, name) for name in ("model", "task", "training")}
    return TrainConfig(**{"output_dir": str(output_dir), **options, **changes})


def repeating(output_dir: Path, run_id: str, **changes: Any) -> TrainConfig:
    """Other options than those of the run, all to give way."""
    options = {
        "model": RUMConfig(hidden_size=99),
        "task": CopyingConfig(delay=50),
        "training": TrainingConfig(max_epochs=1),
        "tracking": TrackingConfig(name="none"),
        **changes,
    }
    return config_of(output_dir, from_run=run_id, **options)


def repeat(output_dir: Path, run_id: str, **changes: Any) -> list[str]:
    """What the user is told."""
    said: list[str] = []
    train_or_repeat(repeating(output_dir, run_id, **changes), said.append)
    return said


def only_run(output_dir: Path) -> Run:
    client = client_of(output_dir)
    [run] = client.search_runs([client.get_experiment_by_name("rum").experiment_id])
    return run


@pytest.fixture
def recorded(output_dir: Path) -> Run:
    """A single run in MLflow."""
    train_or_repeat(config_of(output_dir), lambda line: None)
    return only_run(output_dir)


def change_capsule(output_dir: Path, run: Run, change: Callable[[dict[str, Any]], object]) -> None:
    client = client_of(output_dir)
    plain = read_capsule(client, run.info.run_id)
    change(plain)
    client.log_text(run.info.run_id, json.dumps(plain), "capsule.json")


def test_a_capsule_holds_all_that_decides_a_run() -> None:
    plain = json.loads(json.dumps(make_capsule(EXPERIMENT, TASK)))
    assert experiment_from_plain(plain["experiment"]) == EXPERIMENT
    assert plain["experiment"]["training"]["learning_rate"] == 0.1 / 3
    expected = {
        "format_version": 1,
        "task": "copying",
        "seed": 3,
        "threads": 1,
        "data": {"corpus": "T3", "checksum": TASK.checksum},
        "level": "bit-exact",
        "origin": None,
    }
    assert {name: plain[name] for name in expected} == expected
    assert plain["versions"]["version"] == rum.__version__
    assert {"torch", "python", "optuna"} <= set(plain["versions"])
    assert plain["platform"]["machine"]
    training = dataclasses.replace(EXPERIMENT.training, device="cuda")
    on_gpu = dataclasses.replace(EXPERIMENT, training=training)
    assert make_capsule(on_gpu, TASK)["level"] == "statistical"


def test_a_capsule_holds_commit_and_uncommitted_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", *who, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    git("init", "--quiet")
    (tmp_path / "__init__.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    monkeypatch.setattr(rum, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(capsule, "_code", capsule._code.__wrapped__)  # not from the cache

    clean = make_capsule(EXPERIMENT, TASK)
    assert clean["code"]["commit"] == git("rev-parse", "HEAD").strip()
    assert (clean["code"]["diff"], clean["code"]["untracked"]) == ("", [])

    (tmp_path / "__init__.py").write_text("a = 2\n")
    (tmp_path / "new.py").write_text("")
    dirty = make_capsule(EXPERIMENT, TASK)
    assert dirty["code"]["untracked"] == ["new.py"]
    assert not dirty["code"]["diff_is_cut"]
    git("checkout", "__init__.py")
    (tmp_path / "change.diff").write_text(dirty["code"]["diff"])
    git("apply", "change.diff")
    assert (tmp_path / "__init__.py").read_text() == "a = 2\n"
    names = [line.split(":")[0] for line in changes(clean, dirty)]
    assert names == ["code.diff_sha256", "code.untracked"]

    (tmp_path / "__init__.py").write_text("é\n" * DIFF_BYTES)
    large = make_capsule(EXPERIMENT, TASK)
    assert large["code"]["diff_is_cut"]
    assert len(large["code"]["diff"].encode()) in (DIFF_BYTES - 1, DIFF_BYTES)
    whole = git("diff", "HEAD")
    assert large["code"]["diff_sha256"] == hashlib.sha256(whole.encode()).hexdigest()


def test_a_run_is_repeated_bit_for_bit(recorded: Run, output_dir: Path) -> None:
    said = repeat(output_dir, recorded.info.run_id)
    assert said[-1] == "identical over 4 epochs"
    assert "  versions, code, data and machine are what they were" in said
    epochs = [line for line in said if line.startswith("epoch ")]
    values = re.findall(r"validation/cross_entropy (\S+)", " ".join(epochs))
    client = client_of(output_dir)
    history = client.get_metric_history(recorded.info.run_id, "validation/cross_entropy")
    assert values == [f"{point.value:.4f}" for point in history]
    with pytest.raises(RumError, match="exists: go on with resume=yes, or choose name"):
        repeat(output_dir, recorded.info.run_id)


def test_a_recorded_repetition_says_of_what_and_can_be_repeated(
    recorded: Run, output_dir: Path
) -> None:
    tracking = TrackingConfig(name="mlflow")
    repeat(output_dir, recorded.info.run_id, tracking=tracking)
    client = client_of(output_dir)
    experiment = client.get_experiment_by_name("rum").experiment_id
    where = f"tags.`rum.repeats` = '{recorded.info.run_id}'"
    [second] = client.search_runs([experiment], where)
    first_capsule = read_capsule(client, recorded.info.run_id)
    assert read_capsule(client, second.info.run_id) == first_capsule
    assert second.data.params == recorded.data.params
    assert repeat(output_dir, second.info.run_id)[-1] == "identical over 4 epochs"


def test_a_run_that_goes_on_keeps_its_capsule(recorded: Run, output_dir: Path) -> None:
    training = dataclasses.replace(EXPERIMENT.training, max_epochs=6)
    train_or_repeat(config_of(output_dir, resume="yes", training=training), lambda line: None)
    assert only_run(output_dir).data.metrics["step"] == 30
    plain = read_capsule(client_of(output_dir), recorded.info.run_id)
    assert plain["experiment"]["training"]["max_epochs"] == 4
    assert repeat(output_dir, recorded.info.run_id)[-1] == (
        "identical over 4 epochs; the run has epochs up to 6, which it was given later "
        "(resume=yes)"
    )


def test_differences_are_said_and_another_curve_is_an_error(
    recorded: Run, output_dir: Path
) -> None:
    def change(plain: dict[str, Any]) -> None:
        plain["versions"]["torch"] = "1.0"
        plain["experiment"]["training"]["learning_rate"] = 0.5

    change_capsule(output_dir, recorded, change)
    said: list[str] = []
    config = repeating(output_dir, recorded.info.run_id)
    with pytest.raises(NotRepeatedError) as caught:
        train_or_repeat(config, said.append)
    assert any(re.search(r"differs now: versions.torch: 1\.0 then, ", line) for line in said)
    assert "is not repeated: epoch 1 differs: diagnostics/" in str(caught.value)
    assert "versions.torch: 1.0 then" in str(caught.value)

    change_capsule(output_dir, recorded, lambda plain: plain.update(level="statistical"))
    assert repeat(output_dir, recorded.info.run_id, name="b")[-1].startswith("epoch 1 differs")


def test_the_first_epoch_that_differs_is_named_with_both_values() -> None:
    recorded = {1: {"step": 5.0, "x": 1.0}, 2: {"step": 10.0, "x": 2.0}}
    reports = [
        {"epoch": 1, "step": 5, "x": 1.0, "time/seconds": 1.0},
        {"epoch": 2, "step": 10, "x": 2.5, "time/seconds": 1.0},
    ]
    assert compare(recorded, reports) == "epoch 2 differs: x 2.0 recorded, 2.5 now"
    assert compare(recorded, reports[:1]).startswith("identical over 1 epochs")
    absent = {"epoch": 1, "step": 5}
    assert compare(recorded, [absent]) == "epoch 1 differs: x 1.0 recorded, None now"


def test_a_diverged_run_diverges_again(output_dir: Path) -> None:
    training = TrainingConfig(max_epochs=3, learning_rate=1e30, threads=1, max_grad_norm=None)
    with pytest.raises(RumError, match="not finite"):
        train_or_repeat(config_of(output_dir, training=training), lambda line: None)
    run = only_run(output_dir)
    said = repeat(output_dir, run.info.run_id)
    reason = run.data.tags["rum.reason"].removeprefix("diverged: ")
    assert said[-1] == f"identical over 0 epochs; then diverged as it did: {reason}"


def test_other_data_are_an_error(output_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcd efgh ijkl\n" * 400)
    task = CharacterLMConfig(corpus=str(text), batch_size=2, bptt_length=20)
    training = TrainingConfig(max_epochs=1, threads=1)
    train_or_repeat(config_of(output_dir, task=task, training=training), lambda line: None)
    run = only_run(output_dir)
    assert repeat(output_dir, run.info.run_id)[-1] == "identical over 1 epochs"
    text.write_text("abcd efgh ijkm\n" * 400)
    load_corpus.cache_clear()
    with pytest.raises(DataError, match=r"trained on other data .* checksum"):
        repeat(output_dir, run.info.run_id, name="again")


def test_what_is_no_run_or_has_no_capsule_is_refused(recorded: Run, output_dir: Path) -> None:
    with pytest.raises(TrackingError, match="cannot get run 0123"):
        repeat(output_dir, "0123")
    client = client_of(output_dir)
    bare = client.create_run(recorded.info.experiment_id).info.run_id
    with pytest.raises(TrackingError, match=r"has no capsule\.json"):
        repeat(output_dir, bare)
    client.log_text(bare, "{}", "capsule.json")
    with pytest.raises(TrackingError, match="is damaged"):
        repeat(output_dir, bare)
    change_capsule(output_dir, recorded, lambda plain: plain.update(format_version=9))
    with pytest.raises(TrackingError, match="has format 9, this version reads format 1"):
        repeat(output_dir, recorded.info.run_id)


@pytest.mark.parametrize("override", ["model=lstm", "training.seed=1", "experiment=table1/rum_30"])
def test_options_of_the_experiment_beside_from_run_are_refused(
    override: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "pipelines" / "train.py"), "from_run=abc", override],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"got {override} beside it: leave one of the two out" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("ray_session")
def test_trials_of_a_search_are_repeated_as_far_as_they_got(output_dir: Path) -> None:
    config = SearchConfig(
        model=EXPERIMENT.model,
        task=EXPERIMENT.task,
        training=dataclasses.replace(EXPERIMENT.training, threads=None),
        space={"training.learning_rate": Domain(type="float", low=1e-4, high=1e-1, log=True)},
        scheduler=SchedulerConfig(grace_epochs=2, reduction_factor=2, plateau_band=None),
        search=SearchOptions(num_trials=4),
        study="mine",
        output_dir=str(output_dir),
    )
    run_search(config)
    client = client_of(output_dir)
    experiment = client.get_experiment_by_name("rum").experiment_id
    runs = client.search_runs([experiment], "tags.`rum.trial` != ''")
    by_status = {run.info.status: run for run in runs}
    for status, epochs in (("FINISHED", 4), ("KILLED", 2)):
        said = repeat(output_dir, by_status[status].info.run_id)
        assert said[-1] == f"identical over {epochs} epochs"

    continue_best(
        ResumeConfig(
            study="mine",
            top=1,
            training=ContinuedTrainingConfig(max_epochs=6),
            output_dir=str(output_dir),
        )
    )
    [run] = client.search_runs([experiment], "tags.`rum.origin_study` = 'mine'")
    origin = read_capsule(client, run.info.run_id)["origin"]
    assert repeat(output_dir, run.info.run_id)[-1] == "identical over 2 epochs"

    state = Path(origin["checkpoint"]) / "checkpoint.json"
    description = json.loads(state.read_text())
    assert origin["sha256"] == description["sha256"]
    shutil.rmtree(origin["checkpoint"])
    with pytest.raises(CheckpointError, match=r"went on from .*, without which it cannot"):
        repeat(output_dir, run.info.run_id, name="again")
