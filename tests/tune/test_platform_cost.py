"""What a driver asks of the databases for a trial: as much among many trials as among few."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from rum.cells import RUMConfig
from rum.experiment import ExperimentConfig
from rum.tasks import CopyingConfig
from rum.train import TrackingConfig
from rum.training.config import TrainingConfig
from rum.tune.conductor import Conductor
from rum.tune.config import Domain, SamplerConfig
from rum.tune.database import open_storage
from rum.tune.messages import FINISHED, RUNNING, Workplace
from rum.tune.schedulers.halving import Halving
from rum.tune.study import Study, ensure_study
from rum.tune.tracking import INTERRUPTED, Tracker, connect

EPOCHS, FEW, MANY = 2, 4, 24


@pytest.fixture
def statements() -> Iterator[Counter[str]]:
    """Counts the statements of all engines by the name of their database's file."""
    counts: Counter[str] = Counter()

    def count(connection: sqlalchemy.Connection, *_: Any) -> None:
        counts[Path(str(connection.engine.url.database)).name] += 1

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", count)
    yield counts
    sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", count)


def test_a_trial_costs_as_many_statements_among_many_as_among_few(
    output_dir: Path, statements: Counter[str]
) -> None:
    base = ExperimentConfig(
        model=RUMConfig(hidden_size=8),
        task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
        training=TrainingConfig(max_epochs=EPOCHS),
    )
    task = base.task.load(seed=0)
    space = {"training.learning_rate": Domain(type="float", low=1e-4, high=1e-1, log=True)}
    storage = open_storage(output_dir)
    ensure_study(storage, "study", {"mode": "min"})
    study = Study(storage, "study", space, SamplerConfig(name="tpe", startup_trials=2))
    study.target = MANY + 2
    client, experiment_id = connect(TrackingConfig(), output_dir)
    tracker = Tracker(client, experiment_id, "study", task, {}, {"a": 1}, study_id=study.id)
    workplace = Workplace(dataclasses.asdict(base), str(output_dir / "study"), None)
    conductor = Conductor(study, base, task, Halving([1], 2, "min"), tracker, workplace)

    def run_trial(value: float) -> list[dict[str, int]]:
        """The statements of its start, and of each of its reports."""
        used = []
        statements.clear()
        spec = conductor.next_trial()
        assert spec is not None
        for epoch in range(1, EPOCHS + 1):
            tracker.flush()
            used.append(dict(statements))
            statements.clear()
            report = {
                "epoch": epoch,
                "step": 5 * epoch,
                "validation/cross_entropy": value,
                "validation/best_cross_entropy": value,
            }
            status = FINISHED if epoch == EPOCHS else RUNNING
            message = {"number": spec.number, "status": status, "report": report, "worker": {}}
            if conductor.on_message(message):
                break
        tracker.flush()
        return [*used, dict(statements)]

    costs = [run_trial(1.0 / (number + 1)) for number in range(MANY)]  # each is the best so far
    few, many = costs[FEW], costs[-1]
    assert len(few) == 1 + EPOCHS
    assert many == few
    assert all(set(used) == {"optuna.db", "mlflow.db"} for used in few)

    stopped = run_trial(2.0)
    assert len(stopped) == 2  # at its first rung
    assert stopped[0] == few[0]
    tracker.close(INTERRUPTED)
