"""What a trial will take, against what torch says of one that runs."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from rum.cells import (
    MODELS,
    FSRUMConfig,
    GRUConfig,
    LSTMCellConfig,
    LSTMConfig,
    ModelConfig,
    NTMConfig,
    RUMCellConfig,
    RUMConfig,
)
from rum.experiment import ExperimentConfig, model_sizes
from rum.models import build_model
from rum.tasks import CharacterLMConfig, CopyingConfig, Task
from rum.training.config import TrainingConfig
from rum.tune.prediction import Correction, Predictor, median_ratio, share_for

COPYING = CopyingConfig(delay=110, batch_size=6, steps_per_epoch=5)  # 130 steps
LANGUAGE = CharacterLMConfig(
    corpus="pydoc", batch_size=8, bptt_length=20, embedding_size=16, train_characters=40_000
)
STORIES = {"memn2n"}  # of another task
FS_RUM = FSRUMConfig(
    fast=LSTMCellConfig(hidden_size=48, layer_norm=True, zoneout_h=0.1, zoneout_c=0.5),
    slow=RUMCellConfig(hidden_size=64, eta=1.0, layer_norm=True),
)
ACTIVATIONS = [
    RUMConfig(hidden_size=40),
    RUMConfig(hidden_size=40, zoneout=0.2, layer_norm=True, eta=1.0, num_layers=2, dropout=0.1),
    RUMConfig(hidden_size=24, lambda_=1.0),  # two copies of the memory at 130 steps
    RUMConfig(hidden_size=12, lambda_=0.5),
    LSTMConfig(hidden_size=32, layer_norm=True, zoneout_h=0.1, zoneout_c=0.1),
    GRUConfig(hidden_size=32),
    FS_RUM,
    NTMConfig(hidden_size=24, memory_size=8, memory_width=8),
]


def experiment(model: ModelConfig, **training: object) -> ExperimentConfig:
    options = TrainingConfig(**{"threads": 1, **training})  # type: ignore[arg-type]
    return ExperimentConfig(model=model, task=COPYING, training=options)


@pytest.fixture(scope="module")
def task() -> Task:
    return COPYING.load(seed=0)


@pytest.fixture(scope="module")
def language() -> Task:
    return LANGUAGE.load(seed=0)


def update(model: nn.Module, task: Task) -> Tensor:
    batch = task.training_batch(0)
    return task.loss(model(batch.input)[0], batch.target)


@pytest.mark.parametrize("name", sorted(set(MODELS) - STORIES))
def test_parameters_are_those_of_the_model_when_it_is_built(name: str, task: Task) -> None:
    config = MODELS[name]()
    built = sum(p.numel() for p in build_model(config, model_sizes(task)).parameters())
    assert Predictor(experiment(config), task).predict(experiment(config)).parameters == built


@pytest.mark.parametrize("config", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("one_hot", [True, False])
def test_what_is_saved_is_what_autograd_saves_in_a_real_update(
    config: ModelConfig, one_hot: bool, task: Task, language: Task
) -> None:
    task = task if one_hot else language
    model = build_model(config, model_sizes(task)).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = update(model, task)
    measured = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    assert loss.requires_grad
    base = dataclasses.replace(experiment(config), task=COPYING if one_hot else LANGUAGE)
    predicted = Predictor(base, task).predict(base).saved_bytes
    assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("config", ACTIVATIONS, ids=repr)
def test_the_peak_of_an_update_is_within_a_factor_of_what_is_allocated(
    config: ModelConfig, task: Task
) -> None:
    """The factor is 1.5; the process itself, a constant on the CPU, is left out."""
    model = build_model(config, model_sizes(task)).train()
    optimizer = torch.optim.Adam(model.parameters())
    update(model, task).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        update(model, task).backward()  # type: ignore[no-untyped-call]
    allocated = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    weights = sum(4 * p.numel() for p in model.parameters())
    measured = peak + 3 * weights  # they and Adam's two moments were there before

    base = experiment(config)
    predictor = Predictor(base, task)
    empty = predictor.predict(experiment(RUMConfig(hidden_size=1, num_layers=1)))
    process = empty.memory_bytes - 3 * empty.saved_bytes  # but for some kilobytes
    predicted = predictor.predict(base).memory_bytes - process
    assert 1 / 1.5 < predicted / measured < 1.5


def test_the_optimizer_adds_its_moments(task: Task) -> None:
    memory = {
        name: Predictor(base, task).predict(base).memory_bytes
        for name in ("adam", "rmsprop", "rmsprop_tensorflow", "sgd")
        for base in [experiment(RUMConfig(hidden_size=40), optimizer=name)]
    }
    model = build_model(RUMConfig(hidden_size=40), model_sizes(task))
    weights = sum(4 * p.numel() for p in model.parameters())
    assert memory["adam"] - memory["sgd"] == pytest.approx(2 * weights, abs=1)
    assert memory["rmsprop"] - memory["sgd"] == pytest.approx(weights, abs=1)
    assert memory["rmsprop_tensorflow"] == memory["rmsprop"]


def test_a_trial_with_another_batch_is_predicted_by_its_own(task: Task) -> None:
    base = experiment(RUMConfig(hidden_size=40))
    predictor = Predictor(base, task)
    double = dataclasses.replace(base, task=dataclasses.replace(COPYING, batch_size=12))
    assert predictor.predict(double).saved_bytes == pytest.approx(
        2 * predictor.predict(base).saved_bytes, rel=0.05
    )
    one, two = (predictor.predict(e).seconds_per_update for e in (base, double))
    assert one < two < 2 * one


def test_the_correction_is_the_median_ratio_whatever_an_outlier_says(task: Task) -> None:
    base = experiment(RUMConfig(hidden_size=40))
    predictor = Predictor(base, task)
    before = predictor.predict(base)
    epoch = 5 * before.seconds_per_update  # COPYING has 5 updates in an epoch
    mega = before.memory_bytes / 2**20
    reports = [
        {"system/memory_megabytes": 2 * mega, "time/training_seconds": 3 * epoch},
        {"system/memory_megabytes": 2.5 * mega, "time/training_seconds": 1000 * epoch},
        {"system/memory_megabytes": 0.1 * mega, "time/training_seconds": 2.5 * epoch},
        {"validation/accuracy": 0.5},  # says nothing
    ]
    correction = predictor.calibrate((base, report) for report in reports)
    assert (correction.memory, correction.seconds) == pytest.approx((2.0, 3.0))
    after = predictor.predict(base)
    assert after.memory_bytes == pytest.approx(2 * before.memory_bytes)
    assert after.seconds_per_update == pytest.approx(3 * before.seconds_per_update)
    assert (after.parameters, after.saved_bytes) == (before.parameters, before.saved_bytes)
    # What was corrected already is not corrected twice.
    assert predictor.calibrate((base, report) for report in reports) == correction
    assert predictor.calibrate([]) == Correction()


def test_the_median_ratio_of_nothing_is_one() -> None:
    assert median_ratio([]) == 1.0
    assert median_ratio([(2.0, None), (2.0, 0.0)]) == 1.0
    assert median_ratio([(2.0, 3.0), (2.0, None), (1.0, 4.0)]) == (1.5 + 4.0) / 2


@pytest.mark.parametrize(
    ("gigabytes", "share"),
    [
        (0.5, 1 / 8),
        (9.0, 1 / 8),  # of 10, of which the context takes 0.63
        (9.5, 1 / 6),
        (15.0, 1 / 4),
        (20.0, 1 / 3),
        (27.0, 1 / 2),
        (39.5, 1.0),
        (79.0, 1.0),
        (79.9, None),
        (200.0, None),
    ],
)
def test_the_share_of_a_card_is_the_smallest_that_holds_a_trial_and_its_context(
    gigabytes: float, share: float | None
) -> None:
    assert share_for(gigabytes * 1e9, 80e9) == share
