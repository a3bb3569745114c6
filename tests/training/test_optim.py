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
    rates = [0.002 * schedule.factor(epoch, 1, 360) for epoch in range(360)]

    assert rates[:180] == pytest.approx([0.002] * 180)
    assert rates[180:240] == pytest.approx([0.0001] * 60)
    assert rates[240:] == pytest.approx([0.00001] * 120)


def test_drop_as_released_is_from_the_182nd_of_200_epochs() -> None:
    schedule = ScheduleConfig(name="drop")
    factors = [schedule.factor(epoch, 1, 200) for epoch in range(200)]

    assert factors == [1.0] * 181 + [0.1] * 19


@pytest.mark.parametrize(
    ("share", "max_epochs", "at_full_rate"), [(0.29, 100, 29), (0.58, 50, 29), (0.7, 360, 252)]
)
def test_drop_is_after_the_share_of_the_epochs(
    share: float, max_epochs: int, at_full_rate: int
) -> None:
    schedule = ScheduleConfig(name="drop", drop_at=share)
    factors = [schedule.factor(7 * epoch, 7, max_epochs) for epoch in range(max_epochs)]
    assert factors.count(1.0) == at_full_rate


def test_constant_is_one() -> None:
    assert {ScheduleConfig().factor(step, 3, 10) for step in range(30)} == {1.0}


def test_step_drops_again_and_again() -> None:
    schedule = ScheduleConfig(name="step", step_epochs=2, drop_factor=0.5)
    factors = [schedule.factor(step, 3, 5) for step in range(15)]
    assert factors == [1.0] * 6 + [0.5] * 6 + [0.25] * 3


def test_cosine_is_that_of_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12, eta_min=0.1)
    schedule = ScheduleConfig(name="cosine", final_factor=0.1)
    for step in range(12):
        assert schedule.factor(step, 3, 4) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_plateau_is_that_of_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.3, patience=2, threshold=0.0
    )
    # torch acts after more than `patience` bad epochs, we after so many
    schedule = ScheduleConfig(name="plateau", drop_factor=0.3, patience=3)
    losses = [5.0, 4.0, 4.5, 4.2, 4.1, 3.9, 3.9, 4.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.5]
    for epoch in range(len(losses) + 1):
        factor = schedule.factor(10 * epoch, 10, 100, losses[:epoch])
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"]), epoch
        if epoch < len(losses):
            optimizer.step()
            theirs.step(losses[epoch])


def test_warmup_grows_to_the_rate_of_the_schedule() -> None:
    schedule = ScheduleConfig(name="step", step_epochs=1, drop_factor=0.5, warmup_steps=4)
    factors = [schedule.factor(step, 3, 3) for step in range(6)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"max_epochs": 0}, "max_epochs"),
        ({"optimizer": "adagrad"}, "optimizer"),
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
        ({"name": "linear"}, "name"),
        ({"final_factor": 1.0}, "final_factor"),
        ({"patience": 0}, "patience"),
        ({"step_epochs": 0}, "step_epochs"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"drop_at": 1.0}, "drop_at"),
        ({"drop_factor": 0.0}, "factor"),
    ],
)
def test_invalid_schedules_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ScheduleConfig(**options)  # type: ignore[arg-type]
