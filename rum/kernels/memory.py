"""The RUM recurrence with lambda = 1 as one autograd function per sequence, in plain PyTorch.

Every step changes the associative memory R by a rank-2 update. Nothing of size T x B x N x N is
kept: backward takes the last memory and undoes one rotation after the other, R_{t-1} = R_t Rot_t',
which two explicit reflections do exactly but for rounding (some 1e-6 after 1000 steps in float32);
every `CHECKPOINT_INTERVAL` steps a copy from the forward pass starts it afresh.

The gradient. Orthogonal matrices are a manifold: of K = R_t' dL/dR_t only the skew part
S = K - K' has an effect on what comes before. With h the state that is turned, g the gradient of
`turned` = R_t h, unit vectors e and r, w = e + r and Rot = H_r H_w (see `rum.functional.rotate`):

    z     = R_t' g                            gradient of h
    S    <- S + z h' - h z'
    dw    = - s_w S w                         s_w = 2 / |w|^2, s_r = 2; 0 where left out
    de    = dw
    dr    = dw + s_r H_w S e                  up to multiples of r, which do not turn anything
    S    <- Rot S Rot'                        for the step before
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

CHECKPOINT_INTERVAL = 128


def memory_recurrence(
    projected: Tensor,
    embedded: Tensor,
    hidden: Tensor,
    memory: Tensor,
    weight: Tensor,
    norms: tuple[Tensor, ...],
    mask: Tensor | None,
    options: RecurrenceOptions,
) -> tuple[Tensor, Tensor]:
    """Runs a whole sequence of the RUM cell with lambda = 1.

    Args:
        projected: `(T, B, 2N)`, the inputs' share of target and update gate, bias included.
        embedded: `(T, B, N)`, the embedded inputs.
        hidden: `(B, N)`, the initial state.
        memory: `(B, N, N)`, the initial associative memory, orthogonal; it gets no gradient.
        weight: `(2N, N)`, from the hidden state to target and update gate.
        norms: As `rum.kernels.fused.rum_recurrence`.
        mask: `(T, B, N)`, 1 where zoneout keeps the previous state, or None (expectation).
        options: The rest.

    Returns:
        `(T, B, N)`, the hidden state after every step, and `(B, N, N)`, the last memory.

    Raises:
        RuntimeError: When differentiated twice; the reference backend can do that.
    """
    outputs: tuple[Tensor, Tensor] = _MemoryRecurrence.apply(  # type: ignore[no-untyped-call]
        options,
        mask,
        memory,
        projected.contiguous(),
        embedded.contiguous(),
        hidden.contiguous(),
        weight,
        *norms,
    )
    return outputs


class _MemoryRecurrence(torch.autograd.Function):
    """Arguments as `memory_recurrence`, those without a gradient first."""

    @staticmethod
    def forward(
        ctx: Any,
        options: RecurrenceOptions,
        mask: Tensor | None,
        memory: Tensor,
        projected: Tensor,
        embedded: Tensor,
        hidden: Tensor,
        weight: Tensor,
        *norms: Tensor,
    ) -> tuple[Tensor, Tensor]:
        batch, size = hidden.shape
        pre = torch.empty_like(projected)
        outputs = torch.empty_like(embedded)
        matrix = memory.clone(memory_format=torch.contiguous_format)
        checkpoints = []
        state = hidden

        def turn(source: Tensor, target: Tensor, vector: Tensor) -> _Turn:
            return _advance(matrix, source, target, vector)

        for t in range(len(embedded)):
            if t and t % CHECKPOINT_INTERVAL == 0:
                checkpoints.append(matrix.clone())
            torch.addmm(projected[t], state, weight.t(), out=pre[t])
            step = forward(pre[t].view(batch, 2, size), embedded[t], state, norms, options, turn)
            keep = options.zoneout if mask is None else mask[t]
            state = torch.lerp(step.normalized, state, keep, out=outputs[t])
        ctx.options = options
        ctx.num_norms = len(norms)
        ctx.device_type = hidden.device.type
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            mask, pre, embedded, hidden, weight, outputs, matrix, *norms, *checkpoints
        )
        return outputs, matrix

    @staticmethod
    def backward(
        ctx: Any, grad_outputs: Tensor | None, grad_memory: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("fused")
        with torch.autocast(ctx.device_type, enabled=False):
            return _MemoryRecurrence._gradients(ctx, grad_outputs, grad_memory)

    @staticmethod
    def _gradients(
        ctx: Any, grad_outputs: Tensor | None, grad_memory: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        mask, pre, embedded, hidden, weight, outputs, matrix, *rest = ctx.saved_tensors
        norms, checkpoints = rest[: ctx.num_norms], rest[ctx.num_norms :]
        options: RecurrenceOptions = ctx.options
        batch, size = hidden.shape
        grad_pre = torch.empty_like(pre)
        grad_embedded = torch.empty_like(embedded)
        grad_state = torch.zeros_like(hidden)
        grad_norms = [torch.zeros_like(norm) for norm in norms]
        undone = _Undone.begin(matrix, grad_memory)
        for t in reversed(range(len(embedded))):
            if (t + 1) % CHECKPOINT_INTERVAL == 0 and t + 1 < len(embedded):
                undone.matrix.copy_(checkpoints[(t + 1) // CHECKPOINT_INTERVAL - 1])
            previous = outputs[t - 1] if t else hidden
            step = forward(
                pre[t].view(batch, 2, size), embedded[t], previous, norms, options, undone.turn
            )
            keep = options.zoneout if mask is None else mask[t]
            grad = grad_state if grad_outputs is None else grad_outputs[t] + grad_state
            grad_kept = grad * keep
            gradients = backward(step, previous, grad - grad_kept, norms, grad_norms, options)
            grad_pre[t] = gradients.pre.view(batch, 2 * size)
            grad_embedded[t] = gradients.embedded
            grad_state = torch.addmm(grad_kept + gradients.hidden, grad_pre[t], weight)
        states = torch.cat((hidden.unsqueeze(0), outputs))[:-1]
        grad_weight = grad_pre.view(-1, 2 * size).t() @ states.view(-1, size)
        return None, None, None, grad_pre, grad_embedded, grad_state, grad_weight, *grad_norms


@dataclass
class _Plane:
    """The two reflections of a rotation; scales [B, 1] are 0 where one is left out."""

    e: Tensor
    r: Tensor
    w: Tensor
    scale_r: Tensor
    scale_w: Tensor
    e_inverse_norm: Tensor
    r_inverse_norm: Tensor


def _plane(source: Tensor, target: Tensor) -> _Plane:
    e, e_inverse_norm, e_is_zero = unit(source)
    r, r_inverse_norm, r_is_zero = unit(target)
    is_identity = e_is_zero | r_is_zero
    w = e + r
    squared_norm = dot(w, w)
    is_left_out = (squared_norm < SQUARED_NORM_FLOOR) | is_identity
    scale_w = (2 / squared_norm.masked_fill(is_left_out, 1.0)).masked_fill(is_left_out, 0.0)
    scale_r = torch.full_like(scale_w, 2.0).masked_fill(is_identity, 0.0)
    return _Plane(e, r, w, scale_r, scale_w, e_inverse_norm, r_inverse_norm)


@dataclass
class _Turn:
    """A hidden state turned by the memory in the forward pass."""

    turned: Tensor

    def backward(self, vector: Tensor, grad: Tensor) -> RotationGradients:
        """Never called: the backward pass has turns of its own."""
        raise NotImplementedError


def _advance(matrix: Tensor, source: Tensor, target: Tensor, vector: Tensor) -> _Turn:
    """Multiplies `matrix` by the rotation from the right, in place, and applies it to `vector`."""
    p = _plane(source, target)
    reflected = vector - (p.scale_w * dot(p.w, vector)) * p.w
    rotated = reflected - (p.scale_r * dot(p.r, reflected)) * p.r
    on_r, on_w, turned = (matrix @ torch.stack((p.r, p.w, rotated), -1)).unbind(-1)
    first = p.scale_r * on_r
    second = p.scale_w * (on_w - dot(p.r, p.w) * first)
    _add_outer(matrix, (first, second), (p.r, p.w), -1.0)
    return _Turn(turned)


def _add_outer(
    matrix: Tensor, left: tuple[Tensor, ...], right: tuple[Tensor, ...], factor: float = 1.0
) -> None:
    """Matrix += factor * sum_i left_i right_i', in place; vectors are [B, N]."""
    matrix.baddbmm_(torch.stack(left, -1), torch.stack(right, -2), alpha=factor)


def initial_skew(matrix: Tensor, grad: Tensor | None) -> Tensor:
    """S of the last memory, from its gradient."""
    if grad is None:
        return torch.zeros_like(matrix)
    onto = matrix.mT @ grad
    return onto - onto.mT


class _Undone:
    """The memory on its way back, with the gradient that it carries."""

    def __init__(self, matrix: Tensor, skew: Tensor) -> None:
        self.matrix = matrix
        self.skew = skew

    @staticmethod
    def begin(matrix: Tensor, grad: Tensor | None) -> "_Undone":
        """From the last memory and its gradient."""
        return _Undone(matrix.clone(), initial_skew(matrix, grad))

    def turn(self, source: Tensor, target: Tensor, vector: Tensor) -> "_UndoneTurn":
        """The memory after this step, applied to `vector`; `backward` then undoes the step."""
        p = _plane(source, target)
        on_w, on_r, turned = (self.matrix @ torch.stack((p.w, p.r, vector), -1)).unbind(-1)
        return _UndoneTurn(self, p, on_w, on_r, turned)


@dataclass
class _UndoneTurn:
    memory: _Undone
    plane: _Plane
    on_w: Tensor
    on_r: Tensor
    turned: Tensor

    def backward(self, vector: Tensor, grad: Tensor) -> RotationGradients:
        """Gradients from that of `turned`; takes memory and gradient to the step before."""
        p, matrix, skew = self.plane, self.memory.matrix, self.memory.skew
        z = (matrix.mT @ grad.unsqueeze(-1)).squeeze(-1)
        first = p.scale_w * self.on_w
        second = p.scale_r * (self.on_r - dot(p.w, p.r) * first)
        _add_outer(matrix, (first, second), (p.w, p.r), -1.0)

        skew_w, skew_r = (skew @ torch.stack((p.w, p.r), -1)).unbind(-1)
        skew_w = skew_w + z * dot(vector, p.w) - vector * dot(z, p.w)
        skew_r = skew_r + z * dot(vector, p.r) - vector * dot(z, p.r)
        skew_e = skew_w - skew_r
        grad_w = -p.scale_w * skew_w
        grad_r = grad_w + p.scale_r * (skew_e - (p.scale_w * dot(p.w, skew_e)) * p.w)
        scaled_w = p.scale_w * p.w
        turned_r = skew_r + scaled_w * dot(skew_w, p.r) + grad_w * dot(p.w, p.r)
        scaled_r = p.scale_r * p.r
        _add_outer(
            skew,
            (z, -vector, scaled_w, grad_w, scaled_r, -p.scale_r * turned_r),
            (vector, z, skew_w, p.w, turned_r, p.r),
        )
        return RotationGradients(
            (grad_w - dot(grad_w, p.e) * p.e) * p.e_inverse_norm,
            (grad_r - dot(grad_r, p.r) * p.r) * p.r_inverse_norm,
            z,
        )
