"""One training run by itself: a named folder, progress on the terminal, resumable."""

import re
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from rum.checks import check_choice, check_file_name
from rum.errors import ConfigError
from rum.experiment import ExperimentConfig, check_device, parameter_count, run_experiment
from rum.parameters import flatten
from rum.setting import PublishedConfig
from rum.tasks import Task
from rum.training.checkpoint import Checkpoint, CheckpointStore
from rum.training.loop import Progress, Report


@dataclass(kw_only=True)
class TrackingConfig:
    """Where runs are recorded."""

    name: str = "mlflow"
    """"mlflow" or "none"."""
    uri: str | None = None
    """MLflow tracking URI; null takes MLFLOW_TRACKING_URI, else SQLite in `output_dir`."""
    experiment: str = "rum"
    """MLflow experiment that holds the runs."""

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        check_choice("tracking.name", self.name, ("mlflow", "none"))


@dataclass(kw_only=True)
class TrainConfig(ExperimentConfig, PublishedConfig):
    """Options of `pipelines/train.py`."""

    name: str | None = None
    """Of the run and its folder; null makes one from the published setting, if `experiment=`
    chose one, else from task, corpus and model."""
    data_dir: str | None = None
    """Where corpora are looked for first."""
    output_dir: str = "outputs"
    """Everything that is written goes below."""
    dry_run: bool = False
    """Say the parameter count and the baselines, then stop."""
    resume: str = "no"
    """"no", or "yes": go on from the run's last checkpoint."""
    from_run: str | None = None
    """Id of a recorded run to repeat, with its own model, task and training (needs MLflow)."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        if self.name is not None:
            check_file_name("name", self.name)
        check_choice("resume", self.resume, ("no", "yes"))

    def folder(self, task: Task) -> Path:
        """The run's folder."""
        name = f"{task_slug(task, self.task.name)}-{self.model.name}"
        if self.setting.name is not None:
            setting = self.setting.name.replace("/", "-")
            name = f"{setting}-{task_slug(task, self.task.name)}-{self.profile.name}"
        name = self.name or name
        return Path(self.output_dir).absolute() / "runs" / name


def task_slug(task: Task, name: str) -> str:
    """A task and its corpus as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"{name}-{task.corpus}")


def load_task(config: TrainConfig) -> Task:
    """Loads the data of a run."""
    data_dir = Path(config.data_dir).absolute() if config.data_dir else None
    return config.task.load(seed=config.training.seed, data_dir=data_dir)


Recorder = Callable[["TrainConfig"], AbstractContextManager[Callable[[Report], None]]]
"""Opens, for a run that is about to start, what takes each epoch's report."""


def train(
    config: TrainConfig,
    write: Callable[[str], None],
    recorder: Recorder,
    *,
    begin_from: Checkpoint | None = None,
    last_epoch: int | None = None,
) -> Progress:
    """Trains one model, or with `dry_run` says how large it would be.

    Args:
        config: The run.
        write: Takes lines for the user.
        recorder: Entered when all is checked.
        begin_from: Checkpoint of another run to go on from where this one has none.
        last_epoch: Where to stop before `max_epochs`, which the schedule still goes by.

    Raises:
        ConfigError: If the run exists and `resume` is "no", or does not exist and it is "yes",
            or exists with another seed.
        DataError: If the corpus is missing or altered.
    """
    check_device(config.training.device)
    task = load_task(config)
    folder = config.folder(task)
    if config.dry_run:
        _introduce(config, task, folder, write)
        write("Dry run: nothing was started.")
        return Progress()
    last = CheckpointStore(folder).last()
    if last is not None and config.resume == "no":
        raise ConfigError(f"run {folder} exists: go on with resume=yes, or choose name=...")
    if last is None and config.resume == "yes":
        raise ConfigError(f"resume=yes, but {folder} has no checkpoint")
    changes = _changes(config, last) if last else []
    _introduce(config, task, folder, write)
    for change in changes:
        write(f"  {change}")
    line = _ProgressLine()

    def show(metrics: Report) -> None:
        line.clear()
        shown = " ".join(
            f"{name} {value:.4f}"
            for name, value in metrics.items()
            if name.startswith(("train/", "validation/"))
        )
        write(f"epoch {metrics['epoch']}/{config.training.max_epochs} {shown}")

    with recorder(config) as record:

        def report(metrics: Report) -> None:
            record(metrics)
            show(metrics)

        progress = run_experiment(
            config,
            task,
            folder,
            report,
            on_step=line.show,
            begin_from=begin_from,
            last_epoch=last_epoch,
        )
    write(f"best validation {task.metric}: {progress.best_value:.4f}; checkpoints in {folder}")
    return progress


def _changes(config: TrainConfig, last: Checkpoint) -> list[str]:
    """One line for each option of task and training that is not what the checkpoint was made with.

    Raises:
        ConfigError: If the seed is another: the random states go on from the checkpoint.
    """
    before = flatten(last.description["experiment"])
    now = flatten({"task": config.task, "training": config.training})
    changed = [name for name in now if name in before and before[name] != now[name]]
    if "training.seed" in changed:
        raise ConfigError(
            f"training.seed must be {before['training.seed']} to go on from {last.path}, got "
            f"{config.training.seed}: a run with another seed begins afresh under name=..."
        )
    return [f"{name}: {before[name]} so far, {now[name]} from here on" for name in changed]


def _introduce(
    config: TrainConfig, task: Task, folder: Path, write: Callable[[str], None]
) -> None:
    """Says what is trained, and what its results will be compared with."""
    write(f"{folder}: {parameter_count(config.model, task):,} parameters, {task.protocol}")
    write(f"  data: {task.corpus} ({task.source})")
    for name, value in task.baselines().items():
        write(f"  {name} baseline: {value:.4f} {task.metric}")
    for line in config.setting.lines():
        write(line)


class _ProgressLine:
    """A line on the terminal that says how far the epoch is; nothing where there is none."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._last = 0.0

    def show(self, step: int, total: int) -> None:
        now = time.monotonic()
        if self._is_terminal and now - self._last > 0.2:
            self._last = now
            bar = "#" * (30 * step // total)
            sys.stderr.write(f"\r[{bar:<30}] update {step}/{total}")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._is_terminal:
            sys.stderr.write("\r\033[K")
