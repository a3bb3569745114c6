"""Rotation, time normalisation and zoneout: the pure tensor functions a RUM is made of."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

SQUARED_NORM_FLOOR = 1e-12
"""Squared norms below this count as zero, as in TensorFlow's `l2_normalize` (the floor is on the
*squared* norm, so the smallest divisor is 1e-6)."""


def _full_precision(tensor: Tensor) -> Tensor:
    """Half-precision numbers as float32: floors and 1/(1 + cos) would underflow in them."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Keeps products in the dtype of their operands, also where there is no autocast ("meta")."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _unit(vector: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns `vector` at length one and where it counts as zero (there it is left as it is)."""
    squared_norm = (vector * vector).sum(-1, keepdim=True)
    is_zero = squared_norm < eps
    return vector * torch.rsqrt(squared_norm.masked_fill(is_zero, 1.0)), is_zero


def _reflections(
    source: Tensor, target: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two reflections v -> v - scale (d . v) d that make up a rotation: H_r H_w.

    Returns:
        Direction r and scale of the second, then direction w and scale of the first; a scale is 0
        where that reflection is left out.
    """
    e, source_is_zero = _unit(_full_precision(source), eps)
    r, target_is_zero = _unit(_full_precision(target), eps)
    w = e + r
    squared_norm = (w * w).sum(-1, keepdim=True)
    is_opposite = squared_norm < eps
    is_identity = source_is_zero | target_is_zero
    scale_w = 2 / squared_norm.masked_fill(is_opposite, 1.0)
    scale_r = torch.full_like(scale_w, 2.0)
    return (
        r,
        scale_r.masked_fill(is_identity, 0.0),
        w,
        scale_w.masked_fill(is_opposite | is_identity, 0.0),
    )


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
    r, scale_r, w, scale_w = _reflections(source, target, eps)
    h = _full_precision(vector)
    reflected = h - scale_w * (w * h).sum(-1, keepdim=True) * w
    turned = reflected - scale_r * (r * reflected).sum(-1, keepdim=True) * r
    return turned.to(vector.dtype)


def accumulate_rotation(
    memory: Tensor, source: Tensor, target: Tensor, *, eps: float = SQUARED_NORM_FLOOR
) -> Tensor:
    """Multiplies `memory` by a rotation from the right: `memory @ rotation_matrix(...)`.

    The rotation acts first on a vector that the product is applied to. It is a rank-2 change of
    `memory`, O(N^2) instead of the O(N^3) of a matrix product.

    Args:
        memory: `(B, N, N)`.
        source: `(B, N)`.
        target: `(B, N)`.
        eps: As in `rotate`.

    Returns:
        `(B, N, N)`, in the dtype of `memory`.

    Source: paper section 3.2, R_t = R_{t-1} Rotation(eps, tau); the order is the released code's.
    """
    r, scale_r, w, scale_w = _reflections(source, target, eps)
    full = _full_precision(memory)
    directions = torch.stack((r, w), -1)
    # Autocast would take the products in half precision, and the memory would lose its norm.
    with without_autocast(memory.device):
        onto_r, onto_w = (full @ directions).unbind(-1)  # memory r and memory w, (B, N)
        first = scale_r * onto_r
        second = scale_w * (onto_w - (r * w).sum(-1, keepdim=True) * first)
        change = torch.stack((first, second), -1)
        return torch.baddbmm(full, change, directions.mT, alpha=-1).to(memory.dtype)


def leak_rotation(memory: Tensor, lambda_: float | Tensor) -> Tensor:
    """Shrinks every rotation angle of an orthogonal matrix: a smooth stand-in for its real power.

    ```
    L(R) = ((1 + lambda) R + (1 - lambda) I) ((1 - lambda) R + (1 + lambda) I)^-1
    ```

    An eigenvalue exp(i theta) of R becomes exp(i phi) with tan(phi / 2) = lambda tan(theta / 2).
    So L(R) is orthogonal, equals R at lambda = 1, tends to the identity as lambda goes to 0, obeys
    L_a(L_b(R)) = L_ab(R), and agrees with R^lambda = exp(lambda log R) up to the third power of
    the angles. Unlike that power it has no branch cut at theta = pi, where products of random
    rotations come close, and needs no eigenvectors: the inverse exists for every orthogonal R (its
    smallest singular value is 2 lambda at least), and value and gradient are smooth in both
    arguments. The polar factor of (1 - lambda) I + lambda R, another candidate, is singular at
    lambda = 1/2, theta = pi.

    Cost: one batched LU solve, O(B N^3).

    Args:
        memory: `(..., N, N)`, orthogonal.
        lambda_: In (0, 1], a number or a tensor of one element.

    Returns:
        `(..., N, N)`, in the dtype of `memory`.

    Source: ours; paper section 5.2 names real powers as future work.
    """
    full = _full_precision(memory)
    identity = torch.eye(full.shape[-1], dtype=full.dtype, device=full.device)
    with without_autocast(memory.device):
        # Both factors are functions of R, so they commute: solve from the left.
        numerator = (1 + lambda_) * full + (1 - lambda_) * identity
        denominator = (1 - lambda_) * full + (1 + lambda_) * identity
        leaked: Tensor = torch.linalg.solve(denominator, numerator)
        return leaked.to(memory.dtype)


def orthonormalize(memory: Tensor) -> Tensor:
    """Takes a nearly orthogonal matrix closer to its polar factor: one Newton-Schulz step.

    An error e of orthogonality becomes about e^2 (Bjoerck and Bowie 1971). Cost: O(B N^3).

    Args:
        memory: `(..., N, N)`, singular values in (0, sqrt(3)).

    Returns:
        `(..., N, N)`: 1.5 R - 0.5 R R' R.
    """
    with without_autocast(memory.device):
        full = _full_precision(memory)
        return (1.5 * full - 0.5 * (full @ full.mT) @ full).to(memory.dtype)


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
        eps: Floor on the squared norm; a zero state stays zero. As released, the derivative there
            is eta / sqrt(eps): a sample whose state is zero for many steps (all units of a small
            layer off) multiplies gradients by 1e6 eta at each of them.

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
