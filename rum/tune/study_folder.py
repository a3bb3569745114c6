"""A study's folder, and the lock in it that keeps the study to one driver."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rum.errors import StudyError

LOCK_SECONDS = 2.0
"""So long a lock is tried: whoever looks at a study, or changes it, holds it for a moment."""


class LockedStudyError(StudyError):
    """A study is run by another driver."""


def this_process() -> dict[str, Any]:
    """Names this process as the owner of a lock."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


@contextmanager
def locked(folder: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Holds a study's lock; the system lets it go when its owner dies, however it dies.

    Args:
        folder: The study's; made if it is not there.
        seconds: How long to try.

    Raises:
        LockedStudyError: If another driver holds it, naming that driver.
        StudyError: If the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock.json").open("a+")
    except OSError as error:
        raise StudyError(f"cannot write to {folder}: {error}") from error
    deadline = time.monotonic() + seconds
    with file:
        while not _take(file, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                file.seek(0)
                owner = file.read().strip() or "an unknown process"
                raise LockedStudyError(
                    f"study {folder.name} is run by another driver: {owner}. Wait for it, or stop "
                    f"it (pipelines/study.py action=stop study={folder.name}) and go on with "
                    "resume=yes"
                )
            time.sleep(0.02)
        file.truncate(0)
        file.write(json.dumps(this_process()))
        file.flush()
        yield


def _take(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def driver_of(folder: Path) -> dict[str, Any] | None:
    """Host and pid of the process that holds a study's lock; None if none does."""
    try:
        with (folder / "lock.json").open() as file:
            if _take(file, fcntl.LOCK_SH):
                return None
            owner: dict[str, Any] = json.loads(file.read() or "{}")
            return owner
    except FileNotFoundError:
        return None
    except ValueError:  # it is writing its name
        return {}


def check_unlocked(folder: Path) -> None:
    """Raises StudyError if another driver holds a study's lock, without making the folder."""
    if (folder / "lock.json").exists():
        with locked(folder):
            pass


def claim_folder(folder: Path, study_id: str) -> None:
    """Moves away trials that another study of the same name left (its records were deleted)."""
    marker = folder / "study_id"
    owner = marker.read_text() if marker.exists() else "unknown"
    if owner == study_id:
        return
    for name in ("trials", "origins", "orders"):
        if (folder / name).exists():
            (folder / name).rename(folder / f"{name}-of-{owner[:8]}-before-{study_id[:8]}")
    partial = folder / "study_id.partial"
    partial.write_text(study_id)
    partial.rename(marker)
