"""Replays searches on recorded learning curves, in asynchronous order: which finds what, how soon.

python benchmarks/search.py            all views and methods, ten seeds each; results/search.json

The tables are those of `python benchmarks/learning_curves.py`. A search's workers each train one
epoch in a unit of time; conductor, schedulers and Optuna's samplers are the platform's own.
Sampled values are rounded to the table's grid. Ray Tune as shipped takes part with its own
OptunaSearch and ASHAScheduler, and where it is installed (`pip install syne-tune`)
Syne Tune with ASHA-CQR. Population-based training cannot be replayed: its curves depend on
what was copied.
"""

import argparse
import bisect
import datetime
import heapq
import importlib.util
import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import optuna
from learning_curves import RESULTS, TABLES
from optuna.trial import TrialState

from rum.experiment import ExperimentConfig
from rum.seeding import derive_seed
from rum.tasks import Task
from rum.tune.conductor import Conductor
from rum.tune.config import Domain, SamplerConfig, SchedulerConfig, SearchConfig
from rum.tune.messages import FINISHED, RUNNING, Workplace
from rum.tune.schedulers import build_scheduler
from rum.tune.study import Study, ensure_study

WORKERS = 4
FULL_TRIALS = 64
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)  # of the epochs of so many full trials
OUT = RESULTS.parent / "search.json"

VIEWS: dict[str, tuple[str, dict[str, list[Any]]]] = {
    **{name: (name, {}) for name in TABLES},
    # Few configurations solve these, and late: where rungs below the break-through do harm.
    "recall, slow": (
        "recall",
        {"training.learning_rate": [3e-4, 1e-3], "model.hidden_size": [16, 32]},
    ),
    "copying, slow": (
        "copying",
        {"training.learning_rate": [3e-4, 1e-3, 3e-3], "model.hidden_size": [16, 32]},
    ),
}
"""What is searched: a table, or a part of its grid."""


@dataclass
class Recorded:
    """A table of curves."""

    name: str
    mode: str
    metric: str
    grid: dict[str, list[Any]]
    curves: dict[tuple[Any, ...], list[float]]
    max_epochs: int
    worst: float

    def point(self, parameters: dict[str, Any]) -> tuple[Any, ...]:
        """The grid's point that is nearest, rates by their logarithm."""
        return tuple(
            min(values, key=lambda value: abs(math.log(value) - math.log(parameters[name])))
            if name == "training.learning_rate"
            else parameters[name]
            for name, values in self.grid.items()
        )

    def value(self, parameters: dict[str, Any], epoch: int) -> float:
        """The metric after an epoch; that of a run which diverged stays at the worst of all."""
        curve = self.curves[self.point(parameters)]
        return curve[epoch - 1] if epoch <= len(curve) else self.worst

    def better(self, a: float, b: float) -> float:
        """Of two values."""
        return min(a, b) if self.mode == "min" else max(a, b)

    def best_by(self, parameters: dict[str, Any], epoch: int) -> float:
        """The best value up to an epoch."""
        values = [self.value(parameters, each) for each in range(1, epoch + 1)]
        return min(values) if self.mode == "min" else max(values)

    def optimum(self) -> float:
        """The best value of the whole table."""
        values = [value for curve in self.curves.values() for value in curve]
        return min(values) if self.mode == "min" else max(values)

    def space(self) -> dict[str, Domain]:
        """What is searched: rates between the grid's ends, everything else as choices."""
        rate = self.grid["training.learning_rate"]
        choices = {
            name: Domain(type="categorical", choices=values)
            for name, values in self.grid.items()
            if name != "training.learning_rate"
        }
        domain = Domain(type="float", low=min(rate), high=max(rate), log=True)
        return {"training.learning_rate": domain, **choices}


def load(view: str) -> Recorded:
    """Reads a recorded table, or the part of it."""
    name, part = VIEWS[view]
    stored = json.loads((RESULTS / f"{name}.json").read_text())
    grid = stored["grid"]
    curves = {
        tuple(run["parameters"][key] for key in grid): run["curve"] for run in stored["runs"]
    }
    complete = math.prod(len(values) for values in grid.values())
    if len(curves) != complete:
        raise SystemExit(f"{name}: {len(curves)} of {complete} curves are recorded")
    grid = grid | part
    curves = {point: curves[point] for point in itertools.product(*grid.values())}
    values = [value for curve in curves.values() for value in curve]
    return Recorded(
        name,
        stored["mode"],
        stored["metric"],
        grid,
        curves,
        stored["experiment"]["training.max_epochs"],
        max(values) if stored["mode"] == "min" else min(values),
    )


@dataclass
class Course:
    """What a search had found after so many epochs of training, all trials together."""

    epochs: list[int] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    solvers_begun: int = 0
    solvers_lost: int = 0

    def at(self, epochs: float) -> float:
        """The best value when `epochs` epochs had been trained."""
        return self.best[max(0, bisect.bisect_right(self.epochs, epochs) - 1)]


class Unrecorded:
    """A tracker that writes nothing."""

    def known_status(self, number: int) -> str:
        """As if all were there."""
        return FINISHED

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Whatever else a tracker is asked to write."""
        return lambda *_, **__: None


Trial = tuple[dict[str, Any], Callable[[int, float], bool]]
"""Parameters, and what takes a value after an epoch and says whether the trial ends there."""


def replay(table: Recorded, trials: Iterator[tuple[int, Trial] | None], budget: int) -> Course:
    """Runs trials on `WORKERS` workers until `budget` epochs are trained.

    Args:
        table: The curves.
        trials: Gives the epoch to begin after, and a trial; None while there is none to start.
        budget: In epochs.
    """
    course = Course()
    events: list[tuple[int, int, int, int, Trial]] = []
    clock = count = 0
    best = table.worst
    while True:
        while len(events) < WORKERS:
            handed = next(trials, None)
            if handed is None:
                break
            begun, trial = handed
            count += 1
            heapq.heappush(events, (clock + 1, count, begun + 1, count, trial))
        if not events or len(course.epochs) >= budget:
            return course
        clock, order, epoch, _, (parameters, tell) = heapq.heappop(events)
        value = table.value(parameters, epoch)
        best = table.better(best, value)
        course.epochs.append(len(course.epochs) + 1)
        course.best.append(best)
        stop = tell(epoch, value)
        if not stop and epoch < table.max_epochs:
            heapq.heappush(events, (clock + 1, order, epoch + 1, count, (parameters, tell)))


def platform(
    table: Recorded, task: Task, sampler: str, scheduler: SchedulerConfig, seed: int, trials: int
) -> tuple[Iterator[tuple[int, Trial] | None], Study]:
    """A search by the platform's conductor."""
    base: ExperimentConfig = TABLES[table.name].experiment
    config = SearchConfig(
        model=base.model,
        task=base.task,
        training=base.training,
        space=table.space(),
        sampler=SamplerConfig(name=sampler, seed=seed),
        scheduler=scheduler,
    )
    storage: Any = optuna.storages.InMemoryStorage()
    ensure_study(storage, "replay", {"mode": table.mode})
    study = Study(storage, "replay", config.space, config.sampler)
    study.target = trials
    tracker: Any = Unrecorded()
    conductor = Conductor(
        study, base, task, build_scheduler(config, task), tracker, Workplace({}, "/none", None)
    )
    key = f"validation/best_{table.metric}"

    def handed() -> Iterator[tuple[int, Trial] | None]:
        while True:
            spec = conductor.next_trial()
            if spec is None:
                yield None
                continue
            number, parameters = spec.number, spec.parameters
            begun = max(study.trial(number).intermediate_values, default=0)
            best = [table.best_by(parameters, begun) if begun else table.worst]

            def tell(
                epoch: int, value: float, number: int = number, best: list[float] = best
            ) -> bool:
                best[0] = table.better(best[0], value)
                status = FINISHED if epoch == table.max_epochs else RUNNING
                report = {"epoch": epoch, key: best[0]}
                message = {"number": number, "status": status, "report": report, "worker": {}}
                return conductor.on_message(message)

            yield begun, (parameters, tell)

    return handed(), study


def ray_as_shipped(table: Recorded, seed: int) -> Iterator[tuple[int, Trial] | None]:
    """Ray Tune's own OptunaSearch and ASHAScheduler, on the raw metric as its users report it."""
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    domains = {
        name: optuna.distributions.FloatDistribution(d.low, d.high, log=True)
        if d.choices is None and d.low is not None and d.high is not None
        else optuna.distributions.CategoricalDistribution(d.choices or [])
        for name, d in table.space().items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        searcher = OptunaSearch(domains, metric="value", mode=table.mode, seed=seed)
    scheduler = ASHAScheduler(
        time_attr="training_iteration",
        metric="value",
        mode=table.mode,
        max_t=table.max_epochs,
        grace_period=1,
        reduction_factor=3,
    )
    number = 0
    while True:
        name = f"trial{number}"
        number += 1
        parameters = searcher.suggest(name)
        trial: Any = type("Trial", (), {"trial_id": name, "config": parameters})()
        scheduler.on_trial_add(None, trial)

        def tell(epoch: int, value: float, name: str = name, trial: Any = trial) -> bool:
            result = {"value": value, "training_iteration": epoch}
            searcher.on_trial_result(name, result)
            stop = bool(scheduler.on_trial_result(None, trial, result) == "STOP")
            if stop or epoch == table.max_epochs:
                scheduler.on_trial_complete(None, trial, result)
                searcher.on_trial_complete(name, result)
            return stop

        yield 0, (parameters, tell)


def syne_tune(table: Recorded, seed: int) -> Iterator[tuple[int, Trial] | None]:
    """Syne Tune's ASHA with conformal quantile regression, on the raw metric."""
    from syne_tune.backend.trial_status import Trial as SyneTrial
    from syne_tune.config_space import choice, loguniform
    from syne_tune.optimizer.baselines import ASHACQR

    space = table.space()
    domains = {  # choices by their text, since it takes none of different types
        name: loguniform(d.low, d.high) if d.choices is None else choice(list(map(str, d.choices)))
        for name, d in space.items()
    }
    scheduler = ASHACQR(
        domains,
        metric="value",
        do_minimize=table.mode == "min",
        time_attr="epoch",
        max_t=table.max_epochs,
        grace_period=1,
        reduction_factor=3,
        random_seed=seed,
    )
    for number in itertools.count():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            suggestion = scheduler.suggest()
        trial = SyneTrial(number, suggestion.config, datetime.datetime.now())
        scheduler.on_trial_add(trial)

        def tell(epoch: int, value: float, trial: Any = trial) -> bool:
            stop = scheduler.on_trial_result(trial, {"value": value, "epoch": epoch}) == "STOP"
            if stop:
                scheduler.on_trial_remove(trial)
            return bool(stop)

        parameters = {
            name: value
            if space[name].choices is None
            else next(each for each in space[name].choices or [] if str(each) == value)
            for name, value in suggestion.config.items()
        }
        yield 0, (parameters, tell)


def _scheduler(name: str, *, knows_plateau: bool = True) -> SchedulerConfig:
    return SchedulerConfig(name=name, plateau_band=0.1 if knows_plateau else None)


METHODS: dict[str, tuple[str, SchedulerConfig]] = {
    "random, full length": ("random", _scheduler("none")),
    "TPE, full length": ("tpe", _scheduler("none")),
    "random + ASHA": ("random", _scheduler("asha", knows_plateau=False)),
    "TPE + ASHA": ("tpe", _scheduler("asha", knows_plateau=False)),
    "TPE + ASHA, plateau": ("tpe", _scheduler("asha")),
    "TPE + promotion": ("tpe", _scheduler("promotion", knows_plateau=False)),
    "TPE + promotion, plateau": ("tpe", _scheduler("promotion")),
    "TPE + HyperBand, plateau": ("tpe", _scheduler("hyperband")),
    "TPE + median": ("tpe", _scheduler("median")),
}
PEERS: dict[str, tuple[str, Callable[[Recorded, int], Iterator[tuple[int, Trial] | None]]]] = {
    "Ray Tune as shipped": ("ray", ray_as_shipped),
    "Syne Tune, ASHA-CQR": ("syne_tune", syne_tune),
}
"""Each with the package that it needs."""


def lost_solvers(table: Recorded, study: Study, solved: float) -> tuple[int, int]:
    """Trials that would solve the task if trained to the end, and those that were not let."""
    begun = lost = 0
    for trial in study.trials(TrialState.COMPLETE, TrialState.PRUNED):
        final = table.best_by(trial.params, table.max_epochs)
        if table.better(final, solved) == final:
            begun += 1
            reached = table.best_by(trial.params, max(trial.intermediate_values))
            lost += table.better(reached, solved) != reached
    return begun, lost


def main() -> None:
    """Replays, prints and keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--views", nargs="*", default=list(VIEWS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--methods", nargs="*", help="only these; the others' figures stay")
    arguments = parser.parse_args()
    peers = {
        name: run for name, (package, run) in PEERS.items() if importlib.util.find_spec(package)
    }
    for name in PEERS.keys() - peers.keys():
        print(f"{name}: not installed, left out")
    unknown = set(arguments.methods or ()) - {*METHODS, *peers}
    if unknown:
        parser.error(f"--methods must be of {[*METHODS, *peers]}, got {sorted(unknown)}")
    results: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {"views": {}}
    results["date"] = datetime.date.today().isoformat()
    for name in arguments.views:
        table = load(name)
        task = TABLES[table.name].experiment.task.load(seed=0, data_dir=None)
        full = FULL_TRIALS * table.max_epochs
        optimum = table.optimum()
        sign = 1 if table.mode == "min" else -1
        reference = []
        for seed in range(arguments.seeds):
            trials, _ = platform(
                table, task, "random", _scheduler("none"), 1000 + seed, FULL_TRIALS
            )
            reference.append(replay(table, trials, full).best[-1])
        # Reached when 99 % of the way from the plateau to it is done.
        target = statistics.median(reference)
        target += 0.01 * (task.plateau - target)
        print(f"\n{name}: optimum {optimum:.4f}, {FULL_TRIALS} random full trials {target:.4f}")
        rows: dict[str, Any] = {}
        if arguments.methods:
            rows = results["views"][name]["methods"]
        for method in arguments.methods or (*METHODS, *peers):
            courses = []
            for seed in range(arguments.seeds):
                own = derive_seed("search", seed) % 2**31
                if method in peers:
                    courses.append(replay(table, peers[method](table, own), full // 2))
                    continue
                trials, _ = platform(table, task, *METHODS[method], own, FULL_TRIALS)
                courses.append(replay(table, trials, full // 2))
            regret = {
                share: [sign * (course.at(share * full) - optimum) for course in courses]
                for share in SHARES
            }
            reached = [
                next(
                    (
                        epochs / full
                        for epochs, best in zip(course.epochs, course.best, strict=True)
                        if table.better(best, target) == best
                    ),
                    math.inf,
                )
                for course in courses
            ]
            row = rows[method] = {
                "regret": {str(s): statistics.mean(values) for s, values in regret.items()},
                "half_width": {
                    str(s): 2 * statistics.stdev(values) / math.sqrt(len(values))
                    for s, values in regret.items()
                },
                "share_of_epochs_to_target": sorted(reached),
            }
            print(
                f"{method:26}"
                + "".join(
                    f" {row['regret'][str(s)]:.4f}±{row['half_width'][str(s)]:.4f}" for s in SHARES
                )
                + f"  target after {statistics.median(reached):.3f}, reached by "
                f"{sum(x < math.inf for x in reached)} of {len(reached)}"
            )
        results["views"][name] = {"optimum": optimum, "target": target, "methods": rows}
        if task.plateau_metric is not None and not arguments.methods:
            rows["solvers"] = _solvers(table, task, arguments.seeds)
        OUT.write_text(json.dumps(results, indent=1))


def _solvers(table: Recorded, task: Task, seeds: int) -> dict[str, Any]:
    """Of 64 random trials run until nothing is left to do: solvers ended, and epochs trained."""
    perfect = 0.0 if table.mode == "min" else 1.0
    solved = perfect + 0.1 * (task.plateau - perfect)
    kept: dict[str, Any] = {}
    for label, scheduler in (
        ("ASHA", _scheduler("asha", knows_plateau=False)),
        ("ASHA, plateau", _scheduler("asha")),
        ("promotion", _scheduler("promotion", knows_plateau=False)),
        ("promotion, plateau", _scheduler("promotion")),
        ("median", _scheduler("median")),
    ):
        begun = lost = epochs = found = 0
        for seed in range(seeds):
            trials, study = platform(table, task, "random", scheduler, seed, FULL_TRIALS)
            course = replay(table, trials, 10**9)
            b, ended = lost_solvers(table, study, solved)
            begun, lost, epochs = begun + b, lost + ended, epochs + len(course.epochs)
            found += table.better(course.best[-1], solved) == course.best[-1]
        share = epochs / (seeds * FULL_TRIALS * table.max_epochs)
        kept[label] = {"solvers": begun, "lost": lost, "share_of_epochs": share, "found": found}
        print(
            f"    {label:20} {lost} of {begun} solvers ended before they solved, "
            f"{share:.2f} of the epochs, solved in {found} of {seeds} searches"
        )
    return kept


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    main()
