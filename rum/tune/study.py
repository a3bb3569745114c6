"""A study: Optuna's record of trials, with the operations that a search needs."""

import dataclasses
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import optuna
from optuna.trial import FrozenTrial, TrialState

from rum.errors import StudyError
from rum.tune.config import SamplerConfig
from rum.tune.one_writer import OneWriterStorage
from rum.tune.sampler_view import Cost, SamplerView
from rum.tune.samplers import build_sampler
from rum.tune.space import Fit, Space, differences, suggest

optuna.logging.set_verbosity(optuna.logging.WARNING)

ID = "rum.id"
DEFINITION = "rum.definition"
CONCLUDED = "rum.concluded"
TARGET = "rum.target"
REASON = "rum.reason"
RUNG = "rum.rung"
PAUSED = "rum.paused"
"""The last epoch after which a trial was paused."""
RESUMED = "rum.resumed"
"""The last of these epochs from which it went on."""
INFEASIBLE = "infeasible"
"""How the reason of a candidate beyond a limit begins."""
ORIGIN = "rum.origin"
SHARE = "rum.gpu_share"
"""Of a trial that ran out of memory: the share of a GPU that it has since."""
WARM_START = "rum.warm_start"
"""Of a trial that was queued before the first: where its configuration comes from."""
FINALIST = "rum.finalist"
"""Of a trial that is trained under another seed: the trial of a search that it repeats."""

STOPPED = "rum.stopped"
"""That a running trial is to end at its next report."""
BY_HAND = "stopped by hand"
"""The reason of a trial that was stopped from outside."""
SECONDS = "rum.training_seconds"
"""Of a trial that ended or waits, where they are an objective: seconds that it trained."""
ORDER = "rum.order"
"""Id of the order from outside that queued a trial."""
COMMAND = "rum.command"
"""How the study's last driver was called."""

REFUSED_IN_A_ROW = 3
"""Infeasible candidates after which the next is drawn at random, whatever the sampler: some learn
from trained trials only and would ask the same again."""


@dataclass(frozen=True)
class TrialSpec:
    """A trial to run."""

    number: int
    parameters: dict[str, Any]
    origin: dict[str, Any] | None
    """Where its first checkpoint comes from, if it continues another study's trial."""
    gpus: float | None = None
    """Its share of a GPU, if it needs a larger one than the others."""


class Study:
    """One Optuna study with the operations that a search needs."""

    def __init__(
        self,
        storage: optuna.storages.RDBStorage,
        name: str,
        space: Space,
        sampler: SamplerConfig,
        fit: Fit | None = None,
        cost: Cost | None = None,
    ) -> None:
        """Opens the study, which must exist.

        Args:
            storage: Where it is.
            name: Of the study.
            space: What is searched.
            sampler: Which, and its seed.
            fit: As `rum.tune.space.suggest` has it.
            cost: What the sampler is to keep low beside the metric.
        """
        self._fit = fit
        self.name = name
        self._space = space
        self._sampler = sampler
        self._own = OneWriterStorage(storage, storage.get_study_id_from_name(name))
        own = cast(optuna.storages.BaseStorage, self._own)
        view = cast(optuna.storages.BaseStorage, SamplerView(own, _has_paused, is_sound, cost))
        self._study = optuna.load_study(study_name=name, storage=own)
        self._sampled = optuna.load_study(study_name=name, storage=view)
        self._open: dict[int, optuna.Trial] = {}

    def read_again(self) -> None:
        """Takes that another process may have written to it since it was opened."""
        self._own.read_again()

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

    def attribute(self, key: str, default: Any = None) -> Any:
        """Something kept in the study."""
        return self._study.user_attrs.get(key, default)

    def set_attribute(self, key: str, value: Any) -> None:
        """Keeps something in the study, plain values only."""
        self._study.set_user_attr(key, value)

    @property
    def sequence(self) -> dict[str, int]:
        """Points taken of the sequence of sampler "qmc", under Optuna's own keys."""
        attributes = self._study._storage.get_study_system_attrs(self._study._study_id)
        return {key: value for key, value in attributes.items() if key.startswith("qmc:")}

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

    def enqueue(
        self, parameters: dict[str, Any], attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Queues a trial; what is not in `parameters` is sampled when it starts.

        Args:
            parameters: By dotted name.
            attributes: What to note of it: `ORIGIN` if it continues another, `ORDER` if it was
                queued from outside, and so on.
        """
        self._study.enqueue_trial(parameters, user_attrs=dict(attributes or {}))

    def end_without_process(self, number: int, reason: str) -> None:
        """Ends a trial that waits, is paused or was left running by a dead driver, as PRUNED."""
        frozen = self.trial(number)
        if frozen.state == TrialState.WAITING:
            storage = self._study._storage
            storage.set_trial_state_values(frozen._trial_id, TrialState.RUNNING)
            self._sampled.sampler = build_sampler(self._sampler, number)
            trial = optuna.Trial(self._sampled, frozen._trial_id)
            given = queued_parameters(frozen) or {}  # on record as it was asked for
            suggest(
                trial, {n: d for n, d in self._space.items() if n in given and not d.parameters}
            )
        self._open.pop(number, None)
        self._study._storage.set_trial_user_attr(frozen._trial_id, REASON, reason)
        self._study.tell(number, state=TrialState.PRUNED)

    def ask(self) -> TrialSpec:
        """Opens the next trial: an enqueued one, else a new sample."""
        waiting = self.trials(TrialState.WAITING)
        number = waiting[0].number if waiting else len(self.trials())
        self._sampled.sampler = self._sampler_of(number)
        return self._suggest(self._sampled.ask())

    def _sampler_of(self, number: int) -> optuna.samplers.BaseSampler:
        last = self.trials()[max(0, number - REFUSED_IN_A_ROW) : number]
        is_stuck = len(last) == REFUSED_IN_A_ROW and all(map(is_infeasible, last))
        sampler = dataclasses.replace(self._sampler, name="random") if is_stuck else self._sampler
        return build_sampler(sampler, number)

    def adopt(self, frozen: FrozenTrial) -> TrialSpec:
        """Opens a trial that was running when its driver died, or that was paused."""
        self._sampled.sampler = self._sampler_of(frozen.number)
        return self._suggest(optuna.Trial(self._sampled, frozen._trial_id))

    def _suggest(self, trial: optuna.Trial) -> TrialSpec:
        self._open[trial.number] = trial
        parameters = suggest(trial, self._space, self._fit)
        attributes = trial.user_attrs
        return TrialSpec(trial.number, parameters, attributes.get(ORIGIN), attributes.get(SHARE))

    def report(self, number: int, epoch: int, value: float) -> None:
        """Records the running best of a trial after an epoch."""
        trial_id = self._open[number]._trial_id  # a Trial refuses where there is a cost, too
        self._study._storage.set_trial_intermediate_value(trial_id, epoch, value)

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


def queued_parameters(trial: FrozenTrial) -> dict[str, Any] | None:
    """What a trial was queued with; None for one that was sampled."""
    given: dict[str, Any] | None = trial.system_attrs.get("fixed_params")
    return given


def is_paused(trial: FrozenTrial) -> bool:
    """Whether a trial waits to be gone on with."""
    epoch = trial.user_attrs.get(PAUSED)
    return (
        trial.state == TrialState.RUNNING
        and epoch in trial.intermediate_values
        and epoch != trial.user_attrs.get(RESUMED)
    )


def _has_paused(trial: FrozenTrial) -> bool:
    return trial.user_attrs.get(PAUSED) is not None


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
    """All studies in a storage but those that were only half made."""
    return [
        name for name in sorted(optuna.get_all_study_names(storage)) if _is_whole(storage, name)
    ]


def _is_whole(storage: optuna.storages.RDBStorage, name: str) -> bool:
    return DEFINITION in optuna.load_study(study_name=name, storage=storage).user_attrs


def ensure_study(
    storage: optuna.storages.RDBStorage, name: str, definition: dict[str, Any]
) -> None:
    """Makes an empty study unless it is there, also one that was only half made.

    Raises:
        StudyError: If it is one that was only half rebuilt.
    """
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        direction=_direction(definition["mode"]),
        load_if_exists=True,
    )
    if DEFINITION not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise StudyError(
                f"study {name} was only half rebuilt: repeat the command with resume=from_mlflow"
            )
        _complete(study, uuid.uuid4().hex, 0, definition)


def add_study(
    storage: optuna.storages.RDBStorage,
    name: str,
    study_id: str,
    target: int,
    definition: dict[str, Any],
    sequence: dict[str, int],
    trials: list[FrozenTrial],
) -> None:
    """Makes a study that has trials already; whole at its end, or half made and not listed.

    Args:
        storage: From `open_storage`; the study may be there half made, not whole.
        name: Of the study.
        study_id: Its `Study.id`.
        target: Its `Study.target`.
        definition: Its `Study.definition`.
        sequence: Its `Study.sequence`.
        trials: From number 0 on, without a gap.
    """
    if name in optuna.get_all_study_names(storage):
        assert not _is_whole(storage, name), f"study {name} exists"
        optuna.delete_study(study_name=name, storage=storage)
    study = optuna.create_study(
        study_name=name, storage=storage, direction=_direction(definition["mode"])
    )
    study.add_trials(trials)
    for key, value in sequence.items():
        storage.set_study_system_attr(study._study_id, key, value)
    _complete(study, study_id, target, definition)


def _direction(mode: str) -> optuna.study.StudyDirection:
    directions = optuna.study.StudyDirection
    return directions.MINIMIZE if mode == "min" else directions.MAXIMIZE


def _complete(study: optuna.Study, study_id: str, target: int, definition: dict[str, Any]) -> None:
    study.set_user_attr(ID, study_id)
    study.set_user_attr(TARGET, target)
    study.set_user_attr(DEFINITION, definition)  # last: a study that has it is whole


def check_definition(study: Study, definition: dict[str, Any]) -> None:
    """Raises StudyError if the study was made with another space, experiment or direction."""
    different = differences(definition, study.definition)
    if different:
        lines = "\n  ".join(different)
        raise StudyError(
            f"study {study.name} exists with other settings:\n  {lines}\n"
            "Use the same settings, study_exists=new, or study=<another name>"
        )
