"""When the Triton kernels can serve; needs no Triton itself."""

import importlib.util
import os

import torch

LARGEST_SIZE = 8192
LARGEST_SIZE_WITH_MEMORY = 128  # the memory of a sample stays in one processor's registers


def unserved(size: int, has_memory: bool, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why `rum.kernels.triton_rum` cannot serve a request; None where it can.

    Args:
        size: N, of the hidden state.
        has_memory: Whether lambda = 1.
        dtype: Of the weights.
        device: Of the weights.
    """
    if device.type != "cuda" and not _is_interpreted():
        return f"runs on a CUDA device, or anywhere with TRITON_INTERPRET=1, got {device}"
    if not _is_installed():
        return "needs the package triton"
    if dtype != torch.float32:
        return f"computes in float32 with products in half precision, got {dtype}"
    if size > LARGEST_SIZE:
        return f"takes hidden sizes up to {LARGEST_SIZE}, got {size}"
    if has_memory and size > LARGEST_SIZE_WITH_MEMORY:
        return f"with lambda = 1 takes hidden sizes up to {LARGEST_SIZE_WITH_MEMORY}, got {size}"
    return None


def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


# torch.compile takes results for constants, for it cannot trace calls of the system. What
# torch.compiler.assume_constant_result sets; that would import the compiler and Triton, seconds.
for _function in (_is_installed, _is_interpreted):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]
