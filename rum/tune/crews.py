"""Crews: which trials train side by side in one process, the conductor deciding on each.

The conductor hands out trials in order; a crew takes those of one shape. One of another shape
waits for a crew of its own shape that has a place, or opens one when Ray has room for another
process; as many may wait as a crew has places.
"""

import math
import uuid
from pathlib import Path
from typing import Any

from rum.experiment import ExperimentConfig
from rum.lanes import shape_of
from rum.tune import messages, roster
from rum.tune.conductor import Conductor
from rum.tune.messages import Workplace
from rum.tune.space import apply
from rum.tune.study import TrialSpec


class Crews:
    """Stands between Ray's adapters and a conductor, as a process of Ray's is a crew."""

    def __init__(
        self,
        conductor: Conductor,
        base: ExperimentConfig,
        workplace: Workplace,
        *,
        lanes: int,
        crews: int,
    ) -> None:
        """Holds nothing yet.

        Args:
            conductor: Decides.
            base: The experiment around the searched options.
            workplace: Has the study's folder.
            lanes: Trials in a crew, at most.
            crews: Processes at a time.
        """
        self._conductor = conductor
        self._base = base
        self._folder = Path(workplace.folder)
        self._lanes = lanes
        self._crews = crews
        self._waiting: list[TrialSpec] = []
        self._held: dict[str, dict[int, TrialSpec]] = {}
        self._shapes: dict[str, dict[str, Any]] = {}
        roster.clear(self._folder)

    @property
    def is_done(self) -> bool:
        """Whether no trial is left to start or to go on with."""
        return self._conductor.is_done

    def open(self) -> str | None:
        """A new crew with its first trials, None while there is nothing to start."""
        if self._conductor.is_stopping:
            return None  # what waits is gone on with by the next driver
        spec = self._waiting.pop(0) if self._waiting else self._conductor.next_trial()
        if spec is None:
            return None
        crew = uuid.uuid4().hex[:8]
        self._held[crew] = {spec.number: spec}
        self._shapes[crew] = self._shape(spec)
        self._fill(crew)
        self._write(crew, None)
        return crew

    def on_report(self, crew: str, report: str, reported: list[dict[str, Any]]) -> bool:
        """Takes what a crew's trials say.

        Args:
            crew: Which.
            report: Names this report; the roster then says that it answers it.
            reported: The trials' messages.

        Returns:
            Whether the crew is to stop: it holds no trial any more.
        """
        held = self._held.get(crew, {})
        for message in reported:
            number = message["number"]
            if number not in held:  # not its trial any more
                continue
            stop = self._conductor.on_message(message)
            if stop or message["status"] != messages.RUNNING:
                del held[number]
        self._fill(crew)
        self._write(crew, report)
        return not held

    def on_gone(self, crew: str, lost: str | None = None) -> None:
        """Takes that a crew's process is through: what it holds starts again, or is lost.

        Args:
            crew: Which.
            lost: Why its trials are given up; None: they start again.
        """
        for number in self._held.pop(crew, {}):
            if lost is None:
                self._conductor.on_not_started(number)
            else:
                self._conductor.on_lost(number, lost)

    def _fill(self, crew: str) -> None:
        """Gives a crew trials, so many that all crews that Ray has room for get some."""
        held = self._held.get(crew)
        if held is None or self._conductor.is_stopping:
            return
        fair = math.ceil(self._conductor.num_open / self._crews)
        while len(held) < min(self._lanes, fair):
            spec = self._next_of(self._shapes[crew])
            if spec is None:
                return
            held[spec.number] = spec

    def _next_of(self, shape: dict[str, Any]) -> TrialSpec | None:
        for waiting in self._waiting:
            if self._shape(waiting) == shape:
                self._waiting.remove(waiting)
                return waiting
        while len(self._waiting) < self._lanes:
            spec = self._conductor.next_trial()
            if spec is None or self._shape(spec) == shape:
                return spec
            self._waiting.append(spec)
        return None

    def _shape(self, spec: TrialSpec) -> dict[str, Any]:
        return shape_of(apply(self._base, spec.parameters))

    def _write(self, crew: str, answers: str | None) -> None:
        if crew in self._held:
            roster.write(self._folder, crew, list(self._held[crew].values()), answers)
