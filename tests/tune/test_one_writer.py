"""The driver's view of its study: equal to the database, without asking it for every trial."""

from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from rum.tune.config import Domain, SamplerConfig
from rum.tune.database import open_storage
from rum.tune.study import Study, ensure_study

SPACE = {
    "training.learning_rate": Domain(type="float", low=1e-4, high=1e-1, log=True),
    "model.hidden_size": Domain(type="int", low=4, high=64),
}


@pytest.fixture
def storage(tmp_path: Path) -> optuna.storages.RDBStorage:
    storage = open_storage(tmp_path)
    ensure_study(storage, "small", {"mode": "min"})
    return storage


def opened(storage: optuna.storages.RDBStorage) -> Study:
    return Study(storage, "small", SPACE, SamplerConfig(name="tpe", startup_trials=3))


def plain(trial: FrozenTrial) -> dict[str, Any]:
    return {key: value for key, value in vars(trial).items() if key != "_trial_id"}


def test_what_it_holds_is_what_the_database_holds(storage: optuna.storages.RDBStorage) -> None:
    study = opened(storage)
    study.enqueue({"model.hidden_size": 7}, {"rum.warm_start": "a table"})

    def check() -> None:
        there = storage.get_all_trials(storage.get_study_id_from_name("small"))
        assert list(map(plain, study.trials())) == list(map(plain, there))

    check()
    for number in range(6):
        assert study.ask().number == number
        check()
        study.report(number, 1, 1.0 / (number + 1))
        study.note(number, "rum.paused", 1)
        study.constrain(number, {"parameters": -0.5})
        check()
        if number == 4:
            study.finish(number, TrialState.FAIL)
        elif number % 2:
            study.finish(number, TrialState.PRUNED)
        else:
            study.finish(number, TrialState.COMPLETE, 0.5)
        check()
    study.ask()
    study.adopt(study.trial(6))
    study.end_without_process(6, "stopped by hand")
    check()


def test_what_it_gives_away_is_not_its_own(storage: optuna.storages.RDBStorage) -> None:
    study = opened(storage)
    study.ask()
    copies = study._study.get_trials()  # as Optuna's own code asks for them, to change them
    copies[0].params["model.hidden_size"] = -1
    copies[0].user_attrs["x"] = 1
    assert study.trial(0).params["model.hidden_size"] > 0
    assert study.trial(0).user_attrs == {}


def test_what_another_process_wrote_is_seen_when_asked_for(
    storage: optuna.storages.RDBStorage,
) -> None:
    study, other = opened(storage), opened(storage)
    other.ask()
    other.report(0, 1, 0.5)
    assert study.trials() == []
    study.read_again()
    assert study.trial(0).intermediate_values == {1: 0.5}


def test_a_report_costs_as_much_among_many_trials(storage: optuna.storages.RDBStorage) -> None:
    study = opened(storage)
    statements = []

    @sqlalchemy.event.listens_for(storage.engine, "before_cursor_execute")
    def count(*arguments: Any) -> None:
        statements.append(arguments[2])

    def cost_of_a_trial() -> int:
        statements.clear()
        number = study.ask().number
        study.report(number, 1, 0.5)
        study.ranked()
        study.finish(number, TrialState.COMPLETE, 0.5)
        study.ranked()
        return len(statements)

    for _ in range(5):
        cost_of_a_trial()
    few = cost_of_a_trial()
    for _ in range(60):
        cost_of_a_trial()
    for _ in range(4):
        study.ask()  # running beside it
    cost_of_a_trial()
    assert 0 < cost_of_a_trial() <= few
