"""One step of an LSTM and of a GRU, all but its products, and its gradient by hand.

`rum.cells.LSTMCell` and `rum.cells.GRUCell` have the equations. Backward computes the step again
from its pre-activations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rum.kernels.step import Normal, norm_backward, normal


@dataclass(frozen=True, kw_only=True)
class LSTMOptions:
    """What an LSTM's step computes, tensors apart."""

    forget_bias: float
    zoneout_h: float
    """Probability of keeping the previous hidden state; an expectation where no mask is given."""
    zoneout_c: float
    """The same of the cell state."""


@dataclass
class _LSTMStep:
    """The intermediate values of one step that backward needs, [B, N] unless said."""

    i: Tensor
    f: Tensor
    g: Tensor
    o: Tensor
    gates_normal: Normal | None  # [B, 4, N]
    cell: Tensor  # before zoneout
    cell_normal: Normal | None
    squashed: Tensor  # the cell state inside of the output
    hidden: Tensor  # before zoneout


class LSTMRows:
    """`rum.kernels.recurrence.Rows` of an LSTM in plain PyTorch.

    `norms` is empty, or gain and shift `(4N,)` of the gates, then gain and shift `(N,)` of the
    cell state inside of the output. States and masks: h, then c.
    """

    def __init__(self, norms: tuple[Tensor, ...], options: LSTMOptions) -> None:
        """See `Rows`."""
        self.grad_norms = tuple(torch.zeros_like(norm) for norm in norms)
        self._norms = norms
        self._options = options

    def forward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
    ) -> None:
        """See `Rows`."""
        step = self._step(pre, states[1])
        keep_h, keep_c = self._keep(masks)
        torch.lerp(step.hidden, states[0], keep_h, out=new_states[0])
        torch.lerp(step.cell, states[1], keep_c, out=new_states[1])

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
        step = self._step(pre, states[1])
        keep_h, keep_c = self._keep(masks)
        grad_hidden, grad_cell = (grads[0] * (1 - keep_h), grads[1] * (1 - keep_c))
        grads[0].mul_(keep_h)
        grad_o = grad_hidden * step.squashed
        grad = grad_hidden * step.o * (1 - step.squashed * step.squashed)
        if step.cell_normal is not None:
            grad = norm_backward(step.cell_normal, grad, self._norms[2], self.grad_norms[2:])
        grad_cell = grad_cell + grad
        grads[1].mul_(keep_c).addcmul_(grad_cell, step.f)
        grad_gates = torch.stack(
            (
                grad_cell * step.g * step.i * (1 - step.i),
                grad_cell * states[1] * step.f * (1 - step.f),
                grad_cell * step.i * (1 - step.g * step.g),
                grad_o * step.o * (1 - step.o),
            ),
            -2,
        )
        if step.gates_normal is not None:
            shape = grad_gates.shape[-2:]
            grad_gates = norm_backward(
                step.gates_normal,
                grad_gates,
                self._norms[0].view(shape),
                tuple(norm.view(shape) for norm in self.grad_norms[:2]),
            )
        grad_pre.copy_(grad_gates.flatten(-2))

    def _step(self, pre: Tensor, cell: Tensor) -> _LSTMStep:
        gates = pre.view(len(pre), 4, cell.shape[-1])
        gates_normal = cell_normal = None
        if self._norms:
            gates_normal = normal(gates)
            gain, shift = (norm.view(gates.shape[-2:]) for norm in self._norms[:2])
            gates = torch.addcmul(shift, gates_normal.standard, gain)
        i, f, g, o = gates.unbind(-2)
        i, o, g = torch.sigmoid(i), torch.sigmoid(o), torch.tanh(g)
        f = torch.sigmoid(f + self._options.forget_bias)
        inside = new_cell = torch.addcmul(f * cell, i, g)
        if self._norms:
            cell_normal = normal(new_cell)
            inside = torch.addcmul(self._norms[3], cell_normal.standard, self._norms[2])
        squashed = torch.tanh(inside)
        return _LSTMStep(i, f, g, o, gates_normal, new_cell, cell_normal, squashed, o * squashed)

    def _keep(self, masks: tuple[Tensor, ...]) -> tuple[Tensor | float, Tensor | float]:
        if masks:
            return masks[0], masks[1]
        return self._options.zoneout_h, self._options.zoneout_c


class GRURows:
    """`rum.kernels.recurrence.Rows` of a GRU with the reset gate after the product."""

    def __init__(self) -> None:
        """See `Rows`; a GRU has neither layer norms nor options."""
        self.grad_norms: tuple[Tensor, ...] = ()

    def forward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
    ) -> None:
        """See `Rows`."""
        _, update, candidate, _ = self._step(pre, states[0])
        torch.lerp(candidate, states[0], update, out=new_states[0])

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
        reset, update, candidate, of_state = self._step(pre, states[0])
        grad = grads[0]
        grad_update = grad * (states[0] - candidate) * update * (1 - update)
        grad_candidate = grad * (1 - update) * (1 - candidate * candidate)
        grad_reset = grad_candidate * of_state * reset * (1 - reset)
        parts = (grad_reset, grad_update, grad_candidate, grad_candidate * reset)
        torch.cat(parts, -1, out=grad_pre)
        grad.mul_(update)

    @staticmethod
    def _step(pre: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reset gate, update gate, candidate, and the state's share of the candidate."""
        reset, update, of_input, of_state = pre.chunk(4, -1)
        reset, update = torch.sigmoid(reset), torch.sigmoid(update)
        return reset, update, torch.tanh(torch.addcmul(of_input, reset, of_state)), of_state
