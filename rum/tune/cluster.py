"""The machine or Ray cluster that a search runs on: what a trial takes of it, its life."""

import logging
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray

from rum.errors import ConfigError
from rum.tune.config import SearchConfig
from rum.tune.crew_size import replicas
from rum.tune.terminal import say


def resources(config: SearchConfig) -> dict[str, float]:
    """What a trial takes of the machine, in Ray's words; its share of a GPU is a number here."""
    gpus = float(config.search.gpus_per_trial)
    if config.training.device.startswith("cuda") and gpus == 0:
        gpus = 1.0
    return {"CPU": config.search.cpus_per_trial, "GPU": gpus}


def concurrent(config: SearchConfig, machine: Mapping[str, float]) -> int:
    """Processes at a time, each of a trial or a crew: as many as fit the machine or cluster.

    Raises:
        ConfigError: If not one does.
    """
    fitting = []
    for kind, share in resources(config).items():
        there = int(machine.get(kind, 0))
        if there < share:
            option = f"search.{kind.lower()}s_per_trial"
            raise ConfigError(f"{option} is {share:g}, but there are {there} {kind}s")
        if share >= 1:
            fitting.append(int(there // share))
        elif share > 0:  # each trial's part lies on one GPU
            fitting.append(there * int(1 / share))
    limit = config.search.max_concurrent
    return min(fitting) if limit is None else min(*fitting, math.ceil(limit / replicas(config)))


def check_ray_address() -> None:
    """Looks whether anything listens there: Ray itself tries a dead address for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like, which Ray finds out about by itself
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address!r}, where nothing answers ({error}): start the cluster, or "
            "unset it to search on this machine"
        ) from error


@contextmanager
def running_ray() -> Iterator[Mapping[str, float]]:
    """Connects to the cluster of RAY_ADDRESS, else starts Ray here; gives its resources."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own files are not used: no loggers, rare snapshots, and no change of folder.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # ProgressCallback shows how it stands
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    own_folder = None
    if ray.is_initialized():
        say("Ray: the running instance of this process")
    elif address:
        say(f"Ray: the cluster at {address}")
        ray.init(address=address, **options)
    else:
        say("Ray: local, on this machine (RAY_ADDRESS is not set)")
        own_folder = _own_ray_folder()
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            _temp_dir=own_folder,
            **options,
        )
    try:
        yield ray.cluster_resources()
    finally:
        if own_folder or address:
            ray.shutdown()
        if own_folder:
            shutil.rmtree(own_folder, ignore_errors=True)


def _own_ray_folder() -> str:
    """A new temporary folder for Ray; removes those of drivers that were killed."""
    prefix = "rum-ray-"  # short: sockets lie in it, and their paths are limited
    for leftover in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        pid = leftover.name.removeprefix(prefix).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-")
