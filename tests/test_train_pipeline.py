"""`pipelines/train.py` as a user runs it: a process of its own, in an empty folder."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rum.cells import MODELS, RUMConfig
from rum.errors import ConfigError
from rum.tasks import TASKS, CopyingConfig
from rum.train import TrainConfig, train
from rum.training.checkpoint import CheckpointStore
from rum.training.config import ScheduleConfig, TrainingConfig
from rum.tune.recorder import epoch_recorder

TRAIN = Path(__file__).parents[1] / "pipelines" / "train.py"
TINY = (
    "task=copying",
    "task.delay=3",
    "task.batch_size=4",
    "task.steps_per_epoch=5",
    "model.hidden_size=8",
    "training.max_epochs=2",
    "training.threads=1",
)
RUN = "copying-T3-rum"
BLOCKED = ("ray", "optuna", "mlflow")
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"{{name}} is not installed here", name=name)

sys.meta_path.insert(0, Blocker())
"""


FirstRun = tuple[Path, subprocess.CompletedProcess[str]]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", **changes}


def pipeline(folder: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TRAIN), *arguments],
        cwd=folder,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def tiny_config(
    output_dir: Path, *, resume: str, max_epochs: int = 2, **training: Any
) -> TrainConfig:
    """What the options TINY mean."""
    options: dict[str, Any] = {  # search_spaces/training/copying.yaml
        "max_epochs": max_epochs,
        "threads": 1,
        "optimizer": "rmsprop_tensorflow",
        "learning_rate": 0.001,
        "max_grad_norm": None,
    }
    return TrainConfig(
        model=RUMConfig(hidden_size=8),
        task=CopyingConfig(delay=3, batch_size=4, steps_per_epoch=5),
        training=TrainingConfig(**{**options, **training}),
        output_dir=str(output_dir),
        resume=resume,
    )


def everything_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def epochs(output: str) -> list[dict[str, float]]:
    """The numbers of every epoch line."""
    return [
        {"epoch": float(line.split()[1].split("/")[0])}
        | {name: float(value) for name, value in re.findall(r"(\w+/\w+) ([-\d.]+)", line)}
        for line in output.splitlines()
        if line.startswith("epoch ")
    ]


def steps(run: Path) -> set[int]:
    return {int(path.name.removeprefix("step_")) for path in run.glob("step_*")}


@pytest.fixture(scope="module")
def first_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> FirstRun:
    """A folder with one finished run below `out/`, made from an empty folder `cwd/`."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "cwd").mkdir()
    return folder, pipeline(folder / "cwd", *TINY, f"output_dir={folder / 'out'}")


@pytest.fixture
def finished(first_run: FirstRun, tmp_path: Path) -> Path:
    """A copy of the finished run in the default place below the working directory."""
    shutil.copytree(first_run[0] / "out", tmp_path / "outputs")
    return tmp_path


def assert_user_error(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr + done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message in done.stderr[done.stderr.index("error: ") :]


def test_a_run_prints_its_baseline_and_every_epoch(
    first_run: FirstRun,
) -> None:
    done = first_run[1]

    assert done.returncode == 0, done.stderr
    assert f"memoryless baseline: {10 * math.log(8) / 23:.4f} cross_entropy" in done.stdout
    reports = epochs(done.stdout)
    assert [report["epoch"] for report in reports] == [1, 2]
    for report in reports:
        assert {"train/cross_entropy", "validation/cross_entropy", "validation/accuracy"} <= set(
            report
        )
    best = min(report["validation/cross_entropy"] for report in reports)
    assert f"best validation cross_entropy: {best:.4f}" in done.stdout
    # weights, hand-counted: 3 x 8 x 10 + 2 x 8 x 8 + 2 x 8 + 8 of the cell, 9 x 8 + 9 to read out
    assert f"{240 + 128 + 16 + 8 + 72 + 9} parameters" in done.stdout
    assert done.stderr == ""


def test_a_run_leaves_readable_checkpoints_with_what_it_printed(
    first_run: FirstRun,
) -> None:
    folder, done = first_run
    run = folder / "out" / "runs" / RUN
    last = CheckpointStore(run).last()

    assert last is not None
    assert last.description["step"] == 10
    assert last.description["experiment"]["model"]["hidden_size"] == 8
    kept = [round(report["validation/cross_entropy"], 4) for report in last.reports]
    assert kept == [report["validation/cross_entropy"] for report in epochs(done.stdout)]
    assert steps(run) <= {5, 10}
    assert str(run) in done.stdout


def test_nothing_is_written_elsewhere(
    first_run: FirstRun,
) -> None:
    folder = first_run[0]
    assert everything_below(folder / "cwd") == []
    assert everything_below(folder / "out")[:2] == ["runs", f"runs/{RUN}"]
    assert all(path.startswith("runs") for path in everything_below(folder / "out"))
    assert sorted(path.name for path in folder.iterdir()) == ["cwd", "out"]


def test_a_run_that_exists_is_not_overwritten(finished: Path) -> None:
    before = everything_below(finished)
    done = pipeline(finished, *TINY)

    assert_user_error(done, str(finished / "outputs" / "runs" / RUN))
    assert "resume=yes" in done.stderr
    assert "name=" in done.stderr
    assert everything_below(finished) == before


def test_resume_goes_on_to_more_epochs(finished: Path, first_run: FirstRun) -> None:
    done = pipeline(finished, *TINY, "training.max_epochs=4", "resume=yes")

    assert done.returncode == 0, done.stderr
    assert [report["epoch"] for report in epochs(done.stdout)] == [3, 4]
    last = CheckpointStore(finished / "outputs" / "runs" / RUN).last()
    assert last is not None
    assert last.description["step"] == 20
    assert [report["epoch"] for report in last.reports] == [1, 2, 3, 4]
    # the first two are the first command's, not trained again
    kept = [round(report["validation/cross_entropy"], 4) for report in last.reports]
    printed = [*epochs(first_run[1].stdout), *epochs(done.stdout)]
    assert kept == [report["validation/cross_entropy"] for report in printed]


def test_resume_says_which_options_changed(finished: Path) -> None:
    lines: list[str] = []
    config = tiny_config(
        finished / "outputs",
        resume="yes",
        max_epochs=3,
        learning_rate=0.01,
        max_grad_norm=1.0,
        schedule=ScheduleConfig(name="step"),
    )
    train(config, lines.append, epoch_recorder)

    assert [line.strip() for line in lines if "from here on" in line] == [
        "training.max_epochs: 2 so far, 3 from here on",
        "training.learning_rate: 0.001 so far, 0.01 from here on",
        "training.schedule.name: constant so far, step from here on",
        "training.max_grad_norm: None so far, 1.0 from here on",
    ]
    last = CheckpointStore(finished / "outputs" / "runs" / RUN).last()
    assert last is not None
    assert [report["train/learning_rate"] for report in last.reports] == [0.001, 0.001, 0.01]


def test_resume_with_the_same_options_says_nothing_of_them(finished: Path) -> None:
    lines: list[str] = []
    train(tiny_config(finished / "outputs", resume="yes"), lines.append, epoch_recorder)
    assert not [line for line in lines if "from here on" in line]


def test_resume_with_another_seed_is_refused(finished: Path) -> None:
    before = everything_below(finished)
    with pytest.raises(ConfigError, match=r"training\.seed must be 0 to go on from .*, got 1"):
        train(tiny_config(finished / "outputs", resume="yes", seed=1), print, epoch_recorder)
    assert everything_below(finished) == before


def test_there_is_nothing_to_resume_before_a_first_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no checkpoint") as error:
        train(tiny_config(tmp_path, resume="yes"), print, epoch_recorder)
    assert str(tmp_path / "runs" / RUN) in str(error.value)
    assert everything_below(tmp_path) == []


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    long = (*TINY, "training.max_epochs=1000000")
    process = subprocess.Popen(
        [sys.executable, str(TRAIN), *long],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("epoch 2/"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)  # Ctrl-C
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    done_epochs = int(epochs("epoch 2/ \n" + output)[-1]["epoch"])

    lines: list[str] = []
    resumed = tiny_config(tmp_path / "outputs", resume="yes", max_epochs=done_epochs + 2)
    train(resumed, lines.append, epoch_recorder)

    # the last epoch may have been on disk when Ctrl-C came, and not yet printed
    assert [report["epoch"] for report in epochs("\n".join(lines))] in (
        [done_epochs + 1, done_epochs + 2],
        [done_epochs + 2],
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("model.hiden_size=8", "model.hidden_size"),
        ("+task.dealy=3", "delay"),
    ],
)
def test_a_misspelt_option_is_refused_with_the_nearest(
    given: str, meant: str, tmp_path: Path
) -> None:
    done = pipeline(tmp_path, *TINY, given)
    assert_user_error(done, f"did you mean {meant!r}?")
    assert repr(given.lstrip("+").split("=")[0]) in done.stderr
    assert everything_below(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "must"),
    [
        ("model.eta=0", "eta must be a finite number > 0, got 0.0"),
        ("model.hidden_size=0", "hidden_size must be an integer >= 1, got 0"),
        ("model.lambda_=-1", "lambda_ must be in [0, 1] or a whole number >= 2, got -1.0"),
        ("training.learning_rate=0", "learning_rate must be a finite number > 0, got 0.0"),
        ("model.zoneout=1", "zoneout must be in [0, 1), got 1.0"),
    ],
)
def test_a_bad_value_is_refused_before_anything_is_written(
    given: str, must: str, tmp_path: Path
) -> None:
    done = pipeline(tmp_path, *TINY, given)
    assert_user_error(done, must)
    assert done.stdout == ""
    assert everything_below(tmp_path) == []


def test_multirun_is_refused_with_the_reason(tmp_path: Path) -> None:
    done = pipeline(tmp_path, *TINY, "--multirun", "model.hidden_size=4,8")
    assert_user_error(done, "--multirun is not supported: a search samples, schedules and records")
    assert everything_below(tmp_path) == []


@pytest.mark.parametrize("arguments", [("--help",), ("--cfg", "job")])
def test_options_are_shown_on_request(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = pipeline(tmp_path, *arguments, "task=character_lm")

    assert done.returncode == 0, done.stderr
    for option in ("hidden_size: 256", "learning_rate: 0.002", "max_epochs: 100", "resume: 'no'"):
        assert option in done.stdout
    if arguments[0] == "--help":
        for group, names in (("model", MODELS), ("task", TASKS)):
            assert f"{group}: {', '.join(sorted(names))}" in done.stdout
    else:
        assert "bptt_length: 150" in done.stdout
    assert everything_below(tmp_path) == []


@pytest.fixture
def without_platform(tmp_path: Path) -> str:
    """A folder for PYTHONPATH that makes Ray, Optuna and MLflow impossible to import."""
    folder = tmp_path / "blocker"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER)
    for name in BLOCKED:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            env=environment(PYTHONPATH=str(folder)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"{name} is not installed here" in done.stderr
    return str(folder)


def test_training_needs_neither_ray_nor_optuna_nor_mlflow(
    without_platform: str,
    first_run: FirstRun,
    tmp_path: Path,
) -> None:
    (tmp_path / "cwd").mkdir()
    done = pipeline(tmp_path / "cwd", *TINY, PYTHONPATH=without_platform)

    assert done.returncode == 0, done.stderr
    assert epochs(done.stdout) == epochs(first_run[1].stdout)  # and computes the same


@pytest.mark.parametrize(
    ("options", "needs"),
    [((*TINY, "tracking=mlflow"), "tracking=mlflow"), (("from_run=abc",), "from_run")],
)
def test_what_needs_mlflow_says_what_to_install(
    options: tuple[str, ...], needs: str, without_platform: str, tmp_path: Path
) -> None:
    (tmp_path / "cwd").mkdir()
    done = pipeline(tmp_path / "cwd", *options, PYTHONPATH=without_platform)

    assert_user_error(done, f"{needs} needs the package 'mlflow': install rum-torch[tune]")
    assert everything_below(tmp_path / "cwd") == []


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("experiment=table3/fs_rum_9", "experiment has no 'table3/fs_rum_9'; did you mean"),
        ("profile=papr", "profile has no 'papr'; did you mean 'paper'?"),
    ],
)
def test_a_misspelt_file_is_answered_with_the_nearest(
    override: str, hint: str, tmp_path: Path
) -> None:
    done = pipeline(tmp_path, override)
    assert done.returncode == 1
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_says_size_and_baselines_and_writes_nothing(tmp_path: Path) -> None:
    done = pipeline(tmp_path, "experiment=table1/rum_30", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "9,560 parameters" in done.stdout  # 26 symbols, 50 units, 10 digits
    assert "memoryless baseline: 0.1000 accuracy" in done.stdout
    assert "published for RUM, T = 30: validation/accuracy 1" in done.stdout
    assert everything_below(tmp_path) == []


def test_a_setting_says_what_was_changed_and_rows_have_folders_of_their_own(
    tmp_path: Path,
) -> None:
    done = pipeline(
        tmp_path,
        "experiment=figure2/rum_200",
        "profile.rmsprop=rmsprop",
        "task.delay=20",
        "training.seed=4",
        "dry_run=true",
    )
    assert done.returncode == 0, done.stderr
    assert "figure2-rum_200-copying-T20-reference" in done.stdout
    assert "changed: task.delay=20 (200)\n" in done.stdout  # a seed and a profile are no change


@pytest.mark.parametrize("profile", ["profile=paper", "profile.rum_dropout=0.3"])
def test_a_profile_that_nothing_refers_to_is_refused(profile: str, tmp_path: Path) -> None:
    done = pipeline(tmp_path, "task=copying", profile, "dry_run=true")
    assert done.returncode == 1
    assert f"error: {profile} changes nothing here" in done.stderr
