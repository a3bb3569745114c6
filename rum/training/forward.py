"""How the forward passes of models are computed: each by itself, or several as one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """A forward pass that is to be computed."""

    model: nn.Module
    """Called as `logits, state = model(symbols, state)`."""
    input: Tensor
    """`(T, B)`, symbols, on the model's device."""
    state: State | None
    """Of an earlier call; None begins afresh."""
    generator: torch.Generator | None = None
    """What masks are drawn from; None: torch's default generator."""


Forward = Callable[[Sequence[Call]], list[tuple[Tensor, State]]]
"""Computes logits and new state of each call."""


def apart(calls: Sequence[Call]) -> list[tuple[Tensor, State]]:
    """Each by itself, with torch's default generator."""
    return [call.model(call.input, call.state) for call in calls]
