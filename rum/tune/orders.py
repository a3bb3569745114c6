"""Orders to the driver of a study from other processes.

Whoever holds a study's lock is the only one to write to the study; so the counts of its driver
stay right, and nothing has to be merged. An order from elsewhere is a file in the study's folder,
put there by renaming, and removed by the driver when it has been carried out. The driver looks
into that folder at every turn of its loop: that costs one look at a directory and no database, and
it works wherever the checkpoints do, also from another host. Where no driver runs, whoever gives
the order takes the lock and carries it out; so does the next driver with one that was left. An
order that is carried out twice, because a driver died in between, has the effect of once.
"""

import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from rum.tune.conductor import Conductor
from rum.tune.study import BY_HAND, ORDER, Study
from rum.tune.study_folder import this_process

STOP, EXTEND, STOP_TRIAL, ENQUEUE = "stop", "extend", "stop_trial", "enqueue"
EXTENDED = "rum.extended"
"""Attribute of the study: the last order that extended it, and to what target."""


@dataclass(frozen=True)
class Order:
    """What the driver of a study is to do."""

    action: str
    driver: dict[str, Any] | None = None
    """Of `STOP`: whom it is meant for; the next driver is not."""
    by: int | None = None
    to: int | None = None
    trial: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Orders:
    """The orders that wait in a study's folder, in the sequence in which they were given."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "orders"

    def give(self, order: Order) -> None:
        """Leaves an order for the driver."""
        self._folder.mkdir(parents=True, exist_ok=True)
        last = max((int(path.stem.split("-")[0]) for path in self._paths()), default=0)
        path = self._folder / f"{last + 1:06d}-{order.id}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(order)))
        os.replace(partial, path)

    def waiting(self) -> list[Order]:
        """The orders, first given first."""
        orders = []
        for path in self._paths():
            try:
                orders.append(Order(**json.loads(path.read_text())))
            except FileNotFoundError:  # carried out meanwhile
                continue
        return orders

    def remove(self, order: Order) -> None:
        """Takes an order away that was carried out."""
        for path in self._folder.glob(f"*-{order.id}.json"):
            path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        return [self._folder / name for name in sorted(names) if name.endswith(".json")]


def obey(orders: Orders, study: Study, conductor: Conductor | None = None) -> None:
    """Carries out what was ordered.

    Args:
        orders: Of the study.
        study: Its lock is held by this process.
        conductor: Of the driver, if this process is one.
    """
    for order in orders.waiting():
        if order.action == STOP:
            if conductor is not None and order.driver == this_process():
                conductor.stop()
        elif order.action == STOP_TRIAL:
            _stop_trial(order, study, conductor)
        else:
            _extend(order, study) if order.action == EXTEND else _enqueue(order, study)
            if conductor is not None:
                conductor.runs.record_target()
        orders.remove(order)


def _stop_trial(order: Order, study: Study, conductor: Conductor | None) -> None:
    assert order.trial is not None
    if study.trial(order.trial).state.is_finished():
        return
    if conductor is not None:
        conductor.stop_trial(order.trial)
    else:
        study.end_without_process(order.trial, BY_HAND)


def _enqueue(order: Order, study: Study) -> None:
    if not any(trial.user_attrs.get(ORDER) == order.id for trial in study.trials()):
        study.enqueue(order.parameters, {ORDER: order.id})
    to_come = study.trials(TrialState.RUNNING, TrialState.WAITING)
    _raise_target(study, len(study.ended()) + len(to_come))


def _extend(order: Order, study: Study) -> None:
    """Noted first: a driver that dies in between does not add the same again."""
    last = study.attribute(EXTENDED, {})
    target = last["target"] if last.get("order") == order.id else None
    if target is None:
        target = order.to or study.target + (order.by or 0)
        study.set_attribute(EXTENDED, {"order": order.id, "target": target})
    _raise_target(study, target)


def _raise_target(study: Study, target: int) -> None:
    if target > study.target:
        study.target = target
