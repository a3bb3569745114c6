"""A single training run in MLflow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rum.errors import DivergedError
from rum.parameters import flatten
from rum.train import TrainConfig, load_task
from rum.training.checkpoint import CheckpointStore
from rum.training.loop import Report
from rum.tune.provenance import common_tags, trial_tags
from rum.tune.tracking import FAILED, FINISHED, INTERRUPTED, Tracker, connect


@contextmanager
def record_run(config: TrainConfig) -> Iterator[Callable[[Report], None]]:
    """Records one run, named as its folder; a resumed one goes on in the same MLflow run.

    Raises:
        TrackingError: If MLflow cannot be used.
    """
    client, experiment_id = connect(config.tracking, Path(config.output_dir).absolute())
    task = load_task(config)
    folder = config.folder(task)
    plain = {name: asdict(getattr(config, name)) for name in ("model", "task", "training")}
    tracker = Tracker(
        client,
        experiment_id,
        f"run/{folder.name}",
        task,
        {**common_tags(task, config.task.name), **trial_tags(config)},
        flatten(plain),
    )
    last = CheckpointStore(folder).last()
    for report in last.reports if last and config.resume == "yes" else []:
        tracker.log_report(None, report)
    status = INTERRUPTED
    try:
        yield lambda report: tracker.log_report(None, report)
        status = FINISHED
    except DivergedError:
        status = FAILED
        raise
    finally:
        tracker.close(status)
