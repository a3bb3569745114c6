"""`pipelines/study.py`: studies are looked at and changed while a driver runs, or not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import TrialState

from rum.errors import ConfigError, StudyError
from rum.tune.config import StudyConfig
from rum.tune.control import control
from rum.tune.orders import EXTEND, STOP, Order
from rum.tune.schedulers.halving import Halving
from rum.tune.study import COMMAND, ORIGIN, is_paused
from rum.tune.study_folder import locked

Open = Callable[..., Any]
Act = Callable[..., dict[str, Any]]
TWO = {"model.hidden_size": 5, "training.learning_rate": 0.01}


@pytest.fixture
def act(output_dir: Path) -> Act:
    """Acts on the study as another process would; gives what it says to programs."""

    def act(action: str, study: str | None = "small", **options: Any) -> dict[str, Any]:
        config = StudyConfig(
            action=action,
            study=study,
            output_dir=str(output_dir),
            json=True,
            wait_seconds=0.0,
            **options,
        )
        said: dict[str, Any] = json.loads(control(config))
        return said

    return act


def states(driver: Any) -> list[str]:
    return [trial.state.name for trial in driver.study.trials()]


# Looking


def test_studies_are_listed(small_driver: Open, act: Act, output_dir: Path) -> None:
    search = small_driver(scheduler=Halving([1], 2, "min", pauses=True))
    search.tell(search.start(), 1, 0.5)
    search.start()
    search.start()
    assert act("list", study=None) == {
        "studies": [
            {
                "study": "small",
                "driver": None,
                "target": 4,
                "ended": 0,
                "states": {"PAUSED": 1, "RUNNING": 2},
                "mode": "min",
                "best": None,
            }
        ]
    }
    with locked(search.folder):
        (outline,) = act("list", study=None)["studies"]
        text = control(StudyConfig(output_dir=str(output_dir)))
    assert set(outline["driver"]) == {"host", "pid"}
    assert f"process {outline['driver']['pid']}" in text
    assert "0/4" in text
    assert "1 paused, 2 running" in text


def test_there_may_be_no_studies(tmp_path: Path, act: Act) -> None:
    empty = str(tmp_path / "empty")
    assert control(StudyConfig(output_dir=empty)) == "no studies"
    assert not (tmp_path / "empty").exists()
    with pytest.raises(StudyError, match="there is no study 'small'"):
        control(StudyConfig(action="show", study="small", output_dir=empty))


def test_a_study_is_shown(small_driver: Open, act: Act, output_dir: Path) -> None:
    search = small_driver(max_trial_epochs=9)
    search.study.set_attribute(COMMAND, "python pipelines/tune_ptb.py preset=quick")
    number = search.start()
    for epoch in (1, 2, 3, 4):
        search.tell(number, epoch, 1 / epoch)
    shown = act("show")
    assert shown["best"] == {"trial": 0, "value": 0.25}
    assert shown["budget"]["max_trial_epochs"] == {"used": 4.0, "budget": 9}
    assert shown["go_on"] == "python pipelines/tune_ptb.py preset=quick study=small resume=yes"
    (trial,) = shown["trials"]
    assert (trial["how"], trial["epochs"], trial["value"]) == ("finished", 4, 0.25)
    assert trial["parameters"] == search.study.trial(0).params
    text = control(StudyConfig(action="show", study="small", output_dir=str(output_dir)))
    assert "search.max_trial_epochs: 4 of 9 used" in text
    assert "finished" in text


# Stopping the search


def test_a_driver_is_stopped_once(small_driver: Open, act: Act) -> None:
    assert not act_on_idle(small_driver, act, "stop")["changed"]
    search = small_driver()
    running = search.start()
    with locked(search.folder):
        said = act("stop")
        assert (said["changed"], said["taken"]) == (True, False)  # nobody has looked yet
        assert "resume=yes" in act("show")["go_on"]
        assert "asked to stop" in act("stop")["message"]
        search.obey()
        assert search.orders.waiting() == []
    assert search.conductor.is_done
    assert search.conductor.is_stopping
    assert search.conductor.next_trial() is None
    search.conductor.interrupt()
    again = small_driver()
    assert again.start() == running


def act_on_idle(small_driver: Open, act: Act, action: str) -> dict[str, Any]:
    search = small_driver()
    search.tracker.flush()
    return act(action)


def test_an_order_to_stop_is_for_no_other_driver(small_driver: Open) -> None:
    search = small_driver()
    search.orders.give(Order(STOP, driver={"host": "elsewhere", "pid": 1}))
    search.obey()
    assert not search.conductor.is_stopping
    assert search.orders.waiting() == []


# Extending


def test_a_running_search_goes_on_to_its_new_target(small_driver: Open, act: Act) -> None:
    search = small_driver(num_trials=1)
    number = search.start()
    assert search.conductor.next_trial() is None
    with locked(search.folder):
        act("extend", by=2)
        assert search.study.target == 1  # the driver alone writes while it runs
        search.obey()
    assert search.study.target == 3
    assert (search.start(), search.start()) == (1, 2)
    for epoch in (1, 2, 3, 4):
        search.tell(number, epoch)
    assert search.conductor.num_open == 2
    search.tracker.flush()
    parent = search.tracker.client.get_run(search.tracker.parent_id)
    assert parent.data.tags["rum.target"] == "3"


def test_a_study_is_extended_without_a_driver(small_driver: Open, act: Act) -> None:
    search = small_driver(num_trials=2)
    said = act("extend", by=2)
    assert (said["taken"], said["target"]) == (True, 4)
    assert "resume=yes" in said["message"]
    assert act("extend", to=6)["target"] == 6
    assert not act("extend", to=6)["changed"]
    assert not act("extend", to=5)["changed"]
    assert search.study.target == 6


def test_an_extension_that_is_carried_out_twice_extends_once(small_driver: Open) -> None:
    search = small_driver(num_trials=2)
    order = Order(EXTEND, by=3)
    for _ in range(2):  # its driver dies before it takes the order away
        search.orders.give(order)
        small_driver(num_trials=2).obey()
    assert search.study.target == 5
    search.orders.give(Order(EXTEND, by=3))
    search.obey()
    assert search.study.target == 8


# Stopping a trial


def test_a_running_trial_ends_at_its_next_report(
    small_driver: Open,
    act: Act,
    runs_of: Callable[..., dict[int | None, Run]],
    check_books: Callable[..., None],
    output_dir: Path,
) -> None:
    search = small_driver()
    a, b = search.start(), search.start()
    search.tell(a, 1, 0.5)
    with locked(search.folder):
        act("stop_trial", trial=a)
        search.obey()
        assert search.study.trial(a).state == TrialState.RUNNING
        assert search.tell(a, 2, 0.4)
        assert not search.tell(b, 1)
        said = act("stop_trial", trial=a)
    assert not said["changed"]
    assert said["message"] == "trial 0 has ended before (stopped by hand): nothing changes"
    trial = search.study.trial(a)
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.4)
    search.conductor.interrupt()
    search.tracker.flush()
    check_books(output_dir, "small", "cross_entropy")
    run = runs_of(output_dir, "small")[a]
    assert (run.info.status, run.data.tags["rum.reason"]) == ("KILLED", "stopped by hand")


def test_a_trial_that_was_stopped_ends_also_when_its_driver_dies_first(
    small_driver: Open,
) -> None:
    first = small_driver()
    number = first.start()
    first.conductor.stop_trial(number)
    second = small_driver()
    assert second.start() == number
    assert second.tell(number, 1)
    assert states(second) == ["PRUNED"]


def test_paused_and_queued_trials_end_at_once(
    small_driver: Open, act: Act, check_books: Callable[..., None], output_dir: Path
) -> None:
    search = small_driver(num_trials=3, scheduler=Halving([1], 2, "min", pauses=True))
    paused, running = search.start(), search.start()
    assert search.tell(paused, 1, 0.5)
    search.study.enqueue(TWO)
    queued = 2
    with locked(search.folder):
        act("stop_trial", trial=paused)
        act("stop_trial", trial=queued)
        search.obey()
    assert states(search) == ["PRUNED", "RUNNING", "PRUNED"]
    assert search.study.trial(queued).params == TWO
    assert search.conductor.next_trial() is None  # three were asked for, and there are three
    assert not search.tell(running, 1, 0.4) or is_paused(search.study.trial(running))
    search.conductor.interrupt()
    search.tracker.flush()
    check_books(output_dir, "small", "cross_entropy")


def test_without_a_driver_any_trial_ends_at_once_and_mlflow_hears_of_it_later(
    small_driver: Open, act: Act, check_books: Callable[..., None], output_dir: Path
) -> None:
    first = small_driver(num_trials=3)
    number = first.start()
    first.tell(number, 1, 0.5)
    first.study.enqueue(TWO)
    first.tracker.flush()
    assert act("stop_trial", trial=number)["message"] == "trial 0 has ended"
    act("stop_trial", trial=1)
    assert states(first) == ["PRUNED", "PRUNED"]
    second = small_driver(num_trials=3)
    assert second.start() == 2
    assert second.conductor.next_trial() is None
    second.conductor.interrupt()
    second.tracker.flush()
    check_books(output_dir, "small", "cross_entropy")
    with pytest.raises(ConfigError, match="has no trial 9: it has 3"):
        act("stop_trial", trial=9)


# One configuration


def test_a_queued_configuration_runs_next(small_driver: Open, act: Act) -> None:
    search = small_driver()
    search.start()
    with locked(search.folder):
        act("enqueue", parameters={"model.hidden_size": 5})
        assert not act("enqueue", parameters={"model.hidden_size": 5})["changed"]  # it waits
        search.obey()
        assert not act("enqueue", parameters={"model.hidden_size": 5})["changed"]  # it is queued
        spec = search.conductor.next_trial()
        assert not act("enqueue", parameters={"model.hidden_size": 5})["changed"]  # it runs
        assert act("enqueue", parameters={"model.hidden_size": 5}, again=True)["changed"]
        search.obey()
    assert spec.parameters["model.hidden_size"] == 5
    assert 1e-4 <= spec.parameters["training.learning_rate"] <= 1e-1  # sampled
    assert search.study.target == 4  # it takes one of the places
    assert states(search) == ["RUNNING", "RUNNING", "WAITING"]


def test_where_no_place_is_left_a_queued_configuration_gets_one(
    small_driver: Open, act: Act
) -> None:
    search = small_driver(num_trials=1)
    for epoch in (1, 2, 3, 4):
        search.conductor.next_trial()
        search.tell(0, epoch)
    assert act("enqueue", parameters=TWO)["target"] == 2
    assert not act("enqueue", parameters=TWO)["changed"]
    again = small_driver(num_trials=1)
    assert again.conductor.next_trial().parameters == TWO
    assert again.conductor.next_trial() is None


def test_what_the_space_does_not_have_is_refused_with_the_list(
    small_driver: Open, act: Act
) -> None:
    search = small_driver()
    wrong = {
        "model.hidden_size": 100,
        "training.learning_rate": "fast",
        "model.hidden_sise": 5,
    }
    with pytest.raises(ConfigError) as raised:
        act("enqueue", parameters=wrong)
    lines = str(raised.value).splitlines()[1:]
    assert lines == [
        "  model.hidden_size must be an int from 4 to 12, got 100",
        "  training.learning_rate must be a number from 0.0001 to 0.1, got 'fast'",
        "  model.hidden_sise is not searched; did you mean 'model.hidden_size'?",
    ]
    assert search.study.trials() == []
    assert search.orders.waiting() == []


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "halt"}, "action must be one of"),
        ({"action": "show"}, "action=show needs study="),
        ({"action": "extend", "study": "a"}, "by=<more trials> or to="),
        ({"action": "extend", "study": "a", "by": 1, "to": 2}, "by=<more trials> or to="),
        ({"action": "extend", "study": "a", "by": -1}, "by must be an integer >= 1"),
        ({"action": "stop_trial", "study": "a"}, "needs trial="),
        ({"action": "enqueue", "study": "a"}, "at least one option"),
        ({"action": "stop", "study": "a", "trial": 3}, "trial belongs to action=stop_trial"),
        ({"action": "show", "study": "a", "confirm": True}, "confirm belongs to action=free"),
    ],
)
def test_options_that_do_not_fit_the_action_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        StudyConfig(**options)


# Freeing


def checkpoint(driver: Any, number: int, size: int = 100) -> Path:
    folder = driver.folder / "trials" / f"{number:04d}" / "step_000000005"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"x" * size)
    return Path(folder)


def test_checkpoints_of_ended_trials_are_freed_when_confirmed(
    small_driver: Open, act: Act
) -> None:
    search = small_driver(num_trials=4)
    for number, value in enumerate((0.3, 0.1, 0.2)):
        search.start()
        for epoch in (1, 2, 3, 4):
            search.tell(number, epoch, value)
    search.start()
    folders = [checkpoint(search, number, 100 + number) for number in range(4)]
    search.tracker.flush()

    listed = act("free")
    assert not listed["deleted"]
    assert [piece["trial"] for piece in listed["pieces"]] == [0, 2]  # 1 is to be registered
    assert [piece["bytes"] for piece in listed["pieces"]] == [100, 102]
    assert listed["bytes"] == 202
    assert all(folder.exists() for folder in folders)

    with locked(search.folder):  # also while it runs
        freed = act("free", keep_best=2, confirm=True)
    assert [piece["trial"] for piece in freed["pieces"]] == [0]
    assert [folder.exists() for folder in folders] == [False, True, True, True]
    assert act("free", keep_best=2, confirm=True)["pieces"] == []  # again: nothing is left


def test_what_is_registered_or_begun_from_stays(
    small_driver: Open, act: Act, output_dir: Path
) -> None:
    search = small_driver(num_trials=3)
    for number in range(3):
        search.start()
        for epoch in (1, 2, 3, 4):
            search.tell(number, epoch, number / 10)
    folders = [checkpoint(search, number) for number in range(3)]
    search.tracker.flush()
    search.study.conclude()
    client: MlflowClient = search.tracker.client
    run_ids = [search.tracker.run_id(number) for number in range(3)]
    for run_id in run_ids:
        client.log_artifacts(run_id, str(folders[0]), "checkpoint")
    client.create_registered_model("rum-x")
    version = client.create_model_version("rum-x", "somewhere", run_ids[1])
    client.set_registered_model_alias("rum-x", "best", version.version)

    listed = act("free", artifacts=True)
    found = [(piece["trial"], piece["what"], piece["bytes"]) for piece in listed["pieces"]]
    assert found == [
        (0, "checkpoints", 100),
        (0, "artifacts", 100),
        (2, "checkpoints", 100),
        (2, "artifacts", 100),
    ]
    origin = {"study": "small", "trial": 2, "checkpoint": str(folders[2])}
    search.study.enqueue(TWO, {ORIGIN: origin})
    freed = act("free", artifacts=True, confirm=True, keep_best=1)
    assert [(p["trial"], p["what"]) for p in freed["pieces"]] == [(2, "artifacts")]
    assert [folder.exists() for folder in folders] == [True, True, True]
    artifacts = [[f.path for f in client.list_artifacts(run_id)] for run_id in run_ids]
    assert ["checkpoint" in paths for paths in artifacts] == [True, True, False]
    assert "capsule.json" in artifacts[2]
