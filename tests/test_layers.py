"""Layers over sequences: use like `torch.nn.LSTM`, LSTM values and the Fast-Slow wiring."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import rum
from rum.cells import (
    Cell,
    CellConfig,
    FastSlowCell,
    LSTMCell,
    LSTMCellConfig,
    RUMCell,
    RUMCellConfig,
    RUMConfig,
    State,
    UpperRUMConfig,
)
from rum.cells.base import Noise
from rum.errors import ConfigError
from rum.interop import lstm_from_torch
from rum.layers import RUM, RecurrentLayer

Array = NDArray[np.float64]

FAST_LSTM = LSTMCellConfig(hidden_size=5, layer_norm=True, zoneout_h=0.1, zoneout_c=0.5)
SLOW_RUM = RUMCellConfig(hidden_size=6, eta=1.0, layer_norm=True, zoneout=0.1)
SLOW_RUM_WITH_MEMORY = RUMCellConfig(hidden_size=6, lambda_=1.0)
SLOW_LSTM = LSTMCellConfig(hidden_size=4, layer_norm=True, zoneout_h=0.1, zoneout_c=0.5)

Make = Callable[..., RecurrentLayer]


def make_rum(**options: Any) -> RecurrentLayer:
    return rum.RUM(3, 5, zoneout=0.1, eta=0.7, **options)


def make_rum_with_memory(**options: Any) -> RecurrentLayer:
    return rum.RUM(3, 5, lambda_=1, **options)


def make_lstm(**options: Any) -> RecurrentLayer:
    return rum.LSTM(3, 5, layer_norm=True, zoneout_h=0.1, zoneout_c=0.5, **options)


def make_fast_slow(num_layers: int = 1, **options: Any) -> RecurrentLayer:
    assert num_layers == 1
    return rum.FastSlowRNN(3, fast=FAST_LSTM, slow=SLOW_RUM, **options)


# maker, number of layers, shapes of the state for one sample without the batch dimension
STACKS = [
    pytest.param(make_rum, 1, [(5,)], id="rum-1"),
    pytest.param(make_rum, 2, [(5,)], id="rum-2"),
    pytest.param(make_rum_with_memory, 1, [(5,), (5, 5)], id="rum-memory-1"),
    pytest.param(make_rum_with_memory, 2, [(5,), (5, 5)], id="rum-memory-2"),
    pytest.param(make_lstm, 1, [(5,), (5,)], id="lstm-1"),
    pytest.param(make_lstm, 2, [(5,), (5,)], id="lstm-2"),
    pytest.param(make_fast_slow, 1, [(5,), (5,), (6,)], id="fast_slow-1"),
]
every_stack = pytest.mark.parametrize(("make", "num_layers", "state_shapes"), STACKS)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of tiny operations only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def build(make: Make, **options: Any) -> RecurrentLayer:
    torch.manual_seed(1)
    layer = make(**{"dtype": torch.float64, **options}).eval()
    randomize(layer)
    return layer


def randomize(module: torch.nn.Module) -> None:
    """Every parameter off its initial value, so that gains, shifts and biases matter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).double())


@every_stack
def test_output_and_state_have_the_shapes_of_torch(
    make: Make, num_layers: int, state_shapes: list[tuple[int, ...]]
) -> None:
    layer = build(make, num_layers=num_layers)

    output, state = layer(draw(7, 4, 3))

    assert output.shape == (7, 4, 5)
    assert [tensor.shape for tensor in state] == [(num_layers, 4, *s) for s in state_shapes]
    assert torch.equal(state[0][-1], output[-1])


@every_stack
def test_batch_first_swaps_batch_and_time_of_input_and_output_only(
    make: Make, num_layers: int, state_shapes: list[tuple[int, ...]]
) -> None:
    layer = build(make, num_layers=num_layers)
    swapped = build(make, num_layers=num_layers, batch_first=True)
    input = draw(7, 4, 3)
    _, state = layer(draw(2, 4, 3, seed=4))

    output, after = swapped(input.transpose(0, 1), state)

    expected, expected_after = layer(input, state)
    torch.testing.assert_close(output.transpose(0, 1), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(after, expected_after, rtol=0, atol=1e-14)


@pytest.mark.parametrize("batch_first", [False, True])
@every_stack
def test_one_sequence_without_a_batch_is_a_batch_of_one(
    make: Make, num_layers: int, state_shapes: list[tuple[int, ...]], batch_first: bool
) -> None:
    layer = build(make, num_layers=num_layers, batch_first=batch_first)
    batched = build(make, num_layers=num_layers)
    input = draw(7, 1, 3)
    first, between = layer(input[:3, 0])

    second, state = layer(input[3:, 0], between)

    expected, expected_state = batched(input)
    assert [tensor.shape for tensor in state] == [(num_layers, *s) for s in state_shapes]
    torch.testing.assert_close(torch.cat((first, second)), expected[:, 0], rtol=0, atol=1e-14)
    squeezed = tuple(tensor[:, 0] for tensor in expected_state)
    torch.testing.assert_close(state, squeezed, rtol=0, atol=1e-14)


@every_stack
def test_state_handed_over_equals_one_long_run(
    make: Make, num_layers: int, state_shapes: list[tuple[int, ...]]
) -> None:
    layer = build(make, num_layers=num_layers)
    input = draw(7, 4, 3)

    state = None
    outputs = []
    for part in input.split([2, 1, 4]):
        output, state = layer(part, state)
        outputs.append(output)

    whole, after = layer(input)
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, after, rtol=0, atol=1e-12)


@every_stack
def test_a_second_layer_runs_on_the_outputs_of_the_first(
    make: Make, num_layers: int, state_shapes: list[tuple[int, ...]]
) -> None:
    layer = build(make, num_layers=num_layers)
    input = draw(7, 4, 3)

    output, state = layer(input)

    expected = input
    for index, cell in enumerate(layer.cells):
        assert isinstance(cell, Cell)
        expected, after = cell.unroll(expected)
        torch.testing.assert_close(tuple(each[index] for each in state), after, rtol=0, atol=0)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@every_stack
def test_a_strictly_loaded_fresh_layer_computes_the_same(
    make: Make, num_layers: int, state_shapes: list[tuple[int, ...]]
) -> None:
    layer = build(make, num_layers=num_layers)
    torch.manual_seed(5)
    fresh = make(num_layers=num_layers, dtype=torch.float64).eval()
    input = draw(7, 4, 3)

    fresh.load_state_dict(layer.state_dict(), strict=True)

    torch.testing.assert_close(fresh(input), layer(input), rtol=0, atol=0)


@every_stack
def test_a_deep_copy_computes_the_same_after_the_original_changed(
    make: Make, num_layers: int, state_shapes: list[tuple[int, ...]]
) -> None:
    layer = build(make, num_layers=num_layers)
    input = draw(7, 4, 3)
    expected = layer(input)

    duplicate = copy.deepcopy(layer)
    randomize(layer)

    torch.testing.assert_close(duplicate(input), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_stack
def test_device_and_dtype_are_those_asked_for(
    make: Make, num_layers: int, state_shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    layer = make(num_layers=num_layers, device="meta", dtype=dtype)

    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", dtype)}


@every_stack
def test_float32_output_follows_float64(
    make: Make, num_layers: int, state_shapes: list[tuple[int, ...]]
) -> None:
    layer = build(make, num_layers=num_layers, dtype=torch.float32)
    exact = build(make, num_layers=num_layers)
    exact.load_state_dict(layer.state_dict())
    input = draw(7, 4, 3, dtype=torch.float32)

    output, state = layer(input)

    assert {tensor.dtype for tensor in (output, *state)} == {torch.float32}
    expected, _ = exact(input.double())
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-4)


@every_stack
def test_a_state_of_another_number_of_layers_is_refused(
    make: Make, num_layers: int, state_shapes: list[tuple[int, ...]]
) -> None:
    layer = build(make, num_layers=num_layers)
    state = tuple(torch.zeros(num_layers + 1, 4, *shape).double() for shape in state_shapes)

    with pytest.raises(ValueError, match=rf"num_layers = {num_layers} first, .*{num_layers + 1}"):
        layer(draw(7, 4, 3), state)


@every_stack
def test_a_state_of_another_batch_is_refused(
    make: Make, num_layers: int, state_shapes: list[tuple[int, ...]]
) -> None:
    layer = build(make, num_layers=num_layers)
    state = tuple(torch.zeros(num_layers, 3, *shape).double() for shape in state_shapes)

    with pytest.raises(ValueError, match=r"\(4, 5\).*got \[\(3, 5\)"):
        layer(draw(7, 4, 3), state)


def test_a_state_that_is_a_bare_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="tuple of tensors, got Tensor"):
        build(make_rum)(draw(7, 4, 3), torch.zeros(1, 4, 5))


@pytest.mark.parametrize("shape", [(3,), (2, 7, 4, 3)])
def test_an_input_without_time_or_with_four_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"2 or 3 dimensions, got shape \("):
        build(make_rum)(draw(*shape))


def test_an_input_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 features, got shape \(7, 4, 2\)"):
        build(make_rum)(draw(7, 4, 2))


@pytest.mark.parametrize(
    ("option", "value"), [("num_layers", 0), ("dropout", 1.0), ("dropout", -0.1)]
)
@pytest.mark.parametrize("layer", [rum.RUM, rum.LSTM])
def test_a_value_that_cannot_work_is_refused_by_name(
    layer: type[RecurrentLayer], option: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=f"^{option} must be"):
        layer(3, 5, **{option: value})


def test_two_layers_of_rum_are_two_cells_of_one_hidden_size() -> None:
    layer = rum.RUM(3, 5, 2, eta=0.3, layer_norm=True, zoneout=0.1, backend="reference")

    sizes = []
    for cell in layer.cells:
        assert isinstance(cell, RUMCell)
        assert (cell.eta, cell.layer_norm_gate, cell.zoneout) == (0.3, "post_sigmoid", 0.1)
        assert cell.backend == "reference"
        sizes.append((cell.input_size, cell.hidden_size))
    assert sizes == [(3, 5), (5, 5)]


def test_the_memory_of_each_layer_comes_back_in_the_state() -> None:
    layer = build(make_rum_with_memory, num_layers=2)

    _, (_, memory) = layer(draw(7, 4, 3))

    identity = torch.eye(5, dtype=torch.float64).expand(2, 4, 5, 5)
    product = memory.transpose(-1, -2) @ memory
    torch.testing.assert_close(product, identity, rtol=0, atol=1e-12)
    assert (memory - identity).abs().amax((-1, -2)).min() > 0.1
    assert (memory[0] - memory[1]).abs().max() > 0.1


# Dropout, with cells that hand their input on


class EchoCell(Cell):
    """Output = input; the state is the sum of the inputs so far."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.input_size = self.hidden_size = size
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return (torch.zeros(batch_size, self.input_size, device=device, dtype=dtype),)

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        return projected, (state[0] + projected,)


@dataclass(kw_only=True)
class EchoConfig(CellConfig):
    def build(self, input_size: int, **_: Any) -> EchoCell:
        return EchoCell(input_size)


def fractions(tensor: Tensor) -> dict[float, float]:
    """How often each value occurs, rounded to six digits."""
    values, counts = tensor.detach().mul(1e6).round().div(1e6).unique(return_counts=True)
    return {float(v): int(n) / tensor.numel() for v, n in zip(values, counts, strict=True)}


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(1, {1.0: 1.0}), (2, {0.0: 0.2, 1.25: 0.8}), (3, {0.0: 0.36, 1.5625: 0.64})],
)
def test_dropout_acts_between_layers_and_not_after_the_last(
    num_layers: int, expected: dict[float, float]
) -> None:
    layer = RecurrentLayer([EchoCell(50) for _ in range(num_layers)], dropout=0.2)
    torch.manual_seed(6)

    output, _ = layer(torch.ones(40, 5, 50))

    assert fractions(output) == pytest.approx(expected, abs=0.02)  # 10000 draws


@pytest.mark.parametrize("make", [make_rum, make_lstm, make_fast_slow])
def test_evaluation_does_not_drop_anything(make: Make) -> None:
    layers = 1 if make is make_fast_slow else 2
    layer = build(make, num_layers=layers, dropout=0.5)
    without = build(make, num_layers=layers)
    input = draw(7, 4, 3)

    torch.testing.assert_close(layer(input), without(input), rtol=0, atol=0)


@pytest.mark.parametrize("make", [make_rum, make_lstm, make_fast_slow])
def test_dropout_changes_training(make: Make) -> None:
    layers = 1 if make is make_fast_slow else 2
    layer = build(make, num_layers=layers, dropout=0.5).train()
    input = draw(7, 4, 3)

    torch.manual_seed(7)
    first, _ = layer(input)
    torch.manual_seed(7)
    again, _ = layer(input)
    other, _ = layer(input)

    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_fast_slow_dropout_acts_on_the_way_to_the_slow_cell_and_back() -> None:
    layer = rum.FastSlowRNN(50, fast=EchoConfig(), slow=EchoConfig(), dropout=0.2)
    torch.manual_seed(8)

    output, (fast, slow) = layer(torch.ones(1, 200, 50))

    assert fractions(slow) == pytest.approx({0.0: 0.2, 1.25: 0.8}, abs=0.02)
    assert fractions(output) == pytest.approx({0.0: 0.36, 1.5625: 0.64}, abs=0.02)
    # the fast state saw the undropped input and what came back from the slow cell
    torch.testing.assert_close(fast[0], 1 + output[0])
    assert not output[0][slow[0] == 0].any()


def test_fast_slow_dropout_leaves_the_carried_states_alone() -> None:
    layer = rum.FastSlowRNN(50, fast=EchoConfig(), slow=EchoConfig(), dropout=0.2)
    torch.manual_seed(9)

    output, (fast, slow) = layer(torch.ones(12, 20, 50))

    torch.testing.assert_close(fast[0], 12 + output.sum(0))
    # a sum of zeros and 1.25s; a state dropped on its way would have been scaled again
    kept = slow / 1.25
    torch.testing.assert_close(kept, kept.round())
    assert float(kept.mean()) == pytest.approx(12 * 0.8, abs=0.2)


def test_fast_slow_dropout_draws_a_fresh_mask_every_step_and_sample() -> None:
    layer = rum.FastSlowRNN(50, fast=EchoConfig(), slow=EchoConfig(), dropout=0.5)
    torch.manual_seed(10)

    output, _ = layer(torch.ones(6, 5, 50))

    rows = (output > 0).flatten(0, 1)
    assert len(rows.unique(dim=0)) == 30


# LSTM values


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_lstm_without_layer_norm_is_that_of_torch(
    num_layers: int, bias: bool, batch_first: bool
) -> None:
    torch.manual_seed(11)
    theirs = torch.nn.LSTM(
        3, 5, num_layers, bias=bias, batch_first=batch_first, dtype=torch.float64
    )
    ours = lstm_from_torch(theirs)
    input = draw(4, 7, 3)
    batch = 4 if batch_first else 7
    state = (draw(num_layers, batch, 5, seed=4), draw(num_layers, batch, 5, seed=5))

    results, gradients = [], []
    for layer in (ours, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in (input, *state)]
        output, after = layer(leaves[0], (leaves[1], leaves[2]))
        results.append((output, *after))
        loss = output.square().sum() + after[0].sum() + after[1].exp().sum()
        gradients.append(torch.autograd.grad(loss, leaves, retain_graph=True))
        loss.backward()

    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)
    for index, cell in enumerate(ours.cells):
        assert isinstance(cell, LSTMCell)
        names = [("weight_ih", "weight_ih"), ("weight_hh", "weight_hh")]
        # one bias here stands for two there, each of which gets the same gradient
        names += [("bias", "bias_ih"), ("bias", "bias_hh")] if bias else []
        for mine, other in names:
            expected = getattr(theirs, f"{other}_l{index}").grad
            torch.testing.assert_close(getattr(cell, mine).grad, expected, rtol=0, atol=1e-12)


def test_forget_bias_is_added_at_run_time_and_not_kept_in_the_bias() -> None:
    layer = rum.LSTM(3, 5, dtype=torch.float64)
    theirs = torch.nn.LSTM(3, 5, dtype=torch.float64)
    cell = layer.cells[0]
    assert isinstance(cell, LSTMCell)
    assert not cell.bias.any()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(cell.weight_ih)
        theirs.weight_hh_l0.copy_(cell.weight_hh)
        theirs.bias_ih_l0.zero_()
        theirs.bias_hh_l0.zero_()
        theirs.bias_ih_l0[5:10] = 1.0  # the forget gate
    input = draw(7, 4, 3)

    torch.testing.assert_close(layer(input)[0], theirs(input)[0], rtol=0, atol=1e-12)


def numpy_sigmoid(x: Array) -> Array:
    value: Array = 1 / (1 + np.exp(-x))
    return value


def numpy_layer_norm(x: Array, gain: Array, shift: Array) -> Array:
    normal: Array = (x - x.mean()) / np.sqrt(x.var() + 1e-3) * gain + shift
    return normal


def numpy_lstm(cell: LSTMCell, input: Array, hidden: Array, memory: Array) -> tuple[Array, Array]:
    """One sample, one step of the released LN-LSTM in evaluation: new h and c."""
    size = cell.hidden_size
    weights = {name: tensor.numpy() for name, tensor in cell.state_dict().items()}
    sums = weights["weight_ih"] @ input + weights["weight_hh"] @ hidden + weights["bias"]
    gates = []
    for index in range(4):
        part = slice(index * size, (index + 1) * size)
        gain, shift = weights["gate_norm.gain"][part], weights["gate_norm.shift"][part]
        gates.append(numpy_layer_norm(sums[part], gain, shift))
    i, f, g, o = gates
    new_memory = memory * numpy_sigmoid(f + 1.0) + numpy_sigmoid(i) * np.tanh(g)
    normal = numpy_layer_norm(new_memory, weights["cell_norm.gain"], weights["cell_norm.shift"])
    new_hidden = np.tanh(normal) * numpy_sigmoid(o)
    kept_h, kept_c = cell.zoneout_h, cell.zoneout_c
    return (
        (1 - kept_h) * new_hidden + kept_h * hidden,
        (1 - kept_c) * new_memory + kept_c * memory,
    )


@pytest.mark.parametrize(("zoneout_h", "zoneout_c"), [(0.0, 0.0), (0.1, 0.5), (0.3, 0.0)])
def test_layer_norm_lstm_equals_its_equations(zoneout_h: float, zoneout_c: float) -> None:
    torch.manual_seed(12)
    layer = rum.LSTM(
        3, 5, layer_norm=True, zoneout_h=zoneout_h, zoneout_c=zoneout_c, dtype=torch.float64
    ).eval()
    randomize(layer)
    cell = layer.cells[0]
    assert isinstance(cell, LSTMCell)
    input, state = draw(6, 4, 3), (draw(1, 4, 5, seed=4), draw(1, 4, 5, seed=5))

    with torch.no_grad():
        output, after = layer(input, state)

    expected = np.zeros((6, 4, 5))
    last = np.zeros((4, 5))
    for b in range(4):
        hidden, memory = state[0][0, b].numpy(), state[1][0, b].numpy()
        for t in range(6):
            hidden, memory = numpy_lstm(cell, input[t, b].numpy(), hidden, memory)
            expected[t, b] = hidden
        last[b] = memory
    torch.testing.assert_close(output, torch.from_numpy(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1][0], torch.from_numpy(last), rtol=0, atol=1e-12)


def test_lstm_zoneout_in_training_has_its_own_probability_for_h_and_c() -> None:
    torch.manual_seed(13)
    cell = LSTMCell(3, 5, zoneout_h=0.1, zoneout_c=0.5, dtype=torch.float64).train()
    without = LSTMCell(3, 5, dtype=torch.float64)
    without.load_state_dict(cell.state_dict())
    input, state = draw(2000, 3), (draw(2000, 5, seed=4), draw(2000, 5, seed=5))

    with torch.no_grad():
        _, after = cell(input, state)
        _, new = without(input, state)

    for old, computed, got, probability in zip(state, new, after, (0.1, 0.5), strict=True):
        kept = got == old
        # h' comes from c' before its zoneout: both are either old or as without zoneout
        torch.testing.assert_close(got, torch.where(kept, old, computed), rtol=0, atol=1e-14)
        assert float(kept.double().mean()) == pytest.approx(probability, abs=0.02)
    both = ((after[0] == state[0]) & (after[1] == state[1])).double().mean()
    assert float(both) == pytest.approx(0.05, abs=0.01)  # independent masks


def test_lstm_kernels_with_layer_norm_are_orthogonal_as_a_whole() -> None:
    torch.manual_seed(14)
    cell = LSTMCell(3, 20, layer_norm=True, dtype=torch.float64)

    for weight in (cell.weight_ih, cell.weight_hh):
        columns = weight.T @ weight
        identity = torch.eye(len(columns), dtype=torch.float64)
        torch.testing.assert_close(columns, identity, rtol=0, atol=1e-12)
    # and so one gate's block is not: a quarter of the squared norm each, on average
    blocks = [float(block.square().sum()) for block in cell.weight_hh.detach().split(20)]
    assert blocks == pytest.approx([5.0] * 4, rel=0.25)


def test_lstm_kernels_without_layer_norm_are_glorot_uniform_over_input_and_state() -> None:
    torch.manual_seed(15)
    cell = LSTMCell(30, 40)

    bound = math.sqrt(6 / (30 + 40 + 4 * 40))
    for weight in (cell.weight_ih.detach(), cell.weight_hh.detach()):
        assert bound * 0.99 < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert float(weight.mean()) == pytest.approx(0, abs=0.01)


# Fast-Slow wiring


FAST_SLOW = [
    pytest.param(SLOW_RUM, 2, id="fs-rum-2"),
    pytest.param(SLOW_RUM_WITH_MEMORY, 2, id="fs-rum-2-memory"),
    pytest.param(SLOW_LSTM, 4, id="fs-lstm-4"),
]


def fast_slow(slow: CellConfig, num_fast_cells: int) -> rum.FastSlowRNN:
    torch.manual_seed(16)
    layer = rum.FastSlowRNN(
        3,
        fast=FAST_LSTM,
        slow=slow,
        num_fast_cells=num_fast_cells,
        dropout=0.35,
        dtype=torch.float64,
    )
    randomize(layer)
    return layer.eval()


def cells_of(layer: rum.FastSlowRNN) -> tuple[list[LSTMCell], Cell]:
    cell = layer.cells[0]
    assert isinstance(cell, FastSlowCell)
    fast = [each for each in cell.fast if isinstance(each, LSTMCell)]
    assert len(fast) == len(cell.fast)
    return fast, cell.slow


@pytest.mark.parametrize(("slow", "num_fast_cells"), FAST_SLOW)
def test_fast_slow_wiring(slow: CellConfig, num_fast_cells: int) -> None:
    layer = fast_slow(slow, num_fast_cells)
    fast_cells, slow_cell = cells_of(layer)
    input = draw(6, 4, 3)
    _, start = layer(draw(2, 4, 3, seed=4))

    with torch.no_grad():
        output, after = layer(input, start)

    f: State = tuple(tensor[0] for tensor in start[:2])
    s: State = tuple(tensor[0] for tensor in start[2:])
    expected = []
    with torch.no_grad():
        for x in input:
            o1, f = fast_cells[0](x, f)
            o_slow, s = slow_cell(o1, s)
            last, f = fast_cells[1](o_slow, f)
            for extra in fast_cells[2:]:
                last, f = extra(torch.zeros(4, 1, dtype=torch.float64), f)
            expected.append(last)
    torch.testing.assert_close(output, torch.stack(expected), rtol=0, atol=1e-12)
    state = tuple(tensor.unsqueeze(0) for tensor in (*f, *s))
    torch.testing.assert_close(after, state, rtol=0, atol=1e-12)


def test_fast_cells_share_their_state_and_not_their_weights() -> None:
    fast_cells, _ = cells_of(fast_slow(SLOW_LSTM, 4))

    assert [cell.input_size for cell in fast_cells] == [3, 4, 1, 1]
    assert len(
        {parameter.data_ptr() for cell in fast_cells for parameter in cell.parameters()}
    ) == (sum(len(list(cell.parameters())) for cell in fast_cells))


def test_input_weights_of_the_third_and_later_fast_cells_stay_untrained() -> None:
    layer = fast_slow(SLOW_LSTM, 4).train()
    fast_cells, _ = cells_of(layer)

    layer(draw(6, 4, 3))[0].square().sum().backward()

    for index, cell in enumerate(fast_cells):
        assert cell.weight_ih.grad is not None
        assert bool(cell.weight_ih.grad.any()) is (index < 2)
        assert cell.weight_hh.grad is not None
        assert cell.weight_hh.grad.any()


def test_one_fast_cell_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_fast_cells must be an integer >= 2, got 1"):
        rum.FastSlowRNN(3, fast=FAST_LSTM, slow=SLOW_RUM, num_fast_cells=1)


def test_a_list_gives_each_layer_its_own_options() -> None:
    """Two layers are two single ones, one after the other; gradients too."""
    torch.manual_seed(0)
    options: dict[str, list[Any]] = {
        "eta": [0.7, None],
        "zoneout": [0.3, 0.1],
        "lambda_": [1.0, 0.5],
    }
    both = RUM(5, 6, num_layers=2, dtype=torch.float64, **options).eval()
    single = [
        RUM(size, 6, dtype=torch.float64, **{name: values[i] for name, values in options.items()})
        for i, size in enumerate((5, 6))
    ]
    for layer, cell in zip(single, both.cells, strict=True):
        layer.eval().cells[0].load_state_dict(cell.state_dict())
    input = torch.randn(7, 3, 5, dtype=torch.float64, requires_grad=True)
    output, (hidden, memory) = both(input)
    first, (h0, r0) = single[0](input)
    second, (h1, r1) = single[1](first)
    torch.testing.assert_close(output, second, rtol=0, atol=0)
    torch.testing.assert_close(hidden, torch.cat((h0, h1)), rtol=0, atol=0)
    torch.testing.assert_close(memory, torch.cat((r0, r1)), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(output.square().sum(), input)
    (expected,) = torch.autograd.grad(second.square().sum(), input)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="eta must have a value for each of 2 layers"):
        RUM(5, 6, num_layers=2, eta=[1.0])
    with pytest.raises(ValueError, match="lambda_ must be 0 in all layers or in none"):
        RUM(5, 6, num_layers=2, lambda_=[0, 1])


def test_the_cells_above_the_first_have_options_of_their_own() -> None:
    upper = UpperRUMConfig(lambda_=0.5, eta=0.0, zoneout=0.2)
    config = RUMConfig(hidden_size=6, num_layers=3, lambda_=1.0, eta=2.0, upper=upper)
    cells = [config.build_layer(layer, 4) for layer in range(3)]
    assert [(c.lambda_, c.eta, c.zoneout) for c in cells] == [  # type: ignore[attr-defined]
        (1.0, 2.0, 0.0),
        (0.5, None, 0.2),
        (0.5, None, 0.2),
    ]
    same = RUMConfig(hidden_size=6, num_layers=2, eta=2.0, zoneout=0.3)
    above = same.build_layer(1, 6)
    assert (above.eta, above.zoneout) == (2.0, 0.3)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upper": UpperRUMConfig(eta=1.0)}, "upper.eta has no effect with num_layers = 1"),
        (
            {"num_layers": 2, "upper": UpperRUMConfig(lambda_=1.0)},
            "upper.lambda_ must be 0 if and only if",
        ),
        ({"num_layers": 2, "upper": UpperRUMConfig(eta=-1.0)}, "upper.eta must be"),
        ({"num_layers": 2, "upper": UpperRUMConfig(zoneout=1.0)}, "upper.zoneout must be"),
    ],
)
def test_options_above_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        RUMConfig(hidden_size=6, **options)
