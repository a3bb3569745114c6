"""Searches, evaluation and continuation as a user runs them: processes of their own."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from rum.cells import RUMConfig
from rum.experiment import ExperimentConfig, run_experiment
from rum.tasks import CopyingConfig
from rum.training.config import TrainingConfig

PIPELINES = Path(__file__).parents[1] / "pipelines"
DEADLINE_SECONDS = 120.0
SECRET = "hunter2"

QUICK = ("tune_ptb", "preset=quick")
FULL = ("tune_ptb", "dry_run=true")
COMMANDS = {
    "help": ("tune_ptb", "--help"),
    "dry run": (*QUICK, "dry_run=true"),
    "misspelt in space": (*QUICK, "space={model.hiden_size: {high: 80}}"),
    "misspelt option": (*QUICK, "search.num_trails=3"),
    "unknown preset": ("tune_ptb", "preset=quik"),
    "searched option": (*QUICK, "model.hidden_size=64"),
    "searched option, forced": (*QUICK, "++model.hidden_size=64", "dry_run=true"),
    "searched option in its section": (*QUICK, "training={learning_rate: 0.1}", "dry_run=true"),
    "brace left out": (*QUICK, "space={model.hidden_size: {high: 80}"),
    "no equals sign": ("tune_ptb", "quick"),
    "bad value": (*QUICK, "space={model.zoneout: {high: 1.0}}"),
    "multirun": (*QUICK, "--multirun", "search.num_trials=2,4"),
    "no corpus": (*QUICK, "task.corpus=ptb"),
    "no MLflow": (*QUICK, f"tracking.uri=http://reader:{SECRET}@127.0.0.1:CLOSED_PORT"),
    "no Ray": QUICK,
    "resume nothing": (*QUICK, "resume=yes", "study=mine", "tracking.uri=sqlite:///TABLES"),
    "continue nothing": ("resume", "study=mine", "training.max_epochs=9"),
    "evaluate": ("evaluate", "checkpoint=CHECKPOINT"),
    "evaluate a foreign folder": ("evaluate", "checkpoint=."),
}
ENVIRONMENT = {
    # Nothing answers there, so that nothing is downloaded.
    "no corpus": {"https_proxy": "http://127.0.0.1:CLOSED_PORT", "XDG_CACHE_HOME": "cache"},
    "no Ray": {"RAY_ADDRESS": "127.0.0.1:CLOSED_PORT"},
}


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    folder: Path
    status: int
    out: str
    said: str
    seconds: float

    @property
    def error(self) -> str:
        """The message, after checking that it is one for people."""
        assert self.status != 0
        assert "Traceback" not in self.said, self.said
        assert "error: " in self.said
        return self.said[self.said.index("error: ") :]

    @property
    def written(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*")}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Outcome]]]:
    """Runs all commands, two at a time, each in an empty folder."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed_port = server.getsockname()[1]
    checkpoint = trained(tmp_path_factory.mktemp("trained"))
    tables = tmp_path_factory.mktemp("mlflow") / "mlflow.db"

    def run(name: str) -> Outcome:
        folder = tmp_path_factory.mktemp("cwd")

        def filled(text: str) -> str:
            replaced = text.replace("CLOSED_PORT", str(closed_port))
            return replaced.replace("CHECKPOINT", str(checkpoint)).replace("TABLES", str(tables))

        pipeline, *arguments = map(filled, COMMANDS[name])
        unset = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RUM_DATA_DIR")
        environment = {k: v for k, v in os.environ.items() if k not in unset}
        environment |= {k: filled(v) for k, v in ENVIRONMENT.get(name, {}).items()}
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(PIPELINES / f"{pipeline}.py"), *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )
        seconds = time.monotonic() - began
        said = done.stdout + done.stderr
        return Outcome(folder, done.returncode, done.stdout, said, seconds)

    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(run, name) for name in COMMANDS}
        yield futures
        pool.shutdown(cancel_futures=True)


def trained(folder: Path) -> Path:
    """A checkpoint of a copying model that barely trained."""
    experiment = ExperimentConfig(
        model=RUMConfig(hidden_size=8),
        task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
        training=TrainingConfig(max_epochs=1, threads=1),
    )
    run_experiment(experiment, experiment.task.load(seed=0), folder, lambda report: None)
    return folder / "step_000000005"


Outcomes = dict[str, Future[Outcome]]


# Before a search


def test_help_shows_the_commands_and_the_options(outcomes: Outcomes) -> None:
    outcome = outcomes["help"].result()
    assert outcome.status == 0
    for text in ("pipelines/tune_ptb.py preset=quick", "preset: full, quick", "hidden_size: 256"):
        assert text in outcome.out


def test_a_dry_run_prints_parameters_hours_and_disk_and_writes_nothing(outcomes: Outcomes) -> None:
    outcome = outcomes["dry run"].result()
    assert outcome.status == 0, outcome.said
    counts = re.search(r"Parameters of a trial: ([\d,]+) to ([\d,]+), median", outcome.said)
    assert counts is not None
    low, high = (int(count.replace(",", "")) for count in counts.groups())
    assert 1e4 < low < high < 1e5
    assert re.search(r"Forecast: \d+ minutes with early stopping .* at most \d+", outcome.said)
    assert re.search(r"disk \d+\.\d GiB of \d+ GiB free", outcome.said)
    assert outcome.out.strip() == "Dry run: nothing was started."
    assert outcome.written == set()


@pytest.mark.skipif("not os.environ.get('RUM_DATA_DIR')", reason="RUM_DATA_DIR is not set")
def test_a_dry_run_of_the_full_search_finds_penn_treebank(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PIPELINES / "tune_ptb.py"), "dry_run=true"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Corpus: ptb" in done.stderr
    counts = re.search(r"Parameters of a trial: ([\d,]+) to ([\d,]+), median", done.stderr)
    assert counts is not None
    low, high = (int(count.replace(",", "")) for count in counts.groups())
    assert 5e5 < low < high < 6e7  # one layer of 500 units to two of 2,500
    assert re.search(r"Forecast: [\d,]+ hours with early stopping", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_option_of_the_space_is_refused_with_the_nearest(outcomes: Outcomes) -> None:
    error = outcomes["misspelt in space"].result().error
    assert "the space has no option 'model.hiden_size'; did you mean 'model.hidden_size'?" in error
    assert "search_spaces/space" in error  # where a new one would go


def test_a_misspelt_option_is_refused_with_the_nearest(outcomes: Outcomes) -> None:
    error = outcomes["misspelt option"].result().error
    assert "unknown option 'search.num_trails'; did you mean 'search.num_trials'?" in error


def test_an_unknown_preset_is_refused_with_those_there_are(outcomes: Outcomes) -> None:
    error = outcomes["unknown preset"].result().error
    assert "preset/quik" in error
    assert re.search(r"full\s+quick", error)


def test_an_option_that_is_searched_cannot_be_set_as_well(outcomes: Outcomes) -> None:
    error = outcomes["searched option"].result().error
    assert "model.hidden_size is searched, so model.hidden_size=64 would have no effect" in error
    assert "'space={model.hidden_size: {type: categorical, choices: [...]}}'" in error


@pytest.mark.xfail(strict=True, reason="only overrides written as name=value are looked at")
@pytest.mark.parametrize("name", ["searched option, forced", "searched option in its section"])
def test_an_option_that_is_searched_cannot_be_set_in_other_words(
    outcomes: Outcomes, name: str
) -> None:
    assert "is searched" in outcomes[name].result().error


@pytest.mark.xfail(strict=True, reason="the hints parse the command again, unguarded")
@pytest.mark.parametrize("name", ["brace left out", "no equals sign"])
def test_a_command_that_cannot_be_parsed_is_an_error_without_traceback(
    outcomes: Outcomes, name: str
) -> None:
    assert COMMANDS[name][-1] in outcomes[name].result().error


def test_a_bound_that_no_model_accepts_is_refused_by_name_and_value(outcomes: Outcomes) -> None:
    error = outcomes["bad value"].result().error
    assert "space: model.zoneout = 1.0 is not valid: model.zoneout must be in [0, 1)" in error


def test_multirun_is_refused_with_the_reason(outcomes: Outcomes) -> None:
    error = outcomes["multirun"].result().error
    assert "--multirun is not supported: a search samples, schedules and records" in error


def test_without_penn_treebank_the_error_says_where_to_put_it(outcomes: Outcomes) -> None:
    error = outcomes["no corpus"].result().error
    assert "Penn Treebank is not here and could not be downloaded" in error
    for text in ("ptb.train.txt", "simple-examples.tgz", "data_dir=...", "RUM_DATA_DIR"):
        assert text in error


def test_without_mlflow_the_search_ends_before_it_begins(outcomes: Outcomes) -> None:
    outcome = outcomes["no MLflow"].result()
    assert re.search(r"MLflow at 127.0.0.1:\d+ did not answer within 10 s", outcome.error)
    assert "MLFLOW_TRACKING_URI" in outcome.error
    assert outcome.seconds < 10 + 20  # the second is for starting Python on a busy machine
    assert outcome.written == {"outputs"}


def test_the_message_does_not_name_the_password_of_mlflow(outcomes: Outcomes) -> None:
    assert SECRET not in outcomes["no MLflow"].result().error


@pytest.mark.xfail(strict=True, reason="Hydra itself prints all overrides when a job fails")
def test_nothing_that_is_printed_names_the_password_of_mlflow(outcomes: Outcomes) -> None:
    assert SECRET not in outcomes["no MLflow"].result().said


def test_a_dead_cluster_is_named_before_the_search_begins(outcomes: Outcomes) -> None:
    outcome = outcomes["no Ray"].result()
    assert re.search(r"RAY_ADDRESS is '127.0.0.1:\d+', where nothing answers", outcome.error)
    assert outcome.written == {"outputs"}


def test_resuming_what_never_began_is_refused(outcomes: Outcomes) -> None:
    error = outcomes["resume nothing"].result().error
    assert "resume=yes, but there is no study 'mine'" in error
    assert re.search(r"Studies in .*/outputs: none", error)


# After a search


def test_continuing_a_study_that_is_not_there_is_refused(outcomes: Outcomes) -> None:
    error = outcomes["continue nothing"].result().error
    assert "there is no study 'mine'" in error
    assert re.search(r"Studies in .*/outputs: none", error)


def test_evaluating_a_checkpoint_prints_both_splits(outcomes: Outcomes) -> None:
    outcome = outcomes["evaluate"].result()
    assert outcome.status == 0, outcome.said
    values = dict(line.split() for line in outcome.out.splitlines())
    assert set(values) == {
        "parameters",
        "validation/cross_entropy",
        "validation/accuracy",
        "test/cross_entropy",
        "test/accuracy",
    }
    assert 0.5 < float(values["validation/cross_entropy"]) < 3.0
    assert values["validation/cross_entropy"] != values["test/cross_entropy"]
    assert outcome.written == set()


def test_evaluating_what_is_no_checkpoint_is_refused(outcomes: Outcomes) -> None:
    outcome = outcomes["evaluate a foreign folder"].result()
    assert f"{outcome.folder} is not a readable checkpoint" in outcome.error
