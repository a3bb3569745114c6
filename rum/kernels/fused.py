"""The RUM recurrence with lambda = 0 as one autograd function per sequence, in plain PyTorch.

Forward: one matrix product per step on top of the input projections that the caller made for the
whole sequence. Backward, by hand: one matrix product per step for the state, and the gradient of
the recurrent weight as a single product after the loop. Saved: the pre-activations of target and
update gate, the embedded input and the hidden state, 4 x [T, B, N]; all else is recomputed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rum.functional import SQUARED_NORM_FLOOR

LAYER_NORM_EPS = 1e-3  # inside the root, as released; torch's default 1e-5 is another cell

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softsign": torch.nn.functional.softsign,
}
# Each derivative as a function of the activation's own value, so that no input need be kept.
_DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda value: (value > 0).to(value.dtype),
    "tanh": lambda value: 1 - value * value,
    "sigmoid": lambda value: value * (1 - value),
    "softsign": lambda value: (1 - value.abs()).square(),
}


@dataclass(frozen=True, kw_only=True)
class RecurrenceOptions:
    """What the fused recurrence computes, tensors apart."""

    activation: str
    eta: float | None
    layer_norm_gate: str | None
    """None (no layer norm), "post_sigmoid" or "pre_sigmoid"."""
    zoneout: float
    """Probability of keeping the previous state; used as an expectation where no mask is given."""


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _standardize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x minus its mean times the inverse deviation, and that inverse deviation."""
    centred = x - x.mean(-1, keepdim=True)
    inverse_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS)
    return centred * inverse_std, inverse_std


def _standardize_backward(grad: Tensor, standard: Tensor, inverse_std: Tensor) -> Tensor:
    projection = (grad * standard).mean(-1, keepdim=True)
    return (grad - grad.mean(-1, keepdim=True) - standard * projection) * inverse_std


@dataclass
class _Step:
    """The intermediate values of one time step that backward needs."""

    gates: Tensor  # [B, 2, N]: target and update gate after layer norm and sigmoid
    gates_standard: Tensor | None
    gates_inverse_std: Tensor | None
    sigmoid: Tensor
    e: Tensor
    r: Tensor
    e_inverse_norm: Tensor
    r_inverse_norm: Tensor
    identity: Tensor
    w: Tensor
    w_squared_norm: Tensor
    w_is_zero: Tensor
    k: Tensor
    reflected: Tensor
    z: Tensor  # r . reflected
    sum_standard: Tensor | None
    sum_inverse_std: Tensor | None
    candidate: Tensor
    mixed: Tensor
    squared_norm: Tensor | None
    normalized: Tensor


def _unit(vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    squared_norm = _dot(vector, vector)
    is_zero = squared_norm < SQUARED_NORM_FLOOR
    inverse_norm = torch.rsqrt(squared_norm.masked_fill(is_zero, 1.0))
    return vector * inverse_norm, inverse_norm, is_zero


def _step_forward(
    pre: Tensor,
    embedded: Tensor,
    hidden: Tensor,
    gate_norm: tuple[Tensor, Tensor] | None,
    candidate_norm: tuple[Tensor, Tensor] | None,
    options: RecurrenceOptions,
) -> _Step:
    """One step up to (not including) zoneout; `pre` is [B, 2, N], the rest [B, N]."""
    standard = inverse_std = None
    if gate_norm is None:
        sigmoid = torch.sigmoid(pre[:, 1])
        gates = torch.stack((pre[:, 0], sigmoid), 1)
    elif options.layer_norm_gate == "post_sigmoid":
        sigmoid = torch.sigmoid(pre[:, 1])
        standard, inverse_std = _standardize(torch.stack((pre[:, 0], sigmoid), 1))
        gates = torch.addcmul(gate_norm[1], standard, gate_norm[0])
    else:
        standard, inverse_std = _standardize(pre)
        gates = torch.addcmul(gate_norm[1], standard, gate_norm[0])
        sigmoid = torch.sigmoid(gates[:, 1])
        gates = torch.stack((gates[:, 0], sigmoid), 1)
    target, update = gates.unbind(1)

    e, e_inverse_norm, e_is_zero = _unit(embedded)
    r, r_inverse_norm, r_is_zero = _unit(target)
    identity = e_is_zero | r_is_zero
    w = e + r
    w_squared_norm = _dot(w, w)
    w_is_zero = w_squared_norm < SQUARED_NORM_FLOOR
    w_squared_norm = w_squared_norm.masked_fill(w_is_zero, 1.0)
    k = (2 * _dot(w, hidden) / w_squared_norm).masked_fill(w_is_zero, 0.0)
    reflected = hidden - k * w
    z = _dot(r, reflected)
    total = embedded + torch.where(identity, hidden, reflected - 2 * z * r)

    sum_standard = sum_inverse_std = None
    if candidate_norm is not None:
        sum_standard, sum_inverse_std = _standardize(total)
        total = torch.addcmul(candidate_norm[1], sum_standard, candidate_norm[0])
    candidate = ACTIVATIONS[options.activation](total)
    mixed = torch.lerp(candidate, hidden, update)
    squared_norm = None
    normalized = mixed
    if options.eta is not None:
        squared_norm = _dot(mixed, mixed)
        normalized = options.eta * mixed * torch.rsqrt(squared_norm.clamp(min=SQUARED_NORM_FLOOR))
    return _Step(
        gates=gates,
        gates_standard=standard,
        gates_inverse_std=inverse_std,
        sigmoid=sigmoid,
        e=e,
        r=r,
        e_inverse_norm=e_inverse_norm,
        r_inverse_norm=r_inverse_norm,
        identity=identity,
        w=w,
        w_squared_norm=w_squared_norm,
        w_is_zero=w_is_zero,
        k=k,
        reflected=reflected,
        z=z,
        sum_standard=sum_standard,
        sum_inverse_std=sum_inverse_std,
        candidate=candidate,
        mixed=mixed,
        squared_norm=squared_norm,
        normalized=normalized,
    )


def _rotation_backward(step: _Step, hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `rotate` with respect to hidden, embedded and target."""
    grad_dot_r = _dot(step.r, grad)
    grad_reflected = grad - 2 * grad_dot_r * step.r
    grad_r = -2 * (step.z * grad + grad_dot_r * step.reflected)
    s = 2 * _dot(step.w, grad_reflected) / step.w_squared_norm
    s = s.masked_fill(step.w_is_zero, 0.0)
    grad_w = (s * step.k) * step.w - s * hidden - step.k * grad_reflected
    grad_r = grad_r + grad_w
    grad_hidden = grad_reflected - s * step.w
    grad_embedded = (grad_w - _dot(grad_w, step.e) * step.e) * step.e_inverse_norm
    grad_target = (grad_r - _dot(grad_r, step.r) * step.r) * step.r_inverse_norm
    return (
        torch.where(step.identity, grad, grad_hidden),
        grad_embedded.masked_fill(step.identity, 0.0),
        grad_target.masked_fill(step.identity, 0.0),
    )


class _FusedRecurrence(torch.autograd.Function):
    """See the module; arguments as in `rum_recurrence`."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        embedded: Tensor,
        hidden: Tensor,
        weight: Tensor,
        gate_gain: Tensor | None,
        gate_shift: Tensor | None,
        candidate_gain: Tensor | None,
        candidate_shift: Tensor | None,
        mask: Tensor | None,
        options: RecurrenceOptions,
    ) -> Tensor:
        length, batch, size = embedded.shape
        gate_norm = None if gate_gain is None else _pair(gate_gain, gate_shift, (2, size))
        candidate_norm = (
            None if candidate_gain is None else _pair(candidate_gain, candidate_shift, (size,))
        )
        pre = torch.empty_like(projected)
        outputs = torch.empty_like(embedded)
        state = hidden
        weight_t = weight.t()
        for t in range(length):
            torch.addmm(projected[t], state, weight_t, out=pre[t])
            step = _step_forward(
                pre[t].view(batch, 2, size), embedded[t], state, gate_norm, candidate_norm, options
            )
            keep = mask[t] if mask is not None else options.zoneout
            torch.lerp(step.normalized, state, keep, out=outputs[t])
            state = outputs[t]
        ctx.options = options
        ctx.save_for_backward(
            pre,
            embedded,
            hidden,
            weight,
            gate_gain,
            gate_shift,
            candidate_gain,
            candidate_shift,
            mask,
            outputs,
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (
            pre,
            embedded,
            hidden,
            weight,
            gate_gain,
            gate_shift,
            candidate_gain,
            candidate_shift,
            mask,
            outputs,
        ) = ctx.saved_tensors
        options: RecurrenceOptions = ctx.options
        length, batch, size = embedded.shape
        gate_norm = None if gate_gain is None else _pair(gate_gain, gate_shift, (2, size))
        candidate_norm = (
            None if candidate_gain is None else _pair(candidate_gain, candidate_shift, (size,))
        )
        derivative = _DERIVATIVES[options.activation]
        grad_pre = torch.empty_like(pre)
        grad_embedded = torch.empty_like(embedded)
        grad_gate_gain = None if gate_norm is None else torch.zeros_like(gate_norm[0])
        grad_gate_shift = None if gate_norm is None else torch.zeros_like(gate_norm[0])
        grad_candidate_gain = None if candidate_gain is None else torch.zeros_like(candidate_gain)
        grad_candidate_shift = None if candidate_gain is None else torch.zeros_like(candidate_gain)
        grad_state = torch.zeros_like(hidden)

        for t in reversed(range(length)):
            previous = outputs[t - 1] if t else hidden
            step = _step_forward(
                pre[t].view(batch, 2, size),
                embedded[t],
                previous,
                gate_norm,
                candidate_norm,
                options,
            )
            grad = grad_outputs[t] + grad_state
            # zoneout: the kept part goes straight to the previous state
            if mask is not None:
                grad_previous = grad * mask[t]
                grad = grad - grad_previous
            else:
                grad_previous = grad * options.zoneout
                grad = grad * (1 - options.zoneout)
            # time normalisation
            if options.eta is not None and step.squared_norm is not None:
                is_floored = step.squared_norm < SQUARED_NORM_FLOOR
                square = step.squared_norm.clamp(min=SQUARED_NORM_FLOOR)
                along = (_dot(step.mixed, grad) / square).masked_fill(is_floored, 0.0)
                grad = options.eta * torch.rsqrt(square) * (grad - along * step.mixed)
            # gate mix
            update = step.gates[:, 1]
            grad_update = grad * (previous - step.candidate)
            grad_kept = grad * update
            grad_previous = grad_previous + grad_kept
            # candidate
            grad = (grad - grad_kept) * derivative(step.candidate)
            if (
                candidate_norm is not None
                and step.sum_standard is not None
                and step.sum_inverse_std is not None
                and grad_candidate_gain is not None
                and grad_candidate_shift is not None
            ):
                grad_candidate_gain += (grad * step.sum_standard).sum(0)
                grad_candidate_shift += grad.sum(0)
                grad = _standardize_backward(
                    grad * candidate_norm[0], step.sum_standard, step.sum_inverse_std
                )
            # rotation
            grad_turned, grad_e, grad_target = _rotation_backward(step, previous, grad)
            grad_previous = grad_previous + grad_turned
            torch.add(grad, grad_e, out=grad_embedded[t])
            # gates
            if (
                gate_norm is None
                or step.gates_standard is None
                or step.gates_inverse_std is None
                or grad_gate_gain is None
                or grad_gate_shift is None
            ):
                grad_gates = torch.stack(
                    (grad_target, grad_update * step.sigmoid * (1 - step.sigmoid)), 1
                )
            else:
                if options.layer_norm_gate == "pre_sigmoid":
                    grad_update = grad_update * step.sigmoid * (1 - step.sigmoid)
                grad_gates = torch.stack((grad_target, grad_update), 1)
                grad_gate_gain += (grad_gates * step.gates_standard).sum(0)
                grad_gate_shift += grad_gates.sum(0)
                grad_gates = _standardize_backward(
                    grad_gates * gate_norm[0], step.gates_standard, step.gates_inverse_std
                )
                if options.layer_norm_gate == "post_sigmoid":
                    grad_gates[:, 1] *= step.sigmoid * (1 - step.sigmoid)
            grad_pre[t] = grad_gates.view(batch, 2 * size)
            grad_state = torch.addmm(grad_previous, grad_pre[t], weight)

        grad_weight = None
        if ctx.needs_input_grad[3]:
            grad_weight = torch.zeros_like(weight)
            if length:
                states = torch.cat((hidden.unsqueeze(0), outputs[:-1]))
                torch.mm(grad_pre.view(-1, 2 * size).t(), states.view(-1, size), out=grad_weight)
        return (
            grad_pre,
            grad_embedded,
            grad_state,
            grad_weight,
            None if grad_gate_gain is None else grad_gate_gain.reshape(-1),
            None if grad_gate_shift is None else grad_gate_shift.reshape(-1),
            grad_candidate_gain,
            grad_candidate_shift,
            None,
            None,
        )


def _pair(gain: Tensor, shift: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    assert shift is not None, "a gain comes with a shift"
    return gain.view(shape), shift.view(shape)


def rum_recurrence(
    projected: Tensor,
    embedded: Tensor,
    hidden: Tensor,
    weight: Tensor,
    gate_gain: Tensor | None,
    gate_shift: Tensor | None,
    candidate_gain: Tensor | None,
    candidate_shift: Tensor | None,
    mask: Tensor | None,
    options: RecurrenceOptions,
) -> Tensor:
    """Runs a whole sequence of the RUM cell with lambda = 0.

    Args:
        projected: `(T, B, 2N)`, the inputs' share of target and update gate, bias included.
        embedded: `(T, B, N)`, the embedded inputs.
        hidden: `(B, N)`, the initial state.
        weight: `(2N, N)`, from the hidden state to target and update gate.
        gate_gain: `(2N,)` or None: layer norm of target and update gate.
        gate_shift: `(2N,)` or None.
        candidate_gain: `(N,)` or None: layer norm of embedded input plus turned state.
        candidate_shift: `(N,)` or None.
        mask: `(T, B, N)`, 1 where zoneout keeps the previous state, or None (expectation).
        options: The rest.

    Returns:
        `(T, B, N)`, the hidden state after every step.

    Raises:
        RuntimeError: When differentiated twice; the reference backend can do that.
    """
    result: Tensor = _FusedRecurrence.apply(  # type: ignore[no-untyped-call]
        projected.contiguous(),
        embedded.contiguous(),
        hidden.contiguous(),
        weight,
        gate_gain,
        gate_shift,
        candidate_gain,
        candidate_shift,
        mask,
        options,
    )
    return result
