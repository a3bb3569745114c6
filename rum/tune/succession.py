"""Population-based training in the books: a copy of one trial takes the place of another."""

import logging
import shutil
from pathlib import Path

from rum.errors import CheckpointError
from rum.training.checkpoint import Checkpoint, CheckpointStore
from rum.tune.messages import Workplace
from rum.tune.schedulers import Population
from rum.tune.study import ORIGIN, Study

logger = logging.getLogger(__name__)

ATTEMPTS = 5


def enqueue_successor(
    study: Study, population: Population, workplace: Workplace, number: int, epoch: int
) -> bool:
    """Queues the trial that takes the place of `number` after `epoch`; again changes nothing.

    Returns:
        Whether there is one; not if its source is at its end, or has no checkpoint.
    """
    if has_successor(study, number):
        return True
    source = population.source_for(number, epoch)
    checkpoint = _copied_checkpoint(workplace, source, number)
    if checkpoint is None:
        return False
    if checkpoint.description["epoch"] >= workplace.experiment["training"]["max_epochs"]:
        return False
    parameters = population.mutated(number, study.trial(source).params)
    origin = {
        "study": study.name,
        "trial": source,
        "checkpoint": str(checkpoint.path),
        "replaces": number,
    }
    study.enqueue(parameters, {ORIGIN: origin})
    return True


def has_successor(study: Study, number: int) -> bool:
    """Whether a trial was queued in the place of `number`."""
    origins = [trial.user_attrs.get(ORIGIN) or {} for trial in study.trials()]
    return any(origin.get("replaces") == number for origin in origins)


def _copied_checkpoint(workplace: Workplace, source: int, number: int) -> Checkpoint | None:
    """The source's last checkpoint in a folder that its own later ones leave alone."""
    folder = Path(workplace.folder) / "origins" / f"{number:04d}"
    for _ in range(ATTEMPTS):  # the source's worker may be replacing it
        shutil.rmtree(folder, ignore_errors=True)
        try:
            last = CheckpointStore(workplace.trial_folder(source)).last()
            if last is None:
                break
            shutil.copytree(last.path, folder / last.path.name)
            return CheckpointStore(folder).last()
        except (CheckpointError, OSError) as error:
            logger.info("checkpoint of trial %d: %s", source, error)
    logger.warning("trial %d goes on: trial %d has no checkpoint to take over", number, source)
    return None
