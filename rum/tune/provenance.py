"""Tags that say what made a run: commit, versions, data, and the command that repeats it."""

import getpass
import platform
import re
import shlex
import socket
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rum
from rum.cells import ModelConfig
from rum.experiment import ExperimentConfig
from rum.parameters import flatten
from rum.tasks import Task


def common_tags(task: Task, task_name: str) -> dict[str, str]:
    """Tags of every run of a search or training."""
    return {
        "rum.task": task_name,
        "rum.corpus": task.corpus,
        "rum.data_checksum": task.checksum,
        "rum.metric": task.metric,
        "rum.protocol": task.protocol,
        "rum.driver_host": socket.gethostname(),
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.type": "LOCAL",
        **{f"rum.{name}": text for name, text in versions().items()},
        **_commit_tags(),
    }


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of this package, of Python, and of what both run on."""
    packages = ("torch", "ray", "optuna", "mlflow", "hydra-core")
    return {
        "version": rum.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def git(*arguments: str) -> str | None:
    """What git says in the checkout of this package; None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(rum.__file__).parent,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The commit of this package's checkout; None where it is not in one."""
    is_tracked = git("ls-files", "--error-unmatch", "__init__.py") is not None
    return git("rev-parse", "HEAD") if is_tracked else None


def _commit_tags() -> dict[str, str]:
    at = commit()
    if at is None:
        return {}
    dirty = bool(git("status", "--porcelain", "--", ":/"))
    return {"mlflow.source.git.commit": at, "rum.git_dirty": str(dirty).lower()}


def trial_tags(experiment: ExperimentConfig) -> dict[str, str]:
    """Tags of one training run."""
    return {
        "rum.model": experiment.model.name,
        "rum.lambda": lambda_of(experiment.model),
        "rum.seed": str(experiment.training.seed),
        "rum.device": experiment.training.device,
        "rum.command": command(experiment),
    }


def lambda_of(model: ModelConfig) -> str:
    """The powers of the associative memory in a model's cells, "none" where it has no RUM."""
    found = (value for name, value in flatten(model).items() if name.split(".")[-1] == "lambda_")
    powers = [f"{value:g}" for value in found if value is not None]
    return " ".join(powers) or "none"


def command(experiment: ExperimentConfig) -> str:
    """The command that repeats a run by itself."""
    flat = flatten(
        ExperimentConfig(
            model=experiment.model, task=experiment.task, training=experiment.training
        )
    )
    names = {"model.name": "model", "task.name": "task"}
    first = [f"{names[key]}={flat.pop(key)}" for key in names]
    rest = [f"{key}={option_text(value)}" for key, value in flat.items()]
    return shlex.join(["python", "pipelines/train.py", *first, *rest])


def option_text(value: Any) -> str:
    """An option's value as it is written in an override."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not re.fullmatch(r"[\w/-][\w/.-]*", value):
        # Hydra reads a backslash as itself unless a quote follows, the closing one included.
        last = "\\" * (len(value) - len(value.rstrip("\\")))
        escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
        return f"'{escaped}{last}'"
    return str(value)
