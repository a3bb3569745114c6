"""Which backend can serve a RUM over a sequence."""

from dataclasses import dataclass

import torch

from rum.errors import ConfigError
from rum.kernels import cpu

BACKENDS = ("auto", "reference", "fused", "cpu")
_FASTEST_FIRST = ("cpu", "fused", "reference")
_HALF = (torch.float16, torch.bfloat16)


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
    dtype = state_dtype(request.dtype)
    if dtype not in (torch.float32, torch.float64):
        return f"computes in float32 or float64, got weights in {request.dtype}"
    if backend == "cpu":
        return cpu.unserved(request.size, dtype, request.device)
    return None


def state_dtype(weights: torch.dtype) -> torch.dtype:
    """Of states, norms and memories: float32 with weights in half precision, else the weights'."""
    return torch.float32 if weights in _HALF else weights
