"""A whole sequence of a RUM as one operator of torch, on any backend.

`torch.ops.rum.sequence` and its gradient `rum.sequence_backward` are opaque to torch.compile and
torch.export. They take the products with the inputs, cut time into pieces, keep checkpoints of the
memories, and leave what happens in between to the backend's `Recurrence`.

Saved for the backward pass: the pre-activations, 3 x [T, B, N], and the states; with `recompute`
only the states, for one more product.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rum.kernels import cpu
from rum.kernels.fused import FusedRecurrence
from rum.kernels.memory import CHECKPOINT_INTERVAL, initial_skew
from rum.kernels.recurrence import Recurrence, RecurrenceOptions

_CACHED = 2**20  # pre-activations of replicas that run side by side on a CPU

Weights = tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]
"""Of K RUM cells: `weight_ih (K, 3N, input_size)`, `bias (K, 3N)`, `weight_hh (K, 2N, N)` and the
layer norms that `Recurrence` describes."""


def run(
    backend: str,
    input: Tensor,
    hidden: Tensor,
    memory: Tensor | None,
    weights: Weights,
    mask: Tensor | None,
    options: RecurrenceOptions,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Runs K RUMs over sequences.

    States, norms and memories are in float32 where weights or inputs are in half precision; then,
    and under autocast, operands of the products are rounded to it (not on "cpu", which has no
    faster products for it).

    Args:
        backend: "fused", "cpu" or "triton".
        input: `(T, K, B, input_size)`.
        hidden: `(K, B, N)`, the initial state.
        memory: `(K, B, N, N)` with lambda = 1, the initial associative memory, orthogonal; it gets
            no gradient. None with lambda = 0.
        weights: Of the cells.
        mask: `(T, K, B, N)`, 1 where zoneout keeps the previous state, or None (expectation).
        options: The rest.
        recompute: Save memory: compute pre-activations again for the backward pass.

    Returns:
        `(T, K, B, N)`, the hidden state after every step, and the last memory, if there is one;
        both in the dtype of the states.

    Raises:
        RuntimeError: When differentiated twice; the reference backend can do that.
    """
    weight_ih, bias, weight_hh, norms = weights
    dtype = torch.promote_types(weight_hh.dtype, torch.float32)
    outputs, last_memory, _, _ = _sequence(
        input.to(dtype).contiguous(),
        hidden.to(dtype).contiguous(),
        None if memory is None else memory.to(dtype),
        None if mask is None else mask.to(dtype).contiguous(),
        weight_ih.to(dtype),
        bias.to(dtype).contiguous(),
        weight_hh.to(dtype),
        [norm.to(dtype).contiguous() for norm in norms],
        backend,
        options.activation,
        options.eta,
        options.layer_norm_gate,
        options.zoneout,
        product_dtype_of(weight_hh),
        recompute,
    )
    return outputs, None if memory is None else last_memory


def replicas_at_a_time(backend: str, input: Tensor, size: int) -> int:
    """How many replicas of N = `size` to run side by side, by an input `(T, K, B, input_size)`.

    A processor gains from few that fit its cache, and loses all of that to memory with more.
    """
    steps, replicas, batch, _ = input.shape
    if backend != "cpu":
        return replicas
    return max(1, _CACHED // max(1, 3 * steps * batch * size))


def product_dtype_of(weight: Tensor) -> torch.dtype | None:
    """Half precision where weights are in it or autocast asks for it."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        return weight.dtype
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


@torch.library.custom_op("rum::sequence", mutates_args=())
def _sequence(
    input: Tensor,
    hidden: Tensor,
    memory: Tensor | None,
    mask: Tensor | None,
    weight_ih: Tensor,
    bias: Tensor,
    weight_hh: Tensor,
    norms: Sequence[Tensor],
    backend: str,
    activation: str,
    eta: Sequence[float] | None,
    layer_norm_gate: str | None,
    zoneout: Sequence[float],
    product_dtype: torch.dtype | None,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, last memory, pre-activations, checkpoints of the memory; empty where unused."""
    options = _options(activation, eta, layer_norm_gate, zoneout, product_dtype)
    with torch.autocast(input.device.type, enabled=False):
        recurrence = _recurrence(backend, weight_hh, tuple(norms), options)
        pre = _project(backend, input, weight_ih, bias, options)
        shape = (*input.shape[:3], hidden.shape[-1])
        outputs = cpu.empty(shape) if backend == "cpu" else input.new_empty(shape)
        matrix = None
        if memory is not None:
            matrix = memory.clone(memory_format=torch.contiguous_format)
        checkpoints = input.new_empty(_checkpoint_elements(input.shape[0], memory))
        for first, last in _pieces(len(input), None if matrix is None else CHECKPOINT_INTERVAL):
            if matrix is not None:
                checkpoints.view(_num_pieces(len(input)), *matrix.shape)[
                    first // CHECKPOINT_INTERVAL
                ] = matrix
            recurrence.forward(
                pre[first:last],
                outputs[first - 1] if first else hidden,
                None if mask is None else mask[first:last],
                matrix,
                outputs[first:last],
            )
    return (
        outputs,
        input.new_empty(0) if matrix is None else matrix,
        input.new_empty(0) if recompute else pre,
        checkpoints,
    )


@_sequence.register_fake
def _(  # type: ignore[no-untyped-def]  # the operator's arguments, named above
    input, hidden, memory, mask, weight_ih, bias, weight_hh, norms, *rest
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    recompute = rest[-1]
    leading = input.shape[:3]
    return (
        input.new_empty(*leading, hidden.shape[-1]),
        input.new_empty(0 if memory is None else memory.shape),
        input.new_empty(0) if recompute else input.new_empty(*leading, weight_ih.shape[1]),
        input.new_empty(_checkpoint_elements(input.shape[0], memory)),
    )


def _checkpoint_elements(steps: int, memory: Tensor | None) -> int:
    """Of the memories before every piece of time; one axis, which torch.export keeps dynamic."""
    return 0 if memory is None else _num_pieces(steps) * memory.numel()


def _num_pieces(steps: int) -> int:
    return -(-steps // CHECKPOINT_INTERVAL)


@torch.library.custom_op("rum::sequence_backward", mutates_args=())
def _sequence_backward(
    grad_outputs: Tensor | None,
    grad_memory: Tensor | None,
    outputs: Tensor,
    last_memory: Tensor,
    pre: Tensor,
    checkpoints: Tensor,
    wants_input: bool,
    input: Tensor,
    hidden: Tensor,
    mask: Tensor | None,
    weight_ih: Tensor,
    bias: Tensor,
    weight_hh: Tensor,
    norms: Sequence[Tensor],
    backend: str,
    activation: str,
    eta: Sequence[float] | None,
    layer_norm_gate: str | None,
    zoneout: Sequence[float],
    product_dtype: torch.dtype | None,
    recompute: bool,
) -> list[Tensor]:
    """Gradients of input (empty if not wanted), hidden, weight_ih, bias, weight_hh, norms."""
    options = _options(activation, eta, layer_norm_gate, zoneout, product_dtype)
    steps, replicas, batch, _ = input.shape
    size = hidden.shape[-1]
    has_memory = last_memory.dim() == 4
    matrix = skew = None
    with torch.autocast(input.device.type, enabled=False):
        if has_memory:
            matrix, skew = last_memory.clone(), initial_skew(last_memory, grad_memory)
        grad_outputs = torch.zeros_like(outputs) if grad_outputs is None else grad_outputs
        grad_outputs = grad_outputs.contiguous()
        recurrence = _recurrence(backend, weight_hh, tuple(norms), options)
        interval = CHECKPOINT_INTERVAL if has_memory else recurrence.piece(replicas * batch)
        pieces = _pieces(steps, interval)
        longest = max((last - first for first, last in pieces), default=0)
        # One buffer for the gradients of every piece: with pieces that fit, it stays in the cache,
        # and pages that are there cost less than fresh ones for a whole sequence.
        buffer = input.new_empty(longest, replicas, batch, 3 * size)
        grad_input = torch.empty_like(input) if wants_input else input.new_empty(0)
        grad_state = torch.zeros_like(hidden)
        of_weight_ih, of_bias, of_weight_hh, *of_norms = (
            torch.zeros_like(tensor) for tensor in (weight_ih, bias, weight_hh, *norms)
        )
        for first, last in reversed(pieces):
            if matrix is not None and last < steps:
                matrix.copy_(
                    checkpoints.view(_num_pieces(len(input)), *matrix.shape)[
                        last // CHECKPOINT_INTERVAL
                    ]
                )
            before = outputs[first - 1] if first else hidden
            if first:
                states = outputs[first - 1 : last - 1]
            else:
                states = torch.cat((hidden.unsqueeze(0), outputs[: last - 1]))
            inputs = input[first:last]
            if recompute:
                of_piece = _project(backend, inputs, weight_ih, bias, options)
                of_piece[..., : 2 * size] += _products(states, weight_hh, options)
            else:
                of_piece = pre[first:last]
            grad_pre = buffer[: last - first]
            recurrence.backward(
                of_piece,
                before,
                None if mask is None else mask[first:last],
                matrix,
                skew,
                outputs[first:last],
                grad_outputs[first:last],
                grad_state,
                grad_pre,
                tuple(of_norms),
            )
            _add_gradient(of_weight_hh, grad_pre[..., : 2 * size], states, options)
            _add_gradient(of_weight_ih, grad_pre, inputs, options)
            _add_sums(of_bias, grad_pre)
            if wants_input:
                grad_input[first:last] = _products(grad_pre, weight_ih.mT, options)
    return [grad_input, grad_state, of_weight_ih, of_bias, of_weight_hh, *of_norms]


@_sequence_backward.register_fake
def _(  # type: ignore[no-untyped-def]  # the operator's arguments, named above
    grad_outputs,
    grad_memory,
    outputs,
    last_memory,
    pre,
    checkpoints,
    wants_input,
    input,
    hidden,
    mask,
    weight_ih,
    bias,
    weight_hh,
    norms,
    *rest,
) -> list[Tensor]:
    of_input = torch.empty_like(input) if wants_input else input.new_empty(0)
    others = (hidden, weight_ih, bias, weight_hh, *norms)
    return [of_input, *(torch.empty_like(tensor) for tensor in others)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, hidden, _, mask, weight_ih, bias, weight_hh, norms, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, input, hidden, mask, weight_ih, bias, weight_hh, *norms)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    outputs, memory, pre, checkpoints, *tensors = ctx.saved_tensors
    of_input, of_hidden, of_weight_ih, of_bias, of_weight_hh, *of_norms = _sequence_backward(
        *grads[:2],
        outputs,
        memory,
        pre,
        checkpoints,
        ctx.needs_input_grad[0],
        *tensors[:6],
        tensors[6:],
        *ctx.rest,
    )
    return (
        of_input if ctx.needs_input_grad[0] else None,
        of_hidden,
        None,
        None,
        of_weight_ih,
        of_bias,
        of_weight_hh,
        of_norms,
        *[None] * len(ctx.rest),
    )


def refuse_second_derivative(ctx: Any, *grads: Any) -> None:
    """The gradient of a gradient operator."""
    raise RuntimeError("the fast backends cannot be differentiated twice: use backend='reference'")


_sequence.register_autograd(_gradients, setup_context=_save)
_sequence_backward.register_autograd(refuse_second_derivative)


def _options(
    activation: str,
    eta: Sequence[float] | None,
    layer_norm_gate: str | None,
    zoneout: Sequence[float],
    product_dtype: torch.dtype | None,
) -> RecurrenceOptions:
    return RecurrenceOptions(
        activation=activation,
        eta=None if eta is None else tuple(eta),
        layer_norm_gate=layer_norm_gate,
        zoneout=tuple(zoneout),
        product_dtype=product_dtype,
    )


def _recurrence(
    backend: str, weight: Tensor, norms: tuple[Tensor, ...], options: RecurrenceOptions
) -> Recurrence:
    if backend == "cpu":
        return cpu.CompiledRecurrence(weight, norms, options)
    if backend == "triton":
        from rum.kernels.triton_rum import TritonRecurrence  # Triton need not be installed

        return TritonRecurrence(weight, norms, options)
    assert backend == "fused", backend
    return FusedRecurrence(weight, norms, options)


def _pieces(steps: int, interval: int | None) -> list[tuple[int, int]]:
    """First and last step of every piece of time."""
    interval = max(1, steps if interval is None else interval)
    return [(first, min(first + interval, steps)) for first in range(0, steps, interval)]


def _project(
    backend: str, input: Tensor, weight_ih: Tensor, bias: Tensor, options: RecurrenceOptions
) -> Tensor:
    """The inputs' share of all pre-activations, `(T, K, B, 3N)`."""
    if backend == "cpu":
        return cpu.project(input, weight_ih, bias)
    return _products(input, weight_ih, options) + bias.unsqueeze(1)


def _products(values: Tensor, weight: Tensor, options: RecurrenceOptions) -> Tensor:
    """Values weight' in every replica: `(T, K, B, M)` by `(K, P, M)` to `(T, K, B, P)`."""
    dtype = options.product_dtype or values.dtype
    if len(weight) == 1 or values.device.type == "cpu":  # there each as it would be alone
        shape = len(values), values.shape[2], weight.shape[1]
        products = [
            cpu.linear(of_replica.flatten(0, 1).to(dtype), each.to(dtype), None).view(shape)
            for of_replica, each in zip(values.unbind(1), weight, strict=True)
        ]
        joined = products[0].unsqueeze(1) if len(products) == 1 else torch.stack(products, 1)
        return joined.to(values.dtype)
    return (values.to(dtype) @ weight.to(dtype).mT).to(values.dtype)


def _add_gradient(total: Tensor, grad: Tensor, values: Tensor, options: RecurrenceOptions) -> None:
    """Adds grad' values, summed over time and batch, to a weight's gradient in every replica."""
    dtype = options.product_dtype or total.dtype
    grad, values = grad.to(dtype), values.to(dtype)
    if len(total) == 1 or total.device.type == "cpu":
        for k, of_replica in enumerate(total):
            # Columns of wider rows as they are: oneDNN would take a hundred times as long.
            rows = grad[:, k].flatten(0, 1).contiguous()
            cpu.add_product(of_replica, rows, values[:, k].flatten(0, 1))
    else:
        grad, values = (tensor.transpose(0, 1).flatten(1, 2) for tensor in (grad, values))
        total += grad.mT @ values


def _add_sums(total: Tensor, grad: Tensor) -> None:
    """Adds a gradient, summed over time and batch, to that of a bias in every replica."""
    if len(total) > 1 and total.device.type == "cpu":  # each in the order that it has alone
        for k, of_replica in enumerate(total):
            of_replica += grad[:, k].flatten(0, 1).sum(0)
    else:
        total += grad.sum((0, 2))
