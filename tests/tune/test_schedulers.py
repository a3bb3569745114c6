"""The median rule, population-based training, and schedulers by name."""

import dataclasses
import random
from statistics import median

import pytest

from rum.cells import RUMConfig
from rum.errors import ConfigError
from rum.tasks import CopyingConfig, RecallConfig, Task
from rum.training.config import TrainingConfig
from rum.tune.config import (
    SCHEDULERS,
    Domain,
    ResumeConfig,
    SchedulerConfig,
    SearchConfig,
    SearchOptions,
)
from rum.tune.schedulers import Population, Verdict, build_scheduler
from rum.tune.schedulers.halving import Halving, HyperBand
from rum.tune.schedulers.median import MedianRule

RATE = {"training.learning_rate": Domain(type="float", low=1e-4, high=1e-1, log=True)}
CONFIG = SearchConfig(
    model=RUMConfig(hidden_size=8),
    task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
    training=TrainingConfig(max_epochs=27),
    space=RATE,
)


@pytest.fixture(scope="module")
def task() -> Task:
    return CONFIG.task.load(seed=0)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_trial_stops_below_the_median_of_the_others(mode: str) -> None:
    generator = random.Random(0)
    rule = MedianRule(mode, grace_epochs=2, startup_trials=4)
    curves: list[dict[int, float]] = []
    stopped = 0
    for number in range(40):
        curve: dict[int, float] = {}
        for epoch in range(1, 6):
            value = generator.random()
            others = [other[epoch] for other in curves if epoch in other]
            is_worse = len(others) >= 4 and epoch >= 2
            is_worse &= (
                len(others) > 0 and (value - median(others)) * (1 if mode == "min" else -1) > 0
            )
            assert rule.judge(number, epoch, value) is (
                Verdict.STOP if is_worse else Verdict.GO_ON
            )
            curve[epoch] = value
            if is_worse:
                stopped += 1
                break
        curves.append(curve)
    assert stopped > 20


def test_the_worst_of_a_population_are_replaced_by_copies_of_the_best() -> None:
    population = Population("min", 2, seed=1, space=RATE)
    for number, value in enumerate([5, 1, 2, 4, 3]):
        assert population.judge(number, 2, value) is Verdict.PAUSE
    assert [population.is_beaten(number, 2) for number in range(5)] == [True, *[False] * 4]
    assert population.judge(0, 3, 9.0) is Verdict.GO_ON  # between two comparisons
    assert population.source_for(0, 2) == 1
    assert population.promoted({0: 4, 1: 2, 2: 2}, is_idle=False) is None
    assert population.promoted({0: 4, 2: 2, 1: 2}, is_idle=True) == 1  # the furthest behind


def test_mutations_are_neighbours_within_the_domain() -> None:
    space = RATE | {
        "model.zoneout": Domain(type="float", low=0.0, high=0.5, step=0.1),
        "model.eta": Domain(type="categorical", choices=[None, 0.5, 1.0]),
    }
    population = Population("min", 1, seed=0, space=space)
    parameters = {"training.learning_rate": 0.09, "model.zoneout": 0.5, "model.eta": 0.5}
    mutants = [population.mutated(number, parameters) for number in range(50)]
    rates = {mutant["training.learning_rate"] for mutant in mutants}
    assert rates == {0.09 * 0.8, 0.1}  # 0.108 is beyond the domain
    assert {mutant["model.zoneout"] for mutant in mutants} == {0.4, 0.5}
    assert {mutant["model.eta"] for mutant in mutants} == {None, 1.0}
    assert population.mutated(3, parameters) == mutants[3]


def test_pbt_refuses_what_a_copy_cannot_take_over(task: Task) -> None:
    space = RATE | {"model.hidden_size": Domain(type="int", low=4, high=8)}
    config = dataclasses.replace(CONFIG, space=space, scheduler=SchedulerConfig(name="pbt"))
    with pytest.raises(ConfigError, match=r"got model\.hidden_size: use scheduler=promotion"):
        build_scheduler(config, task)


def test_each_name_makes_its_scheduler(task: Task) -> None:
    def build(name: str) -> object:
        return build_scheduler(
            dataclasses.replace(CONFIG, scheduler=SchedulerConfig(name=name)), task
        )

    kinds = {name: type(build(name)).__name__ for name in SCHEDULERS}
    assert kinds == {
        "none": "NoScheduler",
        "asha": "Halving",
        "promotion": "Halving",
        "hyperband": "HyperBand",
        "median": "MedianRule",
        "pbt": "Population",
    }
    asha, promotion, hyperband = build("asha"), build("promotion"), build("hyperband")
    assert isinstance(asha, Halving)
    assert isinstance(promotion, Halving)
    assert asha.milestones == promotion.milestones == [1, 3, 9]
    assert (asha.pauses, promotion.pauses) == (False, True)
    assert asha.plateau is not None
    assert asha.plateau.baseline == task.baselines()["memoryless"]
    assert isinstance(hyperband, HyperBand)
    brackets = [bracket.milestones for bracket in hyperband._brackets]
    assert brackets == [[1, 3, 9], [3, 9], [9], []]


def test_recall_stays_at_the_most_frequent_digit_of_a_sequence() -> None:
    task = RecallConfig(length=30, validation_size=2000, train_size=10, test_size=10).load(seed=0)
    hits = count = 0
    for batch in task.evaluation_batches("validation"):
        for sequence, answer in zip(batch.input.T.tolist(), batch.target[0].tolist(), strict=True):
            digits = [symbol - 16 for symbol in sequence[1:30:2]]
            hits += max(range(10), key=digits.count) == answer
            count += 1
    assert task.plateau == task.baselines()["most_frequent_digit"] == hits / count
    assert task.plateau == pytest.approx(0.25, abs=0.03)


def test_what_depends_on_the_workers_speed_is_not_deterministic() -> None:
    search = SearchOptions(deterministic=True, max_concurrent=2)
    with pytest.raises(ConfigError, match=r"does not go with search\.deterministic=true"):
        dataclasses.replace(CONFIG, scheduler=SchedulerConfig(name="pbt"), search=search)
    with pytest.raises(ConfigError, match="deterministic=true is for searches"):
        ResumeConfig(study="mine", search=search)
