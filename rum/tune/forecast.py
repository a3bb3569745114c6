"""What a search will cost, before it starts: parameters, memory, hours, disk."""

import dataclasses
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from mlflow import MlflowClient

from rum.errors import ConfigError
from rum.experiment import ExperimentConfig, model_sizes
from rum.models import SequenceModel, build_model
from rum.tasks import Task
from rum.tune.config import SearchConfig
from rum.tune.limits import Limits
from rum.tune.prediction import Cost, Predictor
from rum.tune.samplers import build_sampler
from rum.tune.schedulers import build_scheduler
from rum.tune.space import apply, extreme, suggest
from rum.tune.study import Study
from rum.tune.terminal import say
from rum.tune.tracking import study_runs

SAMPLES = 25
PROBE_STEPS = 8  # time steps of the probe's window
BYTES_PER_PARAMETER = 12  # weights and Adam's two moments, float32


@dataclass(frozen=True)
class Forecast:
    """The cost of a search; hours are rough, from one probe of a few steps on this machine."""

    smallest: Cost
    """Of the experiment of the space with the fewest parameters."""
    typical: Cost
    """Of the median of a sample of the space, by parameters."""
    largest: Cost
    """Of the experiment of the space with the most parameters."""
    epochs_per_trial: float
    """Mean, as far as the scheduler stops trials early."""
    hours: float
    """With the scheduler stopping trials as it should."""
    hours_at_most: float
    """If no trial is stopped."""
    disk_bytes: int
    """Best and last checkpoint of every trial, and of every run of a finalist."""
    free_bytes: int

    def __str__(self) -> str:
        """For people."""
        sizes = {"smallest": self.smallest, "typical": self.typical, "largest": self.largest}
        trials = "\n".join(
            f"{name.capitalize()} trial: {cost.parameters:,} parameters, about "
            f"{cost.memory_bytes / 1e9:.2f} GB of memory, "
            f"{cost.seconds_per_update:.2g} s an update"
            for name, cost in sizes.items()
        )
        return (
            f"{trials}\n"
            f"Forecast: {_hours(self.hours)} with early stopping (on average "
            f"{self.epochs_per_trial:.1f} epochs a trial), at most {_hours(self.hours_at_most)}; "
            f"disk {self.disk_bytes / 2**30:.1f} GiB of {self.free_bytes / 2**30:.0f} GiB free"
        )


def _hours(hours: float) -> str:
    return f"{hours * 60:.0f} minutes" if hours < 2 else f"{hours:,.0f} hours"


def forecast(
    config: SearchConfig, task: Task, output_dir: Path, concurrent: int, limits: Limits
) -> Forecast:
    """Forecasts a search from the ends of its space, samples of it, and one probe.

    Args:
        config: The search.
        task: Its task, loaded.
        output_dir: On the disk in question.
        concurrent: Trials at a time.
        limits: Of the search; the probe corrects the time that their predictor says.
    """
    predictor = limits.predictor
    study, sampled = optuna.create_study(), []
    for number in range(SAMPLES):
        study.sampler = build_sampler(config.sampler, number)
        sampled.append(apply(config, suggest(study.ask(), config.space, predictor.fit)))
    smallest, largest = (
        extreme(
            config,
            config.space,
            lambda e: predictor.predict(e).parameters,
            largest=end,
            fit=predictor.fit,
        )
        for end in (False, True)
    )
    feasible = [e for e in sampled if limits.judge(e).reason is None] or [smallest]
    feasible.sort(key=lambda experiment: predictor.predict(experiment).parameters)
    typical = feasible[len(feasible) // 2]
    before = predictor.predict(typical).seconds_per_update
    measured = _probe(typical, task)
    predictor.correction = dataclasses.replace(
        predictor.correction, seconds=predictor.correction.seconds * measured / before
    )
    costs = [predictor.predict(experiment) for experiment in feasible]
    # Validation comes on top.
    mean_epoch = statistics.mean(c.seconds_per_update for c in costs) * task.steps_per_epoch * 1.1
    mean_parameters = statistics.mean(cost.parameters for cost in costs)
    max_epochs = config.training.max_epochs
    epochs = build_scheduler(config, task).mean_epochs(max_epochs)
    total = mean_epoch * config.search.num_trials / concurrent / 3600
    kept = config.search.num_trials + config.search.num_repeats
    return Forecast(
        smallest=predictor.predict(smallest),
        typical=predictor.predict(typical),
        largest=predictor.predict(largest),
        epochs_per_trial=epochs,
        hours=total * epochs,
        hours_at_most=total * max_epochs,
        disk_bytes=int(2 * BYTES_PER_PARAMETER * mean_parameters) * kept,
        free_bytes=shutil.disk_usage(_existing(output_dir)).free,
    )


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _probe(experiment: ExperimentConfig, task: Task) -> float:
    """Seconds of one update, from a short window scaled to the full one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(experiment.training.threads or threads)
    device = experiment.training.device
    model = build_model(experiment.model, model_sizes(task)).to(device)
    batch = task.training_batch(0)
    steps = len(batch.input)
    if isinstance(model, SequenceModel):  # its time is proportional to the steps
        steps = min(PROBE_STEPS, steps)
    input, target = batch.input[:steps].to(device), batch.target[:steps].to(device)
    durations = []
    for _ in range(3):
        began = time.perf_counter()
        task.loss(model(input)[0], target).backward()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return min(durations) * len(batch.input) / steps


def calibrate(
    predictor: Predictor,
    base: ExperimentConfig,
    study: Study,
    client: MlflowClient,
    experiment_id: str,
) -> None:
    """Corrects the predictor by what a study's ended trials measured, and says so."""
    trials = {trial.number: trial for trial in study.ended()}
    measured = [
        (apply(base, trials[number].params), run.data.metrics)
        for number, run in study_runs(client, experiment_id, study.name, study.id)
        if number in trials and run.data.metrics
    ]
    if measured:
        correction = predictor.calibrate(measured)
        say(
            f"Calibrated by {len(measured)} ended trials: memory x {correction.memory:.2f}, "
            f"time x {correction.seconds:.2f} of what was predicted"
        )


def check_disk(prediction: Forecast, reserve_gigabytes: float) -> None:
    """Raises ConfigError if the search would leave less than the reserve free."""
    left = prediction.free_bytes - prediction.disk_bytes
    if left < reserve_gigabytes * 1e9:
        raise ConfigError(
            f"the search needs {prediction.disk_bytes / 1e9:.1f} GB of disk for checkpoints, but "
            f"{prediction.free_bytes / 1e9:.1f} GB are free and search.disk_reserve_gigabytes = "
            f"{reserve_gigabytes} must stay so: choose another output_dir or fewer trials"
        )
