"""Which backend can serve a cell over a sequence."""

from dataclasses import dataclass

import torch

from rum.errors import ConfigError
from rum.kernels import cpu, gpu

BACKENDS = ("auto", "reference", "fused", "cpu", "triton")
_FASTEST_FIRST = ("triton", "cpu", "fused", "reference")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a call asks of a backend."""

    size: int
    """N, of the (largest) hidden state."""
    dtype: torch.dtype
    """Of states: float32 where weights are in half precision."""
    device: torch.device
    has_memory: bool = False
    """Whether there is an associative memory (lambda = 1)."""
    obstacle: str | None = None
    """Why none but the reference can serve; None if others can."""


def choose(asked: str, request: Request) -> str:
    """Names the backend for a call: for "auto" the fastest that can serve it.

    Raises:
        ConfigError: If the one that is asked for cannot.
    """
    if asked == "auto":
        # Triton's interpreter, for tests on the CPU, is only for who asks for it by name.
        candidates = _FASTEST_FIRST if request.device.type == "cuda" else _FASTEST_FIRST[1:]
        return next(name for name in candidates if _unserved(name, request) is None)
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
    if backend == "triton":
        return gpu.unserved(request.size, request.has_memory, request.dtype, request.device)
    return None
