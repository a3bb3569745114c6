"""Recurrent layers used like `torch.nn.LSTM`: `output, state = layer(input, state)`."""

from typing import Any

import torch
from torch import Tensor, nn

from rum.cells import Cell, CellConfig, FastSlowCell, LSTMCell, RUMCell, State
from rum.checks import check_at_least, check_probability


class RecurrentLayer(nn.Module):
    """A stack of cells over whole sequences.

    Input `(T, B, input_size)`, or `(B, T, input_size)` with `batch_first`, or `(T, input_size)`
    for one sequence without a batch. Output: the same with `hidden_size` features, the last
    layer's at every step. State: a tuple of tensors `(num_layers, B, ...)`, the hidden state
    first (without the batch dimension for an unbatched input); what a call returns can be given
    to the next one.
    """

    def __init__(
        self, cells: list[Cell], *, batch_first: bool = False, dropout: float = 0.0
    ) -> None:
        """Stacks `cells`; `dropout` zeroes outputs between them, not after the last."""
        super().__init__()
        check_probability("dropout", dropout)
        self.cells = nn.ModuleList(cells)
        self.input_size = cells[0].input_size
        self.hidden_size = cells[-1].hidden_size
        self.num_layers = len(cells)
        self.batch_first = batch_first
        self.dropout = dropout

    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs the sequence; see the class for shapes.

        Raises:
            TypeError: If `input` is not a tensor (packed sequences are not supported) or `state`
                is not a tuple of tensors.
            ValueError: If a shape does not fit.
        """
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        if state is not None and not isinstance(state, tuple):
            raise TypeError(f"state must be a tuple of tensors, got {type(state).__name__}")
        if input.dim() not in (2, 3):
            raise ValueError(f"input must have 2 or 3 dimensions, got shape {tuple(input.shape)}")
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(1)
            state = None if state is None else tuple(tensor.unsqueeze(1) for tensor in state)
        elif self.batch_first:
            input = input.transpose(0, 1)
        if state is not None and any(len(tensor) != self.num_layers for tensor in state):
            raise ValueError(
                f"state tensors must have num_layers = {self.num_layers} first, got shapes "
                f"{[tuple(tensor.shape) for tensor in state]}"
            )

        output = input
        states = []
        for index, cell in enumerate(self.cells):
            assert isinstance(cell, Cell)
            if index:
                output = nn.functional.dropout(output, self.dropout, self.training)
            before = None if state is None else tuple(tensor[index] for tensor in state)
            output, after = cell.unroll(output, before)
            states.append(after)
        new_state = tuple(torch.stack(tensors) for tensors in zip(*states, strict=True))

        if not batched:
            return output.squeeze(1), tuple(tensor.squeeze(1) for tensor in new_state)
        return (output.transpose(0, 1) if self.batch_first else output), new_state


class RUM(RecurrentLayer):
    """A multi-layer Rotational Unit of Memory.

    State: `(h,)` with h `(num_layers, B, hidden_size)`; for `lambda_=1` `(h, R)` with R
    `(num_layers, B, hidden_size, hidden_size)`. See `rum.cells.RUMCell` for the equations.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        **cell: Any,
    ) -> None:
        """Builds the stack.

        Args:
            input_size: Features of the input.
            hidden_size: Features of the output and size of the state.
            num_layers: Cells on top of each other.
            batch_first: Input and output are `(B, T, features)`.
            dropout: Probability of zeroing an output between layers, in [0, 1).
            **cell: Options of `rum.cells.RUMCell`: lambda_, eta, layer_norm, layer_norm_gate,
                zoneout, embedding_bias, activation, backend, device, dtype.
        """
        check_at_least("num_layers", num_layers, 1)
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        cells: list[Cell] = [RUMCell(size, hidden_size, **cell) for size in sizes]
        super().__init__(cells, batch_first=batch_first, dropout=dropout)


class LSTM(RecurrentLayer):
    """A multi-layer LSTM with optional layer normalisation and zoneout.

    State: `(h, c)`, both `(num_layers, B, hidden_size)`, as `torch.nn.LSTM`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        **cell: Any,
    ) -> None:
        """Builds the stack; arguments as `RUM`.

        Args:
            **cell: Options of `rum.cells.LSTMCell`: layer_norm, zoneout_h, zoneout_c,
                forget_bias, device, dtype.
        """
        check_at_least("num_layers", num_layers, 1)
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        cells: list[Cell] = [LSTMCell(size, hidden_size, **cell) for size in sizes]
        super().__init__(cells, batch_first=batch_first, dropout=dropout)


class FastSlowRNN(RecurrentLayer):
    """A Fast-Slow RNN over any two cells, for example FS-RUM-2.

    ```
    FastSlowRNN(128, fast=LSTMCellConfig(hidden_size=700), slow=RUMCellConfig(hidden_size=1000))
    ```

    State: the fast cells' tensors, then the slow cell's: for FS-RUM `(h_fast, c_fast, h_slow)`.
    """

    def __init__(
        self,
        input_size: int,
        *,
        fast: CellConfig,
        slow: CellConfig,
        num_fast_cells: int = 2,
        batch_first: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Builds the layer.

        Args:
            input_size: Features of the input.
            fast: Options of the fast cells; they have separate weights and share one state.
            slow: Options of the slow cell.
            num_fast_cells: The k of FS-RNN-k, >= 2.
            batch_first: Input and output are `(B, T, features)`.
            dropout: Probability of zeroing a unit between fast and slow cells, in [0, 1).
            device: Of the parameters.
            dtype: Of the parameters.
        """
        cell = FastSlowCell(
            input_size,
            fast,
            slow,
            num_fast_cells=num_fast_cells,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        super().__init__([cell], batch_first=batch_first)
