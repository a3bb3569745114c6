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


def rum_recurrence(
    projected: Tensor,
    embedded: Tensor,
    hidden: Tensor,
    weight: Tensor,
    norms: tuple[Tensor, ...],
    mask: Tensor | None,
    options: RecurrenceOptions,
) -> Tensor:
    """Runs a whole sequence of the RUM cell with lambda = 0.

    Args:
        projected: `(T, B, 2N)`, the inputs' share of target and update gate, bias included.
        embedded: `(T, B, N)`, the embedded inputs.
        hidden: `(B, N)`, the initial state.
        weight: `(2N, N)`, from the hidden state to target and update gate.
        norms: Empty, or gain and shift `(2N,)` of target and update gate, then gain and shift
            `(N,)` of embedded input plus turned state.
        mask: `(T, B, N)`, 1 where zoneout keeps the previous state, or None (expectation).
        options: The rest.

    Returns:
        `(T, B, N)`, the hidden state after every step.

    Raises:
        RuntimeError: When differentiated twice; the reference backend can do that.
    """
    outputs: Tensor = _FusedRecurrence.apply(  # type: ignore[no-untyped-call]
        options,
        mask,
        projected.contiguous(),
        embedded.contiguous(),
        hidden.contiguous(),
        weight,
        *norms,
    )
    return outputs


class _FusedRecurrence(torch.autograd.Function):
    """Arguments as `rum_recurrence`, those without a gradient first."""

    @staticmethod
    def forward(
        ctx: Any,
        options: RecurrenceOptions,
        mask: Tensor | None,
        projected: Tensor,
        embedded: Tensor,
        hidden: Tensor,
        weight: Tensor,
        *norms: Tensor,
    ) -> Tensor:
        batch, size = hidden.shape
        pre = torch.empty_like(projected)
        outputs = torch.empty_like(embedded)
        state = hidden
        for t in range(len(embedded)):
            torch.addmm(projected[t], state, weight.t(), out=pre[t])
            step = _forward(pre[t].view(batch, 2, size), embedded[t], state, norms, options)
            keep = options.zoneout if mask is None else mask[t]
            state = torch.lerp(step.normalized, state, keep, out=outputs[t])
        ctx.options = options
        ctx.save_for_backward(mask, pre, embedded, hidden, weight, outputs, *norms)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; the result would silently lack terms
            raise RuntimeError(
                "the fused RUM recurrence cannot be differentiated twice: use backend='reference'"
            )
        with torch.autocast(grad_outputs.device.type, enabled=False):
            return _FusedRecurrence._gradients(ctx, grad_outputs)

    @staticmethod
    def _gradients(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        mask, pre, embedded, hidden, weight, outputs, *norms = ctx.saved_tensors
        options: RecurrenceOptions = ctx.options
        batch, size = hidden.shape
        grad_pre = torch.empty_like(pre)
        grad_embedded = torch.empty_like(embedded)
        grad_state = torch.zeros_like(hidden)
        grad_norms = [torch.zeros_like(norm) for norm in norms]
        for t in reversed(range(len(embedded))):
            previous = outputs[t - 1] if t else hidden
            step = _forward(pre[t].view(batch, 2, size), embedded[t], previous, norms, options)
            keep = options.zoneout if mask is None else mask[t]
            grad = grad_outputs[t] + grad_state
            grad_kept = grad * keep
            gradients = _backward(step, previous, grad - grad_kept, norms, grad_norms, options)
            grad_pre[t] = gradients.pre.view(batch, 2 * size)
            grad_embedded[t] = gradients.embedded
            grad_state = torch.addmm(grad_kept + gradients.hidden, grad_pre[t], weight)
        states = torch.cat((hidden.unsqueeze(0), outputs))[:-1]
        grad_weight = grad_pre.view(-1, 2 * size).t() @ states.view(-1, size)
        return None, None, grad_pre, grad_embedded, grad_state, grad_weight, *grad_norms


@dataclass
class _Normal:
    """A tensor at mean zero and variance one over its last axis."""

    standard: Tensor
    inverse_std: Tensor

    def backward(self, grad: Tensor) -> Tensor:
        """Gradient of the tensor from that of `standard`."""
        along = (grad * self.standard).mean(-1, keepdim=True)
        return (grad - grad.mean(-1, keepdim=True) - self.standard * along) * self.inverse_std


def _normal(x: Tensor) -> _Normal:
    centred = x - x.mean(-1, keepdim=True)
    inverse_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS)
    return _Normal(centred * inverse_std, inverse_std)


@dataclass
class _Step:
    """The intermediate values of one time step that backward needs, [B, N] unless said."""

    update: Tensor
    sigmoid: Tensor
    gates_normal: _Normal | None  # [B, 2, N]: target and update gate
    rotation: "_Rotation"
    total_normal: _Normal | None
    candidate: Tensor
    mixed: Tensor
    squared_norm: Tensor | None  # [B, 1], of `mixed`
    normalized: Tensor


def _forward(
    pre: Tensor,
    embedded: Tensor,
    hidden: Tensor,
    norms: tuple[Tensor, ...] | list[Tensor],
    options: RecurrenceOptions,
) -> _Step:
    """One step up to (not including) zoneout; `pre` is [B, 2, N], the rest [B, N]."""
    gates_normal = total_normal = squared_norm = None
    target, sigmoid = pre[:, 0], pre[:, 1]
    if options.layer_norm_gate == "pre_sigmoid":
        gates_normal = _normal(pre)
        target, sigmoid = _scaled(gates_normal.standard, norms).unbind(1)
    update = sigmoid = torch.sigmoid(sigmoid)
    if options.layer_norm_gate == "post_sigmoid":
        gates_normal = _normal(torch.stack((target, sigmoid), 1))
        target, update = _scaled(gates_normal.standard, norms).unbind(1)
    rotation = _rotate(embedded, target, hidden)
    total = embedded + rotation.turned
    if norms:
        total_normal = _normal(total)
        total = torch.addcmul(norms[3], total_normal.standard, norms[2])
    candidate = ACTIVATIONS[options.activation](total)
    normalized = mixed = torch.lerp(candidate, hidden, update)
    if options.eta is not None:
        squared_norm = _dot(mixed, mixed)
        normalized = options.eta * mixed * torch.rsqrt(squared_norm.clamp(min=SQUARED_NORM_FLOOR))
    return _Step(
        update,
        sigmoid,
        gates_normal,
        rotation,
        total_normal,
        candidate,
        mixed,
        squared_norm,
        normalized,
    )


def _scaled(standard: Tensor, norms: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Gain and shift of target and update gate on [B, 2, N]."""
    shape = standard.shape[1:]
    return torch.addcmul(norms[1].view(shape), standard, norms[0].view(shape))


@dataclass
class _Gradients:
    """Of one step's inputs: the direct part of hidden, without that through `pre`."""

    pre: Tensor
    embedded: Tensor
    hidden: Tensor


def _backward(
    step: _Step,
    hidden: Tensor,
    grad: Tensor,
    norms: list[Tensor],
    grad_norms: list[Tensor],
    options: RecurrenceOptions,
) -> _Gradients:
    """Gradients of `_forward` from that of `normalized`; adds to those of the layer norms."""
    if options.eta is not None and step.squared_norm is not None:
        is_floored = step.squared_norm < SQUARED_NORM_FLOOR
        square = step.squared_norm.clamp(min=SQUARED_NORM_FLOOR)
        along = (_dot(step.mixed, grad) / square).masked_fill(is_floored, 0.0)
        grad = options.eta * torch.rsqrt(square) * (grad - along * step.mixed)
    grad_update = grad * (hidden - step.candidate)
    grad_mixed = grad * step.update
    grad = (grad - grad_mixed) * _DERIVATIVES[options.activation](step.candidate)
    if step.total_normal is not None:
        grad_norms[2] += (grad * step.total_normal.standard).sum(0)
        grad_norms[3] += grad.sum(0)
        grad = step.total_normal.backward(grad * norms[2])
    turned = step.rotation.backward(hidden, grad)

    through_sigmoid = step.sigmoid * (1 - step.sigmoid)
    if options.layer_norm_gate != "post_sigmoid":
        grad_update = grad_update * through_sigmoid
    grad_pre = torch.stack((turned.target, grad_update), 1)
    if step.gates_normal is not None:
        grad_norms[0] += (grad_pre * step.gates_normal.standard).sum(0).flatten()
        grad_norms[1] += grad_pre.sum(0).flatten()
        grad_pre = step.gates_normal.backward(grad_pre * norms[0].view(grad_pre.shape[1:]))
    if options.layer_norm_gate == "post_sigmoid":
        grad_pre[:, 1] *= through_sigmoid
    return _Gradients(grad_pre, grad + turned.source, grad_mixed + turned.vector)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


@dataclass
class _RotationGradients:
    source: Tensor
    target: Tensor
    vector: Tensor


@dataclass
class _Rotation:
    """`rum.functional.rotate` with what its gradient needs; scalars are [B, 1].

    turned = H_r H_w vector with unit vectors e, r and w = e + r: first
    reflected = vector - k w, k = 2 (w . vector) / |w|^2, then turned = reflected - 2 z r.
    """

    turned: Tensor
    e: Tensor
    r: Tensor
    e_inverse_norm: Tensor
    r_inverse_norm: Tensor
    is_identity: Tensor
    w: Tensor
    scale_w: Tensor  # 2 / |w|^2, 0 where w counts as zero
    k: Tensor
    reflected: Tensor
    z: Tensor

    def backward(self, vector: Tensor, grad: Tensor) -> _RotationGradients:
        """Gradients of source, target and vector from that of `turned`."""
        grad_dot_r = _dot(self.r, grad)
        grad_reflected = grad - 2 * grad_dot_r * self.r
        s = self.scale_w * _dot(self.w, grad_reflected)
        grad_w = (s * self.k) * self.w - s * vector - self.k * grad_reflected
        grad_r = grad_w - 2 * (self.z * grad + grad_dot_r * self.reflected)
        grad_source = (grad_w - _dot(grad_w, self.e) * self.e) * self.e_inverse_norm
        grad_target = (grad_r - _dot(grad_r, self.r) * self.r) * self.r_inverse_norm
        return _RotationGradients(
            grad_source.masked_fill(self.is_identity, 0.0),
            grad_target.masked_fill(self.is_identity, 0.0),
            torch.where(self.is_identity, grad, grad_reflected - s * self.w),
        )


def _rotate(source: Tensor, target: Tensor, vector: Tensor) -> _Rotation:
    e, e_inverse_norm, e_is_zero = _unit(source)
    r, r_inverse_norm, r_is_zero = _unit(target)
    is_identity = e_is_zero | r_is_zero
    w = e + r
    squared_norm = _dot(w, w)
    w_is_zero = squared_norm < SQUARED_NORM_FLOOR
    scale_w = (2 / squared_norm.masked_fill(w_is_zero, 1.0)).masked_fill(w_is_zero, 0.0)
    k = scale_w * _dot(w, vector)
    reflected = vector - k * w
    z = _dot(r, reflected)
    turned = torch.where(is_identity, vector, reflected - 2 * z * r)
    return _Rotation(
        turned, e, r, e_inverse_norm, r_inverse_norm, is_identity, w, scale_w, k, reflected, z
    )


def _unit(vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The vector at length one, its inverse norm, and where it counts as zero."""
    squared_norm = _dot(vector, vector)
    is_zero = squared_norm < SQUARED_NORM_FLOOR
    inverse_norm = torch.rsqrt(squared_norm.masked_fill(is_zero, 1.0))
    return vector * inverse_norm, inverse_norm, is_zero
