"""What MLflow is told of a study's trials: each a run, from its start to how it ended."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from optuna.trial import FrozenTrial

from rum.errors import CheckpointError, ConfigError
from rum.experiment import ExperimentConfig
from rum.parameters import flatten
from rum.tasks import Task
from rum.training.checkpoint import CheckpointStore
from rum.training.loop import Report
from rum.tune.capsule import FILE as CAPSULE_FILE
from rum.tune.capsule import make_capsule
from rum.tune.messages import Workplace
from rum.tune.provenance import trial_tags
from rum.tune.space import apply
from rum.tune.study import (
    FINALIST,
    INFEASIBLE,
    ORIGIN,
    REASON,
    RUNG,
    WARM_START,
    Study,
    TrialSpec,
    is_infeasible,
    run_status,
)
from rum.tune.tracking import (
    ATTRIBUTES_TAG,
    CONSTRAINTS_TAG,
    INTERRUPTED,
    PARAMETERS_TAG,
    RUNNING,
    SEQUENCE_TAG,
    TARGET_TAG,
    Tracker,
    ended,
)

logger = logging.getLogger(__name__)


class TrialRuns:
    """The runs of one study's trials; the study has been told before, so all can be repeated."""

    def __init__(
        self,
        study: Study,
        base: ExperimentConfig,
        task: Task,
        tracker: Tracker,
        workplace: Workplace,
    ) -> None:
        """Writes nothing yet.

        Args:
            study: The study.
            base: The experiment around the searched options.
            task: Gives the metric.
            tracker: MLflow.
            workplace: Where the trials' checkpoints are.
        """
        self._study = study
        self._base = base
        self._task = task
        self._tracker = tracker
        self._workplace = workplace

    def catch_up(self, paused: Mapping[int, int]) -> None:
        """Writes what an earlier driver did not get to.

        Args:
            paused: The trials that wait, and the epoch after which they do.
        """
        for trial in self._study.trials():
            if trial.state.is_finished() and not ended(self._tracker.known_status(trial.number)):
                self.record(trial)
        for number, epoch in paused.items():
            self._start(self._study.trial(number))
            self.report_again(number, epoch)
            self.pause(number, epoch)

    def record(self, trial: FrozenTrial) -> None:
        """Writes a trial that has ended, whole."""
        self._start(trial)
        self.report_again(trial.number, max(trial.intermediate_values, default=0))
        self.end(trial)

    def start(self, spec: TrialSpec) -> None:
        """Begins a trial's run, or goes on with it."""
        self._begin(spec.number, spec.parameters, spec.origin)

    def _start(self, trial: FrozenTrial) -> None:
        self._begin(trial.number, trial.params, trial.user_attrs.get(ORIGIN))

    def _begin(
        self, number: int, parameters: dict[str, Any], origin: dict[str, Any] | None
    ) -> None:
        try:
            experiment = apply(self._base, parameters)
            capsule = json.dumps(make_capsule(experiment, self._task, origin), indent=1)
            asked = {}
        except ConfigError:  # a candidate that is not trained: its values are kept as asked for
            experiment, capsule, asked = self._base, None, parameters
        tags = trial_tags(experiment)
        if origin:
            tags |= {f"rum.origin_{key}": str(value) for key, value in origin.items()}
        trial = self._study.trial(number)
        for key, value in trial.user_attrs.get(FINALIST, {}).items():
            tags[f"rum.finalist_{key}"] = str(value)
        if WARM_START in trial.user_attrs:
            tags["rum.warm_start"] = trial.user_attrs[WARM_START]
        tags |= {
            PARAMETERS_TAG: json.dumps(parameters),
            ATTRIBUTES_TAG: self._attributes(number),
        }
        if constraints := trial.constraints:
            tags[CONSTRAINTS_TAG] = json.dumps(constraints)
        if self._study.sequence:
            tags[SEQUENCE_TAG] = json.dumps(self._study.sequence)
        plain = {name: asdict(getattr(experiment, name)) for name in ("model", "task", "training")}
        self._tracker.start_trial(
            number,
            f"{self._study.name}-{number:04d}",
            flatten(plain) | asked,
            tags,
            parent_id=origin.get("run_id") if origin else None,
            began=trial.datetime_start,
        )
        if capsule is not None:
            self._tracker.log_text_once(number, capsule, CAPSULE_FILE)

    def report(self, number: int, report: Report) -> None:
        """Writes what a trial measured in an epoch."""
        self._tracker.log_report(number, report)

    def report_again(self, number: int, up_to_epoch: int) -> None:
        """Writes the epochs in a trial's checkpoint: an earlier driver may not have got to it."""
        try:
            last = CheckpointStore(self._workplace.trial_folder(number)).last()
        except CheckpointError as error:  # where it is needed, the trial's worker fails with it
            logger.warning("trial %d: %s", number, error)
            return
        for report in last.reports if last else []:
            if report["epoch"] <= up_to_epoch:
                self._tracker.log_report(number, report)

    def pause(self, number: int, epoch: int) -> None:
        """Marks a trial that waits after an epoch."""
        tags = {"rum.state": "paused", "rum.paused_after": str(epoch)}
        tags[ATTRIBUTES_TAG] = self._attributes(number)
        self._tracker.mark_trial(number, INTERRUPTED, tags)

    def record_attributes(self, number: int) -> None:
        """Writes what the study notes of a running trial, for it to be rebuilt."""
        self._tracker.mark_trial(number, RUNNING, {ATTRIBUTES_TAG: self._attributes(number)})

    def _attributes(self, number: int) -> str:
        attributes = self._study.trial(number).user_attrs
        return json.dumps({k: v for k, v in attributes.items() if k != REASON})

    def end(self, trial: FrozenTrial, worker: Mapping[str, Any] | None = None) -> None:
        """Ends a trial's run as the trial ended.

        Args:
            trial: As the study has it.
            worker: What is known of the process that ran it.
        """
        reason = str(trial.user_attrs.get(REASON) or "")
        state = INFEASIBLE if is_infeasible(trial) else trial.state.name
        tags = {"rum.state": state, ATTRIBUTES_TAG: self._attributes(trial.number)}
        if reason:
            tags["rum.reason"] = reason
        if trial.user_attrs.get(RUNG) is not None:
            tags["rum.rung"] = str(trial.user_attrs[RUNG])
        tags |= {f"rum.worker_{key}": str(value) for key, value in (worker or {}).items()}
        self._tracker.mark_trial(trial.number, run_status(trial), tags, at=trial.datetime_complete)

    def interrupt(self, running: Iterable[int], waiting: Iterable[int]) -> None:
        """Marks trials that are to be gone on with.

        Args:
            running: Those that this driver has started.
            waiting: Those of an earlier one; some of them have no run yet.
        """
        known = [number for number in waiting if self._tracker.known_status(number)]
        for number in [*running, *known]:
            self._tracker.mark_trial(number, INTERRUPTED, {"rum.state": "interrupted"})

    def record_best(self, value: float, num_ended: int) -> None:
        """Writes the study's best value so far."""
        self._tracker.log_best(self._task.metric, value, num_ended)

    def record_target(self) -> None:
        """Writes how many trials the study is to have."""
        self._tracker.tag_study(TARGET_TAG, str(self._study.target))
