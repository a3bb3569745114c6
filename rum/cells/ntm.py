"""Neural Turing Machine (Graves et al. 2014): an LSTM that reads and writes a memory."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rum.cells.base import Cell, CellConfig, Noise, StackConfig, State, register_model
from rum.cells.lstm import LSTMCell
from rum.checks import check_at_least

INITIAL_MEMORY = 0.01  # what every entry of the memory begins with
WEIGHT_FLOOR = 1e-8  # under the logarithm of the sharpening


class NTMCell(Cell):
    """One step of a Neural Turing Machine with one read and one write head.

    ```
    q      = LSTM([x; read], q)                            controller
    for each head, from a linear map of q:
      wc   = softmax_i(softplus(b) cos(k, M_i))            by content
      wg   = sigmoid(g) wc + (1 - sigmoid(g)) w            or where it was
      ws_i = sum_j wg_{i-j} softmax(s)_j                   moved by -R .. R, in a circle
      w_i  = ws_i^y / sum_j ws_j^y,  y = 1 + softplus(.)   sharpened
    M      = M * (1 - w_write sigmoid(e)') + w_write a'    erase, then add
    read   = M' w_read
    output = W_o [q; read] + b_o
    ```

    Parameters: `controller` (an LSTM of N units), `heads` (the linear map to k, b, g, s, y of
    the read head, then of the write head, then e, a), `output`.

    State: `(output, q, c of the LSTM, read, w_read, w_write, M)`, M `(B, memory_size,
    memory_width)`.

    Source: Graves, Wayne and Danihelka 2014, section 3.

    Chosen, not published: the output is linear in the controller's and the read vector joined;
    the write head writes before the read head reads; softplus and sigmoid bring b, y and g into
    their ranges; both heads begin at the first place of a memory of entries 0.01; initial values
    are those of `LSTMCell` and torch's of linear maps; 1e-8 is added to ws before its power.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        memory_size: int = 32,
        memory_width: int = 20,
        shift_range: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `NTMCellConfig` for the options."""
        super().__init__()
        NTMCellConfig(  # checks the options
            hidden_size=hidden_size,
            memory_size=memory_size,
            memory_width=memory_width,
            shift_range=shift_range,
        )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.memory_size = memory_size
        self.memory_width = memory_width
        self.shift_range = shift_range
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.controller = LSTMCell(input_size + memory_width, hidden_size, **like)
        self._sizes = 2 * [memory_width, 1, 1, 2 * shift_range + 1, 1] + 2 * [memory_width]
        self.heads = nn.Linear(hidden_size, sum(self._sizes), **like)
        self.output = nn.Linear(hidden_size + memory_width, hidden_size, **like)

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Returns zeros, both heads at the first place, and equal entries of the memory."""
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        zeros = torch.zeros(batch_size, self.hidden_size, **like)
        read = torch.zeros(batch_size, self.memory_width, **like)
        place = torch.zeros(batch_size, self.memory_size, **like)
        place[:, 0] = 1
        memory = torch.full(
            (batch_size, self.memory_size, self.memory_width), INITIAL_MEMORY, **like
        )
        return zeros, zeros, zeros, read, place, place, memory

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One step; see the class."""
        _, hidden, cell, read, read_weight, write_weight, memory = state
        controller_input = self.controller.project(torch.cat((projected, read), -1))
        hidden, (_, cell) = self.controller.step(controller_input, (hidden, cell), ())
        parts = self.heads(hidden).split(self._sizes, -1)
        write_weight = _address(memory, write_weight, parts[5:10])
        erase, add = torch.sigmoid(parts[10]), parts[11]
        place = write_weight.unsqueeze(-1)
        memory = memory * (1 - place * erase.unsqueeze(-2)) + place * add.unsqueeze(-2)
        read_weight = _address(memory, read_weight, parts[:5])
        read = (read_weight.unsqueeze(-2) @ memory).squeeze(-2)
        output = self.output(torch.cat((hidden, read), -1))
        return output, (output, hidden, cell, read, read_weight, write_weight, memory)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"{self.input_size}, {self.hidden_size}, memory_size={self.memory_size}, "
            f"memory_width={self.memory_width}, shift_range={self.shift_range}"
        )


def _address(memory: Tensor, weight: Tensor, head: tuple[Tensor, ...]) -> Tensor:
    """Where a head looks, `(B, memory_size)`, from where it looked before."""
    key, strength, gate, shift, sharpness = head
    similarity = F.cosine_similarity(key.unsqueeze(-2), memory, dim=-1)
    by_content = torch.softmax(F.softplus(strength) * similarity, -1)
    gate = torch.sigmoid(gate)
    gated = gate * by_content + (1 - gate) * weight
    shares = torch.softmax(shift, -1)
    farthest = shares.shape[-1] // 2
    by_each = [gated.roll(by, -1) for by in range(-farthest, farthest + 1)]
    moved = (shares.unsqueeze(-2) * torch.stack(by_each, -1)).sum(-1)
    # The quotient of powers, in logarithms: powers of small weights underflow.
    return torch.softmax((1 + F.softplus(sharpness)) * torch.log(moved + WEIGHT_FLOOR), -1)


@dataclass(kw_only=True)
class NTMCellConfig(CellConfig):
    """Options of a Neural Turing Machine."""

    hidden_size: int = 100
    """Size of the controller and of the output."""
    memory_size: int = 32
    """Places of the memory, >= 2 shift_range + 1 (it is moved through in a circle)."""
    memory_width: int = 20
    """Numbers in a place."""
    shift_range: int = 1
    """R, how many places a head may move in a step, either way."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the cell does not accept."""
        super().__post_init__()
        check_at_least("hidden_size", self.hidden_size, 1)
        check_at_least("memory_width", self.memory_width, 1)
        check_at_least("shift_range", self.shift_range, 1)
        check_at_least("memory_size", self.memory_size, 2 * self.shift_range + 1)

    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> NTMCell:
        """Builds the cell."""
        return NTMCell(
            input_size,
            self.hidden_size,
            memory_size=self.memory_size,
            memory_width=self.memory_width,
            shift_range=self.shift_range,
            device=device,
            dtype=dtype,
        )


@register_model
@dataclass(kw_only=True)
class NTMConfig(StackConfig, NTMCellConfig):
    """A stack of Neural Turing Machines."""

    name: str = "ntm"
