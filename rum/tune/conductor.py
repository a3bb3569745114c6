"""Decides what runs next, what goes on and what stops; keeps Optuna and MLflow in step.

Knows nothing of Ray: `rum.tune.ray_adapters` hands its questions and answers over. Every decision
is recorded in Optuna's study the moment it is made, so that whatever dies afterwards, the study
says what was decided. The running best goes to sampler and scheduler, the measured values to
MLflow.
"""

import dataclasses
import time
from collections import Counter
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from rum.errors import ConfigError, StudyError
from rum.experiment import ExperimentConfig
from rum.tasks import Task
from rum.training.loop import Report
from rum.tune import messages
from rum.tune.budget import Budget
from rum.tune.limits import Limits
from rum.tune.messages import Workplace
from rum.tune.pareto import training_seconds
from rum.tune.prediction import larger_share
from rum.tune.progress import describe
from rum.tune.schedulers import Population, Scheduler, Verdict
from rum.tune.space import apply
from rum.tune.study import (
    BY_HAND,
    INFEASIBLE,
    PAUSED,
    REASON,
    RESUMED,
    RUNG,
    SECONDS,
    SHARE,
    STOPPED,
    Study,
    TrialSpec,
    is_paused,
    is_sound,
)
from rum.tune.succession import enqueue_successor, has_successor
from rum.tune.tracking import Tracker
from rum.tune.trial_runs import TrialRuns

REFUSALS_PER_TRIAL = 10
"""So many infeasible candidates in a row, for each trial of the study, end a search."""


class Conductor:
    """Runs the books of one search."""

    def __init__(
        self,
        study: Study,
        base: ExperimentConfig,
        task: Task,
        scheduler: Scheduler,
        tracker: Tracker,
        workplace: Workplace,
        limits: Limits | None = None,
        budget: Budget | None = None,
        max_failures: int = 0,
        *,
        notes_seconds: bool = False,
    ) -> None:
        """Takes over a study: what an earlier driver left open is queued first.

        Args:
            study: The study.
            base: The experiment around the searched options.
            task: Gives metric and mode.
            scheduler: Empty; filled here from the study.
            tracker: MLflow.
            workplace: Where the trials' checkpoints are.
            limits: What a candidate may take; None admits all.
            budget: What all trials together may use; None is no end.
            notes_seconds: Whether the sampler is to know how long the trials trained.
            max_failures: Times that a trial whose process died before it ran starts again.
        """
        self._study = study
        self._base = base
        self._key = f"validation/best_{task.metric}"
        self._metric = task.metric
        self._scheduler = scheduler
        self.runs = TrialRuns(study, base, task, tracker, workplace)
        """What MLflow is told."""
        self._workplace = workplace
        self._limits = limits
        self._budget = budget
        self._max_failures = max_failures
        self._notes_seconds = notes_seconds
        self._is_stopping = False
        self._refused_in_a_row = 0
        self._last_epoch: dict[int, int] = {}
        self._running: dict[int, TrialSpec] = {}
        self._not_started: list[TrialSpec] = []
        self._failed_starts: Counter[int] = Counter()
        self._paused: dict[int, int] = {}
        for trial in study.trials():
            if is_sound(trial):
                self._scheduler.file(trial.number, trial.intermediate_values)
        for trial in study.trials(TrialState.RUNNING):
            if trial.user_attrs.get(RUNG) in trial.intermediate_values:  # None is no epoch
                self._end_stopped(trial)
        self._adopted = []
        for trial in study.trials(TrialState.RUNNING):
            if is_paused(trial):
                self._paused[trial.number] = trial.user_attrs[PAUSED]
            else:
                self._adopted.append(trial)
        self._stopped = {t.number for t in self._adopted if STOPPED in t.user_attrs}
        self._asked = len(study.ended()) + len(self._adopted) + len(self._paused)
        # A driver may have died between queueing a successor and counting it.
        if isinstance(scheduler, Population):
            waiting = len(study.trials(TrialState.WAITING))
            study.target = max(study.target, self._asked + waiting)
            self.runs.record_target()
        self._began = time.monotonic()
        self._epochs_trained = 0
        self.runs.catch_up(self._paused)

    def _end_stopped(self, trial: FrozenTrial) -> None:
        """Ends a trial that the scheduler had stopped just before its driver died."""
        self._study.adopt(trial)
        self._study.note(trial.number, REASON, _why_stopped(trial))
        self._study.finish(trial.number, TrialState.PRUNED)

    # What runs next

    @property
    def num_ended(self) -> int:
        """Trials that have ended."""
        return len(self._study.ended())

    @property
    def num_open(self) -> int:
        """Trials that are still to run or to finish."""
        return max(0, self._study.target - self.num_ended)

    def next_trial(self) -> TrialSpec | None:
        """The next trial to start, None when all have been.

        Raises:
            StudyError: If too many candidates in a row are beyond the limits.
        """
        self.advance()
        while (spec := self._open_next()) is not None:
            refusal = self._judge(spec)
            self.runs.start(spec)
            self._running[spec.number] = spec
            if refusal is None:
                self.runs.report_again(spec.number, self._last_epoch[spec.number])
                return spec
            self._refuse(spec.number, refusal)
        return None

    def _open_next(self) -> TrialSpec | None:
        is_idle = self._asked >= self._study.target
        if self._adopted:
            spec = self._taken_up(self._adopted.pop(0))
        elif self._not_started:
            spec = self._not_started.pop(0)
        elif self._is_stopping:
            return None
        elif (number := self._scheduler.promoted(self._paused, is_idle=is_idle)) is not None:
            if self._beyond_budget(self._paused[number]) is not None:
                return None
            epoch = self._paused.pop(number)
            if self._is_replaced(number, epoch):
                self._end_paused(number, epoch)
                return self._open_next()
            spec = self._taken_up(self._study.trial(number))
            self._study.note(number, RESUMED, epoch)
            self.runs.record_attributes(number)
        elif not is_idle:
            if self._beyond_budget(0) is not None:
                return None
            self._asked += 1
            spec = self._study.ask()
            self._last_epoch[spec.number] = 0
        else:
            if not self._running:  # nothing can promote the others any more
                while self._paused:
                    self._end_paused(*self._paused.popitem())
            return None
        return spec

    @property
    def is_done(self) -> bool:
        """Whether no trial is left to start or to go on with."""
        return self.num_open == 0 or self._is_stopping or self.out_of_budget is not None

    @property
    def max_epochs(self) -> int:
        """Epochs of a trial that nothing ends."""
        return self._base.training.max_epochs

    @property
    def out_of_budget(self) -> str | None:
        """Why none of the open trials can start or go on; None while one can, or runs."""
        if self._running:
            return None
        begun = [max(trial.intermediate_values, default=0) for trial in self._adopted]
        new = [0] if self._asked < self._study.target else []
        reasons = [self._beyond_budget(done) for done in (*begun, *self._paused.values(), *new)]
        return reasons[0] if reasons and all(reasons) else None

    def _beyond_budget(self, done: int, number: int | None = None) -> str | None:
        """Why a trial that has had so many epochs cannot go on beside those that run."""
        if self._budget is None:
            return None
        others = [self._last_epoch[other] for other in self._running if other != number]
        return self._budget.refusal(done, others)

    def advance(self) -> None:
        """Takes that time passes; to be called often."""
        if self._budget is not None:
            self._budget.advance([spec.gpus for spec in self._running.values()])

    def _taken_up(self, frozen: FrozenTrial) -> TrialSpec:
        """Opens a trial that has begun."""
        spec = self._study.adopt(frozen)
        for noted in (RUNG, REASON):  # an end that was noted and not reached: judged anew
            if noted in frozen.user_attrs:
                self._study.note(spec.number, noted, None)
        if frozen.user_attrs.get(PAUSED) not in (None, *frozen.intermediate_values):
            self._study.note(spec.number, PAUSED, frozen.user_attrs.get(RESUMED))
        self._last_epoch[spec.number] = max(frozen.intermediate_values, default=0)
        return spec

    def _end_paused(self, number: int, epoch: int) -> None:
        """Ends a trial that does not go on from where it waits."""
        self._study.adopt(self._study.trial(number))
        self._study.note(number, RUNG, epoch)
        self._close(number, TrialState.PRUNED, _why_stopped(self._study.trial(number)))

    def _is_replaced(self, number: int, epoch: int) -> bool:
        """Whether another trial's copy takes the place of a paused one: it is queued then."""
        population = self._scheduler
        if not isinstance(population, Population):
            return False
        if has_successor(self._study, number):  # the driver died before this one ended
            return True
        if not population.is_beaten(number, epoch):
            return False
        before = len(self._study.trials())
        done = enqueue_successor(self._study, population, self._workplace, number, epoch)
        self._study.target += len(self._study.trials()) - before
        self.runs.record_target()
        return done

    def _judge(self, spec: TrialSpec) -> str | None:
        """Why a candidate cannot be trained; None for what can, or has begun to be."""
        if spec.origin is not None or self._last_epoch[spec.number]:
            return None
        try:
            experiment = apply(self._base, spec.parameters)
        except ConfigError as error:  # values that are valid by themselves, but not together
            return f"{INFEASIBLE}: {error}"
        reason = None
        if self._limits is not None:
            verdict = self._limits.judge(experiment)
            self._study.constrain(spec.number, verdict.excess)
            reason = verdict.reason
        if reason is None:
            self._refused_in_a_row = 0
        return reason

    def _refuse(self, number: int, reason: str) -> None:
        """Ends a candidate that cannot be trained."""
        self._end(number, TrialState.PRUNED, reason=reason, worker={})
        del self._last_epoch[number]
        self._asked -= 1
        self._refused_in_a_row += 1
        most = REFUSALS_PER_TRIAL * self._study.target
        if self._refused_in_a_row >= most:
            raise StudyError(
                f"{most} candidates in a row were infeasible, the last with "
                f"{reason.partition(': ')[2]}: nearly all of the space is invalid or beyond "
                "search.max_parameters or search.max_memory_gigabytes"
            )

    # What goes on

    def on_message(self, message: dict[str, Any]) -> bool:
        """Takes a trial's message; returns whether the trial is to stop."""
        self.advance()
        number = message["number"]
        if number not in self._running:
            return True  # ended already, for example by an exception
        status = message["status"]
        if status in (messages.DIVERGED, messages.CRASHED):
            state = TrialState.PRUNED if status == messages.DIVERGED else TrialState.FAIL
            if status == messages.DIVERGED:
                self._scheduler.forget(number)
            self._end(number, state, reason=message["reason"], worker=message["worker"])
            return True
        if status == messages.OUT_OF_MEMORY:
            self._give_more_memory(number, message)
            return True
        report: Report = message["report"]
        epoch, value = int(report["epoch"]), report[self._key]
        if epoch > self._last_epoch[number]:
            self._last_epoch[number] = epoch
            self._epochs_trained += 1
            if self._budget is not None:
                self._budget.add_epoch()
            verdict = Verdict.GO_ON
            if status != messages.FINISHED:
                verdict = self._scheduler.judge(number, epoch, value)
            if verdict is Verdict.PAUSE and number in self._stopped:
                verdict = Verdict.GO_ON  # to its end, below
            # Noted first: a driver that dies after the report still knows what was decided.
            if verdict is Verdict.STOP:
                self._study.note(number, RUNG, epoch)
            elif verdict is Verdict.PAUSE:
                self._study.note(number, PAUSED, epoch)
            self._study.report(number, epoch, value)
            self.runs.report(number, report)
            if verdict is Verdict.PAUSE:
                self._note_seconds(number)
                del self._running[number]
                self._paused[number] = epoch
                self.runs.pause(number, epoch)
                return True
            if verdict is Verdict.STOP:
                reason = _why_stopped(self._study.trial(number))
                self._end(number, TrialState.PRUNED, reason=reason, worker=message["worker"])
                return True
        if status == messages.FINISHED:
            self._end(number, TrialState.COMPLETE, value=value, worker=message["worker"])
            return False
        end = BY_HAND if number in self._stopped else self._beyond_budget(epoch, number)
        if end is not None:
            self._end(number, TrialState.PRUNED, reason=end, worker=message["worker"])
        return end is not None

    def _give_more_memory(self, number: int, message: dict[str, Any]) -> None:
        """Has a trial go on from its checkpoint with a larger share of a GPU, or ends it."""
        spec = self._running[number]
        share = larger_share(spec.gpus or self._workplace.gpus_per_trial)
        if share is None:
            self._end(number, TrialState.FAIL, reason=message["reason"], worker=message["worker"])
            return
        self._study.note(number, SHARE, share)
        self._running[number] = dataclasses.replace(spec, gpus=share)
        self._not_started.append(self._running[number])
        self.runs.record_attributes(number)

    def on_not_started(self, number: int) -> TrialSpec | None:
        """Takes that a trial's process is gone without a word; returns it if it starts again."""
        if number not in self._running:
            return None
        self._failed_starts[number] += 1
        if self._failed_starts[number] > self._max_failures:
            self.on_lost(number, "its process died before it ran")
            return None
        self._not_started.append(self._running[number])
        return self._running[number]

    def on_lost(self, number: int, reason: str) -> None:
        """Takes that a trial ended without saying so (its process died too often)."""
        self.advance()
        if number in self._running:
            self._end(number, TrialState.FAIL, reason=f"crashed: {reason}", worker={})

    def _end(
        self,
        number: int,
        state: TrialState,
        *,
        worker: dict[str, Any],
        value: float | None = None,
        reason: str | None = None,
    ) -> None:
        del self._running[number]
        self._close(number, state, reason, value, worker)

    def _close(
        self,
        number: int,
        state: TrialState,
        reason: str | None,
        value: float | None = None,
        worker: dict[str, Any] | None = None,
    ) -> None:
        self._note_seconds(number)
        if reason is not None:
            self._study.note(number, REASON, reason)
        self._study.finish(number, state, value)
        self.runs.end(self._study.trial(number), worker)
        best = self.best
        if best is not None and best.value is not None:
            self.runs.record_best(best.value, self.num_ended)

    def _note_seconds(self, number: int) -> None:
        if self._notes_seconds:
            self._study.note(number, SECONDS, training_seconds(self._workplace, number))

    # What is ordered from outside

    def stop(self) -> None:
        """Starts nothing any more; what runs is to be gone on with."""
        self._is_stopping = True

    @property
    def is_stopping(self) -> bool:
        """Whether the search is to end as after Ctrl-C."""
        return self._is_stopping

    def stop_trial(self, number: int) -> None:
        """Ends a trial that has not ended: if it runs at its next report, else at once."""
        if number in self._running:
            self._stopped.add(number)
            self._study.note(number, STOPPED, True)
            return
        if self._study.trial(number).state == TrialState.WAITING:
            self._asked += 1
        self._adopted = [trial for trial in self._adopted if trial.number != number]
        self._paused.pop(number, None)
        self._study.end_without_process(number, BY_HAND)
        self.runs.record(self._study.trial(number))

    def interrupt(self) -> None:
        """Marks what is still running as to be gone on with."""
        self.advance()
        if self._budget is not None:
            self._budget.keep()
        self.runs.interrupt(self._running, [trial.number for trial in self._adopted])

    # How it stands

    @property
    def best(self) -> FrozenTrial | None:
        """The best trial that ended."""
        ranked = self._study.ranked()
        return ranked[0] if ranked else None

    def progress(self) -> str:
        """One line: trials by state, best so far, time left."""
        seconds_left = None
        if self._epochs_trained and self.num_open:
            seconds_per_epoch = (time.monotonic() - self._began) / self._epochs_trained
            seconds_left = seconds_per_epoch * self._epochs_left()
        return describe(
            self._study,
            self._metric,
            running=len(self._running),
            paused=len(self._paused),
            seconds_left=seconds_left,
        )

    def _epochs_left(self) -> float:
        """Epochs still to train if open trials get as many as those that ended, on average."""
        ended = [self._last_epoch[n] for n in self._last_epoch if n not in self._running]
        typical = sum(ended) / len(ended) if ended else self._base.training.max_epochs
        begun = [max(0.0, typical - self._last_epoch[number]) for number in self._running]
        return sum(begun) + typical * (self.num_open - len(self._running))


def _why_stopped(trial: FrozenTrial) -> str:
    """The reason of a trial that ends at the rung which was noted."""
    rung = trial.user_attrs[RUNG]
    who = "not promoted" if is_paused(trial) else "stopped by the scheduler"
    return f"{who}: {trial.intermediate_values[rung]:.4f} at rung {rung}"
