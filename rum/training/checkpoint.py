"""Checkpoints: atomic, checksummed, free of pickles, best and last kept.

A checkpoint is a folder `step_000000530/` with `state.pt` (tensors and plain values) and
`checkpoint.json` (SHA-256 of the former, format version, configuration, reports so far). It is
written beside its place and moved there, so a folder of that name is always complete.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rum.errors import CheckpointError, SupersededError

FORMAT_VERSION = 1
STATE_FILE = "state.pt"
DESCRIPTION_FILE = "checkpoint.json"
PARTIAL = ".partial-"
WRITER_FILE = ".writer"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk and its description, the tensors not yet read."""

    path: Path
    description: dict[str, Any]
    """`step`, `epoch`, `best_step`, `best_value`, `reports`, `experiment`, `task`, ..."""

    @property
    def reports(self) -> list[dict[str, float]]:
        """Every epoch's report so far."""
        reports: list[dict[str, float]] = self.description["reports"]
        return reports


class CheckpointStore:
    """The checkpoints of one run: the best and the last.

    One process writes them, the one that claimed the folder last: a run may have been started
    again elsewhere while its first process only seemed to be dead.
    """

    def __init__(self, folder: Path) -> None:
        """The folder is made when it is claimed."""
        self.folder = folder
        self._token: str | None = None

    def claim(self) -> None:
        """Becomes the one that writes here; what an earlier one left half written goes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._token = uuid.uuid4().hex
        partial = self.folder / f"{WRITER_FILE}-{self._token}"
        partial.write_text(self._token)
        partial.replace(self.folder / WRITER_FILE)
        for leftover in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _check_writer(self) -> None:
        try:
            writer = (self.folder / WRITER_FILE).read_text()
        except FileNotFoundError:
            writer = "nobody: the folder was removed"
        if writer != self._token:
            raise SupersededError(
                f"{self.folder} is written to by another process, which started later"
            )

    def save(self, state: dict[str, Any], description: dict[str, Any]) -> Path:
        """Writes a checkpoint, then deletes those that are neither this one nor the best.

        Args:
            state: Tensors and plain values for `torch.save`.
            description: Plain values; must hold `step` and `best_step` (None: no best yet).

        Raises:
            SupersededError: If another process has claimed the folder since.
        """
        if self._token is None:
            self.claim()
        try:
            target = self._write(state, description)
        except OSError:
            self._check_writer()  # which takes away what it finds half written
            raise
        kept = {target.name, _name(description["best_step"] or 0)}
        for folder in self._folders():
            if folder.name not in kept:
                shutil.rmtree(folder)
        return target

    def _write(self, state: dict[str, Any], description: dict[str, Any]) -> Path:
        self._check_writer()
        target = self.folder / _name(description["step"])
        partial = self.folder / f"{PARTIAL}{self._token}"
        if partial.exists():  # of a save that failed
            shutil.rmtree(partial)
        partial.mkdir()
        torch.save(state, partial / STATE_FILE)
        checksum = _synced_checksum(partial / STATE_FILE)
        full = {"format_version": FORMAT_VERSION, "sha256": checksum, **description}
        (partial / DESCRIPTION_FILE).write_text(json.dumps(full, indent=1))
        _synced_checksum(partial / DESCRIPTION_FILE)
        self._check_writer()
        if target.exists():  # left by a process that died after this step
            shutil.rmtree(target)
        partial.rename(target)
        return target

    def last(self) -> Checkpoint | None:
        """The newest checkpoint that can be read, None where there are none.

        One that cannot is passed over with a warning: the run repeats what came after the older.

        Raises:
            CheckpointError: If all are damaged or of another format.
        """
        folders = self._folders()
        for folder in reversed(folders):
            try:
                return read_checkpoint(folder)
            except CheckpointError as error:
                if folder == folders[0]:
                    raise
                logger.warning("%s; an older checkpoint takes its place", error)
        return None

    def best(self) -> Checkpoint | None:
        """The checkpoint with the best validation metric, None where there is none."""
        last = self.last()
        if last is None or last.description["best_step"] is None:
            return None
        return read_checkpoint(self.folder / _name(last.description["best_step"]))

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))


def _name(step: int) -> str:
    return f"step_{step:09d}"


def _synced_checksum(path: Path) -> str:
    """SHA-256 of a file, after making sure that it reached the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint's description and checks its checksum.

    Raises:
        CheckpointError: If `path` is not a checkpoint, is damaged, or is of another format.
    """
    try:
        description = json.loads((path / DESCRIPTION_FILE).read_text())
        checksum = hashlib.sha256((path / STATE_FILE).read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(description, dict) or "format_version" not in description:
        raise CheckpointError(f"{path / DESCRIPTION_FILE} does not describe a checkpoint")
    if description["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {description['format_version']}, "
            f"this version reads format {FORMAT_VERSION}"
        )
    if checksum != description.get("sha256"):
        raise CheckpointError(
            f"{path / STATE_FILE} is damaged: expected SHA-256 {description.get('sha256')}, "
            f"got {checksum}"
        )
    return Checkpoint(path, description)


def load_state(checkpoint: Checkpoint, device: str) -> dict[str, Any]:
    """Loads the tensors of a checkpoint, never executing anything that it holds.

    Raises:
        CheckpointError: If the file holds more than tensors and plain values, or is unreadable.
    """
    try:
        state = torch.load(checkpoint.path / STATE_FILE, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot load {checkpoint.path / STATE_FILE}: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{checkpoint.path / STATE_FILE} must hold a dict")
    return state
