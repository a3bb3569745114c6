"""The file of the studies: damaged ones are named and left as they are."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from rum.errors import StudyError
from rum.tune.database import make_whole, open_storage
from rum.tune.study import ensure_study, study_names

DEFINITION = {"mode": "min"}
Damage = Callable[[Path], object]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "emptied": (lambda path: path.write_bytes(b""), "does not have Optuna's tables"),
    "another file": (lambda path: path.write_text("no database " * 999), "not a database"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:20000]), "malformed|database"),
    "a page overwritten": (
        lambda path: path.write_bytes(
            path.read_bytes()[:8192] + b"\xff" * 4096 + path.read_bytes()[12288:]
        ),
        "malformed|database",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_database_is_named_and_left_as_it_is(kind: str, tmp_path: Path) -> None:
    damage, reason = DAMAGES[kind]
    storage = open_storage(tmp_path)
    ensure_study(storage, "mine", DEFINITION)
    storage.remove_session()
    storage.engine.dispose()
    path = tmp_path / "optuna.db"
    damage(path)
    before = path.read_bytes()
    with pytest.raises(StudyError, match=reason) as caught:
        open_storage(tmp_path)
    assert str(path) in str(caught.value)
    assert "resume=from_mlflow" in str(caught.value)
    assert path.read_bytes() == before


def test_another_programs_database_is_not_taken(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "optuna.db") as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    with pytest.raises(StudyError, match="does not have Optuna's tables"):
        open_storage(tmp_path)


def test_the_log_of_a_deleted_database_does_not_get_into_the_new_one(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    ensure_study(storage, "mine", DEFINITION)
    assert (tmp_path / "optuna.db-wal").stat().st_size > 0
    log = (tmp_path / "optuna.db-wal").read_bytes()
    storage.remove_session()
    storage.engine.dispose()
    (tmp_path / "optuna.db").unlink()
    (tmp_path / "optuna.db-wal").write_bytes(log)
    assert study_names(open_storage(tmp_path)) == []


def test_a_database_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "some.db"

    def dies(new: Path) -> None:
        new.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_whole(path, dies)
    assert not path.exists()

    def make(new: Path) -> None:
        assert not new.exists(), "what the dead one left is cleared away"
        new.write_text("whole")

    make_whole(path, make)
    assert path.read_text() == "whole"
    assert [file.name for file in tmp_path.iterdir()] == ["some.db"]
