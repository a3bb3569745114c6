"""One time step of a RUM and its gradient by hand, around any rotation of the hidden state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

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


Weights = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""Of a RUM cell: `weight_ih (3N, input_size)`, `bias (2N,)`, `embedding_bias (N,)` or None, and
`weight_hh (2N, N)`."""


@dataclass(frozen=True, kw_only=True)
class RecurrenceOptions:
    """What the fused recurrence computes, tensors apart."""

    activation: str
    eta: float | None
    layer_norm_gate: str | None
    """None (no layer norm), "post_sigmoid" or "pre_sigmoid"."""
    zoneout: float
    """Probability of keeping the previous state; used as an expectation where no mask is given."""


@dataclass
class RotationGradients:
    """Gradients of a rotation's inputs, [B, N]."""

    source: Tensor
    target: Tensor
    vector: Tensor


class Rotation(Protocol):
    """A turned hidden state that knows its gradient."""

    turned: Tensor

    def backward(self, vector: Tensor, grad: Tensor) -> RotationGradients:
        """Gradients of source, target and vector from that of `turned`."""


Rotate = Callable[[Tensor, Tensor, Tensor], Rotation]
"""Turns, with source, target and vector [B, N]."""


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
class Step:
    """The intermediate values of one time step that backward needs, [B, N] unless said."""

    update: Tensor
    sigmoid: Tensor
    gates_normal: _Normal | None  # [B, 2, N]: target and update gate
    rotation: Rotation
    total_normal: _Normal | None
    candidate: Tensor
    mixed: Tensor
    squared_norm: Tensor | None  # [B, 1], of `mixed`
    normalized: Tensor


def forward(
    pre: Tensor,
    embedded: Tensor,
    hidden: Tensor,
    norms: tuple[Tensor, ...] | list[Tensor],
    options: RecurrenceOptions,
    rotate: Rotate,
) -> Step:
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
    rotation = rotate(embedded, target, hidden)
    total = embedded + rotation.turned
    if norms:
        total_normal = _normal(total)
        total = torch.addcmul(norms[3], total_normal.standard, norms[2])
    candidate = ACTIVATIONS[options.activation](total)
    normalized = mixed = torch.lerp(candidate, hidden, update)
    if options.eta is not None:
        squared_norm = dot(mixed, mixed)
        normalized = options.eta * mixed * torch.rsqrt(squared_norm.clamp(min=SQUARED_NORM_FLOOR))
    return Step(
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
class Gradients:
    """Of one step's inputs: the direct part of hidden, without that through `pre`."""

    pre: Tensor
    embedded: Tensor
    hidden: Tensor


def backward(
    step: Step,
    hidden: Tensor,
    grad: Tensor,
    norms: list[Tensor],
    grad_norms: list[Tensor],
    options: RecurrenceOptions,
) -> Gradients:
    """Gradients of `forward` from that of `normalized`; adds to those of the layer norms."""
    if options.eta is not None and step.squared_norm is not None:
        is_floored = step.squared_norm < SQUARED_NORM_FLOOR
        square = step.squared_norm.clamp(min=SQUARED_NORM_FLOOR)
        along = (dot(step.mixed, grad) / square).masked_fill(is_floored, 0.0)
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
    return Gradients(grad_pre, grad + turned.source, grad_mixed + turned.vector)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row dot products, [B, 1]."""
    return (a * b).sum(-1, keepdim=True)


def unit(vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The vector at length one, its inverse norm, and where it counts as zero."""
    squared_norm = dot(vector, vector)
    is_zero = squared_norm < SQUARED_NORM_FLOOR
    inverse_norm = torch.rsqrt(squared_norm.masked_fill(is_zero, 1.0))
    return vector * inverse_norm, inverse_norm, is_zero


def refuse_second_derivative(what: str) -> None:
    """Raises RuntimeError in a backward pass under create_graph=True: terms would be missing."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the {what} RUM recurrence cannot be differentiated twice: use backend='reference'"
        )
