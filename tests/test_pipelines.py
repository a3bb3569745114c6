"""Searches, evaluation and continuation as a user runs them: processes of their own."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from rum.cells import RUMConfig
from rum.experiment import ExperimentConfig, run_experiment
from rum.tasks import CopyingConfig
from rum.training.config import TrainingConfig

PIPELINES = Path(__file__).parents[1] / "pipelines"
DEADLINE_SECONDS = 240.0
SECRET = "hunter2"

QUICK = ("tune_ptb", "preset=quick")
COMMANDS = {
    "no MLflow": (*QUICK, f"tracking.uri=http://reader:{SECRET}@127.0.0.1:CLOSED_PORT"),
    "help": ("tune_ptb", "--help"),
    "dry run": (*QUICK, "dry_run=true"),
    "full dry run": ("tune_ptb", "dry_run=true"),
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
    "no Ray": QUICK,
    "continue nothing": ("resume", "study=mine", "training.max_epochs=9"),
    "check nothing": ("check", "study=mine"),
    "show nothing": ("study", "action=show", "study=mine"),
    "queue into nothing": (
        *("study", "action=enqueue", "study=mine"),
        "parameters={model.hidden_size: 100}",
    ),
    "list nothing": ("study", "json=true"),
    "unknown action": ("study", "action=halt"),
    "evaluate": ("evaluate", "checkpoint=CHECKPOINT"),
    "evaluate a foreign folder": ("evaluate", "checkpoint=."),
}
ENVIRONMENT = {
    "full dry run": {"RUM_DATA_DIR": "DATA", "https_proxy": "http://127.0.0.1:CLOSED_PORT"},
    # Nothing answers there, so that nothing is downloaded.
    "no corpus": {"https_proxy": "http://127.0.0.1:CLOSED_PORT", "XDG_CACHE_HOME": "cache"},
    "no Ray": {"RAY_ADDRESS": "127.0.0.1:CLOSED_PORT"},
}


# Importing the platform takes seconds: it is imported once, and each command is a fork of that.
FORKS = """
import json, os, runpy, sys, time
import rum.tune.continuation, rum.tune.evaluation, rum.tune.search

began, names = {}, {}

def wait():
    pid, status = os.wait()
    seconds = time.monotonic() - began[pid]
    print(json.dumps([names[pid], os.waitstatus_to_exitcode(status), seconds]), flush=True)

for line in sys.stdin:
    command = json.loads(line)
    if len(began) - AT_A_TIME >= 0:
        wait()
    pid = os.fork()
    if pid == 0:
        os.chdir(command["folder"])
        os.environ.update(command["environment"])
        for descriptor, file in enumerate(("/dev/null", command["out"], command["err"])):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), descriptor)
        sys.argv = command["arguments"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    began[pid], names[pid] = time.monotonic(), command["name"]
for _ in range(min(AT_A_TIME, len(began))):
    wait()
"""


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


Outcomes = dict[str, Outcome]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Runs all commands, each in an empty folder."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    places = {
        "CLOSED_PORT": str(port),
        "CHECKPOINT": str(trained(tmp_path_factory.mktemp("trained"))),
        "DATA": os.environ.get("RUM_DATA_DIR", ""),
    }

    def filled(text: str) -> str:
        for name, value in places.items():
            text = text.replace(name, value)
        return text

    commands = {}
    for name, (pipeline, *arguments) in COMMANDS.items():
        folder = tmp_path_factory.mktemp("command")
        (folder / "cwd").mkdir()
        commands[name] = {
            "name": name,
            "arguments": [str(PIPELINES / f"{pipeline}.py"), *map(filled, arguments)],
            "folder": str(folder / "cwd"),
            "environment": {k: filled(v) for k, v in ENVIRONMENT.get(name, {}).items()},
            "out": str(folder / "out"),
            "err": str(folder / "err"),
        }
    unset = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RUM_DATA_DIR")
    done = subprocess.run(
        [sys.executable, "-c", FORKS.replace("AT_A_TIME", "3")],
        env={k: v for k, v in os.environ.items() if k not in unset},
        input="\n".join(map(json.dumps, commands.values())),
        stdout=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=True,
    )
    outcomes = {}
    for name, status, seconds in map(json.loads, done.stdout.splitlines()):
        folder = Path(commands[name]["folder"])
        out, err = ((folder.parent / stream).read_text() for stream in ("out", "err"))
        outcomes[name] = Outcome(folder, status, out, out + err, seconds)
    assert set(outcomes) == set(COMMANDS)
    return outcomes


def trained(folder: Path) -> Path:
    """A checkpoint of a copying model that barely trained."""
    experiment = ExperimentConfig(
        model=RUMConfig(hidden_size=8),
        task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
        training=TrainingConfig(max_epochs=1, threads=1),
    )
    run_experiment(experiment, experiment.task.load(seed=0), folder, lambda report: None)
    return folder / "step_000000005"


# Before a search


def test_help_shows_the_commands_and_the_options(outcomes: Outcomes) -> None:
    outcome = outcomes["help"]
    assert outcome.status == 0
    for text in ("pipelines/tune_ptb.py preset=quick", "preset: full, quick", "hidden_size: 256"):
        assert text in outcome.out


def parameters_of_ends(said: str) -> tuple[int, int]:
    """Of the smallest and the largest trial of a space, as a forecast says them."""
    counts = [
        re.search(rf"{end} trial: ([\d,]+) parameters", said) for end in ("Smallest", "Largest")
    ]
    low, high = (int(count[1].replace(",", "")) for count in counts if count is not None)
    return low, high


def test_a_dry_run_prints_parameters_hours_and_disk_and_writes_nothing(outcomes: Outcomes) -> None:
    outcome = outcomes["dry run"]
    assert outcome.status == 0, outcome.said
    low, high = parameters_of_ends(outcome.said)
    assert 1e4 < low < high < 1e5
    assert re.search(r"Forecast: \d+ minutes with early stopping .* at most \d+", outcome.said)
    assert re.search(r"disk \d+\.\d GiB of \d+ GiB free", outcome.said)
    assert outcome.out.strip() == "Dry run: nothing was started."
    assert outcome.written == set()


@pytest.mark.skipif("not os.environ.get('RUM_DATA_DIR')", reason="RUM_DATA_DIR is not set")
def test_a_dry_run_of_the_full_search_finds_penn_treebank(outcomes: Outcomes) -> None:
    outcome = outcomes["full dry run"]
    assert outcome.status == 0, outcome.said
    assert "Corpus: ptb" in outcome.said
    low, high = parameters_of_ends(outcome.said)
    assert 5e5 < low < high < 6e7  # one layer of 500 units to two of 2,500
    assert re.search(r"Forecast: [\d,]+ hours with early stopping", outcome.said)
    assert outcome.written == set()


def test_a_misspelt_option_of_the_space_is_refused_with_the_nearest(outcomes: Outcomes) -> None:
    error = outcomes["misspelt in space"].error
    assert "the space has no option 'model.hiden_size'; did you mean 'model.hidden_size'?" in error
    assert "search_spaces/space" in error  # where a new one would go


def test_a_misspelt_option_is_refused_with_the_nearest(outcomes: Outcomes) -> None:
    error = outcomes["misspelt option"].error
    assert "unknown option 'search.num_trails'; did you mean 'search.num_trials'?" in error


def test_an_unknown_preset_is_refused_with_those_there_are(outcomes: Outcomes) -> None:
    error = outcomes["unknown preset"].error
    assert "preset/quik" in error
    assert re.search(r"full\s+quick", error)


def test_an_option_that_is_searched_cannot_be_set_as_well(outcomes: Outcomes) -> None:
    error = outcomes["searched option"].error
    assert "model.hidden_size is searched, so model.hidden_size=64 would have no effect" in error
    assert "'space={model.hidden_size: {low: ..., high: ...}}'" in error


@pytest.mark.parametrize("name", ["searched option, forced", "searched option in its section"])
def test_an_option_that_is_searched_cannot_be_set_in_other_words(
    outcomes: Outcomes, name: str
) -> None:
    assert "is searched" in outcomes[name].error


@pytest.mark.parametrize("name", ["brace left out", "no equals sign"])
def test_a_command_that_cannot_be_parsed_is_an_error_without_traceback(
    outcomes: Outcomes, name: str
) -> None:
    assert COMMANDS[name][-1] in outcomes[name].error


def test_a_bound_that_no_model_accepts_is_refused_by_name_and_value(outcomes: Outcomes) -> None:
    error = outcomes["bad value"].error
    assert "space: model.zoneout = 1.0 is not valid: model.zoneout must be in [0, 1)" in error


def test_multirun_is_refused_with_the_reason(outcomes: Outcomes) -> None:
    error = outcomes["multirun"].error
    assert "--multirun is not supported: a search samples, schedules and records" in error


def test_without_penn_treebank_the_error_says_where_to_put_it(outcomes: Outcomes) -> None:
    error = outcomes["no corpus"].error
    assert "Penn Treebank is not here and could not be downloaded" in error
    for text in ("ptb.train.txt", "simple-examples.tgz", "data_dir=...", "RUM_DATA_DIR"):
        assert text in error


def test_without_mlflow_the_search_ends_before_it_begins(outcomes: Outcomes) -> None:
    outcome = outcomes["no MLflow"]
    assert re.search(r"MLflow at http://127.0.0.1:\d+ did not answer within 10 s", outcome.error)
    assert "MLFLOW_TRACKING_URI" in outcome.error
    assert outcome.seconds < 60  # MLflow's own patience is minutes; the rest is a busy machine
    assert outcome.written == {"outputs"}


def test_the_message_does_not_name_the_password_of_mlflow(outcomes: Outcomes) -> None:
    assert SECRET not in outcomes["no MLflow"].error


def test_nothing_that_is_printed_names_the_password_of_mlflow(outcomes: Outcomes) -> None:
    assert SECRET not in outcomes["no MLflow"].said


def test_a_dead_cluster_is_named_before_the_search_begins(outcomes: Outcomes) -> None:
    outcome = outcomes["no Ray"]
    assert re.search(r"RAY_ADDRESS is '127.0.0.1:\d+', where nothing answers", outcome.error)
    assert outcome.written == {"outputs"}


# After a search


def test_continuing_a_study_that_is_not_there_is_refused(outcomes: Outcomes) -> None:
    outcome = outcomes["continue nothing"]
    assert re.search(r"there is no study 'mine': .*/outputs is no folder", outcome.error)
    assert outcome.written == set()


def test_checking_a_study_that_is_not_there_is_an_error(outcomes: Outcomes) -> None:
    outcome = outcomes["check nothing"]
    assert re.search(r"there is no study 'mine': .*/outputs has no studies", outcome.error)
    assert outcome.written == set()


def test_studies_that_are_not_there_are_an_empty_list_or_an_error(outcomes: Outcomes) -> None:
    listed = outcomes["list nothing"]
    assert (listed.status, json.loads(listed.out)) == (0, {"studies": []})
    shown = outcomes["show nothing"]
    assert "there is no study 'mine'" in shown.error
    assert shown.out == ""
    assert "action must be one of" in outcomes["unknown action"].error
    assert "there is no study 'mine'" in outcomes["queue into nothing"].error
    assert listed.written == shown.written == set()


def test_evaluating_a_checkpoint_prints_both_splits(outcomes: Outcomes) -> None:
    outcome = outcomes["evaluate"]
    assert outcome.status == 0, outcome.said
    values = dict(line.split() for line in outcome.out.splitlines())
    assert set(values) == {
        "parameters",
        "validation/cross_entropy",
        "validation/accuracy",
        "validation/answer_accuracy",
        "test/cross_entropy",
        "test/accuracy",
        "test/answer_accuracy",
    }
    assert 0.5 < float(values["validation/cross_entropy"]) < 3.0
    assert values["validation/cross_entropy"] != values["test/cross_entropy"]
    assert outcome.written == set()


def test_evaluating_what_is_no_checkpoint_is_refused(outcomes: Outcomes) -> None:
    outcome = outcomes["evaluate a foreign folder"]
    assert f"{outcome.folder} is not a readable checkpoint" in outcome.error
