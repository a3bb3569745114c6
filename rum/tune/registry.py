"""The best model of each task and corpus in MLflow's registry, under the alias `best`."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from rum.errors import TrackingError
from rum.tasks import Task
from rum.train import task_slug
from rum.training.checkpoint import Checkpoint
from rum.tune.spread import Spread, is_beyond_noise

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for three small files

ALIAS = "best"
ARTIFACT = "checkpoint"


@dataclass(frozen=True)
class Registered:
    """A model version, and whether it is the best now."""

    name: str
    version: str
    message: str


def model_name(task: Task, task_name: str) -> str:
    """Name of the registered model of a task and corpus."""
    return f"rum-{task_slug(task, task_name)}"


def register(
    client: MlflowClient,
    run_id: str,
    checkpoint: Checkpoint,
    task: Task,
    task_name: str,
    spread: Spread | None = None,
) -> Registered:
    """Makes a checkpoint an artifact of its run and a version of the task's model.

    The alias `best` moves only if the validation metric beats that of its holder under the same
    protocol and on the same data, and beyond noise as far as that is known of one of them
    (`rum.tune.spread.is_beyond_noise`). Doing this twice changes nothing; with a spread of more
    seeds the version says that one.

    Args:
        client: MLflow.
        run_id: The run that made the checkpoint.
        checkpoint: Best by validation.
        task: The task.
        task_name: Its name.
        spread: Of the run's configuration under several seeds; None if it ran under one.
    """
    name = model_name(task, task_name)
    value = float(checkpoint.description["best_value"])
    spread = spread or Spread.of([value])
    version = _existing_version(client, name, run_id, checkpoint)
    if version is None:
        client.log_artifacts(run_id, str(checkpoint.path), ARTIFACT)
        root = client.get_run(run_id).info.artifact_uri
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = client.create_model_version(
            name,
            f"{root}/{ARTIFACT}",
            run_id,
            tags={
                "metric": task.metric,
                "value": repr(value),
                **_spread_tags(spread),
                "protocol": task.protocol,
                "data_checksum": task.checksum,
                "sha256": checkpoint.description["sha256"],
            },
        )
    else:
        for key, text in _spread_tags(spread).items():
            client.set_model_version_tag(name, version.version, key, text)
    return Registered(name, str(version.version), _move_alias(client, version, spread, task))


def _spread_tags(spread: Spread) -> dict[str, str]:
    if spread.count == 1:
        return {}
    return {
        "mean": repr(spread.mean),
        "std": repr(spread.std),
        "seeds": str(spread.count),
        "interval": json.dumps(spread.interval),
    }


def _spread_of(version: ModelVersion) -> Spread:
    tags = version.tags
    if "seeds" not in tags:
        return Spread.of([float(tags["value"])])
    return Spread(float(tags["mean"]), float(tags["std"]), int(tags["seeds"]))


def _existing_version(
    client: MlflowClient, name: str, run_id: str, checkpoint: Checkpoint
) -> ModelVersion | None:
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if version.tags.get("sha256") == checkpoint.description["sha256"]:
            return version
    return None


def _move_alias(client: MlflowClient, version: ModelVersion, spread: Spread, task: Task) -> str:
    name = version.name
    alias = f"models:/{name}@{ALIAS}"
    try:
        holder = client.get_model_version_by_alias(name, ALIAS)
    except MlflowException:  # no version has the alias yet
        holder = None
    if holder is not None and holder.version == version.version:
        return f"{alias} is version {version.version} ({task.metric} {spread})"
    if holder is not None:
        same = (task.protocol, task.checksum)
        if (holder.tags.get("protocol"), holder.tags.get("data_checksum")) != same:
            return (
                f"{alias} stays at version {holder.version}, which was measured under another "
                f"protocol or on other data; this one is version {version.version}"
            )
        held = _spread_of(holder)
        is_better = spread.mean < held.mean if task.mode == "min" else spread.mean > held.mean
        if not (is_better and is_beyond_noise(spread, held)):
            noise = " which is better, but not beyond noise" if is_better else ""
            return (
                f"{alias} stays at version {holder.version} ({task.metric} {held}); "
                f"this one is version {version.version} ({spread}){noise}"
            )
    client.set_registered_model_alias(name, ALIAS, version.version)
    return f"{alias} is now version {version.version} ({task.metric} {spread})"


@dataclass(frozen=True)
class Fetched:
    """A registered checkpoint on this machine."""

    path: Path
    run_id: str


def fetch(client: MlflowClient, uri: str, tracking_uri: str, folder: Path) -> Fetched:
    """Downloads the checkpoint of `models:/<name>@<alias>` or `models:/<name>/<version>`.

    Args:
        client: MLflow.
        uri: Of the model.
        tracking_uri: MLflow's.
        folder: Where the checkpoint's folder goes.

    Raises:
        TrackingError: If there is none.
    """
    reference = uri.removeprefix("models:/")
    try:
        if "@" in reference:
            version = client.get_model_version_by_alias(*reference.split("@", 1))
        else:
            version = client.get_model_version(*reference.rsplit("/", 1))
        path = mlflow.artifacts.download_artifacts(
            artifact_uri=version.source, dst_path=str(folder), tracking_uri=tracking_uri
        )
    except (MlflowException, TypeError, OSError) as error:
        raise TrackingError(f"cannot get {uri}: {error}") from error
    return Fetched(Path(path), str(version.run_id))
