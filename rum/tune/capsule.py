"""A run's capsule: what repeats it exactly, kept with it in MLflow as `capsule.json`."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from rum.errors import TrackingError
from rum.experiment import ExperimentConfig
from rum.kernels import cpu
from rum.parameters import flatten
from rum.tasks import Task
from rum.training.checkpoint import DESCRIPTION_FILE
from rum.tune.provenance import commit, git, versions
from rum.tune.tracking import read_text

FILE = "capsule.json"
FORMAT_VERSION = 1
BIT_EXACT, STATISTICAL = "bit-exact", "statistical"
DIFF_BYTES = 2**17
UNTRACKED_FILES = 100


def make_capsule(
    experiment: ExperimentConfig, task: Task, origin: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The capsule of a run that starts now, as plain values.

    Args:
        experiment: With every option of the run.
        task: Its task, loaded.
        origin: Where the run's first checkpoint comes from, if it continues another's.

    Returns:
        `format_version`, `experiment`, `task`, `seed`, `threads`, `data`, `level` ("bit-exact" on
        a CPU with the same versions, "statistical" elsewhere), `versions`, `code`, `platform` (of
        this process, which may not be the worker's) and `origin`.
    """
    training = experiment.training
    sections = ("model", "task", "training")
    return {
        "format_version": FORMAT_VERSION,
        "experiment": {name: dataclasses.asdict(getattr(experiment, name)) for name in sections},
        "task": experiment.task.name,
        "seed": training.seed,
        "threads": training.threads or torch.get_num_threads(),
        "data": {"corpus": task.corpus, "checksum": task.checksum},
        "level": BIT_EXACT if training.device == "cpu" else STATISTICAL,
        "versions": versions(),
        "code": _code(),
        "platform": _platform(),
        "origin": None if origin is None else {**origin, "sha256": _checksum(origin)},
    }


@lru_cache(maxsize=1)
def _code() -> dict[str, Any]:
    """Commit and uncommitted changes of this package's checkout; all null outside of one."""
    at = commit()
    diff = None if at is None else git("diff", "--no-ext-diff", "--no-color", "HEAD")
    if diff is None:
        return dict.fromkeys(("commit", "diff", "diff_sha256", "diff_is_cut", "untracked"))
    whole = f"{diff}\n".encode() if diff else b""
    untracked = git("ls-files", "--others", "--exclude-standard", "--full-name", ":/") or ""
    return {
        "commit": at,
        "diff": whole[:DIFF_BYTES].decode(errors="ignore"),
        "diff_sha256": hashlib.sha256(whole).hexdigest(),
        "diff_is_cut": len(whole) > DIFF_BYTES,
        "untracked": untracked.splitlines()[:UNTRACKED_FILES],
    }


@lru_cache(maxsize=1)
def _platform() -> dict[str, Any]:
    """What results may depend on in their last bits."""
    compiled = cpu.library()
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "compiled_kernels_sha256": None
        if compiled is None
        else hashlib.sha256(Path(compiled._name).read_bytes()).hexdigest(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _checksum(origin: Mapping[str, Any]) -> str | None:
    """SHA-256 of the checkpoint that a run begins from; None where it cannot be read."""
    try:
        text = (Path(origin["checkpoint"]) / DESCRIPTION_FILE).read_text()
        return str(json.loads(text)["sha256"])
    except (OSError, ValueError, KeyError):  # the run itself ends with the error
        return None


def read_capsule(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """The capsule of a recorded run.

    Raises:
        TrackingError: If it has none, or one that cannot be read.
    """
    try:
        capsule = json.loads(read_text(client, run_id, FILE))
        version = capsule["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise TrackingError(f"the {FILE} of run {run_id} is damaged: {error!r}") from error
    if version != FORMAT_VERSION:
        raise TrackingError(
            f"the {FILE} of run {run_id} has format {version}, this version reads format "
            f"{FORMAT_VERSION}"
        )
    return dict(capsule)


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each version, part of the code or of the machine that is not what it was."""
    sections = ("versions", "code", "platform")
    before, after = (flatten({name: each[name] for name in sections}) for each in (then, now))
    return [
        f"{name}: {_shortened(before.get(name))} then, {_shortened(after.get(name))} now"
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name) and name not in ("code.diff", "code.diff_is_cut")
    ]


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
