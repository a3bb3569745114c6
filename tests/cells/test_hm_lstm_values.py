"""COPY, UPDATE and FLUSH of an HM-LSTM one by one, and the gradient of its boundaries.

Random weights are compared with NumPy in test_compact_cells_values.py.
"""

import pytest
import torch
from torch import Tensor

from rum.cells import HMLSTMCell

INPUT_SIZE, SIZE, LEVELS, BATCH = 3, 4, 3, 2
NEVER, ALWAYS = -100.0, 100.0


def cell_with(*boundary: float, slope: float = 1.0) -> HMLSTMCell:
    """A cell with random weights whose detectors, from level 1 up, say what they are told."""
    torch.manual_seed(1)
    cell = HMLSTMCell(INPUT_SIZE, SIZE, num_levels=LEVELS, slope=slope).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        for bias, value in zip(cell.bias, boundary, strict=False):
            bias[-1] = value
    return cell


def state_with(*boundary: float) -> list[Tensor]:
    """Random h and c, and the boundaries of the step before."""
    generator = torch.Generator().manual_seed(2)
    shape = (1 + 2 * LEVELS, BATCH, SIZE)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [*drawn, *(torch.full((BATCH, 1), z, dtype=torch.float64) for z in boundary)]


def input_of_a_step() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, INPUT_SIZE, generator=generator, dtype=torch.float64)


def run(cell: HMLSTMCell, state: list[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        _, after = cell(input_of_a_step(), tuple(state))
    return after


def h(state: tuple[Tensor, ...] | list[Tensor], level: int) -> Tensor:
    return state[level]


def c(state: tuple[Tensor, ...] | list[Tensor], level: int) -> Tensor:
    return state[LEVELS + level]


def test_without_a_boundary_the_upper_levels_are_copied_exactly() -> None:
    before = state_with(0.0, 0.0)
    after = run(cell_with(NEVER, NEVER), before)

    for level in (2, 3):
        assert torch.equal(h(after, level), h(before, level))
        assert torch.equal(c(after, level), c(before, level))
    assert (c(after, 1) - c(before, 1)).abs().min() > 1e-6
    assert not after[-2].any()
    assert not after[-1].any()


def test_without_a_boundary_the_upper_levels_stay_at_zero_for_a_whole_sequence() -> None:
    cell = cell_with(NEVER, NEVER)
    with torch.no_grad():
        _, state = cell.unroll(input_of_a_step().expand(9, -1, -1))

    for level in (2, 3):
        assert not h(state, level).any()
        assert not c(state, level).any()
    assert h(state, 1).all()


def test_a_boundary_below_updates_the_next_level_alone() -> None:
    before = state_with(0.0, 0.0)
    after = run(cell_with(ALWAYS, NEVER), before)

    assert (c(after, 2) - c(before, 2)).abs().min() > 1e-6
    assert torch.equal(h(after, 3), h(before, 3))
    assert torch.equal(c(after, 3), c(before, 3))
    assert (after[-2] == 1).all()


lower_levels = pytest.mark.parametrize("level", [1, 2])  # level 2 with no boundary below it


@lower_levels
@pytest.mark.parametrize("ended", [0.0, 1.0])
def test_a_level_forgets_its_cell_after_its_own_boundary(level: int, ended: float) -> None:
    before = state_with(*(ended if level == each else 0.0 for each in (1, 2)))
    changed = list(before)
    changed[LEVELS + level] = before[LEVELS + level] + 1  # its c
    cell = cell_with(NEVER, NEVER)

    first, second = run(cell, before), run(cell, changed)

    assert torch.equal(c(first, level), c(second, level)) is bool(ended)


@lower_levels
@pytest.mark.parametrize("ended", [0.0, 1.0])
def test_a_level_sees_the_one_above_after_its_own_boundary(level: int, ended: float) -> None:
    before = state_with(*(ended if level == each else 0.0 for each in (1, 2)))
    changed = list(before)
    changed[level + 1] = before[level + 1] + 1  # h of the one above
    cell = cell_with(NEVER, NEVER)

    first, second = run(cell, before), run(cell, changed)

    assert torch.equal(h(first, level), h(second, level)) is not bool(ended)


@pytest.mark.parametrize("slope", [0.5, 1.0, 4.0])
def test_the_gradient_of_a_boundary_is_that_of_the_hard_sigmoid(slope: float) -> None:
    """z~ rises by slope / 2 where |slope s| < 1 and is flat elsewhere."""
    cell = cell_with(slope=slope)
    with torch.no_grad():
        cell.weight_below[0][-1] = torch.tensor([1.0, 0.0, 0.0])
        cell.bias[0][-1] = 0.0
    total = torch.tensor([-1.5, -0.9, -0.1, 0.1, 0.9, 1.5], dtype=torch.float64) / slope
    input = torch.zeros(len(total), INPUT_SIZE, dtype=torch.float64)
    input[:, 0] = total
    input.requires_grad_()

    _, state = cell(input)
    (gradient,) = torch.autograd.grad(state[1 + 2 * LEVELS].sum(), input)

    assert state[1 + 2 * LEVELS].flatten().tolist() == [0, 0, 0, 1, 1, 1]
    expected = slope / 2 * torch.tensor([0, 1, 1, 1, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(gradient[:, 0], expected, rtol=0, atol=1e-12)
