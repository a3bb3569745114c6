"""LSTM cell with layer normalisation and zoneout (the baseline and fast cell of the paper)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rum.cells.base import (
    AcceleratedCell,
    CellConfig,
    Noise,
    StackConfig,
    State,
    bernoulli_mask,
    register_model,
    semi_orthogonal,
)
from rum.cells.layer_norm import LayerNorm
from rum.checks import check_at_least, check_probability
from rum.errors import ConfigError
from rum.functional import zoneout
from rum.kernels.backends import Request
from rum.kernels.chain import INPUT, Link, run
from rum.kernels.gates import LSTMOptions


class LSTMCell(AcceleratedCell):
    """One step of an LSTM, gates in torch's order i, f, g, o.

    ```
    i, f, g, o = LN_4(W_ih x + W_hh h + b)         one layer norm over the sum, per gate
    c' = sigmoid(f + forget_bias) * c + sigmoid(i) * tanh(g)
    h' = sigmoid(o) * tanh(LN(c'))
    c, h = zoneout(c', c), zoneout(h', h)          h' comes from c' before its zoneout
    ```

    Without layer norm and zoneout this is `torch.nn.LSTM` with the forget bias added at run time
    (TensorFlow's BasicLSTMCell, forget_bias = 1) and one bias instead of two.

    State: `(h, c)`.

    Source: RUM-Tensorflow/baselineModels/LNLSTM.py, from Mujika et al. 2017 (Fast-Slow-LSTM).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        layer_norm: bool = False,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        forget_bias: float = 1.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `LSTMCellConfig` for the options, `rum.kernels.backends` for backends."""
        super().__init__()
        LSTMCellConfig(  # checks the options
            hidden_size=hidden_size,
            zoneout_h=zoneout_h,
            zoneout_c=zoneout_c,
            forget_bias=forget_bias,
        )
        self.set_backend(backend)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.zoneout_h = zoneout_h
        self.zoneout_c = zoneout_c
        self.forget_bias = forget_bias
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size, **like))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, **like))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size, **like))
        self.gate_norm = LayerNorm(hidden_size, groups=4, **like) if layer_norm else None
        self.cell_norm = LayerNorm(hidden_size, **like) if layer_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws initial weights as released.

        With layer norm: each kernel semi-orthogonal as a whole (`N x 4N`), so that one gate's
        block is not. Without: Glorot-uniform over input and hidden state together. Bias 0.
        """
        if self.gate_norm is not None:
            with torch.no_grad():
                for weight in (self.weight_ih, self.weight_hh):
                    rows, columns = weight.shape
                    weight.copy_(semi_orthogonal(rows, columns, weight))
        else:
            bound = (6 / (self.input_size + self.hidden_size + 4 * self.hidden_size)) ** 0.5
            nn.init.uniform_(self.weight_ih, -bound, bound)
            nn.init.uniform_(self.weight_hh, -bound, bound)
        nn.init.zeros_(self.bias)

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Returns h = 0 and c = 0."""
        zeros = torch.zeros(batch_size, self.hidden_size, device=device, dtype=dtype)
        return zeros, zeros

    def sample_noise(self, length: int, batch_size: int) -> Noise:
        """Draws the zoneout masks of h and c, each `(T, B, N)`."""
        if not self.training or self.zoneout_h == self.zoneout_c == 0:
            return ()
        shape = (length, batch_size, self.hidden_size)
        return tuple(
            bernoulli_mask(probability, *shape, like=self.weight_hh)
            for probability in (self.zoneout_h, self.zoneout_c)
        )

    def project(self, input: Tensor) -> Tensor:
        """Input shares of all gates: `(..., 4N)`."""
        return F.linear(input, self.weight_ih, self.bias)

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One step; see the class."""
        hidden, cell = state
        gates = projected + F.linear(hidden, self.weight_hh)
        if self.gate_norm is not None:
            gates = self.gate_norm(gates)
        i, f, g, o = gates.chunk(4, -1)
        new_cell = torch.sigmoid(f + self.forget_bias) * cell + torch.sigmoid(i) * torch.tanh(g)
        normal = new_cell if self.cell_norm is None else self.cell_norm(new_cell)
        new_hidden = torch.sigmoid(o) * torch.tanh(normal)
        mask_h, mask_c = noise or (None, None)
        assert not isinstance(mask_h, tuple)
        assert not isinstance(mask_c, tuple)
        new_hidden = zoneout(new_hidden, hidden, self.zoneout_h, mask_h)
        new_cell = zoneout(new_cell, cell, self.zoneout_c, mask_c)
        return new_hidden, (new_hidden, new_cell)

    def unroll(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs a sequence on the backend in force; see `Cell.unroll`."""
        state = self.begin(input, state)
        backend = self.choose_backend(state)
        if backend == "reference":
            return super().unroll(input, state)
        noise = self.sample_noise(input.shape[0], input.shape[1])
        outputs, (state,) = run(backend, input, [state], [self.link(INPUT, 0, noise, None)])
        return outputs, state

    def request(self, state: State) -> Request:
        """See `AcceleratedCell`."""
        weight = self.weight_hh
        return Request(size=self.hidden_size, dtype=weight.dtype, device=weight.device)

    def link(self, source: str, slot: int, noise: Noise, dropout: Tensor | None) -> Link:
        """This cell as one of those in a step."""
        norms: tuple[Tensor, ...] = ()
        if self.gate_norm is not None and self.cell_norm is not None:
            norms = (
                self.gate_norm.gain,
                self.gate_norm.shift,
                self.cell_norm.gain,
                self.cell_norm.shift,
            )
        return Link(
            kind="lstm",
            weight_ih=self.weight_ih,
            bias=self.bias,
            weight_hh=self.weight_hh,
            norms=norms,
            options=LSTMOptions(
                forget_bias=self.forget_bias, zoneout_h=self.zoneout_h, zoneout_c=self.zoneout_c
            ),
            source=source,
            slot=slot,
            masks=tuple(mask for mask in noise if isinstance(mask, Tensor)),
            dropout=dropout,
        )

    def extra_repr(self) -> str:
        """Sizes and options, for `print(model)`."""
        return (
            f"{self.input_size}, {self.hidden_size}, zoneout_h={self.zoneout_h}, "
            f"zoneout_c={self.zoneout_c}, forget_bias={self.forget_bias}"
        )


@dataclass(kw_only=True)
class LSTMCellConfig(CellConfig):
    """Options of an LSTM cell."""

    hidden_size: int = 256
    """Size of the hidden state and of the cell state."""
    layer_norm: bool = False
    """Layer norm of the gates and of the cell state inside the output's tanh."""
    zoneout_h: float = 0.0
    """Probability of keeping the previous hidden state; released Penn Treebank code: 0.1."""
    zoneout_c: float = 0.0
    """Probability of keeping the previous cell state; released Penn Treebank code: 0.5."""
    forget_bias: float = 1.0
    """Added to the forget gate at run time, not to the bias parameter."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the cell does not accept."""
        super().__post_init__()
        check_at_least("hidden_size", self.hidden_size, 1)
        check_probability("zoneout_h", self.zoneout_h)
        check_probability("zoneout_c", self.zoneout_c)
        if not math.isfinite(self.forget_bias):
            raise ConfigError(f"forget_bias must be finite, got {self.forget_bias}")

    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LSTMCell:
        """Builds the cell."""
        return LSTMCell(
            input_size,
            self.hidden_size,
            layer_norm=self.layer_norm,
            zoneout_h=self.zoneout_h,
            zoneout_c=self.zoneout_c,
            forget_bias=self.forget_bias,
            device=device,
            dtype=dtype,
        )


@register_model
@dataclass(kw_only=True)
class LSTMConfig(StackConfig, LSTMCellConfig):
    """A stack of LSTM cells."""

    name: str = "lstm"
