"""The recurrent cell that Neural Architecture Search found (Zoph and Le 2017)."""

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
from rum.checks import check_at_least


class NASCell(Cell):
    """One step of the "base 25" cell; a_k = W_k x, b_k = U_k h (+ bias), k = 1 .. 8.

    ```
    l1 = sigmoid(a1 + b1)    l2 = relu(a2 + b2)     l3 = sigmoid(a3 + b3)    l4 = relu(a4 * b4)
    l5 = tanh(a5 + b5)       l6 = sigmoid(a6 + b6)  l7 = tanh(a7 + b7)       l8 = sigmoid(a8 + b8)
    m1 = tanh(l1 * l2)       m2 = tanh(l3 + l4)     m3 = tanh(l5 * l6)       m4 = sigmoid(l7 + l8)
    c' = tanh(m1 + c) * m2
    h' = tanh(c' * tanh(m3 + m4))
    ```

    Parameters: `weight_ih (8N, input_size)`, `weight_hh (8N, N)`, `bias (8N,)` of the products
    with h.

    Chosen, not published: Glorot-uniform initial values, bias 0; the bias is always there
    (TensorFlow's is an option).

    State: `(h, c)`.

    Source: Zoph and Le 2017 (Neural Architecture Search with Reinforcement Learning), appendix,
    as in TensorFlow's NASCell.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `NASCellConfig` for the options."""
        super().__init__()
        NASCellConfig(hidden_size=hidden_size)  # checks the options
        self.input_size = input_size
        self.hidden_size = hidden_size
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(8 * hidden_size, input_size, **like))
        self.weight_hh = nn.Parameter(torch.empty(8 * hidden_size, hidden_size, **like))
        self.bias = nn.Parameter(torch.zeros(8 * hidden_size, **like))
        glorot_uniform_(self.weight_ih)
        glorot_uniform_(self.weight_hh)

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Returns h = 0 and c = 0."""
        zeros = torch.zeros(batch_size, self.hidden_size, device=device, dtype=dtype)
        return zeros, zeros

    def project(self, input: Tensor) -> Tensor:
        """a_1 .. a_8: `(..., 8N)`."""
        return F.linear(input, self.weight_ih)

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One step; see the class."""
        hidden, cell = state
        a = projected.chunk(8, -1)
        b = F.linear(hidden, self.weight_hh, self.bias).chunk(8, -1)
        m1 = torch.tanh(torch.sigmoid(a[0] + b[0]) * torch.relu(a[1] + b[1]))
        m2 = torch.tanh(torch.sigmoid(a[2] + b[2]) + torch.relu(a[3] * b[3]))
        m3 = torch.tanh(torch.tanh(a[4] + b[4]) * torch.sigmoid(a[5] + b[5]))
        m4 = torch.sigmoid(torch.tanh(a[6] + b[6]) + torch.sigmoid(a[7] + b[7]))
        new_cell = torch.tanh(m1 + cell) * m2
        new_hidden = torch.tanh(new_cell * torch.tanh(m3 + m4))
        return new_hidden, (new_hidden, new_cell)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{self.input_size}, {self.hidden_size}"


@dataclass(kw_only=True)
class NASCellConfig(CellConfig):
    """Options of a NASCell."""

    hidden_size: int = 256
    """Size of the hidden state and of the cell state."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the cell does not accept."""
        super().__post_init__()
        check_at_least("hidden_size", self.hidden_size, 1)

    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> NASCell:
        """Builds the cell."""
        return NASCell(input_size, self.hidden_size, device=device, dtype=dtype)


@register_model
@dataclass(kw_only=True)
class NASConfig(StackConfig, NASCellConfig):
    """A stack of NASCells."""

    name: str = "nas"
