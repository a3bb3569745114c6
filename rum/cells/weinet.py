"""Auto-associative memory network after Zhang and Zhou 2017: a RECONSTRUCTION.

"Learning to Update Auto-associative Memory in Recurrent Neural Networks for Improving Sequence
Memorization" (arXiv:1709.06493), the "WeiNet" row of Table 1. Its equations were not available:
this follows from its abstract alone, and no result of it speaks about the published network.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rum.cells.base import Cell, CellConfig, Noise, StackConfig, State, register_model
from rum.cells.fast_weights import SLOW_WEIGHT
from rum.cells.layer_norm import LayerNorm
from rum.checks import check_at_least
from rum.errors import ConfigError

INITIAL_DECAY = 0.95
INITIAL_RATE = 0.5
DECAY_SPACING = 0.05


class WeiNetCell(Cell):
    """One step of fast weights whose rule of writing is learned; K memories. Reconstruction.

    ```
    p   = W h + C x + b
    g   = relu(p)
    h   = relu(LN(p + sum_k A_k g))
    A_k = D_k * A_k + E_k * (h h')           element-wise, after it was read
    ```

    With one memory it starts as `FastWeightsCell` with decay 0.95 and rate 0.5. Several start with
    different decays: equal ones would get equal gradients and stay equal.

    Parameters: `weight_ih (N, input_size)`, `weight_hh (N, N)`, `bias (N,)`, `norm`,
    `memory_decay (K, N, N)` (D), `memory_rate (K, N, N)` (E).

    State: `(h, A)` with A `(B, K, N, N)`, both zero at first.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_memories: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `WeiNetCellConfig` for the options."""
        super().__init__()
        WeiNetCellConfig(hidden_size=hidden_size, num_memories=num_memories)  # checks the options
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_memories = num_memories
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        memories = (num_memories, hidden_size, hidden_size)
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size, **like))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size, **like))
        self.bias = nn.Parameter(torch.empty(hidden_size, **like))
        self.norm = LayerNorm(hidden_size, **like)
        self.memory_decay = nn.Parameter(torch.empty(*memories, **like))
        self.memory_rate = nn.Parameter(torch.empty(*memories, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `FastWeightsCell`; D 0.95, 0.9, ... by memory, every entry of E 0.5 / K."""
        bound = self.input_size**-0.5
        nn.init.uniform_(self.weight_ih, -bound, bound)
        nn.init.zeros_(self.bias)
        with torch.no_grad():
            nn.init.eye_(self.weight_hh).mul_(SLOW_WEIGHT)
            for index, decay in enumerate(self.memory_decay):
                decay.fill_(INITIAL_DECAY - index * DECAY_SPACING)
        nn.init.constant_(self.memory_rate, INITIAL_RATE / self.num_memories)

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Returns h = 0 and A = 0."""
        size = self.hidden_size
        hidden = torch.zeros(batch_size, size, device=device, dtype=dtype)
        shape = (batch_size, self.num_memories, size, size)
        return hidden, torch.zeros(shape, device=device, dtype=dtype)

    def project(self, input: Tensor) -> Tensor:
        """C x + b, `(..., N)`."""
        return F.linear(input, self.weight_ih, self.bias)

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One step; see the class."""
        hidden, memories = state
        slow = projected + F.linear(hidden, self.weight_hh)
        read = (memories.sum(1) @ torch.relu(slow).unsqueeze(-1)).squeeze(-1)
        new = torch.relu(self.norm(slow + read))
        outer = (new.unsqueeze(-1) * new.unsqueeze(-2)).unsqueeze(1)
        return new, (new, self.memory_decay * memories + self.memory_rate * outer)

    def extra_repr(self) -> str:
        """Sizes and options, for `print(model)`."""
        return f"{self.input_size}, {self.hidden_size}, num_memories={self.num_memories}"


@dataclass(kw_only=True)
class WeiNetCellConfig(CellConfig):
    """Options of the reconstructed cell."""

    hidden_size: int = 50
    """Size of the hidden state."""
    num_memories: int = 2
    """K, 1 to 19; two give the published size (22k) with a 100-unit embedding."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the cell does not accept."""
        super().__post_init__()
        check_at_least("hidden_size", self.hidden_size, 1)
        check_at_least("num_memories", self.num_memories, 1)
        if INITIAL_DECAY - (self.num_memories - 1) * DECAY_SPACING <= 0:
            raise ConfigError(f"num_memories must be at most 19, got {self.num_memories}")

    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> WeiNetCell:
        """Builds the cell."""
        return WeiNetCell(
            input_size,
            self.hidden_size,
            num_memories=self.num_memories,
            device=device,
            dtype=dtype,
        )


@register_model
@dataclass(kw_only=True)
class WeiNetConfig(StackConfig, WeiNetCellConfig):
    """A stack of the reconstructed cells."""

    name: str = "weinet_reconstructed"
