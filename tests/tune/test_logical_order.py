"""Whatever the order in which messages come, and wherever the driver dies: the same study."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import optuna
import pytest

from rum.cells import RUMConfig
from rum.errors import ConfigError
from rum.experiment import ExperimentConfig, parameter_count
from rum.tasks import CopyingConfig
from rum.training.config import TrainingConfig
from rum.tune.conductor import Conductor
from rum.tune.config import Domain, SamplerConfig, SearchOptions
from rum.tune.limits import Limits
from rum.tune.logical_order import LogicalOrder
from rum.tune.messages import CRASHED, DIVERGED, FINISHED, RUNNING, Workplace
from rum.tune.prediction import Predictor
from rum.tune.schedulers.halving import Halving, Plateau
from rum.tune.study import RESUMED, Study, ensure_study

EPOCHS, TRIALS, WORKERS = 9, 14, 3
BASE = ExperimentConfig(
    model=RUMConfig(hidden_size=8),
    task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
    training=TrainingConfig(max_epochs=EPOCHS),
)
TASK = BASE.task.load(seed=0)
SPACE = {
    "training.learning_rate": Domain(type="float", low=1e-4, high=1e-1, log=True),
    "model.hidden_size": Domain(type="int", low=4, high=64),
}
LIMITS = Limits(
    Predictor(BASE, TASK), max_parameters=parameter_count(RUMConfig(hidden_size=55), TASK)
)


class NoTracker:
    """The order of decisions is in Optuna's study; MLflow's books are tested elsewhere."""

    def known_status(self, number: int) -> str:
        return FINISHED

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class KilledError(Exception):
    """The driver died."""


class Driver:
    """One process of a search, with workers of any speed; may die after any write to the study."""

    def __init__(self, storage: Any, scheduler: str, generator: random.Random) -> None:
        self.study = Study(storage, "study", SPACE, SamplerConfig(startup_trials=4))
        self.study.target = TRIALS
        plateau = Plateau(0.5, 0.0, 0.2) if scheduler == "plateau" else None
        halving = Halving([1, 3], 3, "min", pauses=scheduler != "asha", plateau=plateau)
        tracker: Any = NoTracker()
        self.conductor = Conductor(
            self.study,
            BASE,
            TASK,
            halving,
            tracker,
            Workplace({}, "/nowhere", None),
            LIMITS,
            max_failures=1000,
        )
        self.order = LogicalOrder(self.conductor, self.study, WORKERS)
        self.generator = generator

    def run(self, checkpoints: dict[int, int]) -> None:
        """Runs to the end; `checkpoints` are the epochs on disk, which outlive the driver."""
        workers: list[list[Any]] = []  # number, parameters, epochs to send
        through: set[int] = set()
        while not (self.order.is_done and not workers):
            if len(workers) < WORKERS:
                spec = self.order.next_trial()
                if spec is not None:
                    assert all(spec.number != other[0] for other in workers), "two workers on one"
                    if spec.number in through:  # it trained on beyond a pause decided later
                        assert RESUMED in self.study.trial(spec.number).user_attrs
                    workers.append([spec.number, spec.parameters, 1])
                    continue
            if not workers:
                continue  # that was the end
            worker = self.generator.choice(workers)
            if worker[2] == 1 and self.generator.random() < 0.1:  # its process died before it ran
                workers.remove(worker)
                self.order.on_not_started(worker[0])
                continue
            number, parameters, epoch = worker
            fate = outcome(number, parameters)
            checkpoints[number] = max(checkpoints.get(number, 0), epoch)
            if (number, epoch) in fate:
                status = fate[number, epoch]
                said = {"number": number, "status": status, "reason": status, "worker": {}}
                if status == DIVERGED:
                    said["reason"] = "diverged: loss is not finite"
            else:
                status = FINISHED if epoch == EPOCHS else RUNNING
                report = {
                    "epoch": epoch,
                    "validation/best_cross_entropy": value(parameters, epoch),
                }
                said = {"number": number, "status": status, "report": report, "worker": {}}
            worker[2] += 1
            if self.order.on_message(said) or status != RUNNING:
                workers.remove(worker)
                if status == FINISHED:  # its process is gone, as that of a trial that died
                    through.add(number)
                    self.order.on_not_started(number)


def outcome(number: int, parameters: dict[str, Any]) -> dict[tuple[int, int], str]:
    """Some trials diverge or crash, always the same ones."""
    if parameters["model.hidden_size"] % 7 == 0:
        return {(number, 2): DIVERGED}
    if parameters["model.hidden_size"] % 5 == 0:
        return {(number, 1): CRASHED}
    return {}


def value(parameters: dict[str, Any], epoch: int) -> float:
    """A curve that depends on all there is."""
    rate = parameters["training.learning_rate"]
    late = parameters["model.hidden_size"] % 3
    return float(0.5 / (1 + max(0, epoch - late) * rate * 30) + 0.001 * late / epoch)


def content(study: Study) -> list[Any]:
    """Everything that is decided, nothing of when."""
    return [
        (t.number, t.state, t.params, t.intermediate_values, t.value, t.user_attrs)
        for t in study.trials()
    ]


def search(scheduler: str, seed: int, deaths: float = 0.0) -> tuple[list[Any], int]:
    """A whole study, and how often its driver died."""
    generator = random.Random(seed)
    storage = Mortal(generator, deaths)
    ensure_study(storage.inner, "study", {"mode": "min"})
    checkpoints: dict[int, int] = {}
    died = 0
    while True:
        try:
            driver = Driver(storage, scheduler, generator)
            driver.run(checkpoints)
        except KilledError:
            died += 1
        else:
            return content(driver.study), died


class Mortal:
    """A storage of Optuna's whose process may die before any write."""

    def __init__(self, generator: random.Random, deaths: float) -> None:
        self.inner = optuna.storages.InMemoryStorage()
        self._generator, self._deaths = generator, deaths

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("set_", "create_")) and self._generator.random() < self._deaths:
            raise KilledError
        return getattr(self.inner, name)


@pytest.mark.parametrize("scheduler", ["asha", "promotion", "plateau"])
def test_the_order_of_arrival_does_not_matter(scheduler: str) -> None:
    first, _ = search(scheduler, seed=0)
    assert len({str(state) for _, state, *_ in first}) == 3  # complete, pruned and failed
    refused = [notes for *_, notes in first if "infeasible" in notes.get("rum.reason", "")]
    assert refused
    assert len(first) == TRIALS + len(refused)
    for seed in range(1, 8):
        assert search(scheduler, seed)[0] == first


@pytest.mark.parametrize("scheduler", ["asha", "promotion", "plateau"])
def test_nor_does_it_matter_where_the_driver_dies(scheduler: str) -> None:
    undisturbed, _ = search(scheduler, seed=0)
    total = 0
    for seed in range(100, 112):
        content, died = search(scheduler, seed, deaths=0.03)
        assert content == undisturbed
        total += died
    assert total >= 25


def test_what_decisions_would_depend_on_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"deterministic=true needs search\.max_concurrent"):
        SearchOptions(deterministic=True)
    with pytest.raises(ConfigError, match=r"max_memory_gigabytes cannot go with"):
        SearchOptions(deterministic=True, max_concurrent=2, max_memory_gigabytes=1.0)
    assert dataclasses.asdict(SearchOptions(deterministic=True, max_concurrent=2))["deterministic"]
