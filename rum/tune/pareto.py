"""What a search found for every size: Pareto fronts of its metric and of what a trial costs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rum.errors import CheckpointError
from rum.experiment import ExperimentConfig, parameter_count
from rum.tasks import Task
from rum.training.checkpoint import CheckpointStore
from rum.tune.messages import Workplace
from rum.tune.results import columns
from rum.tune.space import apply
from rum.tune.study import Study

Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[int]:
    """Which points no other dominates, by the first coordinate; both are minimised.

    A point dominates another if it is nowhere worse and somewhere better; of equal points all
    are kept.
    """
    order = sorted(range(len(points)), key=lambda i: points[i])
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1] or points[i] == points[kept[-1]]:
            kept.append(i)
    return kept


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area that the points dominate below a reference; both coordinates are minimised.

    Args:
        points: Any; those not below the reference count for nothing.
        reference: The corner that bounds the area.
    """
    area, height = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < height:
            area += (reference[0] - x) * (height - y)
            height = y
    return area


@dataclass(frozen=True)
class Front:
    """The best trials for every cost."""

    metric: str
    cost: str
    """"parameters" or "training_seconds"."""
    trials: list[tuple[int, float, float]]
    """Number, metric and cost; from the best value to the lowest cost."""
    reference: Point
    """The worst value and the highest cost of all trials."""
    hypervolume: float
    """Area between the front and the reference, in units of metric x cost."""

    def __str__(self) -> str:
        """For people."""
        rows = [
            ["trial", self.metric, self.cost],
            *([str(n), f"{value:.4f}", f"{cost:,.0f}"] for n, value, cost in self.trials),
        ]
        name = self.cost.replace("_", " ")
        head = (
            f"Pareto front of {self.metric} and {name} (hypervolume {self.hypervolume:.4g} to "
            f"{self.reference[0]:.4f} and {self.reference[1]:,.0f}):"
        )
        return "\n".join([head, *columns(rows)])


def fronts(study: Study, base: ExperimentConfig, task: Task, workplace: Workplace) -> list[Front]:
    """Fronts of the metric against parameters, and against the seconds of training spent.

    A trial that was stopped early counts with its best value and what it took until then. Seconds
    are those in its checkpoint; where there is none, the trial is left out of that front.
    """
    ranked = study.ranked()
    values = {trial.number: trial.value for trial in ranked if trial.value is not None}
    sizes = {t.number: parameter_count(apply(base, t.params).model, task) for t in ranked}
    costs: dict[str, Callable[[int], float | None]] = {
        "parameters": sizes.get,
        "training_seconds": lambda number: training_seconds(workplace, number),
    }
    found = []
    for name, cost in costs.items():
        known = {number: cost(number) for number in values}
        points = {number: (values[number], of) for number, of in known.items() if of is not None}
        if points:
            found.append(_front(points, task, name))
    return found


def _front(points: Mapping[int, Point], task: Task, cost: str) -> Front:
    sign = 1.0 if task.mode == "min" else -1.0
    numbers = list(points)
    minimised = [(sign * value, of) for value, of in points.values()]
    worst = max(x for x, _ in minimised), max(y for _, y in minimised)
    best = [numbers[i] for i in front(minimised)]
    return Front(
        metric=task.metric,
        cost=cost,
        trials=[(number, *points[number]) for number in best],
        reference=(sign * worst[0], worst[1]),
        hypervolume=hypervolume(minimised, worst),
    )


def training_seconds(workplace: Workplace, number: int) -> float | None:
    """Seconds that a trial and what it continues have trained; None without a checkpoint."""
    try:
        last = CheckpointStore(workplace.trial_folder(number)).last()
    except CheckpointError:
        return None
    if last is None:
        return None
    reports = [*last.description.get("before", []), *last.reports]  # the origin's too
    return sum(report["time/training_seconds"] for report in reports) or None


def to_json(found: Sequence[Front]) -> str:
    """The fronts for programs, by cost."""
    plain = {
        each.cost: {
            "hypervolume": each.hypervolume,
            "reference": {each.metric: each.reference[0], each.cost: each.reference[1]},
            "front": [
                {"trial": number, each.metric: value, each.cost: cost}
                for number, value, cost in each.trials
            ],
        }
        for each in found
    }
    return json.dumps(plain, indent=1)
