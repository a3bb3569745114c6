"""Optuna's storage for the one process that writes to a study, which need not ask again."""

import copy
from collections.abc import Container
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState


class OneWriterStorage:
    """Reads a trial again only after it was written to through this object.

    Optuna's own storage reads every trial that has not ended anew, whenever it is asked for the
    trials, which is a dozen times for each: other processes might have written. A study has one
    driver at a time, which holds the study's lock; what others want, they ask of it.
    """

    def __init__(self, storage: optuna.storages.RDBStorage, study_id: int) -> None:
        """Takes the database and the study's id in it."""
        self._storage = storage
        self._study_id = study_id
        self.read_again()

    def read_again(self) -> None:
        """Takes that another process may have written."""
        self._trials: list[FrozenTrial] = self._storage.get_all_trials(self._study_id)
        self._numbers = {trial._trial_id: trial.number for trial in self._trials}
        self._stale: set[int] = set()

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As the storage's own."""
        assert study_id == self._study_id
        self._read_stale()
        found = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def _read_stale(self) -> None:
        for trial_id in sorted(self._stale):
            trial = self._storage.get_trial(trial_id)
            self._numbers[trial_id] = trial.number
            if trial.number == len(self._trials):
                self._trials.append(trial)
            else:
                self._trials[trial.number] = trial
        self._stale.clear()

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """As the storage's own: a copy, which a `Trial` changes."""
        return copy.deepcopy(self._trial(trial_id))

    def _trial(self, trial_id: int) -> FrozenTrial:
        if trial_id in self._stale:
            self._read_stale()
        return self._trials[self._numbers[trial_id]]

    def get_trial_user_attrs(self, trial_id: int) -> dict[str, Any]:
        """As the storage's own."""
        return dict(self._trial(trial_id).user_attrs)

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        """As the storage's own."""
        return dict(self._trial(trial_id).system_attrs)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """As the storage's own."""
        trial_id = self._storage.create_new_trial(study_id, template_trial)
        self._stale.add(trial_id)
        return trial_id

    def set_trial_param(self, trial_id: int, *arguments: Any) -> None:
        """As the storage's own."""
        self._stale.add(trial_id)
        self._storage.set_trial_param(trial_id, *arguments)

    def set_trial_state_values(self, trial_id: int, *arguments: Any, **options: Any) -> bool:
        """As the storage's own."""
        self._stale.add(trial_id)
        return self._storage.set_trial_state_values(trial_id, *arguments, **options)

    def set_trial_intermediate_value(self, trial_id: int, step: int, value: float) -> None:
        """As the storage's own."""
        self._stale.add(trial_id)
        self._storage.set_trial_intermediate_value(trial_id, step, value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As the storage's own."""
        self._stale.add(trial_id)
        self._storage.set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As the storage's own."""
        self._stale.add(trial_id)
        self._storage.set_trial_system_attr(trial_id, key, value)

    def __getattr__(self, name: str) -> Any:
        """All else is the storage's own."""
        return getattr(self._storage, name)
