"""The RUM recurrence with lambda = 0 on the CPU: one C call for a sequence, forward and backward.

The C library (rum_cpu.c) is built when the package is installed, if there is a compiler; it needs
neither Python's nor torch's headers, so one build serves every version of both. Where it is
missing, `rum.kernels.fused` serves.
"""

import ctypes
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rum.kernels.step import ACTIVATIONS, RecurrenceOptions

LARGEST_SIZE = 16384
_ROW_BUFFERS = 6  # rows of scratch for each thread, as in rum_cpu.c
_PANEL_WIDTH = 16  # WIDTH there
_LINEAR = "_linear_pointwise"  # what TorchInductor calls; without it `@` serves
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
    """The compiled library, None where it was not built."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = Path(__file__).with_name(f"_rum_cpu{suffix}")
    if not path.is_file():
        return None
    loaded = ctypes.CDLL(str(path))
    for name, pointers in (("rum_forward", 8), ("rum_backward", 12)):
        function = getattr(loaded, name)
        function.restype = None
        function.argtypes = [
            ctypes.POINTER(_Options),
            ctypes.c_int64,
            *[ctypes.c_void_p] * pointers,
        ]
    return loaded


def unserved(size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this backend cannot serve a request; None where it can."""
    if device.type != "cpu":
        return f"runs on the CPU, got {device}"
    if dtype != torch.float32:
        return f"computes in float32, got {dtype}"
    if size > LARGEST_SIZE:
        return f"takes hidden sizes up to {LARGEST_SIZE}, got {size}"
    if library() is None:
        return "was not built: there was no C compiler when the package was installed"
    return None


def rum_recurrence_cpu(
    projected: Tensor,
    embedded: Tensor,
    hidden: Tensor,
    weight: Tensor,
    norms: tuple[Tensor, ...],
    mask: Tensor | None,
    options: RecurrenceOptions,
) -> Tensor:
    """As `rum.kernels.fused.rum_recurrence`, in float32 on the CPU."""
    outputs: Tensor = _CPURecurrence.apply(  # type: ignore[no-untyped-call]
        options,
        None if mask is None else mask.contiguous(),
        projected.contiguous(),
        embedded.contiguous(),
        hidden.contiguous(),
        weight,
        *(norm.contiguous() for norm in norms),
    )
    return outputs


class _CPURecurrence(torch.autograd.Function):
    """Arguments as `rum_recurrence_cpu`, those without a gradient first."""

    @staticmethod
    def forward(
        ctx: Any,
        options: RecurrenceOptions,
        mask: Tensor | None,
        projected: Tensor,
        embedded: Tensor,
        hidden: Tensor,
        weight: Tensor,
        *norms: Tensor,
    ) -> Tensor:
        compiled = library()
        assert compiled is not None
        batch, size = hidden.shape
        pre = torch.empty_like(projected)
        outputs = torch.empty_like(embedded)
        c_options = _c_options(options, batch, size, norms)
        scratch = hidden.new_empty(c_options.threads * _ROW_BUFFERS * size)
        panels = _panels(weight)
        compiled.rum_forward(
            c_options,
            len(embedded),
            panels.data_ptr(),
            projected.data_ptr(),
            embedded.data_ptr(),
            hidden.data_ptr(),
            mask.data_ptr() if mask is not None else None,
            pre.data_ptr(),
            outputs.data_ptr(),
            scratch.data_ptr(),
        )
        ctx.options = options
        ctx.save_for_backward(mask, pre, embedded, hidden, weight, outputs, *norms)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; the result would silently lack terms
            raise RuntimeError(
                "the compiled RUM recurrence cannot be differentiated twice: use "
                "backend='reference'"
            )
        with torch.autocast("cpu", enabled=False):
            return _CPURecurrence._gradients(ctx, grad_outputs.contiguous())

    @staticmethod
    def _gradients(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        compiled = library()
        assert compiled is not None
        mask, pre, embedded, hidden, weight, outputs, *norms = ctx.saved_tensors
        batch, size = hidden.shape
        c_options = _c_options(ctx.options, batch, size, norms)
        threads = c_options.threads
        scratch = hidden.new_empty(threads * _ROW_BUFFERS * size)
        grad_norms = hidden.new_zeros(threads, 6 * size)
        grad_pre = torch.empty_like(pre)
        grad_embedded = torch.empty_like(embedded)
        grad_state = torch.zeros_like(hidden)
        panels = _panels(weight.t())
        compiled.rum_backward(
            c_options,
            len(embedded),
            panels.data_ptr(),
            pre.data_ptr(),
            embedded.data_ptr(),
            hidden.data_ptr(),
            outputs.data_ptr(),
            mask.data_ptr() if mask is not None else None,
            grad_outputs.data_ptr(),
            grad_state.data_ptr(),
            grad_pre.data_ptr(),
            grad_embedded.data_ptr(),
            grad_norms.data_ptr(),
            scratch.data_ptr(),
        )
        states = torch.cat((hidden.unsqueeze(0), outputs))[:-1]
        grad_weight = _gradient_of_weight(grad_pre.view(-1, 2 * size), states.view(-1, size))
        of_norms: tuple[Tensor, ...] = ()
        if norms:
            of_norms = grad_norms.sum(0).split((2 * size, 2 * size, size, size))
        return None, None, grad_pre, grad_embedded, grad_state, grad_weight, *of_norms


def _panels(weight: Tensor) -> Tensor:
    """Packs a weight (K, M) for products state weight': (K / 16, M, 16), filled up with zeros."""
    rows, columns = weight.shape
    count = -(-rows // _PANEL_WIDTH)
    padded = F.pad(weight, (0, 0, 0, count * _PANEL_WIDTH - rows))
    return padded.view(count, _PANEL_WIDTH, columns).transpose(1, 2).contiguous()


def _gradient_of_weight(grad: Tensor, states: Tensor) -> Tensor:
    """Returns grad' states, both (TB, .).

    From some size on by oneDNN, which chooses its code by what the processor can do; the library
    behind `@` (MKL) also asks who made it, and takes twice the time on AMD's.
    """
    is_large = grad.numel() * states.shape[1] >= _SMALLEST_PRODUCT
    if is_large and torch.backends.mkldnn.enabled and hasattr(torch.ops.mkldnn, _LINEAR):
        linear = getattr(torch.ops.mkldnn, _LINEAR)
        transposed: Tensor = linear(states.t(), grad.t(), None, "none", [], "")
        return transposed.t()
    return grad.t() @ states


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
