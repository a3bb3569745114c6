"""Which trials a crew holds: the driver writes it, the crew's process reads it.

A crew is a process that trains several trials of one shape side by side. Ray tells a process
nothing but whether it goes on; which of its trials end, and which take their places, stands in a
file of the study's folder, put there by renaming. A process that Ray started again reads there
what it holds.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rum.tune.study import TrialSpec

WAIT_SECONDS = 0.02


@dataclass(frozen=True)
class Roster:
    """The trials of a crew."""

    trials: list[dict[str, Any]]
    """`number`, `parameters` and `origin` of each `rum.tune.study.TrialSpec`."""
    answers: str | None
    """The report of the process that the driver has decided on last."""


def write(folder: Path, crew: str, specs: list[TrialSpec], answers: str | None) -> None:
    """Puts a crew's roster in its place."""
    path = _path(folder, crew)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(
        json.dumps({"trials": [asdict(spec) for spec in specs], "answers": answers})
    )
    os.replace(partial, path)


def read(folder: Path, crew: str, answers: str | None = None) -> Roster:
    """A crew's roster, when it answers a certain report (None: as it is).

    The driver writes it before Ray lets the process go on, so there is nothing to wait for but a
    shared disk on which the file may be seen a little later.
    """
    while True:
        roster = Roster(**json.loads(_path(folder, crew).read_text()))
        if answers is None or roster.answers == answers:
            return roster
        time.sleep(WAIT_SECONDS)


def clear(folder: Path) -> None:
    """Removes what an earlier driver left."""
    shutil.rmtree(folder / "crews", ignore_errors=True)


def _path(folder: Path, crew: str) -> Path:
    return folder / "crews" / f"{crew}.json"
