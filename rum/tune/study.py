"""A study: Optuna's record of trials, its folder, and the lock that keeps it to one driver."""

import dataclasses
import fcntl
import json
import os
import socket
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from rum.errors import StudyError
from rum.tune.config import SamplerConfig
from rum.tune.samplers import build_sampler
from rum.tune.space import Fit, Space, differences, suggest

optuna.logging.set_verbosity(optuna.logging.WARNING)

ID = "rum.id"
DEFINITION = "rum.definition"
CONCLUDED = "rum.concluded"
TARGET = "rum.target"
REASON = "rum.reason"
RUNG = "rum.rung"
INFEASIBLE = "infeasible"
"""How the reason of a candidate beyond a limit begins."""
ORIGIN = "rum.origin"

REFUSED_IN_A_ROW = 3
"""Infeasible candidates after which the next is drawn at random, whatever the sampler: some learn
from trained trials only and would ask the same again."""


def open_storage(output_dir: Path) -> optuna.storages.RDBStorage:
    """Opens (or makes) the SQLite file that holds all studies below `output_dir`.

    Raises:
        StudyError: If it cannot be opened.
    """
    url = f"sqlite:///{output_dir / 'optuna.db'}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with (output_dir / "optuna.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two drivers that make the tables disturb each other
            storage = optuna.storages.RDBStorage(
                url, engine_kwargs={"connect_args": {"timeout": 30}}
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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a study's lock; the system lets it go when its owner dies, however it dies.

    Raises:
        StudyError: If another driver holds it, naming that driver.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock.json").open("a+")
    except OSError as error:
        raise StudyError(f"cannot write to {folder}: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "an unknown process"
            raise StudyError(
                f"study {folder.name} is run by another driver: {owner}. Wait for it, or stop it "
                "and go on with resume=yes"
            ) from error
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        yield


def check_unlocked(folder: Path) -> None:
    """Raises StudyError if another driver holds a study's lock, without making the folder."""
    if (folder / "lock.json").exists():
        with locked(folder):
            pass


def claim_folder(folder: Path, study: "Study") -> None:
    """Moves away trials that another study of the same name left (its records were deleted)."""
    marker = folder / "study_id"
    owner = marker.read_text() if marker.exists() else "unknown"
    trials = folder / "trials"
    if owner != study.id and trials.exists():
        trials.rename(folder / f"trials-of-{owner[:8]}-before-{study.id[:8]}")
    marker.write_text(study.id)


@dataclass(frozen=True)
class TrialSpec:
    """A trial to run."""

    number: int
    parameters: dict[str, Any]
    origin: dict[str, Any] | None
    """Where its first checkpoint comes from, if it continues another study's trial."""


class Study:
    """One Optuna study with the operations that a search needs."""

    def __init__(
        self,
        storage: optuna.storages.RDBStorage,
        name: str,
        space: Space,
        sampler: SamplerConfig,
        fit: Fit | None = None,
    ) -> None:
        """Opens the study, which must exist; `fit` as `rum.tune.space.suggest` has it."""
        self._fit = fit
        self.name = name
        self._space = space
        self._sampler = sampler
        self._study = optuna.load_study(study_name=name, storage=storage)
        self._open: dict[int, optuna.Trial] = {}

    @property
    def mode(self) -> str:
        """Whether lower ("min") or higher ("max") is better."""
        return "min" if self._study.direction == optuna.study.StudyDirection.MINIMIZE else "max"

    @property
    def target(self) -> int:
        """Trials asked for so far, in all."""
        return int(self._study.user_attrs[TARGET])

    @target.setter
    def target(self, value: int) -> None:
        self._study.set_user_attr(TARGET, value)

    @property
    def id(self) -> str:
        """Tells this study from others of its name, elsewhere or earlier."""
        return str(self._study.user_attrs[ID])

    @property
    def is_concluded(self) -> bool:
        """Whether the last driver got to the end: best model registered, all recorded."""
        return bool(self._study.user_attrs.get(CONCLUDED) == self.target)

    def conclude(self) -> None:
        """Records that nothing is left to do for the present target."""
        self._study.set_user_attr(CONCLUDED, self.target)

    @property
    def definition(self) -> dict[str, Any]:
        """What the study was made with: `space`, `experiment`, `data_checksum`, `mode`."""
        definition: dict[str, Any] = self._study.user_attrs[DEFINITION]
        return definition

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in some states."""
        return self._study.get_trials(deepcopy=False, states=states or None)

    def ended(self) -> list[FrozenTrial]:
        """Trials that have ended, infeasible candidates left out: they are no trials."""
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        return [trial for trial in self.trials(*states) if not is_infeasible(trial)]

    def refused(self) -> list[FrozenTrial]:
        """Candidates that were infeasible."""
        return [trial for trial in self.trials(TrialState.PRUNED) if is_infeasible(trial)]

    def trial(self, number: int) -> FrozenTrial:
        """One of them."""
        return self.trials()[number]

    def enqueue(self, parameters: dict[str, Any], origin: dict[str, Any]) -> None:
        """Queues a trial that continues another."""
        self._study.enqueue_trial(parameters, user_attrs={ORIGIN: origin})

    def ask(self) -> TrialSpec:
        """Opens the next trial: an enqueued one, else a new sample."""
        waiting = self.trials(TrialState.WAITING)
        number = waiting[0].number if waiting else len(self.trials())
        last = self.trials()[max(0, number - REFUSED_IN_A_ROW) : number]
        is_stuck = len(last) == REFUSED_IN_A_ROW and all(map(is_infeasible, last))
        sampler = dataclasses.replace(self._sampler, name="random") if is_stuck else self._sampler
        self._study.sampler = build_sampler(sampler, number)
        return self._suggest(self._study.ask())

    def adopt(self, frozen: FrozenTrial) -> TrialSpec:
        """Opens a trial that was running when its driver died."""
        self._study.sampler = build_sampler(self._sampler, frozen.number)
        return self._suggest(optuna.Trial(self._study, frozen._trial_id))

    def _suggest(self, trial: optuna.Trial) -> TrialSpec:
        self._open[trial.number] = trial
        parameters = suggest(trial, self._space, self._fit)
        return TrialSpec(trial.number, parameters, trial.user_attrs.get(ORIGIN))

    def report(self, number: int, epoch: int, value: float) -> None:
        """Records the running best of a trial after an epoch."""
        self._open[number].report(value, epoch)

    def note(self, number: int, key: str, value: Any) -> None:
        """Records something about a trial, for example why it ends."""
        self._open[number].set_user_attr(key, value)

    def constrain(self, number: int, excess: Mapping[str, float]) -> None:
        """Tells the sampler how far a trial is beyond each limit, above 0 being infeasible."""
        trial = self._open[number]
        for name, value in excess.items():
            if name not in trial.constraints:
                trial.set_constraint(name, value)

    def finish(self, number: int, state: TrialState, value: float | None = None) -> None:
        """Ends a trial; `value` only with COMPLETE (a pruned trial's is its last report)."""
        with warnings.catch_warnings():  # CMA-ES has no use for constraints, and says so each time
            warnings.filterwarnings("ignore", "Constraints have been set")
            self._study.tell(self._open.pop(number), value, state=state)

    def ranked(self) -> list[FrozenTrial]:
        """Trials with a value, finished or stopped early, best first."""
        trials = [
            trial
            for trial in self.trials(TrialState.COMPLETE, TrialState.PRUNED)
            if trial.value is not None and is_sound(trial)
        ]
        return sorted(trials, key=lambda t: t.value or 0.0, reverse=self.mode == "max")


def is_infeasible(trial: FrozenTrial) -> bool:
    """Whether a candidate was refused because it is beyond a limit."""
    reason = str(trial.user_attrs.get(REASON, ""))
    return trial.state == TrialState.PRUNED and reason.startswith(INFEASIBLE)


def is_sound(trial: FrozenTrial) -> bool:
    """Whether a trial ended by itself or by the scheduler (not by diverging)."""
    return not str(trial.user_attrs.get(REASON, "")).startswith("diverged")


def run_status(trial: FrozenTrial) -> str:
    """What the status of a trial's MLflow run is to be, in MLflow's words."""
    if trial.state == TrialState.RUNNING:
        return "SCHEDULED"  # no process has it now; resume=yes goes on
    if trial.state == TrialState.COMPLETE:
        return "FINISHED"
    return "KILLED" if trial.state == TrialState.PRUNED and is_sound(trial) else "FAILED"


def study_names(storage: optuna.storages.RDBStorage) -> list[str]:
    """All studies in a storage."""
    return sorted(optuna.get_all_study_names(storage))


def ensure_study(
    storage: optuna.storages.RDBStorage, name: str, definition: dict[str, Any]
) -> None:
    """Makes an empty study unless it is there, also one that was only half made."""
    directions = optuna.study.StudyDirection
    direction = directions.MINIMIZE if definition["mode"] == "min" else directions.MAXIMIZE
    study = optuna.create_study(
        study_name=name, storage=storage, direction=direction, load_if_exists=True
    )
    if DEFINITION not in study.user_attrs:
        study.set_user_attr(ID, uuid.uuid4().hex)
        study.set_user_attr(TARGET, 0)
        study.set_user_attr(DEFINITION, definition)


def check_definition(study: Study, definition: dict[str, Any]) -> None:
    """Raises StudyError if the study was made with another space, experiment or direction."""
    different = differences(definition, study.definition)
    if different:
        lines = "\n  ".join(different)
        raise StudyError(
            f"study {study.name} exists with other settings:\n  {lines}\n"
            "Use the same settings, study_exists=new, or study=<another name>"
        )
