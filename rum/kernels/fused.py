"""The RUM recurrence in plain PyTorch, on every device.

Forward: one matrix product per step on top of the inputs' share of the pre-activations. Backward,
by hand: one matrix product per step for the state; all that is not a pre-activation or a state is
computed again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rum.functional import SQUARED_NORM_FLOOR
from rum.kernels.memory import Undone, advance
from rum.kernels.recurrence import RecurrenceOptions
from rum.kernels.step import (
    Rotate,
    RotationGradients,
    Step,
    StepOptions,
    backward,
    dot,
    forward,
    unit,
)


class FusedRecurrence:
    """A `rum.kernels.recurrence.Recurrence`."""

    def __init__(
        self, weight: Tensor, norms: tuple[Tensor, ...], options: RecurrenceOptions
    ) -> None:
        """See `Recurrence`."""
        dtype = options.product_dtype or weight.dtype
        self._weight = weight.to(dtype)
        self._norms = _per_replica(norms)
        self._zoneout = _column(options.zoneout, weight)
        self._options = StepOptions(
            activation=options.activation,
            eta=None if options.eta is None else _column(options.eta, weight),
            layer_norm_gate=options.layer_norm_gate,
        )

    def piece(self, rows: int) -> int | None:
        """All steps at once."""
        return None

    def forward(
        self,
        pre: Tensor,
        hidden: Tensor,
        mask: Tensor | None,
        memory: Tensor | None,
        outputs: Tensor,
    ) -> None:
        """See `Recurrence`."""
        rotate = rotate_once if memory is None else advance(memory)
        state = hidden
        for t in range(len(pre)):
            gates, embedded = _split(pre[t])
            _add_product(gates, state, self._weight.mT)
            step = forward(_by_gate(gates), embedded, state, self._norms, self._options, rotate)
            keep = self._zoneout if mask is None else mask[t]
            state = torch.lerp(step.normalized, state, keep, out=outputs[t])

    def backward(
        self,
        pre: Tensor,
        hidden: Tensor,
        mask: Tensor | None,
        memory: Tensor | None,
        skew: Tensor | None,
        outputs: Tensor,
        grad_outputs: Tensor,
        grad_state: Tensor,
        grad_pre: Tensor,
        grad_norms: tuple[Tensor, ...],
    ) -> None:
        """See `Recurrence`."""
        rotate: Rotate = rotate_once
        if memory is not None and skew is not None:
            rotate = Undone(memory, skew).turn
        grad_norms = _per_replica(grad_norms)
        for t in reversed(range(len(pre))):
            previous = outputs[t - 1] if t else hidden
            gates, embedded = _split(pre[t])
            step = forward(_by_gate(gates), embedded, previous, self._norms, self._options, rotate)
            keep = self._zoneout if mask is None else mask[t]
            grad = grad_outputs[t] + grad_state
            grad_kept = grad * keep
            gradients = backward(
                step, previous, grad - grad_kept, self._norms, grad_norms, self._options
            )
            grad_gates, grad_embedded = _split(grad_pre[t])
            grad_gates.copy_(gradients.gates.flatten(-2))
            grad_embedded.copy_(gradients.embedded)
            torch.add(grad_kept, gradients.hidden, out=grad_state)
            _add_product(grad_state, grad_gates, self._weight)


class RUMRows:
    """`rum.kernels.recurrence.Rows` of a RUM with lambda = 0."""

    def __init__(self, norms: tuple[Tensor, ...], options: RecurrenceOptions) -> None:
        """See `Rows`; options of one replica."""
        self.grad_norms = tuple(torch.zeros_like(norm) for norm in norms)
        self._norms = _broadcast(norms)
        self._zoneout = options.zoneout[0]
        self._options = StepOptions(
            activation=options.activation,
            eta=None if options.eta is None else options.eta[0],
            layer_norm_gate=options.layer_norm_gate,
        )

    def forward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
    ) -> None:
        """See `Rows`."""
        step = self._step(pre, states[0])
        keep = masks[0] if masks else self._zoneout
        torch.lerp(step.normalized, states[0], keep, out=new_states[0])

    def backward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
        grads: tuple[Tensor, ...],
        grad_pre: Tensor,
    ) -> None:
        """See `Rows`."""
        step = self._step(pre, states[0])
        grad_kept = grads[0] * (masks[0] if masks else self._zoneout)
        gradients = backward(
            step,
            states[0],
            grads[0] - grad_kept,
            self._norms,
            _broadcast(self.grad_norms),
            self._options,
        )
        torch.cat((gradients.gates.flatten(-2), gradients.embedded), -1, out=grad_pre)
        torch.add(grad_kept, gradients.hidden, out=grads[0])

    def _step(self, pre: Tensor, hidden: Tensor) -> Step:
        gates, embedded = _split(pre)
        return forward(_by_gate(gates), embedded, hidden, self._norms, self._options, rotate_once)


def _broadcast(norms: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Views of one replica's layer norms that broadcast over rows."""
    return (*map(_by_gate, norms[:2]), *norms[2:])


def _per_replica(norms: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Views of layer norms that broadcast over a replica's rows."""
    if not norms:
        return ()
    *of_gates, gain, shift = norms
    return *(_by_gate(norm).unsqueeze(1) for norm in of_gates), gain[:, None], shift[:, None]


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    """One value a replica as [K, 1, 1]."""
    column: Tensor = like.new_tensor(values).view(-1, 1, 1)
    return column


def _split(pre: Tensor) -> tuple[Tensor, Tensor]:
    """Target and update gate, and the embedded input."""
    size = pre.shape[-1] // 3
    return pre[..., : 2 * size], pre[..., 2 * size :]


def _by_gate(gates: Tensor) -> Tensor:
    return gates.view(*gates.shape[:-1], 2, gates.shape[-1] // 2)


def _add_product(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    """Total += rows weight in every replica, with operands in the dtype of the weight."""
    rows = rows.to(weight.dtype)
    if weight.dtype != total.dtype:
        total += rows @ weight
    elif len(total) == 1:
        total[0].addmm_(rows[0], weight[0])
    else:
        total.baddbmm_(rows, weight)


@dataclass
class _Turn:
    """`rum.functional.rotate` with what its gradient needs; scalars are [..., 1].

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

    def backward(self, vector: Tensor, grad: Tensor) -> RotationGradients:
        """Gradients of source, target and vector from that of `turned`."""
        grad_dot_r = dot(self.r, grad)
        grad_reflected = grad - 2 * grad_dot_r * self.r
        s = self.scale_w * dot(self.w, grad_reflected)
        grad_w = (s * self.k) * self.w - s * vector - self.k * grad_reflected
        grad_r = grad_w - 2 * (self.z * grad + grad_dot_r * self.reflected)
        grad_source = (grad_w - dot(grad_w, self.e) * self.e) * self.e_inverse_norm
        grad_target = (grad_r - dot(grad_r, self.r) * self.r) * self.r_inverse_norm
        return RotationGradients(
            grad_source.masked_fill(self.is_identity, 0.0),
            grad_target.masked_fill(self.is_identity, 0.0),
            torch.where(self.is_identity, grad, grad_reflected - s * self.w),
        )


def rotate_once(source: Tensor, target: Tensor, vector: Tensor) -> _Turn:
    """Turns a vector as `rum.functional.rotate` does, for `rum.kernels.step`."""
    e, e_inverse_norm, e_is_zero = unit(source)
    r, r_inverse_norm, r_is_zero = unit(target)
    is_identity = e_is_zero | r_is_zero
    w = e + r
    squared_norm = dot(w, w)
    w_is_zero = squared_norm < SQUARED_NORM_FLOOR
    scale_w = (2 / squared_norm.masked_fill(w_is_zero, 1.0)).masked_fill(w_is_zero, 0.0)
    k = scale_w * dot(w, vector)
    reflected = vector - k * w
    z = dot(r, reflected)
    turned = torch.where(is_identity, vector, reflected - 2 * z * r)
    return _Turn(
        turned, e, r, e_inverse_norm, r_inverse_norm, is_identity, w, scale_w, k, reflected, z
    )
