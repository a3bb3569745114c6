"""Nodes that come and go, on a cluster of several Ray nodes on this machine."""

import os
import subprocess
import sys
from pathlib import Path

from rum.cells import RUMConfig
from rum.experiment import run_experiment
from rum.tasks import CopyingConfig
from rum.training.config import TrainingConfig
from rum.tune.audit import check_study
from rum.tune.config import (
    CheckConfig,
    Domain,
    SamplerConfig,
    SchedulerConfig,
    SearchConfig,
    SearchOptions,
)
from rum.tune.database import open_storage
from rum.tune.space import apply
from rum.tune.study import Study

# A process of its own, since the tests share a Ray session of one node.
SEARCH = """
import os, sys, threading
from pathlib import Path
from ray.cluster_utils import Cluster
from tests.tune.test_elastic import config
from rum.tune.search import run_search

folder = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
first = cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address

def search() -> None:
    try:
        print(run_search(config(folder)))
    finally:
        done.set()

done = threading.Event()
thread = threading.Thread(target=search)  # Ray starts nodes in the main thread only
thread.start()
trials = folder / "studies/small/trials"
while not list(trials.glob("0000/step_*")) and not done.wait(0.02):
    pass
cluster.remove_node(first, allow_graceful=False)
cluster.add_node(num_cpus=1)
thread.join()
cluster.shutdown()
"""


def config(folder: Path) -> SearchConfig:
    return SearchConfig(
        model=RUMConfig(hidden_size=6),
        task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=60),
        training=TrainingConfig(max_epochs=20),
        space={"training.learning_rate": Domain(type="float", low=1e-3, high=1e-2, log=True)},
        scheduler=SchedulerConfig(name="none"),
        search=SearchOptions(num_trials=2),
        study="small",
        output_dir=str(folder),
    )


def test_a_lost_node_costs_no_epoch(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    environment = {**os.environ, "RUM_DATA_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, str(folder)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    search = config(folder)
    text, agrees = check_study(CheckConfig(study="small", output_dir=str(folder)))
    assert agrees, text
    trials = Study(open_storage(folder), "small", search.space, SamplerConfig()).trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2
    for trial in trials:
        curve: dict[int, float] = {}
        experiment = apply(search, trial.params)
        run_experiment(
            experiment,
            experiment.task.load(seed=experiment.training.seed),
            tmp_path / f"alone_{trial.number}",
            lambda report, curve=curve: curve.update(  # type: ignore[misc]
                {int(report["epoch"]): report["validation/best_cross_entropy"]}
            ),
        )
        assert trial.intermediate_values == curve
