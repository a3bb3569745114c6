"""Optuna's record of a study: states, values, randomness by trial number, and the lock."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from rum.errors import ConfigError, StudyError
from rum.tune.config import Domain, SamplerConfig
from rum.tune.database import open_storage
from rum.tune.samplers import build_sampler
from rum.tune.space import suggest
from rum.tune.study import ORIGIN, REASON, Study, check_definition, ensure_study, study_names
from rum.tune.study_folder import locked

SPACE = {
    "model.hidden_size": Domain(type="int", low=8, high=80, step=8),
    "training.learning_rate": Domain(type="float", low=1e-4, high=1e-1, log=True),
    "training.schedule.name": Domain(type="categorical", choices=["constant", "drop"]),
    "training.schedule.drop_at": Domain(
        type="float", low=0.3, high=0.8, when={"training.schedule.name": "drop"}
    ),
}
DEFINITION = {"space": {"a": 1}, "experiment": {"b": 2}, "mode": "min"}


def open_study(
    folder: Path, sampler: SamplerConfig | None = None, name: str = "study", mode: str = "min"
) -> Study:
    """Opens a study as a new driver does, making it the first time."""
    storage = open_storage(folder)
    ensure_study(storage, name, {**DEFINITION, "mode": mode})
    return Study(storage, name, SPACE, sampler or SamplerConfig(name="random"))


def test_ask_opens_a_running_trial_with_all_its_parameters(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    specs = [study.ask() for _ in range(3)]
    assert [spec.number for spec in specs] == [0, 1, 2]
    assert [trial.state for trial in study.trials()] == [TrialState.RUNNING] * 3
    assert [trial.params for trial in study.trials()] == [spec.parameters for spec in specs]
    assert [spec.origin for spec in specs] == [None] * 3


def test_a_complete_trial_has_its_values_by_epoch_and_the_one_it_finished_with(
    tmp_path: Path,
) -> None:
    study = open_study(tmp_path)
    study.ask()
    study.report(0, 1, 3.0)
    study.report(0, 2, 2.5)
    study.finish(0, TrialState.COMPLETE, 2.5)
    (trial,) = open_study(tmp_path).trials()
    assert trial.state == TrialState.COMPLETE
    assert trial.intermediate_values == {1: 3.0, 2: 2.5}
    assert trial.value == 2.5


def test_a_pruned_trial_keeps_its_values_and_counts_with_the_last(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.ask()
    study.report(0, 1, 3.0)
    study.report(0, 2, 2.5)
    study.finish(0, TrialState.PRUNED)
    (trial,) = open_study(tmp_path).trials()
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {1: 3.0, 2: 2.5}
    assert trial.value == 2.5


def test_a_failed_trial_has_no_value_but_its_reason(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.ask()
    study.report(0, 1, 3.0)
    study.note(0, REASON, "crashed: x")
    study.finish(0, TrialState.FAIL)
    (trial,) = open_study(tmp_path).trials()
    assert (trial.state, trial.value) == (TrialState.FAIL, None)
    assert trial.user_attrs[REASON] == "crashed: x"
    assert study.ranked() == []


@pytest.mark.parametrize(("mode", "order"), [("min", [2, 0, 3]), ("max", [3, 0, 2])])
def test_ranked_puts_the_best_first_and_leaves_out_what_has_no_sound_value(
    tmp_path: Path, mode: str, order: list[int]
) -> None:
    study = open_study(tmp_path, mode=mode)
    ends = [
        (2.0, TrialState.COMPLETE, ""),
        (1.0 if mode == "min" else 9.0, TrialState.PRUNED, "diverged: loss is not finite"),
        (1.5, TrialState.PRUNED, "stopped by the scheduler: 1.5 at rung 1"),
        (3.0, TrialState.COMPLETE, ""),
        (0.1, TrialState.FAIL, "crashed: x"),
        (None, TrialState.PRUNED, "diverged: in the first epoch"),
    ]
    for value, state, reason in ends:
        number = study.ask().number
        if value is not None:
            study.report(number, 1, value)
        study.note(number, REASON, reason)
        study.finish(number, state, value if state == TrialState.COMPLETE else None)
    assert study.mode == mode
    assert [trial.number for trial in study.ranked()] == order


def test_the_target_is_kept(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    assert study.target == 0
    study.target = 12
    assert open_study(tmp_path).target == 12


def test_an_enqueued_trial_comes_first_with_its_parameters_and_origin(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    parameters = {
        "model.hidden_size": 24,
        "training.learning_rate": 0.01,
        "training.schedule.name": "constant",
    }
    origin = {"study": "other", "trial": 3, "run_id": "r", "checkpoint": "/c"}
    study.enqueue(parameters, {ORIGIN: origin})
    spec = open_study(tmp_path).ask()
    assert (spec.number, spec.parameters, spec.origin) == (0, parameters, origin)
    assert open_study(tmp_path).trials()[0].user_attrs[ORIGIN] == origin


def test_studies_in_one_storage_are_listed_and_do_not_mix(tmp_path: Path) -> None:
    first, second = open_study(tmp_path, name="b"), open_study(tmp_path, name="a")
    first.ask()
    assert study_names(open_storage(tmp_path)) == ["a", "b"]
    assert (len(first.trials()), len(second.trials())) == (1, 0)


# Randomness

SAMPLERS = {
    "random": SamplerConfig(name="random", seed=5),
    "tpe": SamplerConfig(name="tpe", seed=5, startup_trials=3),
    "gp": SamplerConfig(name="gp", seed=5, startup_trials=3),
    "cmaes": SamplerConfig(name="cmaes", seed=5, startup_trials=3),
    "qmc": SamplerConfig(name="qmc", seed=5),
    "nsga2": SamplerConfig(name="nsga2", seed=5, startup_trials=3),
    "NSGAIIISampler": SamplerConfig(name="NSGAIIISampler", seed=5),
}
TRIALS = 7


def run_one(study: Study) -> dict[str, Any]:
    """A whole trial whose value is a function of its parameters."""
    spec = study.ask()
    value = 1e3 * spec.parameters["training.learning_rate"] + spec.parameters["model.hidden_size"]
    study.report(spec.number, 1, value)
    study.finish(spec.number, TrialState.COMPLETE, value)
    return spec.parameters


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_two_studies_with_one_seed_sample_the_same(tmp_path: Path, sampler: SamplerConfig) -> None:
    first, second = (open_study(tmp_path / name, sampler) for name in "ab")
    assert [run_one(first) for _ in range(TRIALS)] == [run_one(second) for _ in range(TRIALS)]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_study_reopened_before_each_trial_samples_as_an_undisturbed_one(
    tmp_path: Path, sampler: SamplerConfig
) -> None:
    undisturbed = open_study(tmp_path / "a", sampler)
    expected = [run_one(undisturbed) for _ in range(TRIALS)]
    assert [run_one(open_study(tmp_path / "b", sampler)) for _ in range(TRIALS)] == expected


def test_tpe_departs_from_random_after_its_startup_trials(tmp_path: Path) -> None:
    drawn = {}
    for name in ("random", "tpe"):
        study = open_study(tmp_path / name, SAMPLERS[name])
        drawn[name] = [run_one(study) for _ in range(TRIALS)]
    assert drawn["tpe"][:3] == drawn["random"][:3]
    assert all(drawn["tpe"][i] != drawn["random"][i] for i in range(3, TRIALS))


@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes", "nsga2"])
def test_samplers_that_learn_come_closer_than_random_search(tmp_path: Path, name: str) -> None:
    means = {}
    for each in (name, "random"):
        study = open_study(tmp_path / each, SamplerConfig(name=each, seed=5, startup_trials=8))
        values = []
        for _ in range(40):
            spec = study.ask()
            distance = abs(math.log(spec.parameters["training.learning_rate"] / 1e-3))
            value = distance + abs(spec.parameters["model.hidden_size"] - 64) / 8
            study.finish(spec.number, TrialState.COMPLETE, value)
            values.append(value)
        means[each] = sum(values[20:]) / 20
    assert means[name] < 0.75 * means["random"]


def test_qmc_lays_out_one_sequence_over_a_study_and_draws_choices_at_random(
    tmp_path: Path,
) -> None:
    study = open_study(tmp_path, SAMPLERS["qmc"])
    drawn = [run_one(study) for _ in range(17)]
    # after the first trial, which makes the space known: 16 points, one in each sixteenth
    cells = [math.log10(each["training.learning_rate"] / 1e-4) / 3 * 16 for each in drawn[1:]]
    assert sorted(int(cell) for cell in cells) == list(range(16))
    assert {each["training.schedule.name"] for each in drawn} == {"constant", "drop"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tqe", "one of random, tpe, .* got 'tqe'; did you mean 'tpe'"),
        ("GridSampler", "must take a seed and need nothing else, this one needs search_space"),
        ("BaseSampler", "must take a seed and need nothing else"),
        ("TrialState", "a class of optuna.samplers, got 'TrialState'"),
    ],
)
def test_a_sampler_that_there_is_not_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_sampler(SamplerConfig(name=name), 0)


def test_a_sampler_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"cmaes needs the packages cmaes: pip install 'rum-"):
        build_sampler(SamplerConfig(name="cmaes"), 0)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"qmc"}))
def test_another_seed_and_another_trial_sample_otherwise(tmp_path: Path, name: str) -> None:
    drawn = [
        run_one(open_study(tmp_path / str(seed), SamplerConfig(name=name, seed=seed)))
        for seed in (0, 1)
        for _ in range(2)
    ]
    rates = {parameters["training.learning_rate"] for parameters in drawn}
    assert len(rates) == 4


def test_asking_depends_on_the_number_and_not_on_how_many_were_asked_before(
    tmp_path: Path,
) -> None:
    """A sampler kept from trial to trial would have moved its stream on."""
    sampler = SAMPLERS["random"]
    fresh = optuna.create_study(sampler=build_sampler(sampler, 2)).ask()
    study = open_study(tmp_path, sampler)
    third = [study.ask() for _ in range(3)][2]
    assert suggest(fresh, SPACE) == third.parameters


# A driver that died


def test_an_adopted_trial_keeps_its_number_parameters_and_values(tmp_path: Path) -> None:
    dead = open_study(tmp_path)
    spec = dead.ask()
    dead.report(0, 1, 4.0)
    study = open_study(tmp_path)
    (running,) = study.trials(TrialState.RUNNING)
    assert study.adopt(running) == spec
    study.report(0, 2, 3.0)
    study.finish(0, TrialState.COMPLETE, 3.0)
    (trial,) = open_study(tmp_path).trials()
    assert (trial.number, trial.params) == (0, spec.parameters)
    assert trial.intermediate_values == {1: 4.0, 2: 3.0}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("had", [0, 1, 3])
def test_a_trial_whose_driver_died_while_it_was_sampled_gets_the_rest(
    tmp_path: Path, sampler: SamplerConfig, had: int
) -> None:
    study = open_study(tmp_path, sampler)
    for _ in range(4):
        run_one(study)
    raw = optuna.load_study(study_name="study", storage=open_storage(tmp_path))
    first = suggest(raw.ask(), dict(list(SPACE.items())[:had]))
    study = open_study(tmp_path, sampler)
    (running,) = study.trials(TrialState.RUNNING)
    parameters = study.adopt(running).parameters
    assert running.number == 4
    assert {name: parameters[name] for name in first} == first
    expected = set(SPACE)
    if parameters["training.schedule.name"] == "constant":
        expected.remove("training.schedule.drop_at")
    assert set(parameters) == expected
    assert study.trials()[4].params == parameters


def test_a_study_that_was_only_half_made_is_completed(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    optuna.create_study(study_name="study", storage=storage)  # and the driver died
    study = open_study(tmp_path)
    assert (study.definition, study.target) == (DEFINITION, 0)


def test_making_a_study_again_changes_nothing(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.target = 4
    ensure_study(open_storage(tmp_path), "study", {**DEFINITION, "space": {"other": 1}})
    again = open_study(tmp_path)
    assert (again.definition, again.target) == (DEFINITION, 4)


# The definition


def test_the_same_definition_passes(tmp_path: Path) -> None:
    check_definition(open_study(tmp_path), json.loads(json.dumps(DEFINITION)))


def test_each_difference_of_definitions_is_named_with_both_values(tmp_path: Path) -> None:
    ours = {"space": {"a": 7, "c": None}, "experiment": {}, "mode": "max"}
    with pytest.raises(StudyError) as caught:
        check_definition(open_study(tmp_path), ours)
    lines = str(caught.value).splitlines()
    assert lines[0] == "study study exists with other settings:"
    assert lines[1:-1] == [
        "  experiment.b: 2 in the study, (absent) now",
        "  mode: min in the study, max now",
        "  space.a: 1 in the study, 7 now",
    ]
    assert "study_exists=new" in lines[-1]


# The lock and the folder

HOLD = """
import sys
from pathlib import Path
from rum.tune.study_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts another driver that holds a study's lock."""
    started = []

    def hold(folder: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_driver_is_refused_until_the_first_is_killed(
    tmp_path: Path, hold: Callable[[Path], subprocess.Popen[str]]
) -> None:
    folder = tmp_path / "studies" / "mine"
    owner = hold(folder)
    with (
        pytest.raises(StudyError, match="study mine is run by another driver") as caught,
        locked(folder),
    ):
        pass
    assert f'"pid": {owner.pid}' in str(caught.value)
    owner.send_signal(signal.SIGKILL)
    assert owner.wait(timeout=30) == -signal.SIGKILL
    with locked(folder):
        assert json.loads((folder / "lock.json").read_text())["pid"] == os.getpid()


def test_a_lock_that_was_left_can_be_taken_again(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    with locked(folder):
        first = json.loads((folder / "lock.json").read_text())
    with locked(folder):
        assert json.loads((folder / "lock.json").read_text())["pid"] == first["pid"] == os.getpid()


def test_studies_are_locked_one_by_one(tmp_path: Path) -> None:
    with locked(tmp_path / "a"), locked(tmp_path / "b"):
        assert (tmp_path / "b" / "lock.json").exists()


def test_a_study_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "studies").write_text("a file in the folder's place")
    folder = tmp_path / "studies" / "mine"
    with pytest.raises(StudyError, match=f"cannot write to {folder}"), locked(folder):
        pass


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file in the folder's place")
    with pytest.raises(StudyError, match=f"cannot open the studies in {tmp_path / 'outputs'}"):
        open_storage(tmp_path / "outputs")


def test_commits_do_not_wait_for_the_disk_and_readers_do_not_wait_for_the_driver(
    tmp_path: Path,
) -> None:
    engine = open_storage(tmp_path).engine
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1  # NORMAL
