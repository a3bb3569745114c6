"""Fast weights and WeiNet against their equations, and how they start."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rum.cells import FastWeightsCell, WeiNetCell

Array = NDArray[np.float64]

STEPS, BATCH = 9, 3

every_size = pytest.mark.parametrize(("input_size", "size"), [(4, 6), (5, 7), (3, 1), (1, 2)])


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


def fill(cell: torch.nn.Module) -> None:
    """Draws every parameter, biases and layer norm too."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(cell.named_parameters()):
            draw = normal(10 + index, *parameter.shape)
            parameter.copy_(1 + 0.3 * draw if name.endswith("gain") else 0.5 * draw)


def layer_norm(x: Array, weights: dict[str, Array]) -> Array:
    normalized: Array = (x - x.mean()) / np.sqrt(x.var() + 1e-3)
    return normalized * weights["norm.gain"] + weights["norm.shift"]


def numpy_fast_weights(
    cell: FastWeightsCell, input: Array, hidden: Array, fast: Array
) -> tuple[Array, Array]:
    """One sample, one step: h and A before, h and A after."""
    weights = {name: tensor.numpy() for name, tensor in cell.state_dict().items()}
    slow = weights["weight_hh"] @ hidden + weights["weight_ih"] @ input + weights["bias"]
    g = np.maximum(slow, 0)
    for _ in range(cell.inner_steps):
        g = np.maximum(layer_norm(slow + fast @ g, weights), 0)
    return g, cell.decay * fast + cell.rate * np.outer(g, g)


def numpy_weinet(
    cell: WeiNetCell, input: Array, hidden: Array, memories: Array
) -> tuple[Array, Array]:
    """One sample, one step: h and all A before, h and all A after."""
    weights = {name: tensor.numpy() for name, tensor in cell.state_dict().items()}
    slow = weights["weight_hh"] @ hidden + weights["weight_ih"] @ input + weights["bias"]
    preliminary = np.maximum(slow, 0)
    read = np.zeros_like(slow)
    for memory in memories:
        read = read + memory @ preliminary
    new = np.maximum(layer_norm(slow + read, weights), 0)
    after = np.zeros_like(memories)
    for k, memory in enumerate(memories):
        after[k] = weights["memory_decay"][k] * memory
        after[k] += weights["memory_rate"][k] * np.outer(new, new)
    return new, after


def check_equals_the_equations(cell: Any, step: Any, input: Tensor, state: Any) -> None:
    with torch.no_grad():
        output, (hidden, memory) = cell.unroll(input, state)

    expected = np.zeros((STEPS, BATCH, cell.hidden_size))
    expected_memory = np.zeros(memory.shape)
    for b in range(BATCH):
        h = state[0][b].numpy() if state else np.zeros(cell.hidden_size)
        a = state[1][b].numpy() if state else np.zeros(memory.shape[1:])
        for t in range(STEPS):
            h, a = step(cell, input[t, b].numpy(), h, a)
            expected[t, b] = h
        expected_memory[b] = a
    torch.testing.assert_close(output, torch.from_numpy(expected), rtol=0, atol=1e-10)
    torch.testing.assert_close(memory, torch.from_numpy(expected_memory), rtol=0, atol=1e-10)
    assert torch.equal(hidden, output[-1])


@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"decay": 0.8, "rate": 0.3}, {"inner_steps": 3}, {"inner_steps": 2}], ids=str
)
@every_size
def test_fast_weights_equal_the_equations(
    input_size: int, size: int, options: dict[str, Any], is_given: bool
) -> None:
    cell = FastWeightsCell(input_size, size, **options, dtype=torch.float64)
    fill(cell)
    state = (normal(2, BATCH, size), normal(3, BATCH, size, size)) if is_given else None

    input = normal(1, STEPS, BATCH, input_size)
    check_equals_the_equations(cell, numpy_fast_weights, input, state)


@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize("num_memories", [1, 2, 3])
@every_size
def test_weinet_equals_the_equations(
    input_size: int, size: int, num_memories: int, is_given: bool
) -> None:
    cell = WeiNetCell(input_size, size, num_memories=num_memories, dtype=torch.float64)
    fill(cell)
    shape = (BATCH, num_memories, size, size)
    state = (normal(2, BATCH, size), normal(3, *shape)) if is_given else None

    check_equals_the_equations(cell, numpy_weinet, normal(1, STEPS, BATCH, input_size), state)


def test_fast_weights_default_to_decay_095_rate_05_and_one_inner_step() -> None:
    cell = FastWeightsCell(4, 6)

    assert (cell.decay, cell.rate, cell.inner_steps) == (0.95, 0.5, 1)


def test_state_starts_at_zero() -> None:
    cpu = {"device": torch.device("cpu"), "dtype": torch.float64}
    for cell, shape in (
        (FastWeightsCell(4, 6), (BATCH, 6, 6)),
        (WeiNetCell(4, 6, num_memories=2), (BATCH, 2, 6, 6)),
    ):
        hidden, memory = cell.initial_state(BATCH, **cpu)
        assert torch.equal(hidden, torch.zeros(BATCH, 6, dtype=torch.float64))
        assert torch.equal(memory, torch.zeros(shape, dtype=torch.float64))


def test_the_memory_is_read_before_it_is_written() -> None:
    # from an empty memory the first output is a plain layer-normalised network's
    cell = FastWeightsCell(4, 6, dtype=torch.float64)
    fill(cell)
    input = normal(1, BATCH, 4)

    with torch.no_grad():
        output, (_, memory) = cell(input)
        expected = torch.relu(cell.norm(input @ cell.weight_ih.T + cell.bias))

    torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)
    written = 0.5 * expected[:, :, None] * expected[:, None, :]
    torch.testing.assert_close(memory, written, rtol=0, atol=1e-14)


def test_a_stored_state_attracts_the_read_out() -> None:
    # A = e h h' gives A g = e (h . g) h: along h and nothing else
    cell = FastWeightsCell(4, 6, dtype=torch.float64)
    with torch.no_grad():
        _, state = cell(normal(1, BATCH, 4))
        hidden, memory = state
        probe = normal(2, BATCH, 6)
        read = (memory @ probe.unsqueeze(-1)).squeeze(-1)

    expected = 0.5 * (hidden * probe).sum(-1, keepdim=True) * hidden
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("cell_type", [FastWeightsCell, WeiNetCell])
def test_layer_norm_is_over_the_hidden_units_of_each_sample(cell_type: Any) -> None:
    # a public re-implementation normalises over the batch: then samples would see each other
    cell = cell_type(4, 6, dtype=torch.float64)
    fill(cell)
    input = normal(1, STEPS, BATCH, 4)

    with torch.no_grad():
        together, _ = cell.unroll(input)
        alone, _ = cell.unroll(input[:, 1:2])

    torch.testing.assert_close(together[:, 1:2], alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cell_type", [FastWeightsCell, WeiNetCell])
def test_initial_weights(cell_type: Any) -> None:
    torch.manual_seed(4)
    input_size, size = 36, 50
    cell = cell_type(input_size, size, dtype=torch.float64)

    expected = 0.05 * torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(cell.weight_hh.detach(), expected, rtol=0, atol=1e-12)
    assert torch.equal(cell.bias.detach(), torch.zeros(size, dtype=torch.float64))
    assert torch.equal(cell.norm.gain.detach(), torch.ones(size, dtype=torch.float64))
    assert torch.equal(cell.norm.shift.detach(), torch.zeros(size, dtype=torch.float64))
    # "small uniform"; a public re-implementation draws them up to sqrt(50)
    weight = cell.weight_ih.detach()
    bound = float(weight.abs().max())
    assert 0 < bound <= 0.5
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(float(weight.mean())) < 0.05 * bound


def test_the_layer_norm_epsilon_is_a_thousandth() -> None:
    cell = FastWeightsCell(1, 4, dtype=torch.float64)
    with torch.no_grad():
        cell.weight_ih.copy_(0.01 * torch.tensor([[-1.0], [-1.0], [1.0], [1.0]]).double())
        output, _ = cell(torch.ones(1, 1, dtype=torch.float64))

    # variance 1e-4: with an epsilon of 1e-5 these would be 0.95
    value = 0.01 / math.sqrt(1e-4 + 1e-3)
    expected = torch.tensor([[0.0, 0.0, value, value]], dtype=torch.float64)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)


def test_one_learned_memory_starts_at_a_decay_of_095_and_a_rate_of_05() -> None:
    cell = WeiNetCell(4, 6, num_memories=1, dtype=torch.float64)

    expected = torch.full((1, 6, 6), 0.95, dtype=torch.float64)
    torch.testing.assert_close(cell.memory_decay.detach(), expected, rtol=0, atol=1e-12)
    expected = torch.full((1, 6, 6), 0.5, dtype=torch.float64)
    torch.testing.assert_close(cell.memory_rate.detach(), expected, rtol=0, atol=1e-12)


def test_memories_that_start_apart_become_more_different() -> None:
    cell = WeiNetCell(4, 6, dtype=torch.float64)
    apart = cell.memory_decay[0] - cell.memory_decay[1]
    torch.testing.assert_close(apart, torch.full_like(apart, 0.05))
    cell.unroll(normal(1, STEPS, BATCH, 4))[0].square().sum().backward()
    for parameter in (cell.memory_decay, cell.memory_rate):
        assert parameter.grad is not None
        assert (parameter.grad[0] - parameter.grad[1]).abs().max() > 1e-6


def test_weinet_with_one_memory_starts_as_fast_weights() -> None:
    cell = WeiNetCell(4, 6, num_memories=1, dtype=torch.float64)
    fast = FastWeightsCell(4, 6, dtype=torch.float64)
    shared = {name: value for name, value in cell.state_dict().items() if "memory" not in name}
    fast.load_state_dict(shared)
    input = normal(1, STEPS, BATCH, 4)

    with torch.no_grad():
        output, _ = cell.unroll(input)
        expected, _ = fast.unroll(input)

    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


def test_weinet_has_two_square_matrices_a_memory_and_nothing_else_more() -> None:
    def count(cell: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in cell.parameters())

    plain = count(FastWeightsCell(36, 50))
    assert count(WeiNetCell(36, 50)) == plain + 4 * 50 * 50
    assert count(WeiNetCell(36, 50, num_memories=3)) == plain + 6 * 50 * 50


@pytest.mark.parametrize("start", ["zero", "equal_units", "negative"])
@pytest.mark.parametrize("cell_type", [FastWeightsCell, WeiNetCell])
def test_value_and_gradient_are_finite_where_layer_norm_has_nothing_to_scale(
    cell_type: Any, start: str
) -> None:
    cell = cell_type(4, 6)
    with torch.no_grad():
        if start != "zero":  # equal over the units: variance 0
            cell.weight_ih.fill_(-1.0 if start == "negative" else 1.0)
    input = (0.0 if start == "zero" else 1.0) * torch.ones(STEPS, BATCH, 4)
    input.requires_grad_()

    output, (_, memory) = cell.unroll(input)
    (output.sum() + memory.sum()).backward()

    assert output.isfinite().all()
    for leaf in (input, *cell.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("cell_type", [FastWeightsCell, WeiNetCell])
def test_a_long_sequence_stays_finite_with_the_initial_decay(cell_type: Any) -> None:
    torch.manual_seed(5)
    cell = cell_type(4, 8)

    with torch.no_grad():
        output, (_, memory) = cell.unroll(torch.randn(1000, 2, 4))

    assert output.isfinite().all()
    # |h|^2 <= N after layer norm, so |A| <= rate N / (1 - decay)
    assert float(torch.linalg.matrix_norm(memory, 2).max()) <= 0.5 * 8 / 0.05
