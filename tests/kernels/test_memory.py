"""The fused recurrence with an associative memory against the step-by-step reference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rum.cells import RUMCell
from rum.errors import ConfigError
from rum.kernels import memory, sequence

STEPS, BATCH, INPUT_SIZE, SIZE = 12, 3, 4, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eta": {"eta": 0.7},
    "no-bias": {"embedding_bias": False, "activation": "tanh"},
    "layer-norm": {"layer_norm": True, "eta": 1.0},
    "pre-sigmoid": {"layer_norm": True, "layer_norm_gate": "pre_sigmoid"},
    "zoneout": {"zoneout": 0.3, "activation": "softsign"},
    "all": {"layer_norm": True, "eta": 1.0, "zoneout": 0.2, "activation": "sigmoid"},
}


def cells(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[RUMCell, RUMCell]:
    torch.manual_seed(1)
    sizes = (INPUT_SIZE, options.pop("hidden_size", SIZE))
    reference = RUMCell(*sizes, lambda_=1, backend="reference", dtype=dtype, **options)
    fused = RUMCell(*sizes, lambda_=1, backend="fused", dtype=dtype, **options)
    fused.load_state_dict(reference.state_dict())
    return reference, fused


def draw(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def weighted(tensor: Tensor) -> Tensor:
    weights = torch.linspace(-1, 2, tensor.numel(), dtype=tensor.dtype)
    return (tensor * weights.view_as(tensor)).sum()


def run(
    cell: RUMCell, input: Tensor, hidden: Tensor, start: Tensor, *, use: tuple[str, ...]
) -> list[Tensor]:
    """Outputs, last memory and all gradients of a loss on what `use` names."""
    input = input.clone().requires_grad_()
    hidden = hidden.clone().requires_grad_()
    torch.manual_seed(3)
    outputs, (last, matrix) = cell.unroll(input, (hidden, start))
    parts = {"outputs": outputs, "hidden": last, "memory": matrix}
    loss = torch.stack([weighted(parts[name]) for name in use]).sum()
    gradients = torch.autograd.grad(
        loss, [input, hidden, *cell.parameters()], allow_unused=True, materialize_grads=True
    )
    return [outputs, matrix, *gradients]


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(
            a, b, rtol=0, atol=tolerance * scale, msg=lambda m, i=index: f"tensor {i}: {m}"
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "use",
    [("outputs",), ("hidden",), ("memory",), ("outputs", "hidden", "memory")],
    ids=lambda use: "+".join(use),
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients_are_those_of_the_reference(
    options: dict[str, Any], use: tuple[str, ...], training: bool
) -> None:
    reference, fused = (cell.train(training) for cell in cells(**options))
    start = torch.linalg.qr(draw(BATCH, SIZE, SIZE, seed=4)).Q
    inputs = draw(STEPS, BATCH, INPUT_SIZE), draw(BATCH, SIZE, seed=5), start
    assert_close(run(fused, *inputs, use=use), run(reference, *inputs, use=use), 1e-10)


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_any_size(size: int) -> None:
    reference, fused = cells(hidden_size=size)
    start = torch.eye(size, dtype=torch.float64).expand(BATCH, -1, -1)
    inputs = draw(STEPS, BATCH, INPUT_SIZE), draw(BATCH, size, seed=5), start
    use = ("outputs", "memory")
    assert_close(run(fused, *inputs, use=use), run(reference, *inputs, use=use), 1e-10)


@pytest.mark.parametrize(
    "degrees", [0.0, 1e-3, 0.1, 90.0, 179.0, 179.99, 180.0, "zero source", "zero target"]
)
def test_degenerate_angles(degrees: float | str) -> None:
    """Source and target in the first plane at a given angle at every step, whatever comes in."""
    reference, fused = cells(activation="tanh")
    angle = math.radians(degrees) if isinstance(degrees, float) else 1.0
    target = torch.tensor([math.cos(angle), math.sin(angle), 0, 0, 0], dtype=torch.float64)
    if degrees == 180.0:
        target = torch.tensor([-1.0, 0, 0, 0, 0], dtype=torch.float64)
    source = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)
    for cell in (reference, fused):
        with torch.no_grad():
            cell.weight_ih.zero_()
            cell.weight_hh[:SIZE] = 0
            cell.bias[:SIZE] = 0 if degrees == "zero target" else 1.7 * target
            assert cell.embedding_bias is not None
            cell.embedding_bias.copy_(0 * source if degrees == "zero source" else 0.6 * source)
    start = torch.linalg.qr(draw(BATCH, SIZE, SIZE, seed=4)).Q
    inputs = draw(6, BATCH, INPUT_SIZE), draw(BATCH, SIZE, seed=5), start
    use = ("outputs", "memory")
    ours, theirs = run(fused, *inputs, use=use), run(reference, *inputs, use=use)
    assert all(tensor.isfinite().all() for tensor in ours)
    assert_close(ours, theirs, 1e-10)


def test_long_sequences_pass_their_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "CHECKPOINT_INTERVAL", 4)
    reference, fused = cells()
    start = torch.linalg.qr(draw(BATCH, SIZE, SIZE, seed=4)).Q
    for steps in (1, 3, 4, 5, 8, 11):
        inputs = draw(steps, BATCH, INPUT_SIZE), draw(BATCH, SIZE, seed=5), start
        use = ("outputs", "memory")
        assert_close(run(fused, *inputs, use=use), run(reference, *inputs, use=use), 1e-10)


def test_float32_over_a_thousand_steps_is_close_to_float64() -> None:
    _, single = cells(torch.float32, hidden_size=20, activation="tanh")
    exact, _ = cells(torch.float64, hidden_size=20, activation="tanh")
    exact.load_state_dict(single.state_dict())
    start = torch.eye(20, dtype=torch.float64).expand(2, -1, -1)
    inputs = draw(1000, 2, INPUT_SIZE), draw(2, 20, seed=5), start
    use = ("outputs",)
    ours = run(single, *(tensor.float() for tensor in inputs), use=use)
    theirs = run(exact, *inputs, use=use)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < (1e-5 if index < 2 else 1e-4), index


@pytest.mark.parametrize("interval", [10_000, 64])
def test_undoing_a_thousand_rotations_comes_back_to_the_identity(interval: int) -> None:
    """The last memory, taken back step by step in float32, with and without checkpoints."""
    matrix = torch.eye(50).repeat(4, 1, 1)
    turns = [
        (draw(4, 50, seed=7 + 2 * t).float(), draw(4, 50, seed=8 + 2 * t).float())
        for t in range(1000)
    ]
    seen = []
    for source, target in turns:
        seen.append(matrix.clone())
        memory.advance(matrix)(source, target, source)
    identity = torch.eye(50).expand(4, -1, -1)
    assert (matrix @ matrix.mT - identity).abs().max() < 2e-5
    undone = memory.Undone(matrix.clone(), torch.zeros_like(matrix))
    for t in reversed(range(1000)):
        if (t + 1) % interval == 0:
            undone.matrix.copy_(seen[t + 1] if t + 1 < 1000 else matrix)
        source, target = turns[t]
        undone.turn(source, target, source).backward(source, torch.zeros_like(source))
        assert (undone.matrix - seen[t]).abs().max() < 2e-5
    assert (undone.matrix - identity).abs().max() < 2e-5


def test_no_memory_per_step_is_kept_for_the_backward_pass() -> None:
    _, fused = cells(hidden_size=30)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused.unroll(draw(100, BATCH, INPUT_SIZE))
    # 4 N activations a step and sample, the input, a few weights, ONE memory
    assert sum(kept) < BATCH * (100 * (4 * 30 + 3 * 30 + INPUT_SIZE) + 2 * 30 * 30) + 10_000
    assert sum(kept) < BATCH * 100 * 30 * 30


def test_the_state_goes_on_and_an_empty_sequence_changes_nothing() -> None:
    _, fused = cells()
    input = draw(STEPS, BATCH, INPUT_SIZE)
    whole, (hidden, matrix) = fused.unroll(input)
    first, between = fused.unroll(input[:5])
    second, after = fused.unroll(input[5:], tuple(tensor.detach() for tensor in between))
    torch.testing.assert_close(torch.cat((first, second)), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(after[0], hidden, rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1], matrix, rtol=0, atol=1e-12)
    empty, same = fused.unroll(input[:0], (hidden.detach(), matrix.detach()))
    assert empty.shape == (0, BATCH, SIZE)
    assert torch.equal(same[0], hidden)
    assert torch.equal(same[1], matrix)


def test_the_memory_that_was_handed_in_is_not_changed() -> None:
    _, fused = cells()
    start = torch.linalg.qr(draw(BATCH, SIZE, SIZE, seed=4)).Q
    before = start.clone()
    outputs, _ = fused.unroll(draw(STEPS, BATCH, INPUT_SIZE), (draw(BATCH, SIZE), start))
    outputs.sum().backward()
    assert torch.equal(start, before)


def test_what_cannot_be_served_is_an_error_and_auto_takes_the_reference() -> None:
    for options in ({"lambda_": 0.5}, {"lambda_": 0.5, "lambda_trainable": True}):
        with pytest.raises(ConfigError, match="serves a fixed lambda_ of 0 or 1, got"):
            RUMCell(INPUT_SIZE, SIZE, backend="fused", **options)  # type: ignore[arg-type]
    _, fused = cells()
    start = torch.eye(SIZE, dtype=torch.float64).repeat(BATCH, 1, 1).requires_grad_()
    state = (draw(BATCH, SIZE), start)
    with pytest.raises(ConfigError, match="no gradient to an initial associative memory"):
        fused.unroll(draw(STEPS, BATCH, INPUT_SIZE), state)
    fused.backend = "auto"
    outputs, _ = fused.unroll(draw(STEPS, BATCH, INPUT_SIZE), state)
    outputs.sum().backward()
    assert start.grad is not None
    assert start.grad.abs().max() > 0


def test_a_second_derivative_is_refused() -> None:
    _, fused = cells()
    input = draw(STEPS, BATCH, INPUT_SIZE).requires_grad_()
    outputs, _ = fused.unroll(input)
    (gradient,) = torch.autograd.grad(outputs.sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()
