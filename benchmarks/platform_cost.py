"""What the platform costs beside the training: driver, Optuna's database, MLflow.

python benchmarks/platform_cost.py [--postgres <URI of an empty database>]
results in results/platform_cost.json; with a URI MLflow writes there, too

(1) Real trials of one short epoch, one at a time on a reused actor: from the end of one to the
end of the next, less the training and validation that it reports, is what Ray, Optuna, MLflow,
the checkpoint and the hand-over cost together. (2) Simulated trials (TPE, 8 at a time) through
the real conductor, study and tracker, without Ray. CPU seconds of the driver's thread and of the
thread that writes to MLflow, how far that one is behind, and whether a trial costs more when there
are many: 1,000 trials (asha, 9 epochs at most) with reports as fast as the driver takes them; the
same with so many trials a second as a fast search has; 100 trials that train all of 90 epochs, for
the cost of reports alone.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rum.cells import RUMConfig
from rum.experiment import ExperimentConfig
from rum.tasks import CopyingConfig
from rum.train import TrackingConfig
from rum.training.checkpoint import CheckpointStore
from rum.training.config import TrainingConfig
from rum.tune.conductor import Conductor
from rum.tune.config import Domain, SamplerConfig, SchedulerConfig, SearchConfig, SearchOptions
from rum.tune.database import open_storage
from rum.tune.messages import FINISHED, RUNNING, Workplace
from rum.tune.schedulers.halving import Halving
from rum.tune.search import run_search
from rum.tune.space import space_to_plain
from rum.tune.study import Study, ensure_study
from rum.tune.tracking import FINISHED as STUDY_FINISHED
from rum.tune.tracking import Tracker, connect

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "platform_cost.json"
EPOCHS, WORKERS = 9, 8
LONG_EPOCHS = 90
TRIALS_PER_SECOND = 4.0
REAL_TRIALS, WARM_UP = 40, 10
SPACE = {
    "training.learning_rate": Domain(type="float", low=1e-4, high=1e-2, log=True),
    "model.hidden_size": Domain(type="int", low=8, high=32),
    "model.zoneout": Domain(type="float", low=0.0, high=0.5),
    "model.eta": Domain(type="categorical", choices=[None, 0.5, 1.0]),
    "training.max_grad_norm": Domain(type="float", low=0.5, high=5.0),
}


def real_trials() -> dict[str, float]:
    """Seconds of a trial beyond its training, in the steady state."""
    with tempfile.TemporaryDirectory() as folder:
        config = SearchConfig(
            model=RUMConfig(hidden_size=16),
            task=CopyingConfig(delay=5, batch_size=8, steps_per_epoch=5),
            training=TrainingConfig(max_epochs=1),
            space=SPACE,
            scheduler=SchedulerConfig(name="none"),
            search=SearchOptions(num_trials=REAL_TRIALS, max_concurrent=1),
            study="overhead",
            output_dir=folder,
        )
        run_search(config)
        study = Study(open_storage(Path(folder)), "overhead", config.space, config.sampler)
        trials = study.trials()
        costs = []
        for before, trial in zip(trials[WARM_UP - 1 :], trials[WARM_UP:], strict=False):
            assert before.datetime_complete is not None
            assert trial.datetime_complete is not None
            last = CheckpointStore(
                Path(folder) / "studies" / "overhead" / "trials" / f"{trial.number:04d}"
            ).last()
            assert last is not None
            work = sum(v for k, v in last.reports[-1].items() if k.startswith("time/"))
            between = (trial.datetime_complete - before.datetime_complete).total_seconds()
            costs.append(between - work)
    tenths = statistics.quantiles(costs, n=10)
    return {
        "trials": len(costs),
        "seconds_per_trial_median": round(statistics.median(costs), 3),
        "p10": round(tenths[0], 3),
        "p90": round(tenths[-1], 3),
    }


@dataclass
class Course:
    """What was seen while the trials ran, in CPU seconds of the driver's thread."""

    reports: int = 0
    ends: list[float] = field(default_factory=lambda: [time.thread_time()])
    """When each trial ended."""
    going_on: list[float] = field(default_factory=list)
    """What each report took after which its trial goes on."""
    most_waiting: int = 0
    """Records that MLflow had not taken yet, at most."""


def simulated_study(
    num_trials: int,
    uri: str | None,
    *,
    epochs: int = EPOCHS,
    milestones: Sequence[int] = (1, 3),
    trials_per_second: float = math.inf,
) -> dict[str, float]:
    """CPU seconds of a driver whose trials take no time, or end at a rate."""
    base = ExperimentConfig(
        model=RUMConfig(hidden_size=8),
        task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
        training=TrainingConfig(max_epochs=epochs),
    )
    task = base.task.load(seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        storage = open_storage(folder)
        definition = {"mode": "min", "space": space_to_plain(SPACE)}
        ensure_study(storage, "simulated", definition)
        study = Study(storage, "simulated", SPACE, SamplerConfig(name="tpe"))
        study.target = num_trials
        client, experiment_id = connect(TrackingConfig(uri=uri), folder)
        tracker = Tracker(
            client,
            experiment_id,
            "simulated",
            task,
            {"rum.metric": task.metric},
            {"a": 1},
            study_id=study.id,
        )
        workplace = Workplace(dataclasses.asdict(base), str(folder / "study"), None)
        scheduler = Halving(list(milestones), 3, "min")
        conductor = Conductor(study, base, task, scheduler, tracker, workplace)
        began, cpu = time.perf_counter(), time.thread_time()
        whole = time.process_time()
        course = _drive(conductor, tracker, epochs, trials_per_second)
        driver, seconds = time.thread_time() - cpu, time.perf_counter() - began
        waiting = tracker.num_waiting
        flushing = time.perf_counter()
        tracker.close(STUDY_FINISHED)
        behind = time.perf_counter() - flushing
        both = time.process_time() - whole
        ends, tenth = course.ends, num_trials // 10
    return {
        "trials": num_trials,
        "reports": course.reports,
        "driver_cpu_seconds": round(driver, 1),
        "mlflow_thread_cpu_seconds": round(both - driver, 1),
        "driver_cpu_seconds_per_trial": round(driver / num_trials, 4),
        "driver_cpu_seconds_per_250_reports": round(250 * statistics.median(course.going_on), 3),
        "cpu_seconds_per_250_reports_of_all": round(250 * both / course.reports, 2),
        "seconds": round(seconds, 1),
        "records_waiting_at_most": course.most_waiting,
        "records_waiting_at_the_end": waiting,
        "seconds_behind_at_the_end": round(behind, 1),
        "driver_cpu_per_trial_second_tenth": round((ends[2 * tenth] - ends[tenth]) / tenth, 4),
        "driver_cpu_per_trial_last_tenth": round((ends[-1] - ends[-1 - tenth]) / tenth, 4),
    }


def _drive(
    conductor: Conductor, tracker: Tracker, epochs: int, trials_per_second: float
) -> Course:
    """Runs all trials, not faster than so many a second."""
    generator = random.Random(0)
    running: list[list[Any]] = []
    course = Course()
    began = time.perf_counter()
    while True:
        while len(running) < WORKERS:
            spec = conductor.next_trial()
            if spec is None:
                break
            rate = spec.parameters["training.learning_rate"]
            running.append([spec.number, 0, 0.1 + abs(rate - 3e-3) * 100 + generator.random()])
        if not running:
            return course
        trial = generator.choice(running)
        trial[1] += 1
        value = trial[2] / trial[1]
        report = {
            "epoch": trial[1],
            "step": 5 * trial[1],
            "train/loss": value,
            "validation/cross_entropy": value,
            "validation/accuracy": 0.5,
            "validation/best_cross_entropy": value,
            "time/training_seconds": 0.1,
            "time/validation_seconds": 0.01,
            "learning_rate": 1e-3,
            "gradient_norm": 1.0,
            "system/cpu_percent": 100.0,
            "system/memory_megabytes": 500.0,
        }
        status = FINISHED if trial[1] == epochs else RUNNING
        message = {"number": trial[0], "status": status, "report": report, "worker": {"pid": 1}}
        course.reports += 1
        before = time.thread_time()
        if conductor.on_message(message) or status == FINISHED:
            running.remove(trial)
            course.ends.append(time.thread_time())
            course.most_waiting = max(course.most_waiting, tracker.num_waiting)
            due = began + (len(course.ends) - 1) / trials_per_second
            time.sleep(max(0.0, due - time.perf_counter()))
        else:
            course.going_on.append(time.thread_time() - before)


def main() -> None:
    """Measures, prints and keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--postgres", help="URI of an empty database for MLflow")
    parser.add_argument("--only", choices=["real", "simulated"], help="the others' figures stay")
    arguments = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["cpus"] = os.cpu_count()

    def keep(name: str, figures: dict[str, float]) -> None:
        found[name] = figures
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(name, json.dumps(figures, indent=1), flush=True)

    stores = {"SQLite": None, "PostgreSQL": arguments.postgres}
    if arguments.only != "real":
        if arguments.postgres is None:
            del stores["PostgreSQL"]
            print("MLflow on PostgreSQL is left out: --postgres says no database")
        for store, uri in stores.items():
            every = simulated_study(arguments.trials, uri)
            keep(f"simulated, MLflow on {store}", every)
            paced = simulated_study(arguments.trials, uri, trials_per_second=TRIALS_PER_SECOND)
            keep(f"simulated, {TRIALS_PER_SECOND:g} trials a second, MLflow on {store}", paced)
            long = simulated_study(
                max(10, arguments.trials // 10), uri, epochs=LONG_EPOCHS, milestones=()
            )
            keep(f"simulated, {LONG_EPOCHS} epochs each, MLflow on {store}", long)
    if arguments.only != "simulated":
        keep("real trials", real_trials())


if __name__ == "__main__":
    main()
