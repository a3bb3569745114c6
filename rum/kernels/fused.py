"""The RUM recurrence as one autograd function per sequence, in plain PyTorch.

Forward: one matrix product per step on top of the input projections that the caller made for the
whole sequence. Backward, by hand: one matrix product per step for the state, and the gradient of
the recurrent weight as a single product after the loop. Saved: the pre-activations of target and
update gate, the embedded input and the hidden state, 4 x [T, B, N]; all else is recomputed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rum.functional import SQUARED_NORM_FLOOR
from rum.kernels.step import (
    RecurrenceOptions,
    RotationGradients,
    backward,
    dot,
    forward,
    refuse_second_derivative,
    unit,
)


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
            step = forward(
                pre[t].view(batch, 2, size), embedded[t], state, norms, options, _rotate
            )
            keep = options.zoneout if mask is None else mask[t]
            state = torch.lerp(step.normalized, state, keep, out=outputs[t])
        ctx.options = options
        ctx.save_for_backward(mask, pre, embedded, hidden, weight, outputs, *norms)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("fused")
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
            step = forward(
                pre[t].view(batch, 2, size), embedded[t], previous, norms, options, _rotate
            )
            keep = options.zoneout if mask is None else mask[t]
            grad = grad_outputs[t] + grad_state
            grad_kept = grad * keep
            gradients = backward(step, previous, grad - grad_kept, norms, grad_norms, options)
            grad_pre[t] = gradients.pre.view(batch, 2 * size)
            grad_embedded[t] = gradients.embedded
            grad_state = torch.addmm(grad_kept + gradients.hidden, grad_pre[t], weight)
        states = torch.cat((hidden.unsqueeze(0), outputs))[:-1]
        grad_weight = grad_pre.view(-1, 2 * size).t() @ states.view(-1, size)
        return None, None, grad_pre, grad_embedded, grad_state, grad_weight, *grad_norms


@dataclass
class _Turn:
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


def _rotate(source: Tensor, target: Tensor, vector: Tensor) -> _Turn:
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
