"""Layer normalisation as the released RUM and LN-LSTM cells use it."""

import torch
from torch import Tensor, nn

from rum.kernels.step import LAYER_NORM_EPS


class LayerNorm(nn.Module):
    """Normalises each of `groups` equal parts of the last axis, then one gain and shift over all.

    Mean and biased variance are taken per sample and group; eps is 1e-3, inside the root. With
    eta = 1 and N = 1000 a component of h has variance 7e-4, so torch's default of 1e-5 would be
    another cell.

    Source: `layer_norm_all` and `layer_norm` in RUM-Tensorflow/auxiliary.py.
    """

    def __init__(
        self,
        size: int,
        groups: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Gain 1 and shift 0, both `(groups * size,)`."""
        super().__init__()
        self.size = size
        self.groups = groups
        self.gain = nn.Parameter(torch.ones(groups * size, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.zeros(groups * size, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """`(..., groups * size)` to the same shape."""
        grouped = input.unflatten(-1, (self.groups, self.size))
        normal = nn.functional.layer_norm(grouped, (self.size,), eps=LAYER_NORM_EPS)
        return normal.flatten(-2) * self.gain + self.shift
