"""SQLite files that are made whole or not at all; that of the studies is checked before its use.

A process that dies while it makes tables would leave a file that nobody can open.
"""

import fcntl
import shlex
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy

from rum.errors import StudyError

_TABLES = {"studies", "trials", "trial_params", "version_info"}
_LOGS = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a database


def open_storage(output_dir: Path) -> optuna.storages.RDBStorage:
    """Opens (or makes) the SQLite file that holds all studies below `output_dir`.

    Raises:
        StudyError: If it cannot be opened or is damaged; nothing is overwritten then.
    """
    path = output_dir / "optuna.db"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with (output_dir / "optuna.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two drivers that make the tables disturb each other
            prepare_database(path)
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 30}}
            )
        # Write-ahead log: a commit survives the death of any process without waiting for the disk.
        sqlalchemy.event.listen(storage.engine, "connect", _use_write_ahead_log)
        storage.engine.dispose()  # connections from before the listener
    except (OSError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise StudyError(f"cannot open the studies in {output_dir}: {error}") from error
    return storage


def _use_write_ahead_log(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def prepare_database(path: Path) -> None:
    """Makes the file with its tables where there is none; else checks the one that is there.

    One process at a time may call this.

    Raises:
        StudyError: If the file is no intact database of studies; it is left as it is.
    """
    if path.exists():
        _check(path)
        return
    make_whole(path, _make_tables)


def make_whole(path: Path, make: Callable[[Path], None]) -> None:
    """Lets `make` make a database beside its place, then moves it there; one process at a time."""
    partial = path.with_name(f"{path.name}.partial")
    for ending in ("", *_LOGS):
        partial.with_name(partial.name + ending).unlink(missing_ok=True)
    make(partial)
    for ending in _LOGS:  # of a deleted database: SQLite would take them for the new one's
        path.with_name(path.name + ending).unlink(missing_ok=True)
    partial.rename(path)


def _make_tables(path: Path) -> None:
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    storage.remove_session()
    storage.engine.dispose()


def _check(path: Path) -> None:
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=30)) as connection:
            [found] = connection.execute("PRAGMA quick_check(1)").fetchone()
            names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {name for (name,) in names}
    except sqlite3.OperationalError as error:  # for example no permission
        raise StudyError(f"cannot open the studies in {path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from error
    if found != "ok":
        raise _damaged(path, " ".join(str(found).split()))
    if not tables >= _TABLES:
        raise _damaged(path, "it does not have Optuna's tables")


def _damaged(path: Path, reason: str) -> StudyError:
    place, away = shlex.quote(str(path)), shlex.quote(str(path.parent / "damaged"))
    return StudyError(
        f"{path} is no intact database of studies: {reason}. Nothing was changed. Move it away, "
        "then repeat the search's command with resume=from_mlflow, which rebuilds the study:\n"
        f"  mkdir {away} && mv {place}* {away}"
    )
