"""What driver and workers tell each other; plain values only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

# How a trial stands after a message; see `rum.tune.trial`.
RUNNING, FINISHED, DIVERGED, CRASHED = "running", "finished", "diverged", "crashed"
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Workplace:
    """What all trials of a search have in common."""

    experiment: dict[str, Any]
    """The base experiment, plain values."""
    folder: str
    """The study's folder."""
    data_dir: str | None
    """Where corpora are looked for first."""
    gpus_per_trial: float = 0.0
    """Below 1: the share of a GPU that a trial may fill."""

    def trial_folder(self, number: int) -> Path:
        """Where a trial's checkpoints are."""
        return Path(self.folder) / "trials" / f"{number:04d}"
