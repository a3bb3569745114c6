"""Ray Tune's searcher, scheduler, stopper and callbacks, each a thin view of the conductor."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from rum.tune.conductor import Conductor
from rum.tune.crews import Crews
from rum.tune.logical_order import LogicalOrder

TERMINAL_SECONDS = 0.5
LOG_SECONDS = 10.0


class _NotPickled:
    """Ray pickles what it is given into its own state files; ours live in the study."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Searcher(_NotPickled, Searcher):
    """A searcher that is only asked what to run: all else is told to the scheduler."""

    def __init__(self) -> None:
        super().__init__(metric=None, mode=None)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: trials say how they end, and the scheduler hears of lost ones first."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: the scheduler has seen every result first."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study has it all."""


class ConductedSearcher(_Searcher):
    """Hands out the conductor's trials, under their number in the study."""

    def __init__(self, conductor: Conductor | LogicalOrder) -> None:
        super().__init__()
        self._conductor = conductor

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Opens the next trial; None makes Ray ask again later."""
        spec = self._conductor.next_trial()
        if spec is None:
            return str(Searcher.FINISHED) if self._conductor.is_done else None
        return dataclasses.asdict(spec)


class CrewSearcher(_Searcher):
    """Hands out crews, whose trials stand in their rosters."""

    def __init__(self, crews: Crews) -> None:
        super().__init__()
        self._crews = crews

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Opens the next crew; None makes Ray ask again later."""
        crew = self._crews.open()
        if crew is None:
            return str(Searcher.FINISHED) if self._crews.is_done else None
        return {"crew": crew}


class ConductedScheduler(_NotPickled, FIFOScheduler):
    """Passes every message to the conductor and its decision back.

    The conductor may have Ray begin one of its trials again, as another trial of Ray's, while the
    first one's process lives on for a while: that one is not listened to any more.
    """

    def __init__(self, conductor: Conductor | LogicalOrder) -> None:
        super().__init__()
        self._conductor = conductor
        self._current: dict[int, str] = {}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Takes that Ray is to run a trial."""
        self._current[trial.config["number"]] = str(trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decides whether a trial goes on."""
        if not self._is_current(trial):
            return str(TrialScheduler.STOP)
        stop = self._conductor.on_message(json.loads(result["message"]))
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Takes that a trial's process died too often, or before it ran, where Ray gives up."""
        number = trial.config["number"]
        if not self._is_current(trial):
            return
        if trial.should_recover():
            self._conductor.on_not_started(number)
        else:
            self._conductor.on_lost(number, "its process died")

    def on_trial_complete(
        self, tune_controller: Any, trial: Trial, result: dict[str, Any]
    ) -> None:
        """Takes that a trial's process is through, which may have said nothing of its end."""
        if self._is_current(trial):
            self._conductor.on_not_started(trial.config["number"])

    def _is_current(self, trial: Trial) -> bool:
        return self._current[trial.config["number"]] == str(trial.trial_id)


class CrewScheduler(_NotPickled, FIFOScheduler):
    """Passes what a crew reports on; the answer goes into its roster."""

    def __init__(self, crews: Crews) -> None:
        super().__init__()
        self._crews = crews

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decides whether a crew goes on."""
        reported = json.loads(result["messages"])
        stop = self._crews.on_report(trial.config["crew"], result["report"], reported)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Takes that a crew's process died too often, or before it ran, where Ray gives up."""
        lost = None if trial.should_recover() else "its process died"
        self._crews.on_gone(trial.config["crew"], lost)

    def on_trial_complete(
        self, tune_controller: Any, trial: Trial, result: dict[str, Any]
    ) -> None:
        """Takes that a crew's process is through, which may hold trials still."""
        self._crews.on_gone(trial.config["crew"])


class ConductedStopper(_NotPickled, Stopper):
    """Ends the search when the conductor stops; trials are not told, as after Ctrl-C."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Single trials are stopped by the scheduler."""
        return False

    def stop_all(self) -> bool:
        """Ray asks at every turn of its loop."""
        return self._conductor.is_stopping


class TurnCallback(_NotPickled, Callback):
    """Does something at every turn of Ray's loop, before new trials are asked for."""

    def __init__(self, turn: Callable[[], None]) -> None:
        self._turn = turn

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Ray calls this at every turn of its loop."""
        self._turn()


class ProgressCallback(_NotPickled, Callback):
    """Shows the conductor's progress: live on a terminal, now and then elsewhere."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor
        self._is_terminal = sys.stderr.isatty()
        self._last_time = 0.0
        self._last_line = ""

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Ray calls this at every turn of its loop."""
        interval = TERMINAL_SECONDS if self._is_terminal else LOG_SECONDS
        if time.monotonic() - self._last_time < interval:
            return
        self._last_time = time.monotonic()
        line = self._conductor.progress()
        if self._is_terminal:
            sys.stderr.write(f"\r\033[K{line}")
        elif line != self._last_line:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
        self._last_line = line

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """The last line stays."""
        sys.stderr.write(f"\r\033[K{self._conductor.progress()}\n" if self._is_terminal else "")
