"""Which backend can serve a cell over a sequence."""

from dataclasses import dataclass

import torch

from rum.errors import ConfigError
from rum.kernels import cpu

BACKENDS = ("auto", "reference", "fused", "cpu")
_FASTEST_FIRST = ("cpu", "fused", "reference")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a call asks of a backend."""

    size: int
    """N, of the (largest) hidden state."""
    dtype: torch.dtype
    """Of states: float32 where weights are in half precision."""
    device: torch.device
    obstacle: str | None = None
    """Why none but the reference can serve; None if others can."""


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
    if request.obstacle is not None:
        return request.obstacle
    if request.dtype not in (torch.float32, torch.float64):
        return f"computes in float32 or float64, got weights in {request.dtype}"
    if backend == "cpu":
        return cpu.unserved(request.size, request.dtype, request.device)
    return None
