"""The associative memory of lambda = 1: a rotation of the hidden state by all that came before.

Every step changes the memory R by a rank-2 update. Nothing of size T x B x N x N is kept: backward
takes the last memory and undoes one rotation after the other, R_{t-1} = R_t Rot_t', which two
explicit reflections do exactly but for rounding (some 1e-6 after 1000 steps in float32); every
`CHECKPOINT_INTERVAL` steps a copy from the forward pass starts it afresh.

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

import torch
from torch import Tensor

from rum.functional import SQUARED_NORM_FLOOR
from rum.kernels.step import Rotate, RotationGradients, dot, unit

CHECKPOINT_INTERVAL = 128


@dataclass
class _Plane:
    """The two reflections of a rotation; scales [..., 1] are 0 where one is left out."""

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


def advance(matrix: Tensor) -> Rotate:
    """A rotation of the forward pass, by a memory `(..., N, N)` that it advances in place."""

    def turn(source: Tensor, target: Tensor, vector: Tensor) -> _Turn:
        p = _plane(source, target)
        reflected = vector - (p.scale_w * dot(p.w, vector)) * p.w
        rotated = reflected - (p.scale_r * dot(p.r, reflected)) * p.r
        on_r, on_w, turned = (matrix @ torch.stack((p.r, p.w, rotated), -1)).unbind(-1)
        first = p.scale_r * on_r
        second = p.scale_w * (on_w - dot(p.r, p.w) * first)
        _add_outer(matrix, (first, second), (p.r, p.w), -1.0)
        return _Turn(turned)

    return turn


def _add_outer(
    matrix: Tensor, left: tuple[Tensor, ...], right: tuple[Tensor, ...], factor: float = 1.0
) -> None:
    """Matrix += factor * sum_i left_i right_i', in place."""
    outer = torch.stack(left, -1).flatten(0, -3), torch.stack(right, -2).flatten(0, -3)
    matrix.view(-1, *matrix.shape[-2:]).baddbmm_(*outer, alpha=factor)


def initial_skew(matrix: Tensor, grad: Tensor | None) -> Tensor:
    """S of the last memory, from its gradient."""
    if grad is None:
        return torch.zeros_like(matrix)
    onto = matrix.mT @ grad
    return onto - onto.mT


class Undone:
    """A memory on its way back, in place, with the gradient that it carries; each (..., N, N)."""

    def __init__(self, matrix: Tensor, skew: Tensor) -> None:
        """Starts after the last step; `skew` is its S."""
        self.matrix = matrix
        self.skew = skew

    def turn(self, source: Tensor, target: Tensor, vector: Tensor) -> "_UndoneTurn":
        """The memory after this step, applied to `vector`; `backward` then undoes the step."""
        p = _plane(source, target)
        on_w, on_r, turned = (self.matrix @ torch.stack((p.w, p.r, vector), -1)).unbind(-1)
        return _UndoneTurn(self, p, on_w, on_r, turned)


@dataclass
class _UndoneTurn:
    memory: Undone
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
