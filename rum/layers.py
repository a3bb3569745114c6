"""Recurrent layers used like `torch.nn.LSTM`: `output, state = layer(input, state)`."""

from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rum.cells import (
    Cell,
    CellConfig,
    EUNNCell,
    FastSlowCell,
    FastWeightsCell,
    GORUCell,
    GRUCell,
    HighwayRUMCell,
    HMLSTMCell,
    HyperLSTMCell,
    LSTMCell,
    NASCell,
    NTMCell,
    RUMCell,
    RUMCellConfig,
    State,
    WeiNetCell,
)
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

    @overload
    def forward(
        self, input: Tensor, state: State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]: ...

    @overload
    def forward(
        self, input: PackedSequence, state: State | None = None
    ) -> tuple[PackedSequence, State]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Runs the sequences; see the class for shapes.

        Args:
            input: As the class says, or a `PackedSequence`, then the output is one too.
            state: From an earlier call; None for the cells' initial state.
            lengths: `(B,)`, integers in [0, T]: how many steps of each sequence count. Outputs
                beyond are zero, and the state returned is that after a sequence's own last step.

        Raises:
            TypeError: If `input` is neither a tensor nor packed, or `state` not a tuple of
                tensors.
            ValueError: If a shape or a length does not fit.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths must be None with a PackedSequence, which has its own")
            padded, lengths = pad_packed_sequence(input, batch_first=self.batch_first)
            output, new_state = self._run(padded, state, lengths)
            return _packed_like(input, output, lengths, self.batch_first), new_state
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor or packed, got {type(input).__name__}")
        return self._run(input, state, lengths)

    def _run(
        self, input: Tensor, state: State | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        if state is not None and not isinstance(state, tuple):
            raise TypeError(f"state must be a tuple of tensors, got {type(state).__name__}")
        if input.dim() not in (2, 3):
            raise ValueError(f"input must have 2 or 3 dimensions, got shape {tuple(input.shape)}")
        batched = input.dim() == 3
        if lengths is not None and not batched:
            raise ValueError("lengths belong to a batch, got an input without one")
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

        if lengths is not None:
            _check_lengths(lengths, input)
        output = input
        states = []
        for index, cell in enumerate(self.cells):
            assert isinstance(cell, Cell)
            if index:
                output = nn.functional.dropout(output, self.dropout, self.training)
            before = None if state is None else tuple(tensor[index] for tensor in state)
            if lengths is None or not lengths.numel():
                output, after = cell.unroll(output, before)
            else:
                output, after = _unroll_ragged(cell, output, before, lengths.tolist())
            states.append(after)
        new_state = tuple(torch.stack(tensors) for tensors in zip(*states, strict=True))

        if not batched:
            return output.squeeze(1), tuple(tensor.squeeze(1) for tensor in new_state)
        return (output.transpose(0, 1) if self.batch_first else output), new_state


def _packed_like(
    packed: PackedSequence, padded: Tensor, lengths: Tensor, batch_first: bool
) -> PackedSequence:
    """Packs outputs in the order of rows that `packed` has."""
    order = packed.sorted_indices
    if order is not None:
        padded = padded.index_select(0 if batch_first else 1, order)
        lengths = lengths[order.cpu()]
    data, batch_sizes, _, _ = pack_padded_sequence(padded, lengths, batch_first=batch_first)
    return PackedSequence(data, batch_sizes, order, packed.unsorted_indices)


def _check_lengths(lengths: Tensor, input: Tensor) -> None:
    steps, batch_size, _ = input.shape
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor, got {type(lengths).__name__}")
    whole = not (lengths.is_floating_point() or lengths.dtype == torch.bool)
    fits = lengths.shape == (batch_size,) and whole
    if not fits or (lengths.numel() and not (0 <= lengths.min() and lengths.max() <= steps)):
        raise ValueError(
            f"lengths must be {batch_size} integers in [0, {steps}], got {lengths.tolist()}"
        )


def _unroll_ragged(
    cell: Cell, input: Tensor, state: State | None, lengths: list[int]
) -> tuple[Tensor, State]:
    """Runs sequences of different lengths with any cell: the batch shrinks where one ends.

    Longest first, so that those still running are the first rows; between two lengths the cell
    unrolls as usual, so every backend serves, and no step is spent on padding.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    rows = torch.tensor(order, device=input.device)
    running = state
    if running is None:
        running = cell.begin(input, None)
    running = tuple(tensor[rows] for tensor in running)
    input = input[:, rows]
    pieces = []
    ended: list[State] = []  # of the rows that ended, shortest last in `order`, so prepended
    begin = 0
    count = len(order)
    for end in sorted(set(lengths)):
        if end > begin:
            output, running = cell.unroll(input[begin:end, :count], running)
            missing = len(order) - count
            pieces.append(nn.functional.pad(output, (0, 0, 0, missing)))
            begin = end
        left = sum(length > end for length in lengths)
        ended.insert(0, tuple(tensor[left:] for tensor in running))
        running = tuple(tensor[:left] for tensor in running)
        count = left
    pieces.append(input.new_zeros(len(input) - begin, len(order), cell.hidden_size))
    back = torch.argsort(rows)
    final = tuple(torch.cat(tensors)[back] for tensors in zip(*ended, strict=True))
    return torch.cat(pieces)[:, back], final


class _Stack(RecurrentLayer):
    """A layer of equal cells, `cell_type`, on top of each other."""

    cell_type: ClassVar[Callable[..., Cell]]

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
            **cell: Options of the cell, and `device` and `dtype` of the parameters; a list has
                one value for each layer.

        Raises:
            ValueError: If a list is not as long as there are layers.
        """
        check_at_least("input_size", input_size, 1)
        check_at_least("num_layers", num_layers, 1)
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        for name, value in cell.items():
            if isinstance(value, list) and len(value) != num_layers:
                raise ValueError(
                    f"{name} must have a value for each of {num_layers} layers, got {value}"
                )
        cells = [
            type(self).cell_type(
                size,
                hidden_size,
                **{
                    name: value[layer] if isinstance(value, list) else value
                    for name, value in cell.items()
                },
            )
            for layer, size in enumerate(sizes)
        ]
        super().__init__(cells, batch_first=batch_first, dropout=dropout)


class RUM(_Stack):
    """A multi-layer Rotational Unit of Memory; see `rum.cells.RUMCell` for equations and options.

    State: `(h,)` with h `(num_layers, B, hidden_size)`; unless `lambda_` is 0 `(h, R)` with R
    `(num_layers, B, hidden_size, hidden_size)`, orthogonal: it begins as the identity, and zeros
    would stay zeros. So either all layers have `lambda_` 0 or none has.
    """

    cell_type = RUMCell

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
        """As every stack.

        Raises:
            ValueError: If `lambda_` is 0 in some layers and not in others, or a list is not as
                long as there are layers.
        """
        super().__init__(
            input_size, hidden_size, num_layers, batch_first=batch_first, dropout=dropout, **cell
        )
        powers = [each.lambda_ for each in self.cells if isinstance(each, RUMCell)]
        if 0 in powers and any(powers):
            raise ValueError(
                "lambda_ must be 0 in all layers or in none, since their states have the same "
                f"parts, got {powers}"
            )


class LSTM(_Stack):
    """A multi-layer LSTM with optional layer norm and zoneout; options of `rum.cells.LSTMCell`.

    State: `(h, c)`, both `(num_layers, B, hidden_size)`, as `torch.nn.LSTM`.
    """

    cell_type = LSTMCell


class GRU(_Stack):
    """A multi-layer GRU; options of `rum.cells.GRUCell`. State: `(h,)`."""

    cell_type = GRUCell


class GORU(_Stack):
    """A multi-layer gated orthogonal unit; options of `rum.cells.GORUCell`. State: `(h,)`."""

    cell_type = GORUCell


class EUNN(_Stack):
    """A multi-layer real EUNN; options of `rum.cells.EUNNCell`. State: `(h,)`."""

    cell_type = EUNNCell


class FastWeights(_Stack):
    """Multi-layer fast weights with layer norm; options of `rum.cells.FastWeightsCell`.

    State: `(h, A)` with A `(num_layers, B, hidden_size, hidden_size)`.
    """

    cell_type = FastWeightsCell


class WeiNet(_Stack):
    """The *reconstructed* auto-associative network; options of `rum.cells.WeiNetCell`.

    State: `(h, A)` with A `(num_layers, B, num_memories, hidden_size, hidden_size)`.
    """

    cell_type = WeiNetCell


class NAS(_Stack):
    """A multi-layer NASCell; options of `rum.cells.NASCell`. State: `(h, c)`."""

    cell_type = NASCell


class HyperLSTM(_Stack):
    """A multi-layer HyperLSTM; options of `rum.cells.HyperLSTMCell`.

    State: `(h, c, h of the hyper cell, c of the hyper cell)`.
    """

    cell_type = HyperLSTMCell


class HMLSTM(_Stack):
    """A multi-layer hierarchical multiscale LSTM; options and state of `rum.cells.HMLSTMCell`."""

    cell_type = HMLSTMCell


class NTM(_Stack):
    """A multi-layer Neural Turing Machine; options and state of `rum.cells.NTMCell`."""

    cell_type = NTMCell


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
        backend: str = "auto",
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
            backend: As `rum.cells.FastSlowCell`.
            device: Of the parameters.
            dtype: Of the parameters.
        """
        cell = FastSlowCell(
            input_size,
            fast,
            slow,
            num_fast_cells=num_fast_cells,
            dropout=dropout,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        super().__init__([cell], batch_first=batch_first)


class HighwayRUM(RecurrentLayer):
    """A Recurrent Highway RUM; see `rum.cells.HighwayRUMCell`. State: a RUM's."""

    def __init__(
        self,
        input_size: int,
        rum: RUMCellConfig,
        *,
        depth: int = 2,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Builds the layer.

        Args:
            input_size: Features of the input.
            rum: Options of the micro-steps.
            depth: Micro-steps in a time step, >= 1.
            batch_first: Input and output are `(B, T, features)`.
            device: Of the parameters.
            dtype: Of the parameters.
        """
        cell = HighwayRUMCell(input_size, rum, depth=depth, device=device, dtype=dtype)
        super().__init__([cell], batch_first=batch_first)
