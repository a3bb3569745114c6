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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rum.kernels.memory import CHECKPOINT_INTERVAL, initial_skew
from rum.kernels.step import (
    ACTIVATIONS,
    RecurrenceOptions,
    Weights,
    refuse_second_derivative,
)

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


def unserved(size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this backend cannot serve a request; None where it can."""
    if device.type != "cpu":
        return f"runs on the CPU, got {device}"
    if dtype != torch.float32:
        return f"computes in float32, got {dtype}"
    if size > LARGEST_SIZE:
        return f"takes hidden sizes up to {LARGEST_SIZE}, got {size}"
    if library() is None:
        return (
            "is not there: the package was installed without a C compiler, or it cannot be loaded"
        )
    return None


def rum_sequence(
    input: Tensor,
    hidden: Tensor,
    memory: Tensor | None,
    weights: Weights,
    norms: tuple[Tensor, ...],
    mask: Tensor | None,
    options: RecurrenceOptions,
) -> tuple[Tensor, Tensor | None]:
    """Runs a whole sequence of the RUM cell in float32.

    Args:
        input: `(T, B, input_size)`.
        hidden: `(B, N)`, the initial state.
        memory: `(B, N, N)` with lambda = 1, the initial associative memory, orthogonal; it gets
            no gradient. None with lambda = 0.
        weights: Of the cell.
        norms: As `rum.kernels.fused.rum_recurrence`, and so `mask` and `options`.
        mask: See `norms`.
        options: See `norms`.

    Returns:
        `(T, B, N)`, the hidden state after every step, and the last memory, if there is one.

    Raises:
        RuntimeError: When differentiated twice; the reference backend can do that.
    """
    outputs: tuple[Tensor, Tensor | None] = _Sequence.apply(  # type: ignore[no-untyped-call]
        options,
        None if mask is None else mask.contiguous(),
        memory,
        input.contiguous(),
        hidden.contiguous(),
        *weights,
        *(norm.contiguous() for norm in norms),
    )
    return outputs


class _Sequence(torch.autograd.Function):
    """Arguments as `rum_sequence`, those without a gradient first."""

    @staticmethod
    def forward(
        ctx: Any,
        options: RecurrenceOptions,
        mask: Tensor | None,
        memory: Tensor | None,
        input: Tensor,
        hidden: Tensor,
        weight_ih: Tensor,
        bias: Tensor,
        embedding_bias: Tensor | None,
        weight_hh: Tensor,
        *norms: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        compiled = library()
        assert compiled is not None
        batch, size = hidden.shape
        with torch.autocast("cpu", enabled=False):
            pre = _linear(input, weight_ih[: 2 * size], bias)
            embedded = _linear(input, weight_ih[2 * size :], embedding_bias)
        outputs = torch.empty_like(embedded)
        matrix = None if memory is None else memory.clone(memory_format=torch.contiguous_format)
        checkpoints: list[Tensor] = []
        c_options = _c_options(options, batch, size, norms)
        scratch = hidden.new_empty(c_options.threads * _ROW_BUFFERS * size)
        panels = _panels(weight_hh)
        for first, last in _pieces(len(input), _interval(matrix, len(input))):
            if matrix is not None and first:
                checkpoints.append(matrix.clone())
            previous = outputs[first - 1] if first else hidden
            compiled.rum_forward(
                c_options,
                last - first,
                panels.data_ptr(),
                embedded[first].data_ptr(),
                previous.data_ptr(),
                mask[first].data_ptr() if mask is not None else None,
                pre[first].data_ptr(),
                matrix.data_ptr() if matrix is not None else None,
                outputs[first].data_ptr(),
                scratch.data_ptr(),
            )
        ctx.options = options
        ctx.num_norms = len(norms)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            mask,
            input,
            hidden,
            weight_ih,
            embedding_bias,
            weight_hh,
            pre,
            embedded,
            outputs,
            matrix,
            *norms,
            *checkpoints,
        )
        return outputs, matrix

    @staticmethod
    def backward(
        ctx: Any, grad_outputs: Tensor | None, grad_memory: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("compiled")
        with torch.autocast("cpu", enabled=False):
            return _Sequence._gradients(ctx, grad_outputs, grad_memory)

    @staticmethod
    def _gradients(
        ctx: Any, grad_outputs: Tensor | None, grad_memory: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        compiled = library()
        assert compiled is not None
        (
            mask,
            input,
            hidden,
            weight_ih,
            embedding_bias,
            weight_hh,
            pre,
            embedded,
            outputs,
            matrix,
        ) = ctx.saved_tensors[:10]
        norms = ctx.saved_tensors[10 : 10 + ctx.num_norms]
        checkpoints = ctx.saved_tensors[10 + ctx.num_norms :]
        steps, batch, features = input.shape
        size = hidden.shape[1]
        if grad_outputs is None:
            grad_outputs = torch.zeros_like(outputs)
        grad_outputs = grad_outputs.contiguous()
        skew = None
        if matrix is not None:
            skew = initial_skew(matrix, grad_memory)
            matrix = matrix.clone()
        c_options = _c_options(ctx.options, batch, size, norms)
        threads = c_options.threads
        scratch = hidden.new_empty(threads * _ROW_BUFFERS * size)
        panels = _panels(weight_hh.t())
        grad_input = torch.empty_like(input) if ctx.needs_input_grad[3] else None
        grad_hidden = torch.zeros_like(hidden)
        grad_norms = hidden.new_zeros(threads, 6 * size)
        grad_weight_ih, grad_weight_hh = torch.zeros_like(weight_ih), torch.zeros_like(weight_hh)
        grad_bias = hidden.new_zeros(3 * size)
        # In pieces of time: their gradients stay in the cache and in memory that is there, where
        # fresh pages for those of the whole sequence would cost as much as the products. A piece
        # has rows enough that adding its share to the weight's gradient costs little.
        rows = max(_PIECE // (3 * size), 2 * size)
        interval = _interval(matrix, max(1, rows // max(1, batch)))
        buffer = hidden.new_empty(min(steps, interval) * batch * 3 * size)
        for first, last in reversed(_pieces(steps, interval)):
            if matrix is not None and last < steps:
                matrix.copy_(checkpoints[last // interval - 1])
            rows = (last - first) * batch
            grad_pre = buffer[: rows * 2 * size].view(rows, 2 * size)
            grad_embedded = buffer[rows * 2 * size : rows * 3 * size].view(rows, size)
            previous = outputs[first - 1] if first else hidden
            compiled.rum_backward(
                c_options,
                last - first,
                panels.data_ptr(),
                pre[first].data_ptr(),
                embedded[first].data_ptr(),
                previous.data_ptr(),
                outputs[first].data_ptr(),
                mask[first].data_ptr() if mask is not None else None,
                grad_outputs[first].data_ptr(),
                matrix.data_ptr() if matrix is not None else None,
                skew.data_ptr() if skew is not None else None,
                grad_hidden.data_ptr(),
                grad_pre.data_ptr(),
                grad_embedded.data_ptr(),
                grad_norms.data_ptr(),
                scratch.data_ptr(),
            )
            if first:
                states = outputs[first - 1 : last - 1]
            else:
                states = torch.cat((hidden.unsqueeze(0), outputs[: last - 1]))
            inputs = input[first:last].view(rows, features)
            _add_product(grad_weight_hh, grad_pre, states.view(rows, size))
            _add_product(grad_weight_ih[: 2 * size], grad_pre, inputs)
            _add_product(grad_weight_ih[2 * size :], grad_embedded, inputs)
            grad_bias[: 2 * size] += grad_pre.sum(0)
            grad_bias[2 * size :] += grad_embedded.sum(0)
            if grad_input is not None:
                piece = grad_input[first:last].view(rows, features)
                torch.mm(grad_pre, weight_ih[: 2 * size], out=piece)
                piece.addmm_(grad_embedded, weight_ih[2 * size :])
        of_norms: tuple[Tensor, ...] = ()
        if norms:
            of_norms = grad_norms.sum(0).split((2 * size, 2 * size, size, size))
        return (
            None,
            None,
            None,
            grad_input,
            grad_hidden,
            grad_weight_ih,
            grad_bias[: 2 * size],
            None if embedding_bias is None else grad_bias[2 * size :],
            grad_weight_hh,
            *of_norms,
        )


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


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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


def _add_product(total: Tensor, grad: Tensor, values: Tensor) -> None:
    """Adds grad' values to a weight's gradient."""
    total += _linear(values.t(), grad.t(), None).t()


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
