"""The Triton kernels against the step-by-step reference in float64.

Without a CUDA device they run in Triton's interpreter (tests/conftest.py sees to it);
`test_triton_compiles.py` looks at what the compiler makes of them, and the tests marked `gpu` at
real sizes on a device.
"""

import copy
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the package triton")

import triton

from rum.cells import (
    FastSlowCell,
    GRUCell,
    LSTMCell,
    LSTMCellConfig,
    RUMCell,
    RUMCellConfig,
)
from rum.cells.base import Cell
from rum.kernels.gpu import unserved
from rum.kernels.memory import initial_skew
from rum.kernels.recurrence import RecurrenceOptions, Rows
from rum.kernels.triton_gates import GRURows, LSTMRows
from rum.kernels.triton_rum import RUMRows, TritonRecurrence

if triton.knobs.runtime.interpret and triton.__version__.startswith("3.6."):
    pytest.skip(
        "the interpreter of Triton 3.6 counts loops with arrays, which numpy 2.4 does not take",
        allow_module_level=True,
    )

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 3
POST, PRE = {"layer_norm": True}, {"layer_norm": True, "layer_norm_gate": "pre_sigmoid"}
# replicas, rows, hidden units, options of the cells; then what differs between replicas
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "plain": (1, 3, 7, {}),
    "one unit": (1, 2, 1, {"activation": "tanh"}),
    "one row": (1, 1, 7, {"activation": "softsign", "eta": 0.7}),
    "power of two": (1, 5, 16, {"activation": "sigmoid", "zoneout": 0.3}),
    "replicas": (2, 3, 20, {"activation": "tanh", "eta": 1.0, "zoneout": 0.2}),
    "layer norm": (1, 3, 20, {**POST, "activation": "tanh"}),
    "layer norm, replicas": (2, 3, 7, {**POST, "eta": 1.0, "zoneout": 0.3}),
    "pre-sigmoid": (2, 3, 20, {**PRE, "activation": "sigmoid", "zoneout": 0.2}),
    "pre-sigmoid, eta": (1, 2, 7, {**PRE, "activation": "softsign", "eta": 0.5}),
}
CASES_AND_MASKS = [
    *((name, False) for name in CASES),
    *((name, True) for name, case in CASES.items() if "zoneout" in case[3]),
]
WAYS = {"steps": (0, False), "persistent": (0, True), "memory": (1, None)}


def draw(*shape: int, seed: int) -> Tensor:
    """Numbers that float32 holds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).double()


def make_cells(replicas: int, size: int, options: dict[str, Any]) -> list[RUMCell]:
    cells = []
    for replica in range(replicas):
        torch.manual_seed(replica)
        own = dict(options)
        if options.get("eta"):
            own["eta"] = options["eta"] + 0.5 * replica
        if options.get("zoneout"):
            own["zoneout"] = options["zoneout"] + 0.25 * replica
        cell = RUMCell(2, size, backend="reference", dtype=torch.float64, **own)
        for parameter in cell.parameters():
            noise = torch.randn_like(parameter, dtype=torch.float32) / math.sqrt(size)
            parameter.data = parameter.data.float().double() + 0.5 * noise.double()
        cells.append(cell)
    return cells


def norms_of(cell: RUMCell) -> tuple[Tensor, ...]:
    if cell.gate_norm is None or cell.candidate_norm is None:
        return ()
    first, second = cell.gate_norm, cell.candidate_norm
    return first.gain, first.shift, second.gain, second.shift


def options_of(cells: list[RUMCell], product: torch.dtype | None = None) -> RecurrenceOptions:
    etas = [cell.eta for cell in cells]
    return RecurrenceOptions(
        activation=cells[0].activation,
        eta=None if etas[0] is None else tuple(eta for eta in etas if eta is not None),
        layer_norm_gate=cells[0].layer_norm_gate,
        zoneout=tuple(cell.zoneout for cell in cells),
        product_dtype=product,
    )


def reference(
    cells: list[RUMCell],
    pre: Tensor,
    hidden: Tensor,
    mask: Tensor | None,
    memory: Tensor | None,
    grads: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Values and gradients by autograd, replica by replica, in float64."""
    found: list[dict[str, Tensor]] = []
    for replica, cell in enumerate(cells):
        leaf = pre[:, replica].clone().requires_grad_()
        start = hidden[replica].clone().requires_grad_()
        state: tuple[Tensor, ...] = (start,)
        if memory is not None:
            state = (start, memory[replica].clone().requires_grad_())
        first, outputs = state, []
        for step in range(len(pre)):
            noise = () if mask is None else (mask[step, replica],)
            output, state = cell.step(leaf[step], state, noise)
            outputs.append(output)
        stacked = torch.stack(outputs)
        loss = (stacked * grads["outputs"][:, replica]).sum()
        loss = loss + (stacked[-1] * grads["state"][replica]).sum()
        parts = {"outputs": stacked}
        if memory is not None:
            loss = loss + (state[1] * grads["memory"][replica]).sum()
            parts["memory"] = state[1]
        leaves = [leaf, *first, *norms_of(cell)]
        of_pre, of_state, *rest = torch.autograd.grad(loss, leaves)
        parts |= {"grad_pre": of_pre, "grad_state": of_state}
        if memory is not None:
            parts["skew"] = initial_skew(memory[replica], rest.pop(0))
        parts |= {f"grad_norm_{index}": grad for index, grad in enumerate(rest)}
        found.append({name: part.detach() for name, part in parts.items()})
    return {
        name: torch.stack(
            [part[name] for part in found], 1 if name in ("outputs", "grad_pre") else 0
        )
        for name in found[0]
    }


def ours(
    cells: list[RUMCell],
    pre: Tensor,
    hidden: Tensor,
    mask: Tensor | None,
    memory: Tensor | None,
    grads: dict[str, Tensor],
    persistent: bool | None,
    product: torch.dtype | None = None,
) -> dict[str, Tensor]:
    def single(tensor: Tensor) -> Tensor:
        return tensor.detach().to(DEVICE, torch.float32, copy=True).contiguous()

    weight = single(torch.stack([cell.weight_hh for cell in cells]))
    norms = tuple(single(torch.stack(each)) for each in zip(*map(norms_of, cells), strict=True))
    recurrence = TritonRecurrence(weight, norms, options_of(cells, product), persistent=persistent)
    assert recurrence.piece(8) is None
    pre, hidden = single(pre), single(hidden)
    mask = None if mask is None else single(mask)
    matrix = None if memory is None else single(memory)
    outputs = torch.full((*pre.shape[:3], hidden.shape[2]), math.nan, device=DEVICE)
    recurrence.forward(pre, hidden, mask, matrix, outputs)
    found = {"outputs": outputs}
    skew = None
    if matrix is not None:
        found["memory"] = matrix.clone()
        skew = initial_skew(matrix, single(grads["memory"]))
    grad_state, grad_pre = single(grads["state"]), torch.full_like(pre, math.nan)
    grad_norms = tuple(torch.ones_like(norm) for norm in norms)
    recurrence.backward(
        pre,
        hidden,
        mask,
        matrix,
        skew,
        outputs,
        single(grads["outputs"]),
        grad_state,
        grad_pre,
        grad_norms,
    )
    found |= {"grad_pre": grad_pre, "grad_state": grad_state}
    if skew is not None:
        assert matrix is not None
        assert memory is not None
        torch.testing.assert_close(matrix.cpu(), memory.float(), rtol=0, atol=1e-5)  # back again
        found["skew"] = skew
    found |= {f"grad_norm_{index}": grad - 1 for index, grad in enumerate(grad_norms)}
    return {name: part.double().cpu() for name, part in found.items()}


def assert_close(
    ours: dict[str, Tensor], exact: dict[str, Tensor], values: float = 1e-5, grads: float = 1e-4
) -> None:
    assert ours.keys() == exact.keys()
    for name, b in exact.items():
        error = ((ours[name] - b).norm() / b.norm().clamp(min=1e-3)).item()
        assert error < (values if name in ("outputs", "memory") else grads), (name, error)


def compare(
    way: str,
    replicas: int,
    batch: int,
    size: int,
    options: dict[str, Any],
    *,
    steps: int = STEPS,
    has_mask: bool = False,
    product: torch.dtype | None = None,
    **tolerances: float,
) -> None:
    lambda_, persistent = WAYS[way]
    cells = make_cells(replicas, size, {**options, "lambda_": lambda_})
    shape = (steps, replicas, batch)
    pre = draw(*shape, 3 * size, seed=1)
    hidden = draw(replicas, batch, size, seed=2)
    mask = (draw(*shape, size, seed=3) < -0.3).double() if has_mask else None
    memory = None
    if lambda_:
        memory = torch.linalg.qr(draw(replicas, batch, size, size, seed=4)).Q.float().double()
    grads = {
        "outputs": draw(*shape, size, seed=5),
        "state": draw(replicas, batch, size, seed=6),
        "memory": draw(replicas, batch, size, size, seed=7),
    }
    assert_close(
        ours(cells, pre, hidden, mask, memory, grads, persistent, product),
        reference(cells, pre, hidden, mask, memory, grads),
        **tolerances,
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("case", "has_mask"), CASES_AND_MASKS)
def test_values_and_gradients_are_those_of_the_reference(
    case: str, way: str, has_mask: bool
) -> None:
    replicas, batch, size, options = CASES[case]
    compare(way, replicas, batch, size, options, has_mask=has_mask)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("product", [torch.bfloat16, torch.float16], ids=str)
def test_products_in_half_precision(way: str, product: torch.dtype) -> None:
    options = {"activation": "tanh", "eta": 1.0}
    compare(way, 2, 3, 20, options, product=product, values=3e-2, grads=3e-2)


@pytest.mark.parametrize("way", ["steps", "persistent"])
def test_products_in_half_precision_are_not_those_in_float32(way: str) -> None:
    with pytest.raises(AssertionError, match="outputs"):
        compare(way, 1, 2, 20, {"activation": "tanh"}, product=torch.bfloat16)


def test_tensor_cores_take_float32_where_torch_does() -> None:
    cells = make_cells(1, 4, {})
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            recurrence = TritonRecurrence(cells[0].weight_hh[None], (), options_of(cells))
            assert recurrence._flags.precision == precision
    finally:
        matmul.fp32_precision = before


def test_more_rows_than_a_program_takes_and_more_units_than_a_chunk() -> None:
    compare("persistent", 2, 5, 40, {**POST, "eta": 1.0, "activation": "tanh"}, steps=2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("angle", [0, 1e-3, 0.1, 90, 179, 179.99, 180])
def test_angles(way: str, angle: float) -> None:
    lambda_, persistent = WAYS[way]
    (cell,) = make_cells(1, 7, {"activation": "tanh", "lambda_": lambda_})
    cell.weight_hh.data.zero_()
    basis = torch.linalg.qr(draw(3, 7, 2, seed=1)).Q
    source, other = basis[..., 0].float().double(), basis[..., 1]
    turn = math.radians(angle)
    target = 2 * (math.cos(turn) * source + math.sin(turn) * other)
    if angle in (0, 180):  # exactly
        target = 2 * source if angle == 0 else -2 * source
    pre = torch.cat((target, draw(3, 7, seed=2), source), -1)[None, None].float().double()
    memory = torch.eye(7).expand(1, 3, 7, 7).double() if lambda_ else None
    grads = {
        "outputs": draw(1, 1, 3, 7, seed=3),
        "state": torch.zeros(1, 3, 7).double(),
        "memory": torch.zeros(1, 3, 7, 7).double(),
    }
    inputs = (cell,), pre, draw(1, 3, 7, seed=4), None, memory, grads
    found, exact = ours(*inputs, persistent), reference(*inputs)
    if angle < 179.99:
        # the condition of the gradient grows like 1 / cos(angle / 2)
        assert_close(found, exact, grads=1e-4 if angle < 179 else 1e-3)
        return
    assert_close(found, exact, values=1e-2, grads=5e-2 if angle == 179.99 else 1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("zero", ["source", "target", "state", "all"])
def test_zero_vectors(way: str, zero: str) -> None:
    lambda_, persistent = WAYS[way]
    (cell,) = make_cells(1, 7, {"eta": 1.0, "lambda_": lambda_})
    cell.weight_hh.data.zero_()
    pre, hidden = draw(2, 1, 2, 21, seed=1), draw(1, 2, 7, seed=2)
    if zero in ("source", "all"):
        pre[..., 14:] = 0
    if zero in ("target", "all"):
        pre[..., :7] = 0
    if zero in ("state", "all"):
        hidden.zero_()
    memory = torch.eye(7).expand(1, 2, 7, 7).double() if lambda_ else None
    grads = {
        "outputs": draw(2, 1, 2, 7, seed=3),
        "state": draw(1, 2, 7, seed=4),
        "memory": torch.zeros(1, 2, 7, 7).double(),
    }
    inputs = [cell], pre, hidden, None, memory, grads
    assert_close(ours(*inputs, persistent), reference(*inputs))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_nan_goes_through(way: str, activation: str) -> None:
    lambda_, persistent = WAYS[way]
    (cell,) = make_cells(1, 7, {"activation": activation, "lambda_": lambda_})
    pre, hidden = draw(2, 1, 2, 21, seed=1).float(), torch.zeros(1, 2, 7)
    pre[0, 0, 1, 14] = math.nan
    recurrence = TritonRecurrence(
        cell.weight_hh.detach()[None].float().to(DEVICE),
        (),
        options_of([cell]),
        persistent=persistent,
    )
    outputs = torch.zeros(2, 1, 2, 7, device=DEVICE)
    memory = torch.eye(7, device=DEVICE).repeat(1, 2, 1, 1) if lambda_ else None
    recurrence.forward(pre.to(DEVICE), hidden.to(DEVICE), None, memory, outputs)
    assert outputs[:, 0, 0].isfinite().all()
    assert outputs[:, 0, 1].isnan().any(-1).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(0, 1, 2), (2, 1, 0)], ids=["no steps", "no rows"])
def test_nothing_to_do(way: str, shape: tuple[int, int, int]) -> None:
    lambda_, persistent = WAYS[way]
    cells = make_cells(1, 7, {"layer_norm": True, "lambda_": lambda_})
    pre, hidden = draw(*shape, 21, seed=1), draw(*shape[1:], 7, seed=2)
    memory = torch.eye(7).expand(*shape[1:], 7, 7).double() if lambda_ else None
    grads = {
        "outputs": draw(*shape, 7, seed=3),
        "state": draw(*shape[1:], 7, seed=4),
        "memory": torch.zeros(*shape[1:], 7, 7).double(),
    }
    found = ours(cells, pre, hidden, None, memory, grads, persistent)
    torch.testing.assert_close(found["grad_state"], grads["state"])


class _Step(torch.autograd.Function):
    """One step of `Rows`, so that autograd takes care of the products around it."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, masks: Any, pre: Tensor, *states: Tensor) -> Any:
        new_states = tuple(torch.full_like(state, math.nan) for state in states)
        rows.forward(pre, states, masks, new_states)
        ctx.rows, ctx.masks, ctx.saved = rows, masks, (pre, states, new_states)
        return new_states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        pre, states, new_states = ctx.saved
        grads = tuple(grad.clone() for grad in grads)
        grad_pre = torch.full_like(pre, math.nan)
        ctx.rows.backward(pre, states, ctx.masks, new_states, grads, grad_pre)
        return None, None, grad_pre, *grads


def pre_of(cell: Cell, input: Tensor, hidden: Tensor) -> Tensor:
    """Complete pre-activations of a step."""
    projected = cell.project(input)
    shares = hidden @ cell.weight_hh.t()
    if isinstance(cell, GRUCell):
        size = cell.hidden_size
        of_gates, of_candidate = projected[:, : 2 * size], projected[:, 2 * size :]
        last = shares[:, 2 * size :] + cell.hidden_bias
        return torch.cat((of_gates + shares[:, : 2 * size], of_candidate, last), 1)
    padded = torch.nn.functional.pad(shares, (0, projected.shape[1] - shares.shape[1]))
    return projected + padded


def all_norms(cell: Cell) -> list[Tensor]:
    return [parameter for name, parameter in cell.named_parameters() if "norm" in name]


def make_rows(cell: Cell) -> Rows:
    norms = tuple(norm.detach() for norm in all_norms(cell))
    if isinstance(cell, RUMCell):
        return RUMRows(norms, options_of([cell]))  # type: ignore[return-value]
    if isinstance(cell, LSTMCell):
        return LSTMRows(norms, cell)  # type: ignore[return-value]
    return GRURows()


LSTM_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer norm": {"layer_norm": True, "forget_bias": 0.5},
    "zoneout": {"zoneout_h": 0.2, "zoneout_c": 0.4},
    "all": {"layer_norm": True, "zoneout_h": 0.2, "zoneout_c": 0.4},
}
ROW_CASES = [
    *((LSTMCell, options) for options in LSTM_OPTIONS.values()),
    (GRUCell, {"reset_after": True}),
    (RUMCell, {"activation": "tanh", "eta": 0.7, "zoneout": 0.3}),
    (RUMCell, {**POST, "activation": "tanh", "zoneout": 0.3}),
]


@pytest.mark.parametrize("has_masks", [False, True], ids=["expectation", "masks"])
@pytest.mark.parametrize(("kind", "options"), ROW_CASES)
@pytest.mark.parametrize("size", [1, 20])
def test_rows_are_a_step_of_the_cell(
    kind: type[Cell], options: dict[str, Any], size: int, has_masks: bool
) -> None:
    check_rows(kind, options, size, 3, has_masks)


def check_rows(
    kind: type[Cell], options: dict[str, Any], size: int, batch: int, has_masks: bool
) -> None:
    torch.manual_seed(1)
    cell = kind(4, size, **options)  # type: ignore[call-arg]
    for parameter in cell.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    exact = kind(4, size, **options, dtype=torch.float64)  # type: ignore[call-arg]
    exact.load_state_dict(cell.state_dict())
    if isinstance(exact, RUMCell):
        exact.backend = "reference"
    cell.to(DEVICE)
    number = 2 if kind is LSTMCell else 1
    input = draw(2, batch, 4, seed=2)
    starts = [draw(batch, size, seed=3 + index) for index in range(number)]
    masks: list[tuple[Tensor, ...]] = [(), ()]
    if has_masks and any("zoneout" in name for name in options):
        masks = [
            tuple((draw(batch, size, seed=9 + 2 * step + i) < 0).double() for i in range(number))
            for step in range(2)
        ]
    results = []
    for module, is_ours in ((exact, False), (cell, True)):
        like: dict[str, Any] = {"dtype": module.weight_hh.dtype}
        like["device"] = module.weight_hh.device
        first = state = tuple(start.to(**like).requires_grad_() for start in starts)
        rows = make_rows(module)
        for step in range(2):
            noise = tuple(mask.to(**like) for mask in masks[step])
            x = input[step].to(**like)
            if is_ours:
                state = _Step.apply(rows, noise, pre_of(module, x, state[0]), *state)
            else:
                _, state = module.step(module.project(x), state, noise)
        weights = [draw(batch, size, seed=20 + index).to(**like) for index in range(number)]
        loss = torch.stack([(a * b).sum() for a, b in zip(weights, state, strict=True)]).sum()
        norms = all_norms(module)
        is_norm = {id(norm) for norm in norms}
        leaves = [*first, *(p for p in module.parameters() if id(p) not in is_norm)]
        gradients = list(torch.autograd.grad(loss, leaves + (norms if not is_ours else [])))
        if is_ours:
            assert len(rows.grad_norms) == len(norms)
            gradients += rows.grad_norms
        found = {f"{index}": grad for index, grad in enumerate(gradients)}
        found["outputs"] = torch.stack(state)
        results.append({name: part.detach().double().cpu() for name, part in found.items()})
    assert_close(results[1], results[0])


def test_no_gradients_of_norms_before_a_backward() -> None:
    norms = tuple(torch.ones(n) for n in (8, 8, 4, 4))
    options = SimpleNamespace(forget_bias=1.0, zoneout_h=0.0, zoneout_c=0.0)
    cell = RUMCell(2, 4, layer_norm=True)
    for rows in (LSTMRows(norms, options), RUMRows(norms, options_of([cell]))):
        assert all(not grad.any() for grad in rows.grad_norms)


@pytest.mark.parametrize(
    ("size", "has_memory", "dtype", "reason"),
    [
        (8192, False, torch.float32, None),
        (128, True, torch.float32, None),
        (8193, False, torch.float32, "takes hidden sizes up to 8192, got 8193"),
        (129, True, torch.float32, "with lambda = 1 takes hidden sizes up to 128, got 129"),
        (8, False, torch.float64, "computes in float32 with products in half precision, got"),
    ],
)
def test_what_is_not_served(
    size: int, has_memory: bool, dtype: torch.dtype, reason: str | None
) -> None:
    found = unserved(size, has_memory, dtype, torch.device(DEVICE))
    assert (found or "").startswith(reason or "")
    assert (found is None) == (reason is None)


def test_the_processor_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = unserved(8, False, torch.float32, torch.device("cpu"))
    assert reason == "runs on a CUDA device, or anywhere with TRITON_INTERPRET=1, got cpu"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert unserved(8, False, torch.float32, torch.device("cuda")) == "needs the package triton"


# On a device, at sizes that are in use.

DEVICE_CASES = list(
    itertools.product(
        [("steps", 250), ("steps", 2000), ("persistent", 100), ("persistent", 250)],
        [{"activation": "tanh", "eta": 1.0}, {**POST, "zoneout": 0.1, "activation": "tanh"}],
    )
)


@pytest.mark.gpu
@pytest.mark.parametrize(("way_size", "options"), DEVICE_CASES)
def test_sizes_in_use_on_a_device(way_size: tuple[str, int], options: dict[str, Any]) -> None:
    way, size = way_size
    compare(way, 1, 37, size, options, steps=8, has_mask="zoneout" in options)
    half = {"product": torch.bfloat16, "values": 3e-2, "grads": 3e-2}
    compare(way, 2, 37, size, options, steps=8, has_mask="zoneout" in options, **half)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [50, 100, 128])
@pytest.mark.parametrize("options", [{"activation": "tanh"}, {**POST, "activation": "tanh"}])
def test_memory_on_a_device(size: int, options: dict[str, Any]) -> None:
    compare("memory", 2, 9, size, options, steps=16)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "options"), ROW_CASES)
@pytest.mark.parametrize("size", [250, 2000])
def test_rows_on_a_device(kind: type[Cell], options: dict[str, Any], size: int) -> None:
    check_rows(kind, options, size, 128, True)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_runs_are_bitwise_equal_on_a_device(way: str) -> None:
    """Later runs with "steps" replay a graph."""
    lambda_, persistent = WAYS[way]
    cells = make_cells(1, 100, {**POST, "eta": 1.0, "lambda_": lambda_})
    pre, hidden = draw(8, 1, 33, 300, seed=1), draw(1, 33, 100, seed=2)
    memory = torch.eye(100).expand(1, 33, 100, 100).double() if lambda_ else None
    grads = {
        "outputs": draw(8, 1, 33, 100, seed=3),
        "state": draw(1, 33, 100, seed=4),
        "memory": torch.zeros(1, 33, 100, 100).double(),
    }
    first, *others = (ours(cells, pre, hidden, None, memory, grads, persistent) for _ in range(4))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


CHAINS: dict[str, Any] = {
    "rum": lambda: RUMCell(3, 7, layer_norm=True, eta=1.0, zoneout=0.2, activation="tanh"),
    "rum, memory": lambda: RUMCell(3, 7, lambda_=1, zoneout=0.2, activation="tanh"),
    "lstm": lambda: LSTMCell(3, 7, layer_norm=True, zoneout_h=0.2, zoneout_c=0.4),
    "gru": lambda: GRUCell(3, 7, reset_after=True),
    "fs-rum": lambda: FastSlowCell(
        3,
        LSTMCellConfig(hidden_size=5, layer_norm=True, zoneout_h=0.2, zoneout_c=0.4),
        RUMCellConfig(hidden_size=6, layer_norm=True, eta=1.0, zoneout=0.1, activation="tanh"),
        num_fast_cells=3,
        dropout=0.3,
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["masks", "expectation"])
@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
def test_cells_on_the_backend_are_those_of_the_reference(make: Any, training: bool) -> None:
    torch.manual_seed(0)
    cell = make().train(training).to(DEVICE)
    cell.backend = "triton"
    exact = copy.deepcopy(cell).double()
    exact.backend = "reference"
    found = []
    for each, dtype in ((cell, torch.float32), (exact, torch.float64)):
        input = draw(4, 3, 3, seed=5).to(DEVICE, dtype).requires_grad_()
        torch.manual_seed(7)
        outputs, state = each.unroll(input)
        loss = outputs.square().sum() + sum(tensor.sum() for tensor in state)
        found.append((outputs, *torch.autograd.grad(loss, (input, *each.parameters()))))
    for index, (ours, theirs) in enumerate(zip(*found, strict=True)):
        allowed = (1e-4 if index else 1e-5) * theirs.norm().clamp(min=1.0)
        assert (ours - theirs).norm() <= allowed, index
