"""What runs in a worker: one trial, from its last checkpoint if it has one."""

import json
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from ray import tune

from rum.errors import DivergedError, SupersededError
from rum.experiment import ExperimentConfig, experiment_from_plain, run_experiment
from rum.tasks import Task
from rum.training.checkpoint import CheckpointStore, read_checkpoint
from rum.training.loop import Report
from rum.tune.messages import (
    CRASHED,
    DIVERGED,
    FINISHED,
    OUT_OF_MEMORY,
    RUNNING,
    Workplace,
)
from rum.tune.prediction import allocatable
from rum.tune.space import apply


def run_trial(config: Mapping[str, Any], workplace: Workplace) -> None:
    """Ray's trainable: trains, reporting each epoch to the driver with `tune.report`.

    Epochs in the last checkpoint are reported again first: the driver may have died before it
    heard of them, and takes each epoch once. What a trial cannot mend (a loss that is not finite,
    an exception) is its last report, so that Ray does not try it again; Ray restarts a trial
    whose process died. One that finds another process at work on its trial ends in silence.

    Args:
        config: `number`, `parameters`, `origin` and `gpus` of `rum.tune.study.TrialSpec`.
        workplace: The rest.
    """
    number = config["number"]
    send = Sender(number)
    try:
        experiment = apply(experiment_from_plain(workplace.experiment), config["parameters"])
        if experiment.training.device.startswith("cuda"):
            share = config["gpus"] or workplace.gpus_per_trial
            limit_memory(experiment.training.device, share)
        _train(experiment, workplace, config, send)
    except SupersededError:
        return  # the process that took over has the say
    except torch.OutOfMemoryError as error:
        send.end(OUT_OF_MEMORY, f"out of memory: {error}")
    except DivergedError as error:
        send.end(DIVERGED, f"diverged: {error}")
    except Exception as error:  # noqa: BLE001  # goes to the driver, which records it
        trace = traceback.format_exc(limit=-3)
        send.end(CRASHED, f"crashed: {type(error).__name__}: {error}\n{trace}")


def _train(
    experiment: ExperimentConfig,
    workplace: Workplace,
    config: Mapping[str, Any],
    send: "Sender",
) -> None:
    folder = workplace.trial_folder(config["number"])
    last = CheckpointStore(folder).last()
    origin = config["origin"]
    for report in last.reports if last else []:
        send.epoch(report, experiment.training.max_epochs)
    run_experiment(
        experiment,
        load_task(repr(experiment.task), experiment, workplace.data_dir),
        folder,
        lambda report: send.epoch(report, experiment.training.max_epochs),
        begin_from=read_checkpoint(Path(origin["checkpoint"])) if origin else None,
    )


def limit_memory(device: str, share: float) -> None:
    """Keeps a trial to its share of a GPU, so that it fails by itself and not its neighbours."""
    torch.cuda.reset_peak_memory_stats(device)  # the process may have run another trial before
    if 0 < share < 1:
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = allocatable(share, total) / total
        torch.cuda.set_per_process_memory_fraction(fraction, torch.device(device).index)


_tasks: dict[tuple[str, int, str | None], Task] = {}


def load_task(key: str, experiment: ExperimentConfig, data_dir: str | None) -> Task:
    """Loads a task once per process: actors are reused for many trials of a search."""
    seed = experiment.training.seed
    if (key, seed, data_dir) not in _tasks:
        _tasks.clear()
        path = Path(data_dir) if data_dir else None
        _tasks[key, seed, data_dir] = experiment.task.load(seed=seed, data_dir=path)
    return _tasks[key, seed, data_dir]


class Sender:
    """Sends a trial's reports to the driver, with the state of this machine."""

    def __init__(self, number: int, report: Callable[..., None] = tune.report) -> None:
        self._number = number
        self._report = report
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call starts the measurement
        self._began = time.monotonic()

    def epoch(self, report: Report, max_epochs: int) -> None:
        """Sends what the trial measured in an epoch."""
        status = FINISHED if report["epoch"] >= max_epochs else RUNNING
        self._send({"status": status, "report": {**report, **self._system()}})

    def end(self, status: str, reason: str) -> None:
        """Sends the trial's last words."""
        self._send({"status": status, "reason": reason})

    def _send(self, message: dict[str, Any]) -> None:
        worker = {"host": socket.gethostname(), "device": _device_name(), "pid": os.getpid()}
        message = {"number": self._number, **message, "worker": worker}
        # As one value, since Ray would flatten nested ones and mix up names that hold slashes.
        self._report({"message": json.dumps(message)})

    def _system(self) -> Report:
        system: Report = {
            "system/cpu_percent": self._process.cpu_percent(),
            "system/memory_megabytes": self._process.memory_info().rss / 2**20,
        }
        if torch.cuda.is_available():
            system["system/gpu_memory_megabytes"] = torch.cuda.max_memory_allocated() / 2**20
        return system


@lru_cache(maxsize=1)
def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
