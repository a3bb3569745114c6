"""Fast weights with layer normalisation (Ba et al. 2016): the FW-LN row of Table 1."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rum.cells.base import Cell, CellConfig, Noise, StackConfig, State, register_model
from rum.cells.layer_norm import LayerNorm
from rum.checks import check_at_least, check_positive
from rum.errors import ConfigError

SLOW_WEIGHT = 0.05  # the recurrent weight starts as this multiple of the identity


class FastWeightsCell(Cell):
    """One step of a network whose fast weights A attend to its recent states.

    ```
    p       = W h + C x + b
    g_0     = relu(p)
    g_{s+1} = relu(LN(p + A g_s))        s = 0 .. inner_steps - 1
    h       = g_S
    A       = decay A + rate h h'        after it was read
    ```

    Layer norm over the hidden units of each sample, gain 1 and shift 0 at first.

    Parameters: `weight_ih (N, input_size)` (C), `weight_hh (N, N)` (W), `bias (N,)`, `norm`.

    State: `(h, A)` with A `(B, N, N)`, both zero at first.

    Source: Ba et al. 2016 (Using Fast Weights to Attend to the Recent Past), equations 1 and 2.
    Some public re-implementations write A with this step's g_0 before reading it; not here. The
    input weight's bounds are not published: uniform in +-1 / sqrt(input_size) here.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        decay: float = 0.95,
        rate: float = 0.5,
        inner_steps: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `FastWeightsCellConfig` for the options."""
        super().__init__()
        FastWeightsCellConfig(  # checks the options
            hidden_size=hidden_size, decay=decay, rate=rate, inner_steps=inner_steps
        )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.decay = decay
        self.rate = rate
        self.inner_steps = inner_steps
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size, **like))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size, **like))
        self.bias = nn.Parameter(torch.empty(hidden_size, **like))
        self.norm = LayerNorm(hidden_size, **like)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W = 0.05 I, C uniform, bias 0."""
        bound = self.input_size**-0.5
        nn.init.uniform_(self.weight_ih, -bound, bound)
        with torch.no_grad():
            nn.init.eye_(self.weight_hh).mul_(SLOW_WEIGHT)
        nn.init.zeros_(self.bias)

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Returns h = 0 and A = 0."""
        size = self.hidden_size
        hidden = torch.zeros(batch_size, size, device=device, dtype=dtype)
        return hidden, torch.zeros(batch_size, size, size, device=device, dtype=dtype)

    def project(self, input: Tensor) -> Tensor:
        """C x + b, `(..., N)`."""
        return F.linear(input, self.weight_ih, self.bias)

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One step; see the class."""
        hidden, fast = state
        slow = projected + F.linear(hidden, self.weight_hh)
        new = torch.relu(slow)
        for _ in range(self.inner_steps):
            read = (fast @ new.unsqueeze(-1)).squeeze(-1)
            new = torch.relu(self.norm(slow + read))
        written = self.rate * new.unsqueeze(-1) * new.unsqueeze(-2)
        return new, (new, self.decay * fast + written)

    def extra_repr(self) -> str:
        """Sizes and options, for `print(model)`."""
        return (
            f"{self.input_size}, {self.hidden_size}, decay={self.decay}, rate={self.rate}, "
            f"inner_steps={self.inner_steps}"
        )


@dataclass(kw_only=True)
class FastWeightsCellConfig(CellConfig):
    """Options of a fast-weights cell."""

    hidden_size: int = 50
    """Size of the hidden state."""
    decay: float = 0.95
    """Share of the fast weights that stays at each step, in [0, 1]."""
    rate: float = 0.5
    """Of writing the hidden state's outer product, > 0."""
    inner_steps: int = 1
    """Times that the fast weights are read in a step, >= 1."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the cell does not accept."""
        super().__post_init__()
        check_at_least("hidden_size", self.hidden_size, 1)
        if not 0.0 <= self.decay <= 1.0:
            raise ConfigError(f"decay must be in [0, 1], got {self.decay}")
        check_positive("rate", self.rate)
        check_at_least("inner_steps", self.inner_steps, 1)

    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> FastWeightsCell:
        """Builds the cell."""
        return FastWeightsCell(
            input_size,
            self.hidden_size,
            decay=self.decay,
            rate=self.rate,
            inner_steps=self.inner_steps,
            device=device,
            dtype=dtype,
        )


@register_model
@dataclass(kw_only=True)
class FastWeightsConfig(StackConfig, FastWeightsCellConfig):
    """A stack of fast-weights cells."""

    name: str = "fast_weights"
