"""The RUM recurrence on the CPU with lambda = 0 or 1, compiled.

The C library (rum_cpu.c) is built when the package is installed, if there is a compiler; it needs
neither Python's nor torch's headers, so one build serves every version of both. Where it is
missing, `rum.kernels.fused` serves.
"""

import ctypes
import sysconfig
import warnings
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rum.kernels.recurrence import RecurrenceOptions
from rum.kernels.step import ACTIVATIONS

LARGEST_SIZE = 16384
_INTERFACE = 4  # INTERFACE in rum_cpu.c
_ROW_BUFFERS = 14  # rows of scratch for each thread, as in rum_cpu.c
_PANEL_WIDTH = 16  # WIDTH there
_ONEDNN_LINEAR = "_linear_pointwise"  # what TorchInductor calls; not in every build of torch
_PIECE = 2**20  # numbers in the gradients of a piece of time
_ALWAYS_NEW = 2**25  # bytes above which glibc takes fresh pages from the system every time
_SMALLEST_PRODUCT = 2**21  # multiplications from which oneDNN is faster
_GATE_NORMS = {None: 0, "post_sigmoid": 1, "pre_sigmoid": 2}


class _Options(ctypes.Structure):
    """`Options` of rum_cpu.c."""

    _fields_ = (
        ("replicas", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("activation", ctypes.c_int32),
        ("gate_norm", ctypes.c_int32),
        ("has_eta", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("eta", ctypes.POINTER(ctypes.c_float)),
        ("zoneout", ctypes.POINTER(ctypes.c_float)),
        ("gate_gain", ctypes.c_void_p),
        ("gate_shift", ctypes.c_void_p),
        ("total_gain", ctypes.c_void_p),
        ("total_shift", ctypes.c_void_p),
    )


_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p
_FUNCTIONS: dict[str, list[type]] = {
    "rum_use_large_pages": [_POINTER, _NUMBER],
    "rum_add_product": [*[_NUMBER] * 4, *[_POINTER] * 2, _NUMBER, _POINTER, _NUMBER],
    "rum_project": [_POINTER, *[_NUMBER] * 3, *[_POINTER] * 4],
    "rum_forward": [_POINTER, _NUMBER, *[_POINTER] * 7],
    "rum_backward": [_POINTER, _NUMBER, *[_POINTER] * 12],
    "rum_step_forward": [_POINTER] * 6,
    "rum_step_backward": [_POINTER] * 9,
    "lstm_step_forward": [_POINTER] * 9,
    "lstm_step_backward": [_POINTER] * 10,
    "gru_step_forward": [*[_NUMBER] * 3, *[_POINTER] * 3],
    "gru_step_backward": [*[_NUMBER] * 3, *[_POINTER] * 4],
}


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
    for name, arguments in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype = None
        function.argtypes = arguments
    return loaded


def is_built() -> bool:
    """Whether there is a library."""
    return library() is not None


is_built._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see gpu.py


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


class _Compiled:
    """The library with the options of one call."""

    def __init__(self, norms: tuple[Tensor, ...], options: RecurrenceOptions) -> None:
        loaded = library()
        assert loaded is not None
        self.functions = loaded
        self._norms = norms  # whose memory `_options` points to
        self._options = _Options(
            len(options.zoneout),
            0,
            0,
            list(ACTIVATIONS).index(options.activation),
            _GATE_NORMS[options.layer_norm_gate],
            options.eta is not None,
            torch.get_num_threads(),
            _floats(options.eta or (0.0,) * len(options.zoneout)),
            _floats(options.zoneout),
            *([norm.data_ptr() for norm in norms] or [0] * 4),
        )

    def options(self, hidden: Tensor) -> Any:
        """For a state `(..., B, N)`."""
        self._options.batch, self._options.size = hidden.shape[-2:]
        return ctypes.byref(self._options)

    def scratch(self, hidden: Tensor) -> Tensor:
        """Rows of scratch for all threads."""
        return hidden.new_empty(self._options.threads * _ROW_BUFFERS * hidden.shape[-1])

    def norm_scratch(self, hidden: Tensor) -> Tensor:
        """Each thread's gradients of the layer norms."""
        sizes = self._options.threads, self._options.replicas, 6 * hidden.shape[-1]
        return hidden.new_zeros(sizes)


def empty(shape: tuple[int, ...]) -> Tensor:
    """Float32 numbers yet to be written; large ones in large pages."""
    tensor = torch.empty(shape)
    compiled = library()
    if compiled is not None and 4 * tensor.numel() > _ALWAYS_NEW:
        compiled.rum_use_large_pages(tensor.data_ptr(), 4 * tensor.numel())
    return tensor


def project(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Input weight' + bias in every replica, in float32: `(T, K, B, P)`.

    Args:
        input: `(T, K, B, M)`.
        weight: `(K, P, M)`.
        bias: `(K, P)`.
    """
    steps, replicas, batch, features = input.shape
    columns = weight.shape[1]
    out = empty((steps, replicas, batch, columns))
    if out.numel():
        loaded, panels = library(), _panels(weight)
        assert loaded is not None
        sizes = _Options(replicas=replicas, batch=batch, threads=torch.get_num_threads())
        loaded.rum_project(
            ctypes.byref(sizes),
            steps,
            features,
            columns,
            pointer(panels),
            pointer(bias),
            pointer(input),
            pointer(out),
        )
    return out


class PackedWeight:
    """A weight `(P, M)` in float32 for many products with few rows."""

    def __init__(self, weight: Tensor) -> None:
        """Packs it."""
        loaded = library()
        assert loaded is not None
        self._functions = loaded
        self._columns, self._depth = weight.shape
        self._panels = _panels(weight.unsqueeze(0))
        self._threads = torch.get_num_threads()

    def add_to(self, total: Tensor, rows: Tensor) -> None:
        """Total `(R, P)` += rows `(R, M)` weight'; of both only the last axis need be dense."""
        assert total.stride(-1) == rows.stride(-1) == 1 or not rows.numel()
        self._functions.rum_add_product(
            len(rows),
            self._depth,
            self._columns,
            self._threads,
            pointer(self._panels),
            rows.data_ptr(),
            rows.stride(0),
            total.data_ptr(),
            total.stride(0),
        )


class CompiledRecurrence:
    """A `rum.kernels.recurrence.Recurrence` in float32."""

    def __init__(
        self, weight: Tensor, norms: tuple[Tensor, ...], options: RecurrenceOptions
    ) -> None:
        """See `Recurrence`."""
        self._weight = weight
        self._compiled = _Compiled(norms, options)

    @cached_property
    def _forward_panels(self) -> Tensor:
        return _panels(self._weight)

    @cached_property
    def _backward_panels(self) -> Tensor:
        return _panels(self._weight.mT)

    def piece(self, rows: int) -> int | None:
        """So many that their gradients stay in the cache.

        In memory that is there, too, where fresh pages for those of the whole sequence would cost
        as much as the products. A piece has rows enough that adding its share to the weight's
        gradient costs little.
        """
        size = self._weight.shape[-1]
        wanted = max(_PIECE // (3 * size), 2 * size)
        return max(1, wanted // max(1, rows))

    def forward(
        self,
        pre: Tensor,
        hidden: Tensor,
        mask: Tensor | None,
        memory: Tensor | None,
        outputs: Tensor,
    ) -> None:
        """See `Recurrence`."""
        if not outputs.numel():
            return
        scratch = self._compiled.scratch(hidden)
        self._compiled.functions.rum_forward(
            self._compiled.options(hidden),
            len(pre),
            pointer(self._forward_panels),
            pointer(hidden),
            pointer(mask),
            pointer(pre),
            pointer(memory),
            pointer(outputs),
            pointer(scratch),
        )

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
        """See `Recurrence`."""
        if not outputs.numel():
            return
        scratch, of_norms = self._compiled.scratch(hidden), self._compiled.norm_scratch(hidden)
        self._compiled.functions.rum_backward(
            self._compiled.options(hidden),
            len(pre),
            pointer(self._backward_panels),
            pointer(pre),
            pointer(hidden),
            pointer(outputs),
            pointer(mask),
            pointer(grad_outputs),
            pointer(memory),
            pointer(skew),
            pointer(grad_state),
            pointer(grad_pre),
            pointer(of_norms),
            pointer(scratch),
        )
        _add_norms(grad_norms, of_norms)


class RUMRows:
    """`rum.kernels.recurrence.Rows` of a RUM with lambda = 0, in float32."""

    def __init__(self, norms: tuple[Tensor, ...], options: RecurrenceOptions) -> None:
        """See `Rows`; options of one replica."""
        self.grad_norms = tuple(torch.zeros_like(norm) for norm in norms)
        self._compiled = _Compiled(norms, options)

    def forward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
    ) -> None:
        """See `Rows`."""
        (hidden,), (new,) = states, new_states
        if not hidden.numel():
            return
        scratch = self._compiled.scratch(hidden)
        self._compiled.functions.rum_step_forward(
            self._compiled.options(hidden),
            pointer(pre),
            pointer(hidden),
            pointer(masks[0] if masks else None),
            pointer(new),
            pointer(scratch),
        )

    def backward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
        grads: tuple[Tensor, ...],
        grad_pre: Tensor,
    ) -> None:
        """See `Rows`."""
        (hidden,), (grad_state,) = states, grads
        if not hidden.numel():
            return
        scratch, of_norms = self._compiled.scratch(hidden), self._compiled.norm_scratch(hidden)
        nothing = torch.zeros_like(hidden)
        self._compiled.functions.rum_step_backward(
            self._compiled.options(hidden),
            pointer(pre),
            pointer(hidden),
            pointer(masks[0] if masks else None),
            pointer(nothing),
            pointer(grad_state),
            pointer(grad_pre),
            pointer(of_norms),
            pointer(scratch),
        )
        _add_norms(self.grad_norms, of_norms)


def pointer(tensor: Tensor | None) -> int | None:
    """Of a tensor that somebody holds; one that exists only as an argument would be gone."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    assert tensor.dtype == torch.float32
    return tensor.data_ptr()


def _floats(values: tuple[float, ...]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(values))(*values)


def _add_norms(grad_norms: tuple[Tensor, ...], of_threads: Tensor) -> None:
    """Adds what the threads summed up to the gradients of the layer norms."""
    if grad_norms:
        size = of_threads.shape[-1] // 6
        parts = of_threads.sum(0).split((2 * size, 2 * size, size, size), -1)
        for total, part in zip(grad_norms, parts, strict=True):
            total += part.view_as(total)


def _panels(weight: Tensor) -> Tensor:
    """Packs weights (R, P, M) for products rows weight': (R, P / 16, M, 16), filled up with 0."""
    replicas, rows, columns = weight.shape
    count = -(-rows // _PANEL_WIDTH)
    padded = F.pad(weight, (0, 0, 0, count * _PANEL_WIDTH - rows))
    return padded.view(replicas, count, _PANEL_WIDTH, columns).transpose(2, 3).contiguous()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns input weight' + bias.

    On the CPU from some size on by oneDNN, which chooses its code by what the processor can do;
    the library behind `torch.mm` (MKL) also asks who made it, and takes twice the time on AMD's.
    """
    is_large = input.numel() * len(weight) >= _SMALLEST_PRODUCT
    is_here = input.device.type == "cpu" and input.dtype == torch.float32
    if is_here and is_large and torch.backends.mkldnn.enabled:
        onednn = getattr(torch.ops.mkldnn, _ONEDNN_LINEAR, None)
        if onednn is not None:
            result: Tensor = onednn(input, weight, bias, "none", [], "")
            return result
    return F.linear(input, weight, bias)


def add_product(total: Tensor, grad: Tensor, values: Tensor) -> None:
    """Adds grad' values to a weight's gradient."""
    total += linear(values.t(), grad.t(), None).t()
