"""Hierarchical multiscale LSTM (Chung et al. 2017): levels that update where a segment ends."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rum.cells.base import (
    Cell,
    CellConfig,
    Noise,
    StackConfig,
    State,
    glorot_uniform_,
    register_model,
)
from rum.checks import check_at_least, check_positive


class HMLSTMCell(Cell):
    """One step of an HM-LSTM; z is 1 where a level's segment ends, z of level 0 is always 1.

    ```
    for l = 1 .. L, with the previous step's h, c, z and the new h, z of level l - 1:
      s = U_l h_l + z_l V_l h_{l+1} + z_{l-1} W_l h_{l-1} + b_l      V only below the top
      f, i, o = sigmoid, g = tanh of its first four parts
      z~ = clip((slope s_z + 1) / 2, 0, 1),  new z_l = z~ > 0.5      not at the top
      z_l = 1                 FLUSH    c = i g
      z_l = 0, z_{l-1} = 1    UPDATE   c = f c + i g
      z_l = 0, z_{l-1} = 0    COPY     c and h stay
      h = o tanh(c)
    output = relu(sum_l sigmoid(w_l [h_1; ..; h_L]) E_l h_l)
    ```

    z has no derivative: backward passes through it as if it were z~ (straight-through estimator).

    Parameters, a list over levels each: `weight_hh (4N [+ 1], N)` (U), `weight_above` (V),
    `weight_below` (W), `bias`; `output_gate (L, L N)` (w), `output_weight (N, L N)` (E).

    State: `(output, h_1 .. h_L, c_1 .. c_L, z_1 .. z_{L-1})`, z `(B, 1)`.

    Source: Chung, Ahn and Bengio 2017 (Hierarchical Multiscale Recurrent Neural Networks), section
    3; the output is that of their output module, equations 11 and 12.

    Chosen, not published: Glorot-uniform initial values, biases 0, no segment ended before the
    first step, an output of N units. The slope is constant here; there it grows during training.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_levels: int = 3,
        slope: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `HMLSTMCellConfig` for the options."""
        super().__init__()
        HMLSTMCellConfig(hidden_size=hidden_size, num_levels=num_levels, slope=slope)  # checks
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_levels = num_levels
        self.slope = slope
        like: dict[str, Any] = {"device": device, "dtype": dtype}

        def weights(columns: list[int]) -> nn.ParameterList:
            rows = [4 * hidden_size + (level < num_levels - 1) for level in range(num_levels)]
            return nn.ParameterList(
                nn.Parameter(torch.empty(row, column, **like))
                for row, column in zip(rows, columns, strict=False)
            )

        self.weight_hh = weights([hidden_size] * num_levels)
        self.weight_above = weights([hidden_size] * (num_levels - 1))
        self.weight_below = weights([input_size] + [hidden_size] * (num_levels - 1))
        self.bias = nn.ParameterList(
            nn.Parameter(torch.zeros(len(weight), **like)) for weight in self.weight_hh
        )
        joined = num_levels * hidden_size
        self.output_gate = nn.Parameter(torch.empty(num_levels, joined, **like))
        self.output_weight = nn.Parameter(torch.empty(hidden_size, joined, **like))
        for weight in (*self.weight_hh, *self.weight_above, *self.weight_below):
            glorot_uniform_(weight)
        glorot_uniform_(self.output_gate)
        glorot_uniform_(self.output_weight)

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Returns zeros: no segment has ended."""
        zeros = torch.zeros(batch_size, self.hidden_size, device=device, dtype=dtype)
        boundary = torch.zeros(batch_size, 1, device=device, dtype=dtype)
        return (zeros,) * (1 + 2 * self.num_levels) + (boundary,) * (self.num_levels - 1)

    def project(self, input: Tensor) -> Tensor:
        """What the lowest level sees of the input: `(..., 4N [+ 1])`."""
        return F.linear(input, self.weight_below[0], self.bias[0])

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One step; see the class."""
        levels, size = self.num_levels, self.hidden_size
        hidden = list(state[1 : 1 + levels])
        cells = list(state[1 + levels : 1 + 2 * levels])
        boundaries = [*state[1 + 2 * levels :], state[0].new_zeros(len(state[0]), 1)]
        below = torch.ones_like(boundaries[0])
        for level in range(levels):
            ended = boundaries[level]
            total = F.linear(hidden[level], self.weight_hh[level])
            if level == 0:
                total = total + projected
            else:
                from_below = F.linear(hidden[level - 1], self.weight_below[level])
                total = total + below * from_below + self.bias[level]
            if level < levels - 1:
                from_above = F.linear(hidden[level + 1], self.weight_above[level])
                total = total + ended * from_above
            f, i, o, g = total[:, : 4 * size].chunk(4, -1)
            written = torch.sigmoid(i) * torch.tanh(g)
            updated = torch.sigmoid(f) * cells[level] + written
            kept = (1 - ended) * (1 - below)
            cells[level] = ended * written + (1 - ended) * below * updated + kept * cells[level]
            new = torch.sigmoid(o) * torch.tanh(cells[level])
            hidden[level] = (1 - kept) * new + kept * hidden[level]
            if level < levels - 1:
                below = boundaries[level] = _boundary(total[:, 4 * size :], self.slope)
        joined = torch.cat(hidden, -1)
        gates = torch.sigmoid(F.linear(joined, self.output_gate))
        gated = (torch.stack(hidden, -2) * gates.unsqueeze(-1)).flatten(-2)
        output = torch.relu(F.linear(gated, self.output_weight))
        return output, (output, *hidden, *cells, *boundaries[:-1])

    def extra_repr(self) -> str:
        """Sizes and options, for `print(model)`."""
        return (
            f"{self.input_size}, {self.hidden_size}, num_levels={self.num_levels}, "
            f"slope={self.slope}"
        )


def _boundary(activation: Tensor, slope: float) -> Tensor:
    """Zeros and ones, with the derivative of the hard sigmoid below them."""
    soft = ((slope * activation + 1) / 2).clamp(0, 1)
    hard = (soft > 0.5).to(soft.dtype)
    return soft + (hard - soft).detach()


@dataclass(kw_only=True)
class HMLSTMCellConfig(CellConfig):
    """Options of an HM-LSTM cell."""

    hidden_size: int = 512
    """Size of every level and of the output."""
    num_levels: int = 3
    """L, >= 2."""
    slope: float = 1.0
    """Of the hard sigmoid of the boundary detectors, > 0."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the cell does not accept."""
        super().__post_init__()
        check_at_least("hidden_size", self.hidden_size, 1)
        check_at_least("num_levels", self.num_levels, 2)
        check_positive("slope", self.slope)

    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HMLSTMCell:
        """Builds the cell."""
        return HMLSTMCell(
            input_size,
            self.hidden_size,
            num_levels=self.num_levels,
            slope=self.slope,
            device=device,
            dtype=dtype,
        )


@register_model
@dataclass(kw_only=True)
class HMLSTMConfig(StackConfig, HMLSTMCellConfig):
    """A stack of HM-LSTM cells; one already has `num_levels` levels."""

    name: str = "hm_lstm"
