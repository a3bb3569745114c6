"""Optimisers against their formulas, schedules against the paper's table."""

import numpy as np
import pytest
import torch

from rum.errors import ConfigError
from rum.training.config import ScheduleConfig, TrainingConfig
from rum.training.optim import TensorFlowRMSProp, build_optimizer


def test_tensorflow_rmsprop_starts_at_one_with_epsilon_inside_the_root() -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=5)
    gradients = generator.normal(size=(3, 5)) * 1e-5  # small, so that epsilon would show
    parameter = torch.nn.Parameter(torch.tensor(weight))
    optimizer = TensorFlowRMSProp([parameter], lr=0.1)
    mean_square = np.ones(5)

    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        mean_square = 0.9 * mean_square + 0.1 * gradient**2
        weight = weight - 0.1 * gradient / np.sqrt(mean_square + 1e-10)

    np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-14)


def test_first_step_of_the_two_rmsprops_differs_as_documented() -> None:
    steps = {}
    for name in ("rmsprop", "rmsprop_tensorflow"):
        model = torch.nn.Linear(1, 1, bias=False).double()
        before = model.weight.item()
        optimizer = build_optimizer(model, TrainingConfig(optimizer=name, learning_rate=0.01))
        model.weight.grad = torch.full((1, 1), 1e-3, dtype=torch.float64)
        optimizer.step()
        steps[name] = before - model.weight.item()

    assert steps["rmsprop"] == pytest.approx(0.01 / 0.1**0.5, rel=1e-3)
    assert steps["rmsprop_tensorflow"] == pytest.approx(0.01 * 1e-3 / 0.9**0.5, rel=1e-3)


def test_table6_at_360_epochs_is_the_papers_table() -> None:
    schedule = ScheduleConfig(name="table6")
    rates = [0.002 * schedule.factor(epoch, 360) for epoch in range(1, 361)]

    assert rates[:180] == pytest.approx([0.002] * 180)
    assert rates[180:240] == pytest.approx([0.0001] * 60)
    assert rates[240:] == pytest.approx([0.00001] * 120)


def test_drop_as_released_is_from_the_182nd_of_200_epochs() -> None:
    schedule = ScheduleConfig(name="drop")
    factors = [schedule.factor(epoch, 200) for epoch in range(1, 201)]

    assert factors == [1.0] * 181 + [0.1] * 19


@pytest.mark.parametrize(
    ("share", "max_epochs", "at_full_rate"), [(0.29, 100, 29), (0.58, 50, 29), (0.7, 360, 252)]
)
def test_drop_is_after_the_share_of_the_epochs(
    share: float, max_epochs: int, at_full_rate: int
) -> None:
    schedule = ScheduleConfig(name="drop", drop_at=share)
    factors = [schedule.factor(epoch, max_epochs) for epoch in range(1, max_epochs + 1)]
    assert factors.count(1.0) == at_full_rate


def test_constant_is_one() -> None:
    assert {ScheduleConfig().factor(epoch, 10) for epoch in range(1, 11)} == {1.0}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"max_epochs": 0}, "max_epochs"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"device": "tpu"}, "device"),
        ({"threads": 0}, "threads"),
        ({"seed": -1}, "seed"),
    ],
)
def test_invalid_training_options_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        TrainingConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"name": "cosine"}, "name"),
        ({"drop_at": 1.0}, "drop_at"),
        ({"drop_factor": 0.0}, "factor"),
    ],
)
def test_invalid_schedules_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ScheduleConfig(**options)  # type: ignore[arg-type]
