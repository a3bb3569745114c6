"""What Ray is asked for a trial."""

import dataclasses
from pathlib import Path

import pytest
import ray
import torch
from ray.tune import PlacementGroupFactory
from ray.tune.search import ConcurrencyLimiter, Searcher

from rum.cells import RUMConfig
from rum.experiment import ExperimentConfig
from rum.tasks import CopyingConfig
from rum.training.config import TrainingConfig
from rum.tune import ray_run, trial
from rum.tune.config import SearchConfig, SearchOptions
from rum.tune.messages import OUT_OF_MEMORY, Workplace
from rum.tune.prediction import SHARES, larger_share
from rum.tune.ray_run import resources_of


def test_a_trial_that_ran_out_of_memory_takes_more_of_a_gpu_than_the_others() -> None:
    config = SearchConfig(
        model=RUMConfig(hidden_size=8),
        task=CopyingConfig(),
        training=TrainingConfig(device="cuda"),
        search=SearchOptions(gpus_per_trial=0.25, cpus_per_trial=2),
    )
    of_trial = resources_of(config)
    for gpus, expected in ((None, 0.25), (0.5, 0.5)):
        handed = {"number": 3, "parameters": {}, "origin": None, "gpus": gpus}
        assert of_trial(handed) == PlacementGroupFactory([{"CPU": 2, "GPU": expected}])
    assert of_trial({"crew": "a"}) == PlacementGroupFactory([{"CPU": 2, "GPU": 0.25}])


@pytest.mark.usefixtures("ray_session")
def test_the_number_of_trials_at_a_time_follows_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = SearchConfig(model=RUMConfig(hidden_size=8), task=CopyingConfig())
    there = int(ray.cluster_resources()["CPU"])
    limited = ConcurrencyLimiter(Searcher(), max_concurrent=there + 5)
    room = ray_run._Room(config, limited)
    room.follow()
    assert limited.max_concurrent == there + 5, "it does not ask all the time"
    monkeypatch.setattr(ray_run, "LOOK_SECONDS", 0.0)
    room.follow()
    assert limited.max_concurrent == there
    large = dataclasses.replace(config, search=SearchOptions(cpus_per_trial=there + 1))
    ray_run._Room(large, limited).follow()  # a node may come back
    assert limited.max_concurrent == there


def test_the_shares_go_up_to_a_whole_gpu() -> None:
    shares = [SHARES[-1]]
    while (larger := larger_share(shares[-1])) is not None:
        shares.append(larger)
    assert shares == sorted(SHARES)
    assert larger_share(0.2) == 0.25
    assert larger_share(0.0) is None
    assert larger_share(2.0) is None


def test_a_worker_says_that_its_memory_was_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no GPU to fill here: what torch would raise is raised in its place."""
    experiment = ExperimentConfig(
        model=RUMConfig(hidden_size=8),
        task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
        training=TrainingConfig(max_epochs=1),
    )
    said: list[str] = []

    def fill(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trial, "run_experiment", fill)
    monkeypatch.setattr(trial.Sender, "end", lambda self, *words: said.extend(words))
    handed = {"number": 0, "parameters": {}, "origin": None, "gpus": None}
    trial.run_trial(handed, Workplace(dataclasses.asdict(experiment), str(tmp_path), None))
    assert said == [
        OUT_OF_MEMORY,
        "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB",
    ]
