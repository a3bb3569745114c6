"""A study as its sampler is to see it: trials that wait as stopped, a cost beside the metric."""

import copy
from collections.abc import Callable, Container
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

Cost = Callable[[FrozenTrial], float | None]
"""What a trial cost, to be minimised; None where it is not known."""


class SamplerView:
    """A storage of Optuna's as samplers are to see it.

    They learn nothing from trials that run, and a trial may be paused for most of a search: to
    them it counts as stopped there, also while it goes on. With a cost the study has a second
    objective for them alone: Optuna takes no values after each epoch in studies of several
    objectives, and those are the record of what the trials did. A trial that was stopped early
    counts with its best value until then, as it does on the Pareto front.
    """

    def __init__(
        self,
        storage: optuna.storages.BaseStorage,
        is_paused: Callable[[FrozenTrial], bool],
        is_sound: Callable[[FrozenTrial], bool],
        cost: Cost | None,
    ) -> None:
        """Takes the study's own storage.

        Args:
            storage: Of the study.
            is_paused: Whether a running trial has ever waited.
            is_sound: Whether a trial that ended has a value to go by.
            cost: The second objective, if any.
        """
        self._storage = storage
        self._is_paused = is_paused
        self._is_sound = is_sound
        self._cost = cost

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """As the storage's own, and that the cost is to be low."""
        directions = list(self._storage.get_study_directions(study_id))
        return directions if self._cost is None else [*directions, StudyDirection.MINIMIZE]

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As the storage's own."""
        shown = []
        for trial in self._storage.get_all_trials(study_id, deepcopy=deepcopy):
            if trial.state == TrialState.RUNNING and self._is_paused(trial):
                trial = copy.copy(trial)
                trial.state = TrialState.PRUNED
            if self._cost is not None and trial.state.is_finished():
                trial = self._with_cost(trial, self._cost)
            if states is None or trial.state in states:
                shown.append(trial)
        return shown

    def _with_cost(self, trial: FrozenTrial, cost: Cost) -> FrozenTrial:
        if any(excess > 0 for excess in trial.constraints.values()):
            return trial  # infeasible: it is known by that alone
        seen = copy.copy(trial)
        value = trial.intermediate_values.get(max(trial.intermediate_values, default=0))
        price = None if value is None or not self._is_sound(trial) else cost(trial)
        if value is None or price is None:
            seen.state = TrialState.FAIL
            seen.values = None
        else:
            seen.state = TrialState.COMPLETE
            seen.values = [value, price]
        return seen

    def __getattr__(self, name: str) -> Any:
        """All else is the storage's own."""
        return getattr(self._storage, name)
