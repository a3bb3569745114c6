"""Pareto fronts and hypervolumes against counting by hand."""

import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from optuna.trial import TrialState

from rum.cells import RUMConfig
from rum.experiment import ExperimentConfig, parameter_count
from rum.tasks import CopyingConfig
from rum.training.checkpoint import CheckpointStore
from rum.training.config import TrainingConfig
from rum.tune.config import Domain, SamplerConfig
from rum.tune.database import open_storage
from rum.tune.messages import Workplace
from rum.tune.pareto import Point, front, fronts, hypervolume, to_json
from rum.tune.study import Study, ensure_study

SIDE = 12


def some_points(seed: int) -> list[Point]:
    draw = random.Random(seed)
    return [
        (float(draw.randrange(SIDE)), float(draw.randrange(SIDE)))
        for _ in range(draw.randrange(1, 12))
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_hypervolume_is_the_number_of_dominated_unit_squares(seed: int) -> None:
    points = some_points(seed)
    reference = (9.0, 10.0)  # some points are beyond it
    squares = sum(
        any(x <= i and y <= j for x, y in points)
        for i, j in itertools.product(range(int(reference[0])), range(int(reference[1])))
    )
    assert hypervolume(points, reference) == squares


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_no_other_point_dominates(seed: int) -> None:
    points = some_points(seed)

    def dominated(p: Point) -> bool:
        return any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)

    kept = front(points)
    assert sorted(kept) == [i for i, p in enumerate(points) if not dominated(p)]
    assert [points[i] for i in kept] == sorted(points[i] for i in kept)


def test_nothing_has_no_front_and_no_area() -> None:
    assert front([]) == []
    assert hypervolume([], (1.0, 1.0)) == 0.0


BASE = ExperimentConfig(
    model=RUMConfig(hidden_size=8),
    task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
    training=TrainingConfig(max_epochs=2),
)
TASK = BASE.task.load(seed=0)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_fronts_of_a_study(tmp_path: Path, mode: str) -> None:
    task = BASE.task.load(seed=0)
    task.mode = mode
    storage = open_storage(tmp_path)
    ensure_study(storage, "study", {"mode": mode})
    space = {"model.hidden_size": Domain(type="int", low=4, high=40)}
    study = Study(storage, "study", space, SamplerConfig(name="random"))
    workplace = Workplace(dataclasses.asdict(BASE), str(tmp_path / "study"), None)
    sign = 1 if mode == "min" else -1
    # Size, value (the lower the better, times the sign), seconds of each of two epochs; the last
    # two are no trials with a value.
    trials = [(10, 2.0, 4.0), (20, 1.0, 3.0), (30, 1.5, 1.0), (8, 3.0, None), (40, 0.0, 9.0)]
    for size, value, seconds in trials:
        study.enqueue({"model.hidden_size": size})
        number = study.ask().number
        if size == 40:
            study.note(number, "rum.reason", "diverged: loss is not finite")
            study.report(number, 1, sign * value)
            study.finish(number, TrialState.PRUNED)
            continue
        study.report(number, 1, sign * value)
        study.finish(number, TrialState.COMPLETE, sign * value)
        if seconds is not None:
            reports = [{"epoch": e, "time/training_seconds": seconds} for e in (1, 2)]
            CheckpointStore(workplace.trial_folder(number)).save(
                {"weights": torch.zeros(1)}, {"step": 5, "best_step": 5, "reports": reports}
            )

    by_size, by_time = fronts(study, BASE, task, workplace)
    count = {n: parameter_count(RUMConfig(hidden_size=n), TASK) for n in (8, 10, 20, 30)}
    assert by_size.trials == [
        (1, sign * 1.0, count[20]),
        (0, sign * 2.0, count[10]),
        (3, sign * 3.0, count[8]),
    ]
    assert by_size.reference == (sign * 3.0, count[30])
    assert by_size.hypervolume == 1.0 * (count[30] - count[20]) + 1.0 * (count[30] - count[10])
    assert by_time.trials == [(1, sign * 1.0, 6.0), (2, sign * 1.5, 2.0)]
    assert by_time.reference == (sign * 2.0, 8.0)
    assert by_time.hypervolume == 1.0 * (8 - 6) + 0.5 * (6 - 2)

    metric = task.metric
    plain = json.loads(to_json([by_size, by_time]))
    assert plain["training_seconds"] == {
        "hypervolume": 4.0,
        "reference": {metric: sign * 2.0, "training_seconds": 8.0},
        "front": [
            {"trial": 1, metric: sign * 1.0, "training_seconds": 6.0},
            {"trial": 2, metric: sign * 1.5, "training_seconds": 2.0},
        ],
    }
    lines = str(by_size).splitlines()
    assert lines[0].startswith(f"Pareto front of {metric} and parameters (hypervolume ")
    assert lines[2].split() == ["1", f"{sign * 1.0:.4f}", f"{count[20]:,}"]


def test_a_study_without_a_value_has_no_fronts(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    ensure_study(storage, "study", {"mode": "min"})
    study = Study(storage, "study", {}, SamplerConfig())
    assert fronts(study, BASE, TASK, Workplace({}, str(tmp_path), None)) == []
