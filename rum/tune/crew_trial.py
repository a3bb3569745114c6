"""What runs in a worker: a crew of trials side by side, each from its last checkpoint."""

import json
import traceback
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ray import tune

from rum.errors import DivergedError, SupersededError
from rum.experiment import experiment_from_plain
from rum.lanes import Run, SideBySide, open_lane
from rum.training.checkpoint import CheckpointStore, read_checkpoint
from rum.training.loop import Trainer, Turn, train
from rum.tune import roster
from rum.tune.messages import CRASHED, DIVERGED, Workplace
from rum.tune.space import apply
from rum.tune.trial import Sender, limit_memory, load_task


def run_crew(
    config: Mapping[str, Any], workplace: Workplace, report: Callable[..., None] = tune.report
) -> None:
    """Ray's trainable: trains what the crew's roster says, as `rum.tune.trial.run_trial` one.

    Trials report together, after each epoch of one of them; then the roster says which go on and
    which are new. What one trial cannot mend ends that trial; an exception in what they compute
    together ends all of them.

    Args:
        config: `crew`, its name.
        workplace: The rest.
        report: Sends to the driver, and returns when it has decided.
    """
    crew = _Crew(config["crew"], workplace, report)
    while lanes := crew.enlist():
        try:
            train(lanes, crew.decide, forward=SideBySide())
        except Exception as error:  # noqa: BLE001  # goes to the driver, which records it
            crew.crash(error)


class _Crew:
    """The trials of a process and what they have to say."""

    def __init__(self, name: str, workplace: Workplace, send: Callable[..., None]) -> None:
        self._name = name
        self._workplace = workplace
        self._send = send
        self._folder = Path(workplace.folder)
        self._process = uuid.uuid4().hex
        self._num_reports = 0
        self._answers: str | None = None
        self._outbox: list[dict[str, Any]] = []
        self._lanes: dict[int, Trainer] = {}
        self._senders: dict[int, Sender] = {}
        self._left: set[int] = set()
        """Trials that this process leaves to another one, which has taken them over."""

    def enlist(self) -> list[Trainer]:
        """Reports what there is to say; opens what is new in the roster; returns all lanes."""
        while True:
            if self._outbox:
                self._report()
            trials = roster.read(self._folder, self._name, self._answers).trials
            numbers = {trial["number"] for trial in trials}
            self._lanes = {n: lane for n, lane in self._lanes.items() if n in numbers}
            for trial in trials:
                if trial["number"] not in self._lanes and trial["number"] not in self._left:
                    self._open(trial)
            if not self._outbox:
                return list(self._lanes.values())

    def decide(self, turn: Turn, left: list[Trainer]) -> list[Trainer]:
        """Reports what lanes came to and does what the driver decides; see `train`."""
        number_of = {lane: number for number, lane in self._lanes.items()}
        for lane, report in turn.reports:
            self._senders[number_of[lane]].epoch(report, lane.config.max_epochs)
        for lane, error in turn.errors:
            self._fail(number_of[lane], error)
        return self.enlist()

    def crash(self, error: Exception) -> None:
        """Ends all trials: none of them can do without what went wrong."""
        for number in [*self._lanes]:
            self._fail(number, error)

    def _open(self, trial: Mapping[str, Any]) -> None:
        """Takes a trial up; its checkpoint's epochs are reported again first."""
        number, origin = trial["number"], trial["origin"]
        sender = self._senders[number] = Sender(number, self._keep)
        try:
            experiment = apply(
                experiment_from_plain(self._workplace.experiment), trial["parameters"]
            )
            training = experiment.training
            if not self._lanes:  # the same for all
                if training.device.startswith("cuda"):
                    limit_memory(training.device, self._workplace.gpus_per_trial)
                if training.threads is not None:
                    torch.set_num_threads(training.threads)
            folder = self._workplace.trial_folder(number)
            last = CheckpointStore(folder).last()
            for report in last.reports if last else []:
                sender.epoch(report, training.max_epochs)
            run = Run(
                config=experiment,
                task=load_task(repr(experiment.task), experiment, self._workplace.data_dir),
                folder=folder,
                begin_from=read_checkpoint(Path(origin["checkpoint"])) if origin else None,
            )
            self._lanes[number] = open_lane(run)
        except Exception as error:  # noqa: BLE001  # goes to the driver, which records it
            self._fail(number, error)

    def _fail(self, number: int, error: Exception) -> None:
        self._lanes.pop(number, None)
        if isinstance(error, SupersededError):
            self._left.add(number)  # the process that took over has the say
        elif isinstance(error, DivergedError):
            self._senders[number].end(DIVERGED, f"diverged: {error}")
        else:
            trace = "".join(traceback.format_exception(error, limit=-3))
            reason = f"crashed: {type(error).__name__}: {error}\n{trace}"
            self._senders[number].end(CRASHED, reason)

    def _keep(self, message: Mapping[str, str]) -> None:
        self._outbox.append(json.loads(message["message"]))

    def _report(self) -> None:
        """Sends what there is to say, under a name that the roster is to answer."""
        self._num_reports += 1
        self._answers = name = f"{self._process}-{self._num_reports}"
        # As one value, since Ray would flatten nested ones and mix up names that hold slashes.
        self._send({"report": name, "messages": json.dumps(self._outbox)})
        self._outbox.clear()
