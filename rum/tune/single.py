"""A single training run in MLflow."""

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rum.errors import DivergedError
from rum.parameters import flatten
from rum.train import TrainConfig, load_task
from rum.training.checkpoint import CheckpointStore
from rum.training.loop import Report
from rum.tune.capsule import FILE as CAPSULE_FILE
from rum.tune.capsule import make_capsule
from rum.tune.provenance import common_tags, trial_tags
from rum.tune.tracking import FAILED, FINISHED, INTERRUPTED, Tracker, connect


@contextmanager
def record_run(
    config: TrainConfig, origin: dict[str, Any] | None
) -> Iterator[Callable[[Report], None]]:
    """Records one run, named as its folder; a resumed one goes on in the same MLflow run.

    Args:
        config: The run.
        origin: Where its first checkpoint comes from, if it continues another's.

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
        {
            **common_tags(task, config.task.name),
            **trial_tags(config),
            **config.published_tags(),
            **({"rum.repeats": config.from_run} if config.from_run else {}),
        },
        flatten(plain),
        study_id=_own_id(folder, is_resumed=config.resume == "yes"),
    )
    capsule = make_capsule(config, task, origin)
    tracker.log_text_once(None, json.dumps(capsule, indent=1), CAPSULE_FILE)
    last = CheckpointStore(folder).last()
    for report in last.reports if last and config.resume == "yes" else []:
        tracker.log_report(None, report)
    status = INTERRUPTED
    try:
        yield lambda report: tracker.log_report(None, report)
        status = FINISHED
    except Exception as error:
        status = FAILED
        kind = "diverged" if isinstance(error, DivergedError) else "crashed"
        tracker.mark_trial(None, FAILED, {"rum.reason": f"{kind}: {error}"})
        raise
    finally:
        tracker.close(status)


def _own_id(folder: Path, *, is_resumed: bool) -> str:
    """Tells the run from earlier ones in a folder of the same name."""
    path = folder / "run_id"
    if not (is_resumed and path.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex)
    return path.read_text()
