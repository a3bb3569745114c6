"""Gated recurrent unit (Cho et al. 2014), with the reset gate before or after the product."""

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
    glorot_uniform_,
    register_model,
    semi_orthogonal,
)
from rum.checks import check_at_least, check_choice
from rum.kernels.backends import Request
from rum.kernels.chain import INPUT, Link, run

INITIALIZATIONS = ("glorot", "orthogonal")


class GRUCell(AcceleratedCell):
    """One step of a GRU.

    ```
    r = sigmoid(W_r [x; h] + b_r)                    reset gate
    u = sigmoid(W_u [x; h] + b_u)                    update gate
    c = tanh(W_c [x; r * h] + b_c)                   reset before the product: TensorFlow, paper
    c = tanh(W_cx x + b_c + r * (W_ch h + b_h))      reset after it: torch.nn.GRU, cuDNN
    h = u * h + (1 - u) * c                          u keeps the old state
    ```

    The two orders are different cells: their weights cannot be exchanged.

    Parameters: `weight_ih (3N, input_size)` and `weight_hh (3N, N)`, rows reset gate, update gate,
    candidate; `bias (3N,)`; `hidden_bias (N,)` where the reset gate comes after, else None.

    State: `(h,)`.

    Source: Cho et al. 2014, section 2.3; `tf.nn.rnn_cell.GRUCell`; `torch.nn.GRU`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        reset_after: bool = False,
        initialization: str = "glorot",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `GRUCellConfig` for the options, `rum.kernels.backends` for backends.

        Those other than "reference" serve `reset_after`, which takes one product a step.
        """
        super().__init__()
        GRUCellConfig(hidden_size=hidden_size, initialization=initialization)  # checks the options
        self.set_backend(backend)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.reset_after = reset_after
        self.initialization = initialization
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size, **like))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden_size, hidden_size, **like))
        self.bias = nn.Parameter(torch.empty(3 * hidden_size, **like))
        self.hidden_bias = nn.Parameter(torch.empty(hidden_size, **like)) if reset_after else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws initial weights as released.

        One kernel over input and hidden state together for both gates and one for the candidate,
        each Glorot-uniform or semi-orthogonal as a whole. Gates start with biases 1, the candidate
        with 0.
        """
        size = self.hidden_size
        with torch.no_grad():
            for rows in (slice(0, 2 * size), slice(2 * size, 3 * size)):
                shape = (self.input_size + size, rows.stop - rows.start)
                kernel = self.weight_ih.new_empty(shape)
                if self.initialization == "orthogonal":
                    kernel = semi_orthogonal(shape[0], shape[1], kernel)
                else:
                    glorot_uniform_(kernel)
                self.weight_ih[rows] = kernel[: self.input_size].t()
                self.weight_hh[rows] = kernel[self.input_size :].t()
            self.bias[: 2 * size] = 1.0
            self.bias[2 * size :] = 0.0
            if self.hidden_bias is not None:
                self.hidden_bias.zero_()

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Returns h = 0."""
        return (torch.zeros(batch_size, self.hidden_size, device=device, dtype=dtype),)

    def project(self, input: Tensor) -> Tensor:
        """Input shares of both gates and of the candidate: `(..., 3N)`."""
        return F.linear(input, self.weight_ih, self.bias)

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One step; see the class."""
        (hidden,) = state
        size = self.hidden_size
        of_gates, of_candidate = torch.tensor_split(projected, (2 * size,), -1)
        if self.hidden_bias is not None:
            from_hidden = F.linear(hidden, self.weight_hh)
            reset, update = torch.sigmoid(of_gates + from_hidden[..., : 2 * size]).chunk(2, -1)
            share = reset * (from_hidden[..., 2 * size :] + self.hidden_bias)
        else:
            from_hidden = F.linear(hidden, self.weight_hh[: 2 * size])
            reset, update = torch.sigmoid(of_gates + from_hidden).chunk(2, -1)
            share = F.linear(reset * hidden, self.weight_hh[2 * size :])
        candidate = torch.tanh(of_candidate + share)
        new = update * hidden + (1 - update) * candidate
        return new, (new,)

    def unroll(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs a sequence on the backend in force; see `Cell.unroll`."""
        state = self.begin(input, state)
        backend = self.choose_backend(state)
        if backend == "reference":
            return super().unroll(input, state)
        outputs, (state,) = run(backend, input, [state], [self.link(INPUT, 0, (), None)])
        return outputs, state

    def request(self, state: State) -> Request:
        """See `AcceleratedCell`."""
        weight = self.weight_hh
        return Request(
            size=self.hidden_size,
            dtype=weight.dtype,
            device=weight.device,
            obstacle=None if self.reset_after else "serves a GRU with reset_after=True",
        )

    def link(self, source: str, slot: int, noise: Noise, dropout: Tensor | None) -> Link:
        """This cell, with the reset gate after the product, as one of those in a step."""
        assert self.hidden_bias is not None
        return Link(
            kind="gru",
            weight_ih=self.weight_ih,
            bias=torch.cat((self.bias, self.hidden_bias)),
            weight_hh=self.weight_hh,
            norms=(),
            options=None,
            source=source,
            slot=slot,
            masks=(),
            dropout=dropout,
        )

    def extra_repr(self) -> str:
        """Sizes and options, for `print(model)`."""
        return f"{self.input_size}, {self.hidden_size}, reset_after={self.reset_after}"


@dataclass(kw_only=True)
class GRUCellConfig(CellConfig):
    """Options of a GRU cell."""

    hidden_size: int = 256
    """Size of the hidden state."""
    reset_after: bool = False
    """Apply the reset gate after the product with the hidden state, as torch.nn.GRU does."""
    initialization: str = "glorot"
    """Of the kernels: "glorot" (released for recall and bAbI) or "orthogonal" (for copying)."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the cell does not accept."""
        super().__post_init__()
        check_at_least("hidden_size", self.hidden_size, 1)
        check_choice("initialization", self.initialization, INITIALIZATIONS)

    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GRUCell:
        """Builds the cell."""
        return GRUCell(
            input_size,
            self.hidden_size,
            reset_after=self.reset_after,
            initialization=self.initialization,
            device=device,
            dtype=dtype,
        )


@register_model
@dataclass(kw_only=True)
class GRUConfig(StackConfig, GRUCellConfig):
    """A stack of GRU cells."""

    name: str = "gru"
