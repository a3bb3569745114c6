"""The operator `rum::sequence`: what torch, strange shapes and long sequences make of it."""

import copy
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

import rum
from rum.cells import RUMCell
from rum.kernels.cpu import library

BACKENDS = ["fused", *(["cpu"] if library() else [])]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "memory": {"lambda_": 1},
    "all": {"layer_norm": True, "eta": 1.0, "zoneout": 0.3, "num_layers": 2},
    "memory-all": {"lambda_": 1, "layer_norm": True, "eta": 1.0, "zoneout": 0.3},
}
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def draw(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected).detach().norm()
    return float(difference / expected.detach().norm().clamp(min=1e-3))


@every_backend
@every_option
@pytest.mark.parametrize("training", [True, False])
def test_torch_compile_sees_one_node_a_layer(
    options: dict[str, Any], backend: str, training: bool
) -> None:
    torch.manual_seed(0)
    layer = rum.RUM(4, 5, backend=backend, **options).train(training)
    graphs = []

    def remember(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=remember)
    results = []
    for call in (layer, compiled):
        input = draw(7, 3, 4).requires_grad_()
        torch.manual_seed(1)
        output, state = call(input)
        loss = output.square().sum() + state[-1].square().sum()
        results.append([output, *state, *torch.autograd.grad(loss, [input, *layer.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    (graph,) = graphs
    nodes = [node for node in graph.graph.nodes if "rum.sequence" in str(node.target)]
    assert len(nodes) == layer.num_layers


@every_backend
def test_torch_compile_traces_the_backward_pass(backend: str) -> None:
    layer = rum.RUM(4, 5, backend=backend, lambda_=1, layer_norm=True)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (layer, compiled):
        input = draw(7, 3, 4).requires_grad_()
        loss = call(input)[0].square().sum()
        gradients.append(torch.autograd.grad(loss, [input, *layer.parameters()]))
    torch.testing.assert_close(*gradients)


@every_backend
@every_option
def test_torch_export_sees_one_node_a_layer(options: dict[str, Any], backend: str) -> None:
    layer = rum.RUM(4, 5, backend=backend, **options).eval()
    steps, batch = torch.export.Dim("steps", min=2, max=500), torch.export.Dim("batch", min=2)
    input = draw(7, 3, 4)
    exported = torch.export.export(layer, (input,), dynamic_shapes=({0: steps, 1: batch},))
    nodes = [node for node in exported.graph.nodes if "rum.sequence" in str(node.target)]
    assert len(nodes) == layer.num_layers
    for other in (input, draw(300, 2, 4)):
        torch.testing.assert_close(exported.module()(other), layer(other))


@every_backend
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lambda_", [0, 1])
def test_the_operators_keep_torchs_rules(lambda_: int, recompute: bool, backend: str) -> None:
    """Schema, fake implementation, autograd and AOT dispatch, as torch.library checks them."""
    size, batch = 5, 3
    leaves = [draw(7, 2, batch, 4), draw(2, batch, size)]
    weights = [draw(2, 3 * size, 4), draw(2, 3 * size), draw(2, 2 * size, size)]
    for tensor in (*leaves, *weights):
        tensor.requires_grad_()
    memory = torch.eye(size).repeat(2, batch, 1, 1) if lambda_ else None
    norms = [draw(2, n).requires_grad_() for n in (2 * size, 2 * size, size, size)]
    rest = (backend, "tanh", [0.5, 1.0], "post_sigmoid", [0.0, 0.3], None, recompute)
    torch.library.opcheck(
        torch.ops.rum.sequence.default, (*leaves, memory, None, *weights, norms, *rest)
    )


@every_backend
@pytest.mark.parametrize("lambda_", [0, 1])
def test_autocast_rounds_products_only(lambda_: int, backend: str) -> None:
    torch.manual_seed(0)
    cell = RUMCell(4, 20, lambda_=lambda_, backend=backend, activation="tanh", eta=1.0)
    exact = copy.deepcopy(cell).double()
    exact.backend = "reference"
    input = draw(4, 3, 4)  # few steps: the recurrence multiplies differences
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = cell.unroll(input.bfloat16())
        loss = output.sum()
    expected, _ = exact.unroll(input.bfloat16().double())
    assert output.dtype == torch.float32
    assert all(tensor.dtype == torch.float32 for tensor in state)
    assert relative(output, expected) < 3e-2
    ours = torch.autograd.grad(loss, list(cell.parameters()))
    theirs = torch.autograd.grad(expected.sum(), list(exact.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 3e-2


@every_backend
@pytest.mark.parametrize("lambda_", [0, 1])
def test_a_hundred_thousand_steps_in_pieces_are_those_in_one(lambda_: int, backend: str) -> None:
    torch.manual_seed(0)
    cell = RUMCell(1, 4, lambda_=lambda_, eta=1.0, backend=backend, activation="tanh")
    steps = 100_000 if backend == "cpu" else 10_000  # plain PyTorch takes 0.1 ms a step
    input = draw(steps, 1, 1)
    with torch.no_grad():
        whole, last = cell.unroll(input)
        state = None
        for piece in input.split(steps // 4 + 1):
            outputs, state = cell.unroll(piece, state)
    assert torch.equal(outputs, whole[-len(outputs) :])
    for ours, theirs in zip(state or (), last, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(whole.norm(dim=-1), torch.ones(steps, 1))
    if lambda_:
        assert (last[1].mT @ last[1] - torch.eye(4)).abs().max() < 1e-3


@every_backend
def test_two_calls_draw_different_masks(backend: str) -> None:
    layer = rum.RUM(4, 50, zoneout=0.5, backend=backend)
    input = draw(7, 3, 4)
    assert not torch.equal(layer(input)[0], layer(input)[0])


def _strided(shape: tuple[int, ...], order: list[int], gap: int, seed: int) -> Tensor:
    """Random numbers in any memory order, and with gaps between them."""
    tensor = draw(*(shape[axis] for axis in order), gap, seed=seed)[..., 0]
    return tensor.permute([order.index(axis) for axis in range(len(shape))])


@hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(data=st.data())
def test_any_shape_option_and_stride_gives_values_and_gradients_of_the_reference(
    data: st.DataObject,
) -> None:
    sizes = st.integers(1, 9)
    features, size = data.draw(sizes), data.draw(st.sampled_from([1, 2, 3, 7, 16, 17, 33]))
    steps, batch = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    options: dict[str, Any] = {
        "lambda_": data.draw(st.sampled_from([0, 1])),
        "eta": data.draw(st.sampled_from([None, 0.5, 1.0])),
        "layer_norm": data.draw(st.booleans()),
        "layer_norm_gate": data.draw(st.sampled_from(["post_sigmoid", "pre_sigmoid"])),
        "zoneout": data.draw(st.sampled_from([0.0, 0.3])),
        "embedding_bias": data.draw(st.booleans()),
        # smooth: a ReLU on the other side of zero is another gradient
        "activation": data.draw(st.sampled_from(["tanh", "sigmoid", "softsign"])),
    }
    backend = data.draw(st.sampled_from(BACKENDS))
    dtype = torch.float32 if backend == "cpu" else torch.float64
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    exact = RUMCell(features, size, backend="reference", dtype=torch.float64, **options)
    exact.train(data.draw(st.booleans()))
    rounded = copy.deepcopy(exact).to(dtype)
    cell = copy.deepcopy(rounded)
    cell.backend, cell.recompute = backend, data.draw(st.booleans())
    gap = data.draw(st.integers(1, 2))
    input = _strided((steps, batch, features), data.draw(st.permutations([0, 1, 2])), gap, seed=3)
    hidden = _strided((batch, size), data.draw(st.permutations([0, 1])), gap, seed=4)

    ours, reference, expected = (run(each, input, hidden) for each in (cell, rounded, exact))
    for index, (a, b, c) in enumerate(zip(ours, reference, expected, strict=True)):
        assert a.shape == c.shape
        if dtype == torch.float64:
            assert (a - c).norm() <= 1e-8 * max(1.0, float(c.norm())), index
        else:  # near 180 degrees rounding is multiplied; the reference shows by how much
            allowed = 1e-4 * max(1.0, float(c.norm())) + 20 * (b - c).norm()
            assert (a - c).norm() <= allowed, index


def run(cell: RUMCell, input: Tensor, hidden: Tensor) -> list[Tensor]:
    """Output, states and all gradients of a loss on them."""
    dtype = cell.weight_hh.dtype
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (input, hidden)]
    start = cell.initial_state(len(hidden), device=torch.device("cpu"), dtype=dtype)
    torch.manual_seed(9)
    output, state = cell.unroll(leaves[0], (leaves[1], *start[1:]))
    parts = [output, *state]
    weights = [torch.linspace(-1, 2, part.numel()).to(dtype).view_as(part) for part in parts]
    losses = [(part * weight).sum() for part, weight in zip(parts, weights, strict=True)]
    gradients = torch.autograd.grad(
        torch.stack(losses).sum(),
        [*leaves, *cell.parameters()],
        allow_unused=True,
        materialize_grads=True,
    )
    return [tensor.detach().double() for tensor in (*parts, *gradients)]
