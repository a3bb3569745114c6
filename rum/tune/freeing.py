"""Frees the disk of checkpoints that nothing needs any more, or says what it would free."""

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from optuna.trial import FrozenTrial

from rum.errors import TrackingError
from rum.tune.config import StudyConfig, output_folder
from rum.tune.messages import Workplace
from rum.tune.registry import ALIAS, ARTIFACT
from rum.tune.study import ORIGIN, Study
from rum.tune.study_folder import LockedStudyError, driver_of, locked
from rum.tune.tracking import connect, study_runs


@dataclass(frozen=True)
class Piece:
    """Something that can be deleted."""

    study: str
    trial: int
    what: str
    """"checkpoints" or "artifacts"."""
    where: str
    """A folder, or the URI of a run's artifacts."""
    bytes: int


def free(
    config: StudyConfig, studies: list[Study], everything: list[Study]
) -> tuple[dict[str, Any], str]:
    """Deletes checkpoints of ended trials, with `confirm`; else lists them.

    What stays: trials that have not ended, and those that they begin from; of a study that is not
    at its end the best trial, which is to be registered, and where trials are copied from each
    other all; the `keep_best` best of every study; the source of each registered model that is
    `best`.

    Args:
        config: The options.
        studies: Whose checkpoints.
        everything: All studies: a trial of one may begin from a trial of another.

    Returns:
        What was found, as plain values and for people.

    Raises:
        TrackingError: If MLflow cannot be used: it knows which trials are registered.
    """
    output_dir = output_folder(config.output_dir)
    client, experiment_id = connect(config.tracking, output_dir)
    registered = _registered_runs(client)
    origins = {path for study in everything for path in _origins(study)}
    pieces: list[Piece] = []
    for study in studies:
        folder = output_dir / "studies" / study.name
        is_run = driver_of(folder) is not None
        try:
            # So that no driver starts meanwhile; one that runs has its own needs kept.
            with nullcontext() if is_run or not config.confirm else locked(folder):
                runs = dict(study_runs(client, experiment_id, study.name, study.id))
                ids = {n: run.info.run_id for n, run in runs.items() if n is not None}
                kept = {n for n, run_id in ids.items() if run_id in registered}
                for trial in _freeable(study, config.keep_best, is_run):
                    if trial.number in kept:
                        continue
                    found = list(_checkpoints(study.name, trial.number, folder, origins))
                    if config.artifacts and trial.number in ids:
                        found += _artifacts(study.name, trial.number, client, ids[trial.number])
                    pieces += found
                    if config.confirm:
                        for piece in found:
                            _delete(piece, client)
        except LockedStudyError:
            continue  # a driver has just started: the next time
    return _report(pieces, config)


def _report(pieces: list[Piece], config: StudyConfig) -> tuple[dict[str, Any], str]:
    total = sum(piece.bytes for piece in pieces)
    plain = {
        "deleted": config.confirm,
        "bytes": total,
        "pieces": [asdict(piece) for piece in pieces],
    }
    if not pieces:
        return plain, "nothing can be freed"
    lines = [
        f"  {_size(piece.bytes):>9}  {piece.study} trial {piece.trial}: {piece.what} {piece.where}"
        for piece in pieces
    ]
    head = "deleted" if config.confirm else "would be deleted; confirm=true deletes"
    return plain, "\n".join([f"{_size(total)} {head}:", *lines])


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _freeable(study: Study, keep_best: int, is_run: bool) -> list[FrozenTrial]:
    """Ended trials that their own study does not need."""
    is_open = is_run or len(study.ended()) < study.target or not study.is_concluded
    trials = study.trials()
    is_population = any("replaces" in (t.user_attrs.get(ORIGIN) or {}) for t in trials)
    if is_open and is_population:
        return []
    best = {trial.number for trial in study.ranked()[: max(keep_best, int(is_open))]}
    return [t for t in trials if t.state.is_finished() and t.number not in best]


def _origins(study: Study) -> Iterator[Path]:
    """Checkpoints that trials which have not ended begin from."""
    for trial in study.trials():
        origin = trial.user_attrs.get(ORIGIN)
        if origin and not trial.state.is_finished():
            yield Path(origin["checkpoint"])


def _registered_runs(client: MlflowClient) -> set[str]:
    """Runs whose checkpoints are the best of a registered model."""
    try:
        return {
            str(client.get_model_version_by_alias(model.name, ALIAS).run_id)
            for model in client.search_registered_models(max_results=1000)
            if ALIAS in model.aliases
        }
    except MlflowException as error:
        raise TrackingError(f"cannot ask which models are registered: {error}") from error


def _checkpoints(study: str, number: int, folder: Path, origins: set[Path]) -> Iterator[Piece]:
    """A trial's folder, and the copy of another's checkpoint that it was replaced by."""
    for place in (
        Workplace({}, str(folder), None).trial_folder(number),
        folder / "origins" / f"{number:04d}",
    ):
        is_needed = any(place in origin.parents for origin in origins)
        if place.is_dir() and not is_needed:
            size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
            yield Piece(study, number, "checkpoints", str(place), size)


def _artifacts(study: str, number: int, client: MlflowClient, run_id: str) -> list[Piece]:
    files = client.list_artifacts(run_id, ARTIFACT)
    if not files:
        return []
    root = client.get_run(run_id).info.artifact_uri
    size = sum(file.file_size or 0 for file in files)
    return [Piece(study, number, "artifacts", f"{root}/{ARTIFACT}", size)]


def _delete(piece: Piece, client: MlflowClient) -> None:
    if piece.what == "artifacts":
        root, _, name = piece.where.rpartition("/")
        get_artifact_repository(root, tracking_uri=client.tracking_uri).delete_artifacts(name)
    else:
        shutil.rmtree(piece.where, ignore_errors=True)
