"""The GRU against its equations, TensorFlow's order and torch's, and its initial weights."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rum.cells import GRUCell
from rum.errors import ConfigError

Array = NDArray[np.float64]

STEPS, BATCH = 9, 3

every_order = pytest.mark.parametrize("reset_after", [False, True])
every_size = pytest.mark.parametrize(("input_size", "size"), [(4, 6), (7, 5), (3, 1), (1, 2)])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of tiny operations only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_cell(input_size: int, size: int, **options: Any) -> GRUCell:
    """Every parameter drawn at random, biases too."""
    cell = GRUCell(input_size, size, dtype=torch.float64, **options)
    with torch.no_grad():
        for index, parameter in enumerate(cell.parameters()):
            parameter.copy_(0.8 * normal(10 + index, *parameter.shape))
    return cell.eval()


def sigmoid(x: Array) -> Array:
    value: Array = 1 / (1 + np.exp(-x))
    return value


def numpy_gru(cell: GRUCell, input: Array, hidden: Array) -> Array:
    """One sample, one step."""
    size = cell.hidden_size
    weights = {name: tensor.numpy() for name, tensor in cell.state_dict().items()}
    w_reset, w_update, w_candidate = weights["weight_ih"].reshape(3, size, -1)
    v_reset, v_update, v_candidate = weights["weight_hh"].reshape(3, size, size)
    b_reset, b_update, b_candidate = weights["bias"].reshape(3, size)

    reset = sigmoid(w_reset @ input + v_reset @ hidden + b_reset)
    update = sigmoid(w_update @ input + v_update @ hidden + b_update)
    if "hidden_bias" in weights:
        share = reset * (v_candidate @ hidden + weights["hidden_bias"])
    else:
        share = v_candidate @ (reset * hidden)
    candidate = np.tanh(w_candidate @ input + b_candidate + share)
    new: Array = update * hidden + (1 - update) * candidate
    return new


@every_order
@every_size
def test_values_equal_the_equations(input_size: int, size: int, reset_after: bool) -> None:
    cell = random_cell(input_size, size, reset_after=reset_after)
    input, start = normal(1, STEPS, BATCH, input_size), normal(2, BATCH, size)

    with torch.no_grad():
        output, (after,) = cell.unroll(input, (start,))

    expected = np.zeros((STEPS, BATCH, size))
    for b in range(BATCH):
        hidden = start[b].numpy()
        for t in range(STEPS):
            hidden = expected[t, b] = numpy_gru(cell, input[t, b].numpy(), hidden)
    torch.testing.assert_close(output, torch.from_numpy(expected), rtol=0, atol=1e-10)
    assert torch.equal(after, output[-1])


def torch_gru(cell: GRUCell, *, bias_on_input: bool) -> torch.nn.GRU:
    """The same weights in torch's cell, gate biases in one or the other of its two vectors."""
    size = cell.hidden_size
    module = torch.nn.GRU(cell.input_size, size, dtype=torch.float64)
    assert cell.hidden_bias is not None
    gates, candidate = cell.bias[: 2 * size], cell.bias[2 * size :]
    on_input, on_hidden = (gates, 0 * gates) if bias_on_input else (0 * gates, gates)
    with torch.no_grad():
        module.weight_ih_l0.copy_(cell.weight_ih)
        module.weight_hh_l0.copy_(cell.weight_hh)
        module.bias_ih_l0.copy_(torch.cat((on_input, candidate)))
        module.bias_hh_l0.copy_(torch.cat((on_hidden, cell.hidden_bias)))
    return module


@pytest.mark.parametrize("bias_on_input", [False, True])
@every_size
def test_reset_after_the_product_is_the_gru_of_torch(
    input_size: int, size: int, bias_on_input: bool
) -> None:
    cell = random_cell(input_size, size, reset_after=True)
    module = torch_gru(cell, bias_on_input=bias_on_input)
    results = []
    for is_ours in (True, False):
        input = normal(1, STEPS, BATCH, input_size).requires_grad_()
        start = normal(2, BATCH, size).requires_grad_()
        if is_ours:
            output, (after,) = cell.unroll(input, (start,))
        else:
            output, hidden = module(input, start.unsqueeze(0))
            after = hidden[0]
        weights = (
            [cell.weight_ih, cell.weight_hh]
            if is_ours
            else [module.weight_ih_l0, module.weight_hh_l0]
        )
        loss = (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum()
        gradients = torch.autograd.grad(loss, [input, start, *weights])
        results.append((output.detach(), after.detach(), *gradients))

    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_the_two_orders_of_reset_are_different_cells() -> None:
    before, after = random_cell(4, 6), random_cell(4, 6, reset_after=True)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias"):
            getattr(after, name).copy_(getattr(before, name))
        assert after.hidden_bias is not None
        after.hidden_bias.zero_()
        input, start = normal(1, STEPS, BATCH, 4), (normal(2, BATCH, 6),)

        difference = before.unroll(input, start)[0] - after.unroll(input, start)[0]

    assert float(difference.abs().max()) > 0.01


def test_only_the_order_of_torch_has_a_bias_inside_the_reset() -> None:
    assert GRUCell(4, 6).hidden_bias is None
    hidden_bias = GRUCell(4, 6, reset_after=True).hidden_bias
    assert hidden_bias is not None
    assert torch.equal(hidden_bias, torch.zeros(6))


@every_order
def test_an_update_gate_of_one_keeps_the_old_state(reset_after: bool) -> None:
    cell = random_cell(4, 6, reset_after=reset_after)
    with torch.no_grad():
        cell.bias[6:12] = 1e4
        start = normal(2, BATCH, 6)
        output, _ = cell.unroll(normal(1, STEPS, BATCH, 4), (start,))

    assert torch.equal(output, start.expand(STEPS, -1, -1))


def test_a_closed_reset_gate_hides_the_old_state_from_the_candidate() -> None:
    cell = random_cell(4, 6)
    with torch.no_grad():
        cell.bias[:6] = -1e4
        cell.bias[6:12] = -1e4  # and the update gate takes the candidate alone
        input = normal(1, STEPS, BATCH, 4)
        output, _ = cell.unroll(input, (normal(2, BATCH, 6),))

        expected = torch.tanh(input @ cell.weight_ih[12:].T + cell.bias[12:])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@every_order
@pytest.mark.parametrize("initialization", ["glorot", "orthogonal"])
def test_biases_start_at_one_for_the_gates_and_zero_for_the_candidate(
    initialization: str, reset_after: bool
) -> None:
    cell = GRUCell(4, 6, initialization=initialization, reset_after=reset_after)

    assert torch.equal(cell.bias, torch.tensor([1.0] * 12 + [0.0] * 6))


@pytest.mark.parametrize(("input_size", "size"), [(40, 60), (90, 50)])
def test_glorot_bounds_are_those_of_one_kernel_for_the_gates_and_one_for_the_candidate(
    input_size: int, size: int
) -> None:
    torch.manual_seed(3)
    cell = GRUCell(input_size, size, initialization="glorot", dtype=torch.float64)

    # (input_size + N) x 2N and (input_size + N) x N
    for rows, outputs in ((slice(2 * size), 2 * size), (slice(2 * size, None), size)):
        bound = math.sqrt(6 / (input_size + size + outputs))
        for weight in (cell.weight_ih[rows].detach(), cell.weight_hh[rows].detach()):
            assert 0.99 * bound < float(weight.abs().max()) <= bound
            assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize(("input_size", "size"), [(10, 25), (4, 6), (9, 5), (1, 3)])
def test_orthogonal_kernels_are_semi_orthogonal_over_input_and_state_as_a_whole(
    input_size: int, size: int
) -> None:
    torch.manual_seed(4)
    cell = GRUCell(input_size, size, initialization="orthogonal", dtype=torch.float64)

    for rows in (slice(2 * size), slice(2 * size, None)):
        kernel = torch.cat((cell.weight_ih[rows], cell.weight_hh[rows]), 1).detach()
        expected = torch.ones(min(kernel.shape), dtype=torch.float64)
        torch.testing.assert_close(torch.linalg.svdvals(kernel), expected, rtol=0, atol=1e-12)


def test_an_unknown_initialization_is_refused() -> None:
    with pytest.raises(ConfigError, match="initialization"):
        GRUCell(4, 6, initialization="xavier")


@every_order
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_value_and_gradient_are_finite_at_zero_and_at_saturation(
    scale: float, reset_after: bool
) -> None:
    cell = random_cell(4, 6, reset_after=reset_after).float()
    input = (scale * normal(1, STEPS, BATCH, 4)).float().requires_grad_()

    output, _ = cell.unroll(input)
    output.square().sum().backward()

    assert output.isfinite().all()
    assert input.grad is not None
    assert input.grad.isfinite().all()
    for parameter in cell.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
