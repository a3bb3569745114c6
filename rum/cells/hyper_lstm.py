"""HyperLSTM (Ha et al. 2017, HyperNetworks): a small LSTM scales the weights of a large one."""

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
    register_model,
    semi_orthogonal,
)
from rum.cells.layer_norm import LayerNorm
from rum.cells.lstm import LSTMCell
from rum.checks import check_at_least

FORGET_BIAS = 1.0
SCALE_AT_START = 0.1  # d of the paper's equation 7: what the weight rows begin with
BIAS_EMBEDDING_STD = 0.01


class HyperLSTMCell(Cell):
    """One step of a HyperLSTM; y stands for each of the gates i, f, g, o.

    ```
    k, _  = LSTM([x; h], k)                              the hyper cell, with layer norm
    z_y   = V_y k + v_y                                  three embeddings a gate: of h, x, bias
    y     = LN((D_hy z_hy) * W_y h + (D_xy z_xy) * U_y x + D_by z_by + b_y)
    c     = sigmoid(f + 1) * c + sigmoid(i) * tanh(g)
    h     = sigmoid(o) * tanh(LN(c))
    ```

    Parameters: `weight_ih (4N, input_size)`, `weight_hh (4N, N)`, `bias (4N,)`, the hyper cell
    `hyper`, `embed (12 E, hyper_size)` and `embed_bias (8 E,)` (V, v; rows of h, x, bias; the
    bias's embedding has no v), `scale (3, 4, N, E)` (D of h, x, bias).

    Initial values as in the paper's appendix A.2.3: V 0 and v 1 for h and x, D 0.1 / E, so that
    every row begins scaled by 0.1; V Gaussian of 0.01 and D 0 for the bias; kernels
    semi-orthogonal a gate.

    State: `(h, c, k, c of the hyper cell)`.

    Source: Ha, Dai and Le 2017, section 3.2 and appendix A.2.2. The embeddings see k after its
    step, as in the authors' code (supercell).

    Chosen here: layer norm with this library's eps of 1e-3; layer norm, forget bias and initial
    values of the hyper cell are those of `LSTMCell`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        hyper_size: int = 128,
        embedding_size: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `HyperLSTMCellConfig` for the options."""
        super().__init__()
        HyperLSTMCellConfig(  # checks the options
            hidden_size=hidden_size, hyper_size=hyper_size, embedding_size=embedding_size
        )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.embedding_size = embedding_size
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        size, embedding = hidden_size, embedding_size
        self.hyper = LSTMCell(input_size + size, hyper_size, layer_norm=True, **like)
        self.weight_ih = nn.Parameter(torch.empty(4 * size, input_size, **like))
        self.weight_hh = nn.Parameter(torch.empty(4 * size, size, **like))
        self.bias = nn.Parameter(torch.zeros(4 * size, **like))
        self.embed = nn.Parameter(torch.zeros(12 * embedding, hyper_size, **like))
        self.embed_bias = nn.Parameter(torch.ones(8 * embedding, **like))
        self.scale = nn.Parameter(torch.zeros(3, 4, size, embedding, **like))
        self.gate_norm = LayerNorm(size, groups=4, **like)
        self.cell_norm = LayerNorm(size, **like)
        with torch.no_grad():
            for weight in (self.weight_ih, self.weight_hh):
                for gate in weight.chunk(4):
                    gate.copy_(semi_orthogonal(gate.shape[0], gate.shape[1], gate))
            self.embed[8 * embedding :].normal_(0.0, BIAS_EMBEDDING_STD)
            self.scale[:2].fill_(SCALE_AT_START / embedding)

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Returns zeros for both cells."""
        zeros = torch.zeros(batch_size, self.hidden_size, device=device, dtype=dtype)
        return zeros, zeros, *self.hyper.initial_state(batch_size, device=device, dtype=dtype)

    def project(self, input: Tensor) -> Tensor:
        """U x of all gates, then x itself for the hyper cell: `(..., 4N + input_size)`."""
        return torch.cat((F.linear(input, self.weight_ih), input), -1)

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One step; see the class."""
        hidden, cell, *hyper_state = state
        from_input, input = torch.tensor_split(projected, (4 * self.hidden_size,), -1)
        hyper_input = self.hyper.project(torch.cat((input, hidden), -1))
        key, hyper_after = self.hyper.step(hyper_input, tuple(hyper_state), ())
        no_bias = self.embed_bias.new_zeros(4 * self.embedding_size)
        z = F.linear(key, self.embed, torch.cat((self.embed_bias, no_bias)))
        z = z.unflatten(-1, (3, 4, self.embedding_size))
        of_hidden, of_input, of_bias = (
            torch.einsum("bkge,kgne->kbgn", z, self.scale).flatten(-2).unbind(0)
        )
        gates = of_hidden * F.linear(hidden, self.weight_hh) + of_input * from_input
        i, f, g, o = self.gate_norm(gates + of_bias + self.bias).chunk(4, -1)
        new_cell = torch.sigmoid(f + FORGET_BIAS) * cell + torch.sigmoid(i) * torch.tanh(g)
        new_hidden = torch.sigmoid(o) * torch.tanh(self.cell_norm(new_cell))
        return new_hidden, (new_hidden, new_cell, *hyper_after)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{self.input_size}, {self.hidden_size}, embedding_size={self.embedding_size}"


@dataclass(kw_only=True)
class HyperLSTMCellConfig(CellConfig):
    """Options of a HyperLSTM cell; the defaults are the paper's on Penn Treebank."""

    hidden_size: int = 1000
    """Size of the hidden state and of the cell state."""
    hyper_size: int = 128
    """Size of the hyper cell."""
    embedding_size: int = 4
    """E, features of what the hyper cell says about a gate."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the cell does not accept."""
        super().__post_init__()
        for name in ("hidden_size", "hyper_size", "embedding_size"):
            check_at_least(name, getattr(self, name), 1)

    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HyperLSTMCell:
        """Builds the cell."""
        return HyperLSTMCell(
            input_size,
            self.hidden_size,
            hyper_size=self.hyper_size,
            embedding_size=self.embedding_size,
            device=device,
            dtype=dtype,
        )


@register_model
@dataclass(kw_only=True)
class HyperLSTMConfig(StackConfig, HyperLSTMCellConfig):
    """A stack of HyperLSTM cells."""

    name: str = "hyper_lstm"
