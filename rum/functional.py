"""Rotation, time normalisation and zoneout: the pure tensor functions a RUM is made of."""

import torch
from torch import Tensor

SQUARED_NORM_FLOOR = 1e-12
"""Squared norms below this count as zero, as in TensorFlow's `l2_normalize` (the floor is on the
*squared* norm, so the smallest divisor is 1e-6)."""


def _full_precision(tensor: Tensor) -> Tensor:
    """Half-precision numbers as float32: floors and 1/(1 + cos) would underflow in them."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _unit(vector: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns `vector` at length one and where it counts as zero (there it is left as it is)."""
    squared_norm = (vector * vector).sum(-1, keepdim=True)
    is_zero = squared_norm < eps
    return vector * torch.rsqrt(squared_norm.masked_fill(is_zero, 1.0)), is_zero


def rotate(
    source: Tensor, target: Tensor, vector: Tensor, *, eps: float = SQUARED_NORM_FLOOR
) -> Tensor:
    """Turns `vector` by the rotation that takes the direction of `source` to that of `target`.

    With unit vectors e (source) and r (target) and w = e + r the rotation is the product of two
    reflections, H_r H_w: orthogonal at every angle, and the identity on whatever is orthogonal to
    both. Cost: O(N) per vector; the N x N matrix is never built. Swapping `source` and `target`
    gives the inverse.

    Degenerate inputs, all with finite value and gradient:

    - `source` or `target` is zero: `vector` comes back unturned (the released code projects);
    - parallel: the identity;
    - exactly opposite (w = 0, where no plane of rotation is defined): the reflection H_r alone. It
      takes e to r, fixes the complement of r and preserves norms; its determinant is -1. Close to
      it the true gradient grows like 1 / cos(angle / 2); it is bounded by the floor on |w|^2.

    Args:
        source: `(..., N)`.
        target: `(..., N)`.
        vector: `(..., N)`; the leading dimensions of the three are broadcast.
        eps: Squared norms below this count as zero.

    Returns:
        `(..., N)`, in the dtype of `vector`; half precision is computed in float32.

    Source: Dangovski et al., section 3.1 (Rotation); there as I - uu' - vv' + [u v] R(angle)
    [u v]', which equals this form but gives NaN where the two directions are nearly parallel.
    """
    e, source_is_zero = _unit(_full_precision(source), eps)
    r, target_is_zero = _unit(_full_precision(target), eps)
    h = _full_precision(vector)
    w = e + r
    squared_norm = (w * w).sum(-1, keepdim=True)
    is_opposite = squared_norm < eps
    k = 2 * (w * h).sum(-1, keepdim=True) / squared_norm.masked_fill(is_opposite, 1.0)
    reflected = h - k.masked_fill(is_opposite, 0.0) * w
    turned = reflected - 2 * (r * reflected).sum(-1, keepdim=True) * r
    return torch.where(source_is_zero | target_is_zero, h, turned).to(vector.dtype)


def rotation_matrix(source: Tensor, target: Tensor, *, eps: float = SQUARED_NORM_FLOOR) -> Tensor:
    """Returns the matrix R of `rotate`: `R @ vector == rotate(source, target, vector)`.

    Args:
        source: `(..., N)`.
        target: `(..., N)`.
        eps: As in `rotate`.

    Returns:
        `(..., N, N)`, orthogonal.
    """
    size = source.shape[-1]
    basis = torch.eye(size, dtype=source.dtype, device=source.device)
    rows = rotate(source.unsqueeze(-2), target.unsqueeze(-2), basis, eps=eps)  # row i is R e_i
    return rows.transpose(-1, -2)


def time_normalize(hidden: Tensor, eta: float, *, eps: float = SQUARED_NORM_FLOOR) -> Tensor:
    """Scales each hidden state to norm `eta`: over the hidden units of one sample at one step.

    Args:
        hidden: `(..., N)`.
        eta: The norm, > 0.
        eps: Floor on the squared norm; a zero state stays zero.

    Returns:
        `(..., N)`.

    Source: paper section 3.2, last equation. The paper's words "along the sequence dimension" do
    not describe that equation or the released code, which both normalise over hidden units.
    """
    full = _full_precision(hidden)
    squared_norm = (full * full).sum(-1, keepdim=True).clamp(min=eps)
    return (eta * full * torch.rsqrt(squared_norm)).to(hidden.dtype)


def zoneout(
    new: Tensor, previous: Tensor, probability: float, mask: Tensor | None = None
) -> Tensor:
    """Keeps each unit's previous value with some probability (Krueger et al. 2017).

    Args:
        new: `(..., N)`, the state that the cell computed.
        previous: `(..., N)`, the state before the step.
        probability: Of keeping `previous`, in [0, 1). The released configurations state the
            opposite, the probability of taking `new`: their 0.9 is 0.1 here.
        mask: `(..., N)`, 1 where `previous` is kept, drawn with `probability` (training). Without
            it the result is the expectation, a mix of the two (evaluation).

    Returns:
        `(..., N)`.
    """
    if mask is not None:
        return torch.lerp(new, previous, mask.to(new.dtype))
    return torch.lerp(new, previous, probability) if probability else new
