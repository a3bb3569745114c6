"""Decisions in an order that does not depend on how fast the workers were.

With `search.deterministic` a search decides as if its K workers trained one epoch in one unit of
time, and of two messages at the same time the lower trial came first. A message waits until those
before it have come; its trial trains on meanwhile, and what it did beyond the end that is decided
for it is dropped. Trials give the same values on the same kind of machine, samplers draw from seed
and number, and so the whole study comes out the same, also when it was interrupted: the times at
which trials began are kept in it.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from rum.tune import messages
from rum.tune.conductor import Conductor
from rum.tune.study import REASON, RESUMED, Study, TrialSpec, is_paused

BEGAN = "rum.began"
"""Each time that a trial was taken up: logical time, and the epoch that it had done."""


@dataclass
class _Lane:
    """A trial that logically runs."""

    began: int
    first_epoch: int
    next_epoch: int
    inbox: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Messages by epoch."""
    last_words: dict[str, Any] | None = None
    """Why it ended, if not by an epoch."""

    @property
    def next_time(self) -> int:
        """When its next message is due."""
        return self.began + self.next_epoch - self.first_epoch

    @property
    def has_end(self) -> bool:
        """Whether its last message has come, due or not."""
        ended = (message["status"] != messages.RUNNING for message in self.inbox.values())
        return self.last_words is not None or any(ended)

    def due(self) -> dict[str, Any] | None:
        """Its next message, if it has come."""
        return self.inbox.pop(self.next_epoch, None) or self.last_words


class LogicalOrder:
    """Stands between Ray's adapters and a conductor."""

    def __init__(self, conductor: Conductor, study: Study, workers: int) -> None:
        """Takes over a study where it stands.

        Args:
            conductor: Decides.
            study: The conductor's.
            workers: How many trials run at a time.
        """
        self._conductor = conductor
        self._study = study
        self._lanes: dict[int, _Lane] = {}
        self._ready: deque[TrialSpec] = deque()
        self._in_ray: set[int] = set()
        self._asked = False
        trials = study.trials()
        self._free, self._clock = _replayed(trials, workers)
        for trial in trials:
            if trial.state == TrialState.RUNNING and not is_paused(trial):
                spec = conductor.next_trial()  # it hands out what was running first
                if spec is None:  # what its last driver had not yet judged was refused
                    break
                self._begin(spec)

    @property
    def is_done(self) -> bool:
        """Whether no trial is left to start or to go on with."""
        return not self._ready and self._conductor.is_done

    def next_trial(self) -> TrialSpec | None:
        """The next trial to start or to go on with, None while there is none."""
        if not self._lanes:
            self._asked = False  # the study may have been extended meanwhile
        self._advance()
        # A trial that goes on waits for the worker that was told too late that it is paused.
        if not self._ready or self._ready[0].number in self._in_ray:
            return None
        spec = self._ready.popleft()
        self._in_ray.add(spec.number)
        return spec

    def on_message(self, message: dict[str, Any]) -> bool:
        """Takes a trial's message; returns whether the trial is to stop."""
        if message["status"] == messages.OUT_OF_MEMORY:  # memory is not the same every time
            message = {**message, "status": messages.CRASHED}
        number, status = message["number"], message["status"]
        lane = self._lanes.get(number)
        if lane is not None and not self._is_waiting(number):
            if status in (messages.DIVERGED, messages.CRASHED):
                lane.last_words = message
            else:
                epoch = int(message["report"]["epoch"])
                if epoch >= lane.next_epoch:
                    lane.inbox[epoch] = message
        self._advance()
        is_over = number not in self._lanes or self._is_waiting(number)
        if is_over or status != messages.RUNNING:
            self._in_ray.discard(number)
        return is_over

    def on_not_started(self, number: int) -> None:
        """Takes that a trial's process is gone without a last word: it is handed out again."""
        self._in_ray.discard(number)
        lane = self._lanes.get(number)
        if lane is None or lane.has_end or self._is_waiting(number):
            return
        spec = self._conductor.next_trial() if self._conductor.on_not_started(number) else None
        if spec is not None:
            self._ready.appendleft(spec)
        else:
            self.on_lost(number, "its process died before it ran")

    def on_lost(self, number: int, reason: str) -> None:
        """Takes that a trial ended without saying so."""
        self._in_ray.discard(number)
        if number in self._lanes and not self._is_waiting(number):
            self._lanes[number].last_words = {
                "number": number,
                "status": messages.CRASHED,
                "reason": f"crashed: {reason}",
                "worker": {},
            }
        self._advance()

    def _is_waiting(self, number: int) -> bool:
        """Whether a trial was taken up again and no worker has it yet."""
        return any(spec.number == number for spec in self._ready)

    def _advance(self) -> None:
        """Decides all that can be decided: a free worker asks after every message."""
        while True:
            if self._free and not self._asked:
                spec = self._conductor.next_trial()
                if spec is not None:
                    self._begin(spec)
                else:
                    self._asked = True
                continue
            if not self._lanes:
                return
            number = min(self._lanes, key=lambda n: (self._lanes[n].next_time, n))
            lane = self._lanes[number]
            message = lane.due()
            if message is None:
                return
            self._clock = lane.next_time
            lane.next_epoch += 1
            stop = self._conductor.on_message(message)
            if stop or message["status"] != messages.RUNNING:
                del self._lanes[number]
                heapq.heappush(self._free, self._clock)
            self._asked = False

    def _begin(self, spec: TrialSpec) -> None:
        trial = self._study.trial(spec.number)
        done = max(trial.intermediate_values, default=0)
        began = [list(each) for each in trial.user_attrs.get(BEGAN, [])]
        if not _is_noted(trial):
            began.append([max(heapq.heappop(self._free), self._clock), done])
            self._study.note(spec.number, BEGAN, began)
            self._conductor.runs.record_attributes(spec.number)
        time, epoch = began[-1]
        # All epochs may be on record, and the end not.
        due = min(done + 1, self._conductor.max_epochs)
        self._lanes[spec.number] = _Lane(time, epoch, due)
        self._ready.append(spec)


def _is_noted(trial: FrozenTrial) -> bool:
    """Whether a running trial's last beginning is on record: a driver may have died before."""
    began = trial.user_attrs.get(BEGAN, [])
    if not began:
        return False
    resumed = trial.user_attrs.get(RESUMED)
    return resumed is None or began[-1][1] >= resumed


def _replayed(trials: list[FrozenTrial], workers: int) -> tuple[list[int], int]:
    """When the free workers became free, and the time of the last decision."""
    free = [0] * workers
    spans: list[tuple[int, int, int | None]] = []  # began, number, ended
    clock = 0
    for trial in trials:
        last = max(trial.intermediate_values, default=0)
        began = trial.user_attrs.get(BEGAN, [])
        for index, (time, epoch) in enumerate(began):
            is_last = index + 1 == len(began)
            until = last if is_last else began[index + 1][1]
            ended: int | None = time + until - epoch
            clock = max(clock, ended or 0)
            if trial.state == TrialState.FAIL or _ended_between_epochs(trial):
                ended = time + until - epoch + is_last
                clock = max(clock, ended)
            if is_last and trial.state == TrialState.RUNNING and not is_paused(trial):
                ended = None if _is_noted(trial) else ended
            spans.append((time, trial.number, ended))
    for _, _, ended in sorted(spans, key=lambda span: span[:2]):
        heapq.heappop(free)
        if ended is not None:
            heapq.heappush(free, ended)
        else:
            heapq.heappush(free, 2**62)  # busy
    return [time for time in free if time < 2**62], clock


def _ended_between_epochs(trial: FrozenTrial) -> bool:
    """Whether a trial diverged: its last words took a unit of time, too."""
    return str(trial.user_attrs.get(REASON, "")).startswith("diverged")
