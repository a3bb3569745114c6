"""The compiled kernel against the step-by-step reference in float64."""

import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rum.cells import RUMCell
from rum.errors import ConfigError
from rum.kernels import cpu, sequence
from rum.kernels.recurrence import RecurrenceOptions

INPUT_SIZE, STEPS, BATCH = 4, 9, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eta": {"eta": 0.7},
    "no-bias": {"embedding_bias": False, "activation": "tanh"},
    "layer-norm": {"layer_norm": True, "eta": 1.0, "activation": "sigmoid"},
    "pre-sigmoid": {"layer_norm": True, "layer_norm_gate": "pre_sigmoid", "activation": "tanh"},
    "zoneout": {"zoneout": 0.3, "activation": "softsign"},
    "all": {"layer_norm": True, "eta": 1.0, "zoneout": 0.2, "activation": "tanh"},
}

built = pytest.mark.skipif(
    cpu.library() is None, reason="the compiled kernel was not built: no C compiler here"
)


@pytest.fixture(params=[1, 2], ids=lambda threads: f"{threads}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def pair(size: int, **options: Any) -> tuple[RUMCell, RUMCell]:
    """The reference in float64 and the compiled kernel, with the same float32 weights."""
    torch.manual_seed(1)
    ours = RUMCell(INPUT_SIZE, size, backend="cpu", **options)
    exact = RUMCell(INPUT_SIZE, size, backend="reference", dtype=torch.float64, **options)
    exact.load_state_dict(ours.state_dict())
    return ours, exact


def run(
    cell: RUMCell,
    input: Tensor,
    hidden: Tensor,
    mask: Tensor | None,
    start: Tensor | None = None,
    use: tuple[str, ...] = ("outputs",),
) -> list[Tensor]:
    """What `use` names (outputs, last state and memory) and its gradients, for given masks."""
    dtype = cell.weight_hh.dtype
    noise = () if mask is None else (mask.to(dtype),)
    cell.sample_noise = lambda length, batch: noise  # type: ignore[method-assign]
    leaves = [input.to(dtype).requires_grad_(), hidden.to(dtype).requires_grad_()]
    memory = () if start is None else (start.to(dtype),)
    outputs, last = cell.unroll(leaves[0], (leaves[1], *memory))
    parts = dict(zip(("outputs", "hidden", "memory"), (outputs, *last), strict=False))
    used = [parts[name] for name in use]
    loss = torch.stack(
        [
            (torch.linspace(-1, 2, part.numel(), dtype=dtype) * part.flatten()).sum()
            for part in used
        ]
    )
    gradients = torch.autograd.grad(
        loss.sum(), [*leaves, *cell.parameters()], allow_unused=True, materialize_grads=True
    )
    return [tensor.double() for tensor in (*used, *gradients)]


def assert_close(ours: list[Tensor], exact: list[Tensor], values: int = 1) -> None:
    """Relative norm: 1e-5 of values, which come first, 1e-4 of gradients."""
    for index, (a, b) in enumerate(zip(ours, exact, strict=True)):
        error = ((a - b).norm() / b.norm().clamp(min=1e-3)).item()
        assert error < (1e-5 if index < values else 1e-4), index


@built
@pytest.mark.parametrize("training", [True, False], ids=["masks", "expectation"])
@pytest.mark.parametrize("size", [2, 7, 50, 250])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients_are_those_of_the_reference(
    options: dict[str, Any], size: int, training: bool, threads: int
) -> None:
    ours, exact = pair(size, **options)
    batch = 64 if size == 250 else BATCH  # enough for threads to share
    mask = None
    if training and options.get("zoneout"):
        mask = (draw(STEPS, batch, size, seed=7) < -0.5).double()
    inputs = draw(STEPS, batch, INPUT_SIZE), draw(batch, size, seed=3)
    assert_close(run(ours, *inputs, mask), run(exact, *inputs, mask))


@built
@pytest.mark.parametrize("size", [1, 3])
def test_one_unit_and_empty_shapes(size: int) -> None:
    ours, exact = pair(size, activation="tanh")
    inputs = draw(STEPS, BATCH, INPUT_SIZE), draw(BATCH, size, seed=3)
    assert_close(run(ours, *inputs, None), run(exact, *inputs, None))
    for shape in ((0, BATCH, INPUT_SIZE), (STEPS, 0, INPUT_SIZE)):
        input = torch.zeros(shape, requires_grad=True)
        outputs, _ = ours.unroll(input)
        assert outputs.shape == (*shape[:2], size)
        outputs.sum().backward()
        assert input.grad is not None


@built
@pytest.mark.parametrize(
    "degrees", [0.0, 1e-3, 0.1, 90.0, 179.0, 180.0, "zero source", "zero target"]
)
def test_degenerate_angles(degrees: float | str) -> None:
    ours, exact = pair(5, activation="tanh")
    angle = math.radians(degrees) if isinstance(degrees, float) else 1.0
    target = torch.tensor([math.cos(angle), math.sin(angle), 0, 0, 0])
    if degrees == 180.0:
        target = torch.tensor([-1.0, 0, 0, 0, 0])
    source = torch.tensor([1.0, 0, 0, 0, 0])
    with torch.no_grad():
        ours.weight_ih.zero_()
        ours.weight_hh[:5] = 0
        ours.bias[:5] = 0 if degrees == "zero target" else 1.7 * target
        assert ours.embedding_bias is not None
        ours.embedding_bias.copy_(0 * source if degrees == "zero source" else 0.6 * source)
    exact.load_state_dict(ours.state_dict())
    inputs = draw(6, BATCH, INPUT_SIZE), draw(BATCH, 5, seed=3)
    got = run(ours, *inputs, None)
    assert all(tensor.isfinite().all() for tensor in got)
    if degrees != 179.0:  # there float32's own rounding of the weights is magnified a hundredfold
        assert_close(got, run(exact, *inputs, None))


@built
def test_strided_inputs_are_taken() -> None:
    ours, exact = pair(6)
    input = draw(BATCH, INPUT_SIZE, STEPS).permute(2, 0, 1)
    hidden = draw(6, BATCH, seed=3).t()
    assert not input.is_contiguous()
    assert_close(run(ours, input, hidden, None), run(exact, input, hidden, None))


@built
@pytest.mark.parametrize("batch", [1, 9])
def test_threads_that_share_a_product_give_the_reference(batch: int, threads: int) -> None:
    """Few rows and many weights: the threads divide the weights."""
    ours, exact = pair(515, eta=1.0)
    inputs = draw(STEPS, batch, INPUT_SIZE), draw(batch, 515, seed=3)
    assert_close(run(ours, *inputs, None), run(exact, *inputs, None))


@built
@pytest.mark.parametrize("size", [7, 250])
def test_a_long_sequence_is_taken_in_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_PIECE", 1)
    ours, exact = pair(size, layer_norm=True, eta=1.0)
    batch = 2 * size // 4  # four steps a piece, the first a rest
    inputs = draw(STEPS, batch, INPUT_SIZE), draw(batch, size, seed=3)
    assert_close(run(ours, *inputs, None), run(exact, *inputs, None))


def rotations(batch: int, size: int) -> Tensor:
    """Orthogonal matrices to begin with."""
    return torch.linalg.qr(draw(batch, size, size, seed=4)).Q


@built
@pytest.mark.parametrize(
    "use",
    [("outputs",), ("hidden",), ("memory",), ("outputs", "hidden", "memory")],
    ids=lambda use: "+".join(use),
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_with_a_memory_values_and_gradients_are_those_of_the_reference(
    options: dict[str, Any], use: tuple[str, ...]
) -> None:
    ours, exact = pair(7, lambda_=1, **{"activation": "tanh", **options})
    mask = None
    if options.get("zoneout"):
        mask = (draw(STEPS, BATCH, 7, seed=7) < -0.5).double()
    inputs = draw(STEPS, BATCH, INPUT_SIZE), draw(BATCH, 7, seed=3), mask, rotations(BATCH, 7)
    assert_close(run(ours, *inputs, use), run(exact, *inputs, use), len(use))


@built
@pytest.mark.parametrize(("size", "batch"), [(1, 3), (2, 3), (50, 19)])
def test_a_memory_of_any_size(size: int, batch: int, threads: int) -> None:
    """19 rows are some for each of two threads, and more than a thread takes at once."""
    ours, exact = pair(size, lambda_=1, activation="tanh")
    inputs = draw(STEPS, batch, INPUT_SIZE), draw(batch, size, seed=3), None
    inputs = *inputs, rotations(batch, size)
    use = ("outputs", "memory")
    assert_close(run(ours, *inputs, use), run(exact, *inputs, use), len(use))


@built
@pytest.mark.parametrize("steps", [1, 3, 4, 5, 8, 11])
def test_a_memory_passes_its_checkpoints(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "CHECKPOINT_INTERVAL", 4)
    ours, exact = pair(5, lambda_=1, activation="tanh")
    inputs = draw(steps, BATCH, INPUT_SIZE), draw(BATCH, 5, seed=3), None, rotations(BATCH, 5)
    use = ("outputs", "memory")
    assert_close(run(ours, *inputs, use), run(exact, *inputs, use), len(use))


@built
def test_a_memory_stays_orthogonal_over_a_thousand_steps() -> None:
    """Its rotations are undone; the gradients at the beginning say how well."""
    ours, exact = pair(20, lambda_=1, activation="tanh")
    start = torch.eye(20, dtype=torch.float64).expand(2, -1, -1)
    inputs = draw(1000, 2, INPUT_SIZE), draw(2, 20, seed=3), None, start
    use = ("outputs", "memory")
    got, expected = run(ours, *inputs, use), run(exact, *inputs, use)
    gram = got[1].mT @ got[1]
    assert (gram - torch.eye(20, dtype=torch.float64)).abs().max() < 2e-5
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() / b.norm() < 1e-3


@built
@pytest.mark.parametrize("shape", [(0, BATCH, INPUT_SIZE), (STEPS, 0, INPUT_SIZE)])
def test_a_memory_of_nothing(shape: tuple[int, ...]) -> None:
    ours, _ = pair(3, lambda_=1)
    input = torch.zeros(shape, requires_grad=True)
    outputs, (hidden, memory) = ours.unroll(input)
    assert outputs.shape == (*shape[:2], 3)
    assert torch.equal(memory, torch.eye(3).expand(shape[1], -1, -1))
    (outputs.sum() + hidden.sum()).backward()
    assert input.grad is not None


@built
def test_the_same_number_of_threads_gives_the_same_bits(threads: int) -> None:
    ours, _ = pair(250, layer_norm=True, eta=1.0)
    inputs = draw(STEPS, 64, INPUT_SIZE), draw(64, 250, seed=3)
    for first, second in zip(run(ours, *inputs, None), run(ours, *inputs, None), strict=True):
        assert torch.equal(first, second)


@built
@pytest.mark.parametrize("lambda_", [0, 1])
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "embedding_bias"])
def test_what_is_not_a_number_is_not_hidden(name: str, lambda_: int) -> None:
    """A ReLU that asks whether its input is positive would make a zero of it."""
    ours, exact = pair(9, lambda_=lambda_)
    for cell in (ours, exact):
        with torch.no_grad():
            getattr(cell, name).view(-1)[-1] = math.nan
        cell.requires_grad_(False)
    input = draw(STEPS, BATCH, INPUT_SIZE)
    (got, _), (expected, _) = ours.unroll(input.float()), exact.unroll(input)
    assert expected.isnan().any()
    assert torch.equal(got.isnan(), expected.isnan())


@built
def test_a_library_of_another_version_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_INTERFACE", -1)
    with pytest.warns(UserWarning, match=r"was built from another version of rum_cpu\.c"):
        assert cpu.library.__wrapped__() is None


def test_a_library_that_does_not_load_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    (tmp_path / f"_rum_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("no library")
    with pytest.warns(UserWarning, match="cannot be loaded"):
        assert cpu.library.__wrapped__() is None


@built
def test_flush_to_zero_stays_off() -> None:
    """A library built with -ffast-math would set it for the whole thread when it is loaded."""
    ours, _ = pair(3)
    ours.unroll(torch.zeros(1, 1, INPUT_SIZE))
    assert (torch.tensor([1e-30]) * 1e-10).item() > 0


@built
def test_a_second_derivative_is_refused() -> None:
    ours, _ = pair(3)
    input = torch.randn(2, 2, INPUT_SIZE, requires_grad=True)
    outputs, _ = ours.unroll(input)
    (gradient,) = torch.autograd.grad(outputs.sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


@built
def test_saved_for_backward_are_four_states_a_step() -> None:
    ours, _ = pair(32)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours.unroll(torch.randn(20, 8, INPUT_SIZE))
    activations = 20 * 8 * 32
    assert 4 * activations <= sum(kept.values()) < 5.5 * activations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "backend 'cpu' computes in float32, got torch.float64"),
        ({"device": "meta"}, "backend 'cpu' runs on the CPU, got meta"),
    ],
)
def test_what_cannot_be_served_is_an_error(options: dict[str, Any], message: str) -> None:
    cell = RUMCell(INPUT_SIZE, 3, backend="cpu", **options)
    with pytest.raises(ConfigError, match=message):
        cell.unroll(torch.zeros(1, 1, INPUT_SIZE, **options))


@pytest.mark.parametrize("options", [{"lambda_": 0.5}, {"lambda_": 0.5, "lambda_trainable": True}])
def test_other_powers_of_the_memory_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"backend 'cpu' serves a fixed lambda_ of 0 or 1, got"):
        RUMCell(INPUT_SIZE, 3, backend="cpu", **options)


def test_without_a_build_fused_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    cell = RUMCell(INPUT_SIZE, 3)
    _, state = cell.unroll(torch.randn(2, 2, INPUT_SIZE))
    assert cell.choose_backend(state) == "fused"
    cell.backend = "cpu"
    with pytest.raises(
        ConfigError, match="is not there: the package was installed without a C compiler"
    ):
        cell.unroll(torch.randn(2, 2, INPUT_SIZE))


@built
@pytest.mark.parametrize("training", [True, False], ids=["masks", "expectation"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_rows_of_one_step_are_those_of_the_cell(
    options: dict[str, Any], training: bool, threads: int
) -> None:
    """`RUMRows`, for networks of several cells: complete pre-activations, no products."""
    size, batch = 33, 300  # enough for threads to share
    cell = RUMCell(INPUT_SIZE, size, dtype=torch.float64, **options).train(training)
    norms = tuple(norm.detach() for norm in cell.norms())
    pre, hidden = draw(batch, 3 * size).requires_grad_(), draw(batch, size).requires_grad_()
    mask = (draw(batch, size, seed=7) < -0.5).double()
    with torch.no_grad():
        cell.weight_hh.zero_()
    masks = (mask,) if training and cell.zoneout else ()
    expected, _ = cell.step(pre, (hidden,), masks)
    grad = draw(batch, size, seed=9)
    of_pre, of_hidden, *of_norms = torch.autograd.grad(
        (expected * grad).sum(), [pre, hidden, *cell.norms()]
    )

    rows = cpu.RUMRows(
        tuple(norm.float() for norm in norms),
        RecurrenceOptions(
            activation=cell.activation,
            eta=None if cell.eta is None else (cell.eta,),
            layer_norm_gate=cell.layer_norm_gate,
            zoneout=(cell.zoneout,),
        ),
    )
    single = pre.detach().float(), (hidden.detach().float(),), tuple(m.float() for m in masks)
    new, grad_pre, grads = torch.empty(batch, size), torch.empty(batch, 3 * size), grad.float()
    rows.forward(*single, (new,))
    rows.backward(*single, (new,), (grads,), grad_pre)

    assert_close([new.double()], [expected.detach()])
    ours = [grad_pre, grads, *rows.grad_norms]
    assert_close([tensor.double() for tensor in ours], [of_pre, of_hidden, *of_norms], values=0)
