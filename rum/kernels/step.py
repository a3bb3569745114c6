"""One time step of a RUM and its gradient by hand, around any rotation of the hidden state.

Shapes: [..., N] where nothing else is said; target and update gate together, `gates`, are
[..., 2, N]. Layer norms and eta are given such that they broadcast against these.
"""

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


@dataclass
class RotationGradients:
    """Gradients of a rotation's inputs."""

    source: Tensor
    target: Tensor
    vector: Tensor


class Rotation(Protocol):
    """A turned hidden state that knows its gradient."""

    turned: Tensor

    def backward(self, vector: Tensor, grad: Tensor) -> RotationGradients:
        """Gradients of source, target and vector from that of `turned`."""


Rotate = Callable[[Tensor, Tensor, Tensor], Rotation]
"""Turns, with source, target and vector."""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What a step computes, tensors that are learned apart."""

    activation: str
    eta: float | Tensor | None
    layer_norm_gate: str | None
    """None (no layer norm), "post_sigmoid" or "pre_sigmoid"."""


@dataclass
class Normal:
    """A tensor at mean zero and variance one over its last axis."""

    standard: Tensor
    inverse_std: Tensor

    def backward(self, grad: Tensor) -> Tensor:
        """Gradient of the tensor from that of `standard`."""
        along = (grad * self.standard).mean(-1, keepdim=True)
        return (grad - grad.mean(-1, keepdim=True) - self.standard * along) * self.inverse_std


def normal(x: Tensor) -> Normal:
    """The tensor with what the gradient of its standard form needs."""
    centred = x - x.mean(-1, keepdim=True)
    inverse_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS)
    return Normal(centred * inverse_std, inverse_std)


@dataclass
class Step:
    """The intermediate values of one time step that backward needs."""

    update: Tensor
    sigmoid: Tensor
    gates_normal: Normal | None  # [..., 2, N]
    rotation: Rotation
    total_normal: Normal | None
    candidate: Tensor
    mixed: Tensor
    squared_norm: Tensor | None  # [..., 1], of `mixed`
    normalized: Tensor


def forward(
    gates: Tensor,
    embedded: Tensor,
    hidden: Tensor,
    norms: tuple[Tensor, ...],
    options: StepOptions,
    rotate: Rotate,
) -> Step:
    """One step up to (not including) zoneout; `gates` before sigmoid and layer norm."""
    gates_normal = total_normal = squared_norm = None
    target, sigmoid = gates.unbind(-2)
    if options.layer_norm_gate == "pre_sigmoid":
        gates_normal = normal(gates)
        target, sigmoid = _scaled(gates_normal, norms).unbind(-2)
    update = sigmoid = torch.sigmoid(sigmoid)
    if options.layer_norm_gate == "post_sigmoid":
        gates_normal = normal(torch.stack((target, sigmoid), -2))
        target, update = _scaled(gates_normal, norms).unbind(-2)
    rotation = rotate(embedded, target, hidden)
    total = embedded + rotation.turned
    if norms:
        total_normal = normal(total)
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


def _scaled(normal: Normal, norms: tuple[Tensor, ...]) -> Tensor:
    return torch.addcmul(norms[1], normal.standard, norms[0])


@dataclass
class Gradients:
    """Of one step's inputs: the direct part of hidden, without that through `gates`."""

    gates: Tensor
    embedded: Tensor
    hidden: Tensor


def backward(
    step: Step,
    hidden: Tensor,
    grad: Tensor,
    norms: tuple[Tensor, ...],
    grad_norms: tuple[Tensor, ...],
    options: StepOptions,
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
        grad = norm_backward(step.total_normal, grad, norms[2], grad_norms[2:])
    turned = step.rotation.backward(hidden, grad)

    through_sigmoid = step.sigmoid * (1 - step.sigmoid)
    if options.layer_norm_gate != "post_sigmoid":
        grad_update = grad_update * through_sigmoid
    grad_gates = torch.stack((turned.target, grad_update), -2)
    if step.gates_normal is not None:
        grad_gates = norm_backward(step.gates_normal, grad_gates, norms[0], grad_norms[:2])
    if options.layer_norm_gate == "post_sigmoid":
        grad_gates[..., 1, :] *= through_sigmoid
    return Gradients(grad_gates, grad + turned.source, grad_mixed + turned.vector)


def norm_backward(
    normal: Normal, grad: Tensor, gain: Tensor, grad_norms: tuple[Tensor, ...]
) -> Tensor:
    """Gradient of what was normalised; adds to those of gain and shift."""
    of_gain, of_shift = grad_norms
    of_gain += (grad * normal.standard).sum_to_size(of_gain.shape)
    of_shift += grad.sum_to_size(of_shift.shape)
    return normal.backward(grad * gain)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row dot products, [..., 1]."""
    return (a * b).sum(-1, keepdim=True)


def unit(vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The vector at length one, its inverse norm, and where it counts as zero."""
    squared_norm = dot(vector, vector)
    is_zero = squared_norm < SQUARED_NORM_FLOOR
    inverse_norm = torch.rsqrt(squared_norm.masked_fill(is_zero, 1.0))
    return vector * inverse_norm, inverse_norm, is_zero
