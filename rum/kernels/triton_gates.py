"""One step of an LSTM and of a GRU in Triton, all but its products: a program per row, float32.

See `rum.cells.LSTMCell` and `rum.cells.GRUCell` for the equations. Backward recomputes the step
from its pre-activations.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from rum.kernels.triton_kernels import (
    add_to,
    block_of,
    launched_on,
    sigmoid,
    standardize,
    standardize_backward,
    tanh,
    warps_of,
)


@triton.jit
def _gate(pre, gain, shift, index, columns, valid, size):
    """Gate `index` of a row after layer norm, and its standard form."""
    x = tl.load(pre + index * size + columns, mask=valid, other=0.0)
    normal = (x, x)
    if gain is not None:
        normal = standardize(x, valid, size)
        of_gate = index * size + columns
        x = normal[0] * tl.load(gain + of_gate, mask=valid, other=0.0)
        x += tl.load(shift + of_gate, mask=valid, other=0.0)
    return x, normal


@triton.jit
def _gate_backward(grad, normal, gain, grad_pre, grad_norms, index, columns, valid, size):
    """Stores the gradient of gate `index` from that after layer norm; adds to gain and shift."""
    of_gate = index * size + columns
    if gain is not None:
        add_to(grad_norms + of_gate, grad * normal[0], valid)
        add_to(grad_norms + 4 * size + of_gate, grad, valid)
        grad *= tl.load(gain + of_gate, mask=valid, other=0.0)
        grad = standardize_backward(grad, normal[0], normal[1], valid, size)
    tl.store(grad_pre + of_gate, grad, mask=valid)


@triton.jit
def _lstm_forward(
    pre,
    hidden,
    cell,
    mask_h,
    mask_c,
    gate_gain,
    gate_shift,
    cell_gain,
    cell_shift,
    new_hidden,
    new_cell,
    size,
    forget_bias,
    zoneout_h,
    zoneout_c,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)[None, :]
    valid = columns < size
    of_row = row * size + columns
    pre += row * 4 * size
    i, _ = _gate(pre, gate_gain, gate_shift, 0, columns, valid, size)
    f, _ = _gate(pre, gate_gain, gate_shift, 1, columns, valid, size)
    g, _ = _gate(pre, gate_gain, gate_shift, 2, columns, valid, size)
    o, _ = _gate(pre, gate_gain, gate_shift, 3, columns, valid, size)
    c = tl.load(cell + of_row, mask=valid, other=0.0)
    h = tl.load(hidden + of_row, mask=valid, other=0.0)
    c_new = tl.where(valid, sigmoid(f + forget_bias) * c + sigmoid(i) * tanh(g), 0.0)
    total = c_new
    if cell_gain is not None:
        total, _ = standardize(c_new, valid, size)
        total *= tl.load(cell_gain + columns, mask=valid, other=0.0)
        total += tl.load(cell_shift + columns, mask=valid, other=0.0)
    h_new = sigmoid(o) * tanh(total)
    keep_h, keep_c = zoneout_h, zoneout_c
    if mask_h is not None:
        keep_h = tl.load(mask_h + of_row, mask=valid, other=0.0)
        keep_c = tl.load(mask_c + of_row, mask=valid, other=0.0)
    tl.store(new_hidden + of_row, keep_h * h + (1.0 - keep_h) * h_new, mask=valid)
    tl.store(new_cell + of_row, keep_c * c + (1.0 - keep_c) * c_new, mask=valid)


@triton.jit
def _lstm_backward(
    pre,
    cell,
    mask_h,
    mask_c,
    gate_gain,
    gate_shift,
    cell_gain,
    cell_shift,
    grad_hidden,
    grad_cell,
    grad_pre,
    grad_norms,
    size,
    forget_bias,
    zoneout_h,
    zoneout_c,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)[None, :]
    valid = columns < size
    of_row = row * size + columns
    pre += row * 4 * size
    grad_pre += row * 4 * size
    if cell_gain is not None:
        grad_norms += row * 10 * size
    i, of_i = _gate(pre, gate_gain, gate_shift, 0, columns, valid, size)
    f, of_f = _gate(pre, gate_gain, gate_shift, 1, columns, valid, size)
    g, of_g = _gate(pre, gate_gain, gate_shift, 2, columns, valid, size)
    o, of_o = _gate(pre, gate_gain, gate_shift, 3, columns, valid, size)
    i, f, g, o = sigmoid(i), sigmoid(f + forget_bias), tanh(g), sigmoid(o)
    c = tl.load(cell + of_row, mask=valid, other=0.0)
    c_new = tl.where(valid, f * c + i * g, 0.0)
    total = c_new
    if cell_gain is not None:
        standard, inverse_std = standardize(c_new, valid, size)
        gain = tl.load(cell_gain + columns, mask=valid, other=0.0)
        total = standard * gain + tl.load(cell_shift + columns, mask=valid, other=0.0)
    squashed = tanh(total)
    keep_h, keep_c = zoneout_h, zoneout_c
    if mask_h is not None:
        keep_h = tl.load(mask_h + of_row, mask=valid, other=0.0)
        keep_c = tl.load(mask_c + of_row, mask=valid, other=0.0)

    grad_h = tl.load(grad_hidden + of_row, mask=valid, other=0.0)
    grad_c = tl.load(grad_cell + of_row, mask=valid, other=0.0)
    tl.store(grad_hidden + of_row, grad_h * keep_h, mask=valid)
    kept_c = grad_c * keep_c
    grad_h *= 1.0 - keep_h
    grad_o = grad_h * squashed * o * (1.0 - o)
    grad_total = grad_h * o * (1.0 - squashed * squashed)
    if cell_gain is not None:
        add_to(grad_norms + 8 * size + columns, grad_total * standard, valid)
        add_to(grad_norms + 9 * size + columns, grad_total, valid)
        grad_total = standardize_backward(grad_total * gain, standard, inverse_std, valid, size)
    grad_c = grad_c - kept_c + grad_total
    tl.store(grad_cell + of_row, kept_c + grad_c * f, mask=valid)
    grad_i = grad_c * g * i * (1.0 - i)
    grad_f = grad_c * c * f * (1.0 - f)
    grad_g = grad_c * i * (1.0 - g * g)
    _gate_backward(grad_i, of_i, gate_gain, grad_pre, grad_norms, 0, columns, valid, size)
    _gate_backward(grad_f, of_f, gate_gain, grad_pre, grad_norms, 1, columns, valid, size)
    _gate_backward(grad_g, of_g, gate_gain, grad_pre, grad_norms, 2, columns, valid, size)
    _gate_backward(grad_o, of_o, gate_gain, grad_pre, grad_norms, 3, columns, valid, size)


@triton.jit
def _gru_gates(pre, size, columns, valid):
    """Reset gate, update gate, candidate, and the state's share of the latter."""
    reset = sigmoid(tl.load(pre + columns, mask=valid, other=0.0))
    update = sigmoid(tl.load(pre + size + columns, mask=valid, other=0.0))
    from_input = tl.load(pre + 2 * size + columns, mask=valid, other=0.0)
    from_state = tl.load(pre + 3 * size + columns, mask=valid, other=0.0)
    return reset, update, tanh(from_input + reset * from_state), from_state


@triton.jit
def _gru_forward(pre, hidden, new_hidden, size, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    valid = columns < size
    _, update, candidate, _ = _gru_gates(pre + row * 4 * size, size, columns, valid)
    h = tl.load(hidden + row * size + columns, mask=valid, other=0.0)
    new = update * h + (1.0 - update) * candidate
    tl.store(new_hidden + row * size + columns, new, mask=valid)


@triton.jit
def _gru_backward(pre, hidden, grad_hidden, grad_pre, size, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    valid = columns < size
    reset, update, candidate, from_state = _gru_gates(pre + row * 4 * size, size, columns, valid)
    h = tl.load(hidden + row * size + columns, mask=valid, other=0.0)
    grad_hidden += row * size + columns
    grad = tl.load(grad_hidden, mask=valid, other=0.0)
    tl.store(grad_hidden, grad * update, mask=valid)
    grad_update = grad * (h - candidate) * update * (1.0 - update)
    grad_candidate = grad * (1.0 - update) * (1.0 - candidate * candidate)
    grad_reset = grad_candidate * from_state * reset * (1.0 - reset)
    grad_pre += row * 4 * size + columns
    tl.store(grad_pre, grad_reset, mask=valid)
    tl.store(grad_pre + size, grad_update, mask=valid)
    tl.store(grad_pre + 2 * size, grad_candidate, mask=valid)
    tl.store(grad_pre + 3 * size, grad_candidate * reset, mask=valid)


class LSTMOptions(Protocol):
    """Options of a `rum.cells.LSTMCell`."""

    forget_bias: float
    zoneout_h: float
    zoneout_c: float


class LSTMRows:
    """A `rum.kernels.recurrence.Rows`, see there: one step of an LSTM."""

    def __init__(self, norms: tuple[Tensor, ...], options: LSTMOptions) -> None:
        """As `Rows`.

        Args:
            norms: Empty, or gain and shift `(4N,)` of the gates, then gain and shift `(N,)` of
                the cell state.
            options: See the cell.
        """
        self._norms = norms
        numbers = options.forget_bias, options.zoneout_h, options.zoneout_c
        self._numbers = tuple(float(number) for number in numbers)
        self._of_norms: Tensor | None = None  # by row, summed when asked for

    @property
    def grad_norms(self) -> tuple[Tensor, ...]:
        """As the norms."""
        if self._of_norms is None:
            return tuple(torch.zeros_like(norm) for norm in self._norms)
        return tuple(self._of_norms.sum(0).split([len(norm) for norm in self._norms]))

    def forward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
    ) -> None:
        """See `Rows`."""
        rows, size = new_states[0].shape
        if rows == 0:
            return
        block = block_of(size)
        with torch.cuda.device_of(pre):
            _lstm_forward[(rows,)](
                pre,
                *states,
                *(masks or (None, None)),
                *(self._norms or (None,) * 4),
                *new_states,
                size,
                *self._numbers,
                BLOCK_N=block,
                **launched_on(warps_of(block)),
            )

    def backward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
        grads: tuple[Tensor, ...],
        grad_pre: Tensor,
    ) -> None:
        """See `Rows`."""
        rows, size = new_states[0].shape
        if rows == 0:
            return
        if self._norms and self._of_norms is None:
            self._of_norms = pre.new_zeros(rows, 10 * size)
        block = block_of(size)
        with torch.cuda.device_of(pre):
            _lstm_backward[(rows,)](
                pre,
                states[1],
                *(masks or (None, None)),
                *(self._norms or (None,) * 4),
                *grads,
                grad_pre,
                self._of_norms,
                size,
                *self._numbers,
                BLOCK_N=block,
                **launched_on(warps_of(block)),
            )


class GRURows:
    """A `rum.kernels.recurrence.Rows`, see there: one step of a GRU with reset after the product.

    It has neither layer norms nor options.
    """

    def __init__(self, norms: tuple[Tensor, ...] = (), options: object = None) -> None:
        """As `Rows`."""
        self.grad_norms: tuple[Tensor, ...] = ()

    def forward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
    ) -> None:
        """See `Rows`."""
        rows, size = new_states[0].shape
        if rows == 0:
            return
        block = block_of(size)
        with torch.cuda.device_of(pre):
            _gru_forward[(rows,)](
                pre, states[0], new_states[0], size, BLOCK_N=block, **launched_on(warps_of(block))
            )

    def backward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
        grads: tuple[Tensor, ...],
        grad_pre: Tensor,
    ) -> None:
        """See `Rows`."""
        rows, size = new_states[0].shape
        if rows == 0:
            return
        block = block_of(size)
        with torch.cuda.device_of(pre):
            _gru_backward[(rows,)](
                pre,
                states[0],
                grads[0],
                grad_pre,
                size,
                BLOCK_N=block,
                **launched_on(warps_of(block)),
            )
