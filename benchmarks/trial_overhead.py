"""What the platform costs a trial beyond its training, in the steady state.

python benchmarks/trial_overhead.py

Trials of one short epoch run one at a time on a reused actor. From the end of one trial to the
end of the next, less the training and validation that it reports, is what Ray, Optuna, MLflow,
the checkpoint and the hand-over cost together. Prints the median and the tenth and ninetieth
percentile over the trials after the first ten.
"""

import json
import statistics
import tempfile
from pathlib import Path

from rum.cells import RUMConfig
from rum.tasks import CopyingConfig
from rum.training.checkpoint import CheckpointStore
from rum.training.config import TrainingConfig
from rum.tune.config import Domain, SchedulerConfig, SearchConfig, SearchOptions
from rum.tune.database import open_storage
from rum.tune.search import run_search
from rum.tune.study import Study

TRIALS = 40
WARM_UP = 10


def main() -> None:
    """Runs the search and prints the cost."""
    with tempfile.TemporaryDirectory() as folder:
        config = SearchConfig(
            model=RUMConfig(hidden_size=16),
            task=CopyingConfig(delay=5, batch_size=8, steps_per_epoch=5),
            training=TrainingConfig(max_epochs=1),
            space={
                "training.learning_rate": Domain(type="float", low=1e-4, high=1e-2, log=True),
                "model.hidden_size": Domain(type="int", low=8, high=32),
                "model.zoneout": Domain(type="float", low=0.0, high=0.5),
                "model.eta": Domain(type="categorical", choices=[None, 0.5, 1.0]),
                "training.max_grad_norm": Domain(type="float", low=0.5, high=5.0),
            },
            scheduler=SchedulerConfig(name="none"),
            search=SearchOptions(num_trials=TRIALS, max_concurrent=1),
            study="overhead",
            output_dir=folder,
        )
        run_search(config)
        study = Study(open_storage(Path(folder)), "overhead", config.space, config.sampler)
        trials = study.trials()
        costs = []
        for before, trial in zip(trials[WARM_UP - 1 :], trials[WARM_UP:], strict=False):
            assert before.datetime_complete is not None
            assert trial.datetime_complete is not None
            last = CheckpointStore(
                Path(folder) / "studies" / "overhead" / "trials" / f"{trial.number:04d}"
            ).last()
            assert last is not None
            work = sum(v for k, v in last.reports[-1].items() if k.startswith("time/"))
            between = (trial.datetime_complete - before.datetime_complete).total_seconds()
            costs.append(between - work)
    tenths = statistics.quantiles(costs, n=10)
    print(
        json.dumps(
            {
                "trials": len(costs),
                "seconds_per_trial_median": round(statistics.median(costs), 3),
                "p10": round(tenths[0], 3),
                "p90": round(tenths[-1], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
