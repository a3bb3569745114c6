"""The operator `rum::chain` (LSTM, GRU, Fast-Slow RNN) against the step-by-step reference."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rum
from rum.cells import (
    FastSlowCell,
    GRUCell,
    GRUCellConfig,
    LSTMCell,
    LSTMCellConfig,
    RUMCell,
    RUMCellConfig,
)
from rum.cells.base import AcceleratedCell
from rum.errors import ConfigError
from rum.kernels.cpu import library

INPUT_SIZE, STEPS, BATCH = 4, 6, 5
BACKENDS = ["fused", *(["cpu"] if library() else [])]
NORMED = LSTMCellConfig(hidden_size=6, layer_norm=True, zoneout_h=0.2, zoneout_c=0.4)
Make = Callable[..., AcceleratedCell]
CELLS: dict[str, Make] = {
    "lstm": lambda **o: LSTMCell(INPUT_SIZE, 7, **o),
    "lstm-layer-norm": lambda **o: LSTMCell(
        INPUT_SIZE, 7, layer_norm=True, zoneout_h=0.2, zoneout_c=0.4, forget_bias=0.5, **o
    ),
    "lstm-zoneout-h": lambda **o: LSTMCell(INPUT_SIZE, 7, zoneout_h=0.3, **o),
    "gru": lambda **o: GRUCell(INPUT_SIZE, 7, reset_after=True, **o),
    "fs-rum-2": lambda **o: FastSlowCell(
        INPUT_SIZE,
        NORMED,
        RUMCellConfig(hidden_size=8, eta=1.0, layer_norm=True, zoneout=0.1, activation="tanh"),
        dropout=0.3,
        **o,
    ),
    "fs-rum-3": lambda **o: FastSlowCell(
        INPUT_SIZE,
        LSTMCellConfig(hidden_size=5),
        RUMCellConfig(
            hidden_size=8, layer_norm=True, layer_norm_gate="pre_sigmoid", activation="tanh"
        ),
        num_fast_cells=3,
        **o,
    ),
    "fs-lstm-4": lambda **o: FastSlowCell(
        INPUT_SIZE, NORMED, LSTMCellConfig(hidden_size=3), num_fast_cells=4, dropout=0.3, **o
    ),
    "rum-gru": lambda **o: FastSlowCell(
        INPUT_SIZE,
        RUMCellConfig(hidden_size=6, zoneout=0.2, activation="sigmoid", embedding_bias=False),
        GRUCellConfig(hidden_size=5, reset_after=True),
        **o,
    ),
}
every_cell = pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def pair(
    make: Make, backend: str, *, training: bool = False
) -> tuple[AcceleratedCell, AcceleratedCell]:
    """A cell with random parameters on a backend, and the reference in float64."""
    torch.manual_seed(1)
    cell = make(backend=backend).train(training)
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            around = 1.0 if name.endswith("gain") else 0.0
            torch.nn.init.normal_(parameter, around, 0.5)
    exact = copy.deepcopy(cell).double()
    exact.backend = "reference"
    return (cell if backend == "cpu" else copy.deepcopy(exact)), exact


def run(
    cell: AcceleratedCell, shape: tuple[int, int] = (STEPS, BATCH), *, backend: str | None = None
) -> list[Tensor]:
    """Outputs, states, and all gradients of a loss on them, from a random initial state."""
    if backend is not None:
        cell.backend = backend
    steps, batch = shape
    dtype = next(cell.parameters()).dtype
    initial = cell.initial_state(batch, device=torch.device("cpu"), dtype=dtype)
    leaves = [draw(steps, batch, INPUT_SIZE)]
    leaves += [draw(*state.shape, seed=seed) for seed, state in enumerate(initial, 3)]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    torch.manual_seed(9)
    outputs, state = cell.unroll(leaves[0], tuple(leaves[1:]))
    parts = [outputs, *state]
    weights = [torch.linspace(-1, 2, part.numel()).to(dtype).view_as(part) for part in parts]
    losses = [(part * weight).sum() for part, weight in zip(parts, weights, strict=True)]
    gradients = torch.autograd.grad(
        torch.stack(losses).sum(),
        [*leaves, *cell.parameters()],
        allow_unused=True,  # by the reference without a step
        materialize_grads=True,
    )
    return [tensor.detach().double() for tensor in (*parts, *gradients)]


@every_backend
@every_cell
@pytest.mark.parametrize("training", [True, False], ids=["masks", "expectation"])
@pytest.mark.parametrize("shape", [(STEPS, BATCH), (1, 1), (0, 3), (3, 0)], ids=str)
def test_values_and_gradients_are_those_of_the_reference(
    make: Make, backend: str, training: bool, shape: tuple[int, int]
) -> None:
    cell, exact = pair(make, backend, training=training)
    ours, expected = run(cell, shape, backend=backend), run(exact, shape)
    for index, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert a.shape == b.shape
        allowed = 1e-11 if backend == "fused" else (1e-5 if index < 4 else 1e-4)
        assert (a - b).norm() <= allowed * max(1.0, float(b.norm())), index


@pytest.mark.skipif(library() is None, reason="the compiled kernel was not built")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_rows_are_shared_by_threads(threads: int) -> None:
    def make(**options: Any) -> AcceleratedCell:
        fast = LSTMCellConfig(hidden_size=70, layer_norm=True, zoneout_h=0.2, zoneout_c=0.4)
        slow = RUMCellConfig(hidden_size=150, eta=1.0, layer_norm=True, activation="tanh")
        return FastSlowCell(INPUT_SIZE, fast, slow, **options)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    cell, exact = pair(make, "cpu", training=True)
    ours, expected = run(cell, (3, 130)), run(exact, (3, 130))
    torch.set_num_threads(before)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * max(1.0, float(b.norm()))


@pytest.mark.parametrize("name", ["lstm-layer-norm", "gru", "fs-rum-2", "fs-lstm-4"])
def test_gradients_pass_gradcheck(name: str) -> None:
    cell, _ = pair(CELLS[name], "fused")
    cell.backend = "fused"
    initial = cell.initial_state(2, device=torch.device("cpu"), dtype=torch.float64)
    leaves = [draw(3, 2, INPUT_SIZE), *(draw(*state.shape, seed=5) for state in initial)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def unroll(*tensors: Tensor) -> Tensor:
        return cell.unroll(tensors[0], tensors[1 : len(leaves)])[0]

    # gradcheck perturbs the parameters in place, so the cell need not be given them
    assert torch.autograd.gradcheck(unroll, (*leaves, *cell.parameters()))


@every_backend
@pytest.mark.parametrize("name", ["lstm-layer-norm", "gru", "fs-rum-2"])
def test_torch_compile_and_export_see_one_node(name: str, backend: str) -> None:
    cell = CELLS[name](backend=backend).eval()
    input = draw(STEPS, BATCH, INPUT_SIZE).float().requires_grad_()

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, input: Tensor) -> Tensor:
            return self.cell.unroll(input)[0]

    layer = Layer()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        output = call(input)
        gradients = torch.autograd.grad(output.square().sum(), [input, *cell.parameters()])
        results.append([output, *gradients])
    torch.testing.assert_close(*results)
    exported = torch.export.export(layer, (input,))
    nodes = [node for node in exported.graph.nodes if "rum.chain" in str(node.target)]
    assert len(nodes) == 1
    torch.testing.assert_close(exported.module()(input), results[0][0])


@every_backend
def test_autocast_rounds_products_only(backend: str) -> None:
    cell, exact = pair(CELLS["fs-rum-2"], "cpu" if backend == "cpu" else "fused")
    cell = cell.float()
    cell.backend = backend
    input = draw(3, BATCH, INPUT_SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = cell.unroll(input.bfloat16())
    expected, _ = exact.unroll(input.bfloat16().double())
    assert all(tensor.dtype == torch.float32 for tensor in (output, *state))
    assert (output.double() - expected).norm() < 3e-2 * expected.norm()
    output.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in cell.parameters())


@every_backend
def test_a_second_derivative_is_refused_and_the_reference_has_it(backend: str) -> None:
    cell = LSTMCell(INPUT_SIZE, 3, backend=backend)
    input = torch.randn(2, 2, INPUT_SIZE, requires_grad=True)
    (gradient,) = torch.autograd.grad(cell.unroll(input)[0].sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="twice: use backend='reference'"):
        gradient.sum().backward()
    cell.backend = "reference"
    (gradient,) = torch.autograd.grad(cell.unroll(input)[0].sum(), input, create_graph=True)
    gradient.sum().backward()
    assert input.grad is not None


@every_backend
def test_lengths_and_unbatched_inputs_through_the_layer(backend: str) -> None:
    layer = rum.FastSlowRNN(
        INPUT_SIZE, fast=NORMED, slow=RUMCellConfig(hidden_size=8), backend=backend
    ).eval()
    input = draw(STEPS, 3, INPUT_SIZE).float()
    outputs, state = layer(input, lengths=torch.tensor([6, 2, 4]))
    for row, length in enumerate((6, 2, 4)):
        alone, last = layer(input[:length, row])
        torch.testing.assert_close(outputs[:length, row], alone)
        assert not outputs[length:, row].any()
        for ours, theirs in zip(state, last, strict=True):
            torch.testing.assert_close(ours[:, row], theirs)


REFUSED: dict[str, tuple[Make, str]] = {
    "gru": (lambda **o: GRUCell(INPUT_SIZE, 3, **o), "serves a GRU with reset_after=True"),
    "memory": (
        lambda **o: FastSlowCell(INPUT_SIZE, NORMED, RUMCellConfig(hidden_size=3, lambda_=1), **o),
        r"serves LSTM, GRU \(reset_after=True\) and RUM \(lambda_=0\) cells .*, got RUMCell",
    ),
    "half": (
        lambda **o: LSTMCell(INPUT_SIZE, 3, dtype=torch.bfloat16, **o),
        "computes in float32 or float64, got weights in torch.bfloat16",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_an_error_and_auto_takes_the_reference(
    make: Make, message: str
) -> None:
    cell = make(backend="fused")
    input = torch.zeros(2, 1, INPUT_SIZE, dtype=next(cell.parameters()).dtype)
    with pytest.raises(ConfigError, match=f"backend 'fused' {message}: use 'reference'"):
        cell.unroll(input)
    cell.backend = "auto"
    assert cell.choose_backend(cell.begin(input, None)) == "reference"
    assert cell.unroll(input)[0].shape == (2, 1, cell.hidden_size)


def test_an_observer_inside_sees_every_step() -> None:
    cell = FastSlowCell(INPUT_SIZE, NORMED, RUMCellConfig(hidden_size=3))
    seen: list[object] = []
    assert isinstance(cell.slow, RUMCell)
    cell.slow.observer = seen.append
    cell.unroll(torch.zeros(4, 1, INPUT_SIZE))
    assert len(seen) == 4


@every_backend
def test_a_repeated_call_gives_the_same_bits(backend: str) -> None:
    cell, _ = pair(CELLS["fs-rum-2"], backend, training=True)
    first, second = run(cell, backend=backend), run(cell, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
