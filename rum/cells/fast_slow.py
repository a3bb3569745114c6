"""Fast-Slow RNN: k fast cells share one state, one slow cell runs once a step between them.

Mujika et al. 2017 (Fast-Slow Recurrent Neural Networks); FS-RUM in Dangovski et al., section 4.4.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rum.cells.base import (
    AcceleratedCell,
    Cell,
    CellConfig,
    Noise,
    StackConfig,
    State,
    bernoulli_mask,
    register_model,
)
from rum.cells.gru import GRUCell
from rum.cells.lstm import LSTMCell, LSTMCellConfig
from rum.cells.rum import RUMCell, RUMCellConfig
from rum.checks import check_at_least, check_probability
from rum.kernels.backends import Request
from rum.kernels.chain import INPUT, NOTHING, PREVIOUS, Link, run


class FastSlowCell(AcceleratedCell):
    """One step of an FS-RNN; D is dropout with a fresh mask per step and position.

    ```
    o1, F = F1(x, F)            F: the one state that all fast cells hand on
    oS, S = S(D(o1), S)
    o2, F = F2(D(oS), F)
    ok, F = Fk(0, F)            k >= 3: a single zero feature; their input weights stay untrained
    output = ok
    ```

    Dropout of the input and before the read-out belong to the model around the cell.

    State: the fast cells' tensors, then the slow cell's.

    Source: Fast-Slow-LSTM/FSRNN.py.
    """

    def __init__(
        self,
        input_size: int,
        fast: CellConfig,
        slow: CellConfig,
        *,
        num_fast_cells: int = 2,
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Builds `num_fast_cells` cells of `fast`, separate weights, and one of `slow`.

        Backends other than "reference" serve LSTM cells, GRU cells with `reset_after` and RUM
        cells with lambda = 0; see `rum.kernels.backends`.
        """
        super().__init__()
        self.set_backend(backend)
        check_at_least("num_fast_cells", num_fast_cells, 2)
        check_probability("dropout", dropout)
        first = fast.build(input_size, device=device, dtype=dtype)
        self.slow = slow.build(first.hidden_size, device=device, dtype=dtype)
        input_sizes = [self.slow.hidden_size] + [1] * (num_fast_cells - 2)
        rest = (fast.build(size, device=device, dtype=dtype) for size in input_sizes)
        self.fast = nn.ModuleList((first, *rest))
        self.input_size = input_size
        self.hidden_size = first.hidden_size
        self.dropout = dropout
        empty_state = first.initial_state(0, device=torch.device("cpu"), dtype=torch.float32)
        self._num_fast_tensors = len(empty_state)

    def _fast(self, index: int) -> Cell:
        cell = self.fast[index]
        assert isinstance(cell, Cell)
        return cell

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """The fast cells' shared initial state, then the slow cell's."""
        fast = self._fast(0).initial_state(batch_size, device=device, dtype=dtype)
        return fast + self.slow.initial_state(batch_size, device=device, dtype=dtype)

    def sample_noise(self, length: int, batch_size: int) -> Noise:
        """Draws the masks of every fast cell, of the slow cell and of the two dropouts."""
        if not self.training:
            return ()
        cells = [self._fast(index) for index in range(len(self.fast))] + [self.slow]
        noise = tuple(cell.sample_noise(length, batch_size) for cell in cells)
        if self.dropout == 0:
            return (*noise, ())
        keep = 1 - self.dropout
        like = next(self.parameters())
        return (
            *noise,
            tuple(
                bernoulli_mask(keep, length, batch_size, size, like=like) / keep
                for size in (self.hidden_size, self.slow.hidden_size)
            ),
        )

    def unroll(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs a sequence on the backend in force; see `Cell.unroll`."""
        state = self.begin(input, state)
        backend = self.choose_backend(state)
        if backend == "reference":
            return super().unroll(input, state)
        noise = self.sample_noise(input.shape[0], input.shape[1])
        count = self._num_fast_tensors
        links = self._links(noise)
        outputs, (fast, slow) = run(backend, input, [state[:count], state[count:]], links)
        return outputs, fast + slow

    def request(self, state: State) -> Request:
        """See `AcceleratedCell`."""
        weight = next(self.parameters())
        return Request(
            size=max(self.hidden_size, self.slow.hidden_size),
            dtype=weight.dtype,
            device=weight.device,
            obstacle=next(filter(None, map(_obstacle, (*self.fast, self.slow))), None),
        )

    def _links(self, noise: Noise) -> list[Link]:
        """The cells in the order of a step; see the class."""
        *cell_noise, dropouts = noise or ((),) * (len(self.fast) + 2)
        to_slow, to_fast = dropouts or (None, None)
        assert not isinstance(to_slow, tuple)
        assert not isinstance(to_fast, tuple)
        first, second, *others = (
            (self._fast(index), _tuple(cell_noise[index])) for index in range(len(self.fast))
        )
        order = [
            (*first, INPUT, 0, None),
            (self.slow, _tuple(cell_noise[-1]), PREVIOUS, 1, to_slow),
            (*second, PREVIOUS, 0, to_fast),
            *((*other, NOTHING, 0, None) for other in others),
        ]
        links = []
        for cell, own, source, slot, dropout in order:
            assert isinstance(cell, LSTMCell | GRUCell | RUMCell)
            links.append(cell.link(source, slot, own, dropout))
        return links

    def project(self, input: Tensor) -> Tensor:
        """The first fast cell's projection of the input."""
        return self._fast(0).project(input)

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One step; see the class."""
        fast_state = state[: self._num_fast_tensors]
        slow_state = state[self._num_fast_tensors :]
        *cell_noise, dropout = noise or ((),) * (len(self.fast) + 2)
        to_slow, to_fast = dropout or (None, None)

        output, fast_state = self._fast(0).step(projected, fast_state, _tuple(cell_noise[0]))
        if isinstance(to_slow, Tensor):
            output = output * to_slow
        output, slow_state = self.slow.step(
            self.slow.project(output), slow_state, _tuple(cell_noise[-1])
        )
        if isinstance(to_fast, Tensor):
            output = output * to_fast
        for index in range(1, len(self.fast)):
            cell = self._fast(index)
            if index > 1:
                output = output.new_zeros(output.shape[0], 1)
            output, fast_state = cell.step(
                cell.project(output), fast_state, _tuple(cell_noise[index])
            )
        return output, fast_state + slow_state


def _obstacle(cell: nn.Module) -> str | None:
    """Why a cell cannot be one of several in a kernel's step; None where it can."""
    served = "serves LSTM, GRU (reset_after=True) and RUM (lambda_=0) cells without observer"
    if isinstance(cell, RUMCell) and cell.lambda_ == 0 and cell.observer is None:
        return None
    if isinstance(cell, LSTMCell) or (isinstance(cell, GRUCell) and cell.reset_after):
        return None
    return f"{served}, got {type(cell).__name__}"


def _tuple(noise: "Tensor | Noise") -> Noise:
    assert isinstance(noise, tuple)
    return noise


@dataclass(kw_only=True)
class FastSlowConfig(StackConfig):
    """A Fast-Slow RNN over any two cells; a subclass with a name makes it a `model=` option."""

    fast: CellConfig
    """The fast cells, all of one size."""
    slow: CellConfig
    """The slow cell."""
    num_fast_cells: int = 2
    """The k of FS-RNN-k, >= 2."""
    dropout: float = 0.35
    """As `StackConfig.dropout`, and also between the fast and the slow cells."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the cell does not accept."""
        super().__post_init__()
        check_at_least("num_fast_cells", self.num_fast_cells, 2)

    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> FastSlowCell:
        """Builds the cell; `dropout` also acts inside it."""
        return FastSlowCell(
            input_size,
            self.fast,
            self.slow,
            num_fast_cells=self.num_fast_cells,
            dropout=self.dropout,
            device=device,
            dtype=dtype,
        )


def _fast_lstm() -> LSTMCellConfig:
    return LSTMCellConfig(hidden_size=700, layer_norm=True, zoneout_h=0.1, zoneout_c=0.5)


def _slow_rum() -> RUMCellConfig:
    return RUMCellConfig(hidden_size=1000, eta=1.0, layer_norm=True, zoneout=0.1)


def _slow_lstm() -> LSTMCellConfig:
    return LSTMCellConfig(hidden_size=400, layer_norm=True, zoneout_h=0.1, zoneout_c=0.5)


@register_model
@dataclass(kw_only=True)
class FSRUMConfig(FastSlowConfig):
    """FS-RUM-k: fast LSTMs, a slow RUM; the defaults are the paper's FS-RUM-2 (Table 5)."""

    name: str = "fs_rum"
    fast: LSTMCellConfig = field(default_factory=_fast_lstm)
    slow: RUMCellConfig = field(default_factory=_slow_rum)


@register_model
@dataclass(kw_only=True)
class FSLSTMConfig(FastSlowConfig):
    """FS-LSTM-k: all LSTMs; the defaults are FS-LSTM-2 of Mujika et al."""

    name: str = "fs_lstm"
    fast: LSTMCellConfig = field(default_factory=_fast_lstm)
    slow: LSTMCellConfig = field(default_factory=_slow_lstm)
