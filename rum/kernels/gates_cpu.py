"""One step of an LSTM and of a GRU on the CPU, compiled (rum_cpu_gates.c)."""

import ctypes

import torch
from torch import Tensor

from rum.kernels.cpu import library, pointer
from rum.kernels.gates import LSTMOptions

_BUFFERS = 11  # LSTM_BUFFERS in rum_cpu_gates.c


class _Options(ctypes.Structure):
    """`LSTMOptions` of rum_cpu_gates.c."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("has_norms", ctypes.c_int32),
        ("forget_bias", ctypes.c_float),
        ("zoneout_h", ctypes.c_float),
        ("zoneout_c", ctypes.c_float),
        ("gate_gain", ctypes.c_void_p),
        ("gate_shift", ctypes.c_void_p),
        ("cell_gain", ctypes.c_void_p),
        ("cell_shift", ctypes.c_void_p),
    )


class LSTMRows:
    """As `rum.kernels.gates.LSTMRows`, in float32."""

    def __init__(self, norms: tuple[Tensor, ...], options: LSTMOptions) -> None:
        """See `Rows`."""
        loaded = library()
        assert loaded is not None
        self._functions = loaded
        self._norms = norms  # whose memory `_options` points to
        self._options = _Options(
            threads=torch.get_num_threads(),
            has_norms=bool(norms),
            forget_bias=options.forget_bias,
            zoneout_h=options.zoneout_h,
            zoneout_c=options.zoneout_c,
            **dict(
                zip(
                    ("gate_gain", "gate_shift", "cell_gain", "cell_shift"),
                    [norm.data_ptr() for norm in norms],
                    strict=False,
                )
            ),
        )
        self._scratch = self._of_norms = torch.empty(0)

    @property
    def grad_norms(self) -> tuple[Tensor, ...]:
        """As the norms."""
        if not self._of_norms.numel():
            return tuple(torch.zeros_like(norm) for norm in self._norms)
        size = self._options.size
        parts: tuple[Tensor, ...] = self._of_norms.sum(0).split((4 * size, 4 * size, size, size))
        return parts

    def forward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
    ) -> None:
        """See `Rows`."""
        self._prepare(states[0])
        self._functions.lstm_step_forward(
            ctypes.byref(self._options),
            pointer(pre),
            *map(pointer, states),
            *(map(pointer, masks) if masks else (None, None)),
            *map(pointer, new_states),
            pointer(self._scratch),
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
        self._prepare(states[0])
        if self._norms and not self._of_norms.numel():
            self._of_norms = torch.zeros(self._options.threads, 10 * self._options.size)
        self._functions.lstm_step_backward(
            ctypes.byref(self._options),
            pointer(pre),
            pointer(states[1]),
            *(map(pointer, masks) if masks else (None, None)),
            *map(pointer, grads),
            pointer(grad_pre),
            pointer(self._of_norms),
            pointer(self._scratch),
        )

    def _prepare(self, hidden: Tensor) -> None:
        self._options.batch, self._options.size = hidden.shape
        needed = self._options.threads * _BUFFERS * self._options.size
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed)


class GRURows:
    """As `rum.kernels.gates.GRURows`, in float32."""

    def __init__(self) -> None:
        """See `Rows`."""
        loaded = library()
        assert loaded is not None
        self._functions = loaded
        self._threads = torch.get_num_threads()
        self.grad_norms: tuple[Tensor, ...] = ()

    def forward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
    ) -> None:
        """See `Rows`."""
        tensors = pre, states[0], new_states[0]
        self._functions.gru_step_forward(*states[0].shape, self._threads, *map(pointer, tensors))

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
        tensors = pre, states[0], grads[0], grad_pre
        self._functions.gru_step_backward(*states[0].shape, self._threads, *map(pointer, tensors))
