"""What a backend implements: a RUM's recurrence over a piece of a sequence, and a step's rows.

`rum.kernels.sequence` makes one operator of torch of a `Recurrence` (products with the inputs,
gradients of the weights, pieces of time and the memories' checkpoints are its own), and
`rum.kernels.chain` one of several cells' `Rows`.

K replicas of a layer run side by side (K = 1 but for `rum.Replicas`), each with its own weights
and B rows. All tensors are contiguous and of one dtype, float32, or float64 where a backend has
it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RecurrenceOptions:
    """What a RUM's recurrence computes, tensors apart."""

    activation: str
    eta: tuple[float, ...] | None
    """One a replica; None without time normalisation."""
    layer_norm_gate: str | None
    """None (no layer norm), "post_sigmoid" or "pre_sigmoid"."""
    zoneout: tuple[float, ...]
    """One a replica: probability of keeping the previous state; used as an expectation where no
    mask is given."""
    product_dtype: torch.dtype | None = None
    """Of the operands of matrix products where they are not taken in the tensors' own dtype."""


class Recurrence(Protocol):
    """The recurrence of K RUMs, made for one call with `(weight, norms, options)`.

    `weight` is `(K, 2N, N)`, from the hidden state to target and update gate; `norms` is empty, or
    gain and shift `(K, 2N)` of target and update gate, then gain and shift `(K, N)` of embedded
    input plus turned state.
    """

    def piece(self, rows: int) -> int | None:
        """Steps of K B = `rows` rows to go back at a time; None for all of them."""

    def forward(
        self,
        pre: Tensor,
        hidden: Tensor,
        mask: Tensor | None,
        memory: Tensor | None,
        outputs: Tensor,
    ) -> None:
        """Goes forward by S steps.

        Args:
            pre: `(S, K, B, 3N)`, the inputs' share of target, update gate and embedded input, bias
                included. The state's share of target and update gate is added to it, in place.
            hidden: `(K, B, N)`, the state before the first step.
            mask: `(S, K, B, N)`, 1 where zoneout keeps the previous state; None: expectation.
            memory: `(K, B, N, N)` with lambda = 1; advances in place. None with lambda = 0.
            outputs: `(S, K, B, N)`, is filled with the states after each step.
        """

    def backward(
        self,
        pre: Tensor,
        hidden: Tensor,
        mask: Tensor | None,
        memory: Tensor | None,
        skew: Tensor | None,
        outputs: Tensor,
        grad_outputs: Tensor,
        grad_state: Tensor,
        grad_pre: Tensor,
        grad_norms: tuple[Tensor, ...],
    ) -> None:
        """Goes back by S steps.

        Args:
            pre: As `forward` left it.
            hidden: As `forward`, and so `mask`.
            mask: See `hidden`.
            memory: `(K, B, N, N)`, after the last step; goes back in place to before the first.
            skew: `(K, B, N, N)`, its gradient as `rum.kernels.memory` describes; goes back too.
            outputs: As `forward` left them.
            grad_outputs: `(S, K, B, N)`, without what `grad_state` holds.
            grad_state: `(K, B, N)`, gradient of the last state; becomes that of `hidden`.
            grad_pre: `(S, K, B, 3N)`, is filled with the gradient of `pre`: target and update gate
                before layer norm, embedded input.
            grad_norms: As the norms; their gradients are added.
        """


class Rows(Protocol):
    """One step of one kind of cell, all but its matrix products, for the cells of a chain.

    Made for one call with `(norms, options)`: the cell's layer norms and its typed options.
    """

    @property
    def grad_norms(self) -> tuple[Tensor, ...]:
        """As the norms; what `backward` has added up."""

    def forward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
    ) -> None:
        """Takes a step.

        Args:
            pre: `(B, G N)`, complete pre-activations: for a RUM target, update gate and embedded
                input; for an LSTM i, f, g, o; for a GRU reset gate, update gate, the input's share
                of the candidate and the state's.
            states: Each `(B, N)`: `(h,)`, of an LSTM `(h, c)`.
            masks: Of zoneout, one a state, or empty (expectation).
            new_states: As `states`, are filled.
        """

    def backward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
        grads: tuple[Tensor, ...],
        grad_pre: Tensor,
    ) -> None:
        """Goes back by a step.

        Args:
            pre: As `forward` got it, and so `states` and `masks`.
            states: See `pre`.
            masks: See `pre`.
            new_states: As `forward` left them.
            grads: Of `new_states`; become those of `states`, without what passes through `pre`.
            grad_pre: As `pre`, is filled.
        """
