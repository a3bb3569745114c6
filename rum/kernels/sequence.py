"""A whole sequence of a RUM: which backend can serve a call, and the call."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rum.errors import ConfigError
from rum.kernels import cpu
from rum.kernels.fused import rum_recurrence
from rum.kernels.memory import memory_recurrence
from rum.kernels.step import RecurrenceOptions, Weights

BACKENDS = ("auto", "reference", "fused", "cpu")
_FASTEST_FIRST = ("cpu", "fused", "reference")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a call asks of a backend."""

    size: int
    """N, of the hidden state."""
    has_fixed_power: bool
    """Whether lambda is 0 or 1 and not learned."""
    wants_memory_gradient: bool
    """Whether an initial associative memory needs a gradient."""
    dtype: torch.dtype
    """Of the weights."""
    device: torch.device


def choose(asked: str, request: Request) -> str:
    """Names the backend for a call: for "auto" the fastest that can serve it.

    Raises:
        ConfigError: If the one that is asked for cannot.
    """
    if asked == "auto":
        return next(name for name in _FASTEST_FIRST if _unserved(name, request) is None)
    reason = _unserved(asked, request)
    if reason is not None:
        serving = [name for name in ("fused", "reference") if _unserved(name, request) is None]
        raise ConfigError(f"backend {asked!r} {reason}: use {serving[0]!r}")
    return asked


def _unserved(backend: str, request: Request) -> str | None:
    """Why a backend cannot serve a call; None where it can."""
    if backend == "reference":
        return None
    if not request.has_fixed_power:
        return "serves a fixed lambda_ of 0 or 1"
    if request.wants_memory_gradient:
        return "gives no gradient to an initial associative memory"
    if request.dtype not in (torch.float32, torch.float64):
        # the reference does norms and rotation of half precision in float32
        return f"computes in float32 or float64, got weights in {request.dtype}"
    if backend == "cpu":
        return cpu.unserved(request.size, request.dtype, request.device)
    return None


def run(
    backend: str,
    input: Tensor,
    hidden: Tensor,
    memory: Tensor | None,
    weights: Weights,
    norms: tuple[Tensor, ...],
    mask: Tensor | None,
    options: RecurrenceOptions,
) -> tuple[Tensor, Tensor | None]:
    """Runs a sequence on "fused" or "cpu"; see `rum.kernels.cpu.rum_sequence`."""
    weight_ih, bias, embedding_bias, weight_hh = weights
    dtype, size = weight_hh.dtype, hidden.shape[1]
    hidden = hidden.to(dtype)
    memory = None if memory is None else memory.to(dtype)
    if backend == "cpu":
        return cpu.rum_sequence(input.to(dtype), hidden, memory, weights, norms, mask, options)
    # Two products, so that no kernel need copy its part out of a joint result.
    gates = F.linear(input, weight_ih[: 2 * size], bias).to(dtype)
    embedded = F.linear(input, weight_ih[2 * size :], embedding_bias).to(dtype)
    with torch.autocast(input.device.type, enabled=False):
        if memory is None:
            outputs = rum_recurrence(gates, embedded, hidden, weight_hh, norms, mask, options)
            return outputs, None
        return memory_recurrence(gates, embedded, hidden, memory, weight_hh, norms, mask, options)
