"""The RUM recurrence on the CPU with lambda = 0 or 1: compiled, input products included.

The C library (rum_cpu.c) is built when the package is installed, if there is a compiler; it needs
neither Python's nor torch's headers, so one build serves every version of both. Where it is
missing, `rum.kernels.fused` serves.
"""

import ctypes
import sysconfig
import warnings
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rum.kernels.memory import CHECKPOINT_INTERVAL
from rum.kernels.recurrence import RecurrenceOptions
from rum.kernels.step import ACTIVATIONS

LARGEST_SIZE = 16384
_INTERFACE = 2  # INTERFACE in rum_cpu.c
_ROW_BUFFERS = 14  # rows of scratch for each thread, as in rum_cpu.c
_PANEL_WIDTH = 16  # WIDTH there
_ONEDNN_LINEAR = "_linear_pointwise"  # what TorchInductor calls; not in every build of torch
_PIECE = 2**20  # numbers in the gradients of a piece of time
_SMALLEST_PRODUCT = 2**21  # multiplications from which oneDNN is faster
_GATE_NORMS = {None: 0, "post_sigmoid": 1, "pre_sigmoid": 2}


class _Options(ctypes.Structure):
    """`Options` of rum_cpu.c."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("activation", ctypes.c_int32),
        ("gate_norm", ctypes.c_int32),
        ("has_eta", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("eta", ctypes.c_float),
        ("zoneout", ctypes.c_float),
        ("gate_gain", ctypes.c_void_p),
        ("gate_shift", ctypes.c_void_p),
        ("total_gain", ctypes.c_void_p),
        ("total_shift", ctypes.c_void_p),
    )


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library, None where it was not built, or (with a warning) does not fit."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = Path(__file__).with_name(f"_rum_cpu{suffix}")
    if not path.is_file():
        return None
    reason = ""
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        reason = f"cannot be loaded ({error})"
    else:
        if not hasattr(loaded, "rum_interface") or loaded.rum_interface() != _INTERFACE:
            reason = "was built from another version of rum_cpu.c"
    if reason:
        warnings.warn(
            f"{path} {reason}: the slower backend 'fused' serves until the package is installed "
            "again (pip install -e .)",
            stacklevel=2,
        )
        return None
    for name, pointers in (("rum_forward", 8), ("rum_backward", 14)):
        function = getattr(loaded, name)
        function.restype = None
        function.argtypes = [
            ctypes.POINTER(_Options),
            ctypes.c_int64,
            *[ctypes.c_void_p] * pointers,
        ]
    return loaded


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # it calls the system
def is_built() -> bool:
    """Whether there is a library."""
    return library() is not None


def unserved(size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this backend cannot serve a request; None where it can."""
    if device.type != "cpu":
        return f"runs on the CPU, got {device}"
    if dtype != torch.float32:
        return f"computes in float32, got {dtype}"
    if size > LARGEST_SIZE:
        return f"takes hidden sizes up to {LARGEST_SIZE}, got {size}"
    if not is_built():
        return (
            "is not there: the package was installed without a C compiler, or it cannot be loaded"
        )
    return None


def _interval(matrix: Tensor | None, otherwise: int) -> int:
    """Steps in a piece of time: with memories, those between two checkpoints."""
    return otherwise if matrix is None else CHECKPOINT_INTERVAL


def _pieces(steps: int, interval: int) -> list[tuple[int, int]]:
    """First and last step of every piece of time."""
    return [(first, min(first + interval, steps)) for first in range(0, steps, max(1, interval))]


def _panels(weight: Tensor) -> Tensor:
    """Packs a weight (K, M) for products state weight': (K / 16, M, 16), filled up with zeros."""
    rows, columns = weight.shape
    count = -(-rows // _PANEL_WIDTH)
    padded = F.pad(weight, (0, 0, 0, count * _PANEL_WIDTH - rows))
    return padded.view(count, _PANEL_WIDTH, columns).transpose(1, 2).contiguous()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns input weight' + bias.

    From some size on by oneDNN, which chooses its code by what the processor can do; the library
    behind `torch.mm` (MKL) also asks who made it, and takes twice the time on AMD's.
    """
    is_large = input.numel() * len(weight) >= _SMALLEST_PRODUCT
    if is_large and torch.backends.mkldnn.enabled and hasattr(torch.ops.mkldnn, _ONEDNN_LINEAR):
        onednn = getattr(torch.ops.mkldnn, _ONEDNN_LINEAR)
        result: Tensor = onednn(input, weight, bias, "none", [], "")
        return result
    return F.linear(input, weight, bias)


def add_product(total: Tensor, grad: Tensor, values: Tensor) -> None:
    """Adds grad' values to a weight's gradient."""
    total += linear(values.t(), grad.t(), None).t()


def _c_options(
    options: RecurrenceOptions, batch: int, size: int, norms: tuple[Tensor, ...] | list[Tensor]
) -> _Options:
    pointers = [norm.data_ptr() for norm in norms] or [0] * 4  # null where there is no layer norm
    return _Options(
        batch,
        size,
        list(ACTIVATIONS).index(options.activation),
        _GATE_NORMS[options.layer_norm_gate],
        options.eta is not None,
        torch.get_num_threads(),
        options.eta or 0.0,
        options.zoneout,
        *pointers,
    )
