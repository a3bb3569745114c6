"""Gated orthogonal recurrent unit (Jing et al. 2017, arXiv:1706.02761)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rum.cells.base import Cell, Noise, StackConfig, State, register_model
from rum.cells.eunn import INPUT_BOUND, OrthogonalOptions, OrthogonalProduct, mod_relu


class GORUCell(Cell):
    """One step of a GORU: a GRU around an orthogonal recurrent matrix.

    ```
    r = sigmoid(U_r x + W_r h + b_r)             reset gate
    g = sigmoid(U_g x + W_g h + b_g)             update gate
    c = modReLU(U_c x + r * (W h), b_c)          W orthogonal at any angles
    h = g * h + (1 - g) * c                      g keeps the old state
    ```

    Parameters: `weight_ih (3N, input_size)`, rows r, g, c; `weight_hh (2N, N)`, rows r, g;
    `bias (3N,)`, rows r, g, c; `orthogonal` (see `OrthogonalProduct`).

    State: `(h,)`.

    Source: Jing et al. 2017, section 3; RUM-Tensorflow/baselineModels/GORU.py.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        style: str = "tunable",
        capacity: int = 2,
        zero_last_unit: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `OrthogonalOptions`."""
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.orthogonal = OrthogonalProduct(
            hidden_size, style=style, capacity=capacity, zero_last_unit=zero_last_unit, **like
        )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size, **like))
        self.weight_hh = nn.Parameter(torch.empty(2 * hidden_size, hidden_size, **like))
        self.bias = nn.Parameter(torch.empty(3 * hidden_size, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws initial weights as released.

        U and W uniform in +-0.01; b_r and b_c 2; b_g has no initialiser of its own there, so
        TensorFlow's default for a vector: uniform in +-sqrt(3 / N).
        """
        size = self.hidden_size
        nn.init.uniform_(self.weight_ih, -INPUT_BOUND, INPUT_BOUND)
        nn.init.uniform_(self.weight_hh, -INPUT_BOUND, INPUT_BOUND)
        with torch.no_grad():
            self.bias.fill_(2.0)
            bound = math.sqrt(3 / size)
            self.bias[size : 2 * size].uniform_(-bound, bound)

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Returns h = 0."""
        return (torch.zeros(batch_size, self.hidden_size, device=device, dtype=dtype),)

    def project(self, input: Tensor) -> Tensor:
        """U x, `(..., 3N)`, with the biases of the two gates."""
        size = self.hidden_size
        gates_bias = torch.cat((self.bias[: 2 * size], self.bias.new_zeros(size)))
        return F.linear(input, self.weight_ih, gates_bias)

    def unroll(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs a sequence; see `Cell.unroll`."""
        with self.orthogonal.reused():
            return super().unroll(input, state)

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One step; see the class."""
        (hidden,) = state
        size = self.hidden_size
        of_gates, of_candidate = torch.tensor_split(projected, (2 * size,), -1)
        gates = torch.sigmoid(of_gates + F.linear(hidden, self.weight_hh))
        reset, update = gates.chunk(2, -1)
        turned = self.orthogonal(hidden)
        candidate = mod_relu(of_candidate + reset * turned, self.bias[2 * size :])
        new = update * hidden + (1 - update) * candidate
        return new, (new,)


@dataclass(kw_only=True)
class GORUCellConfig(OrthogonalOptions):
    """Options of a GORU cell."""

    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GORUCell:
        """Builds the cell."""
        return GORUCell(
            input_size,
            self.hidden_size,
            style=self.style,
            capacity=self.capacity,
            zero_last_unit=self.zero_last_unit,
            device=device,
            dtype=dtype,
        )


@register_model
@dataclass(kw_only=True)
class GORUConfig(StackConfig, GORUCellConfig):
    """A stack of GORU cells."""

    name: str = "goru"
