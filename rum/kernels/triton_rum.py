"""The RUM recurrence in Triton, for CUDA devices: float32, products in half precision if asked.

Three ways, by what there is to do:

- lambda = 0: a product of torch and one kernel per step, a program per row. Replayed as a CUDA
  graph, for the launches would take longer than the work.
- lambda = 0 and few hidden units: the loop over time inside one kernel. A program takes some rows
  of a replica; rows do not meet, so none waits for another.
- lambda = 1: the same with one program per sample, which keeps the memory in its registers.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from rum.kernels import triton_kernels as kernels
from rum.kernels.graphs import Graphs
from rum.kernels.recurrence import RecurrenceOptions
from rum.kernels.triton_kernels import block_of, launched_on, warps_of

LARGEST_PERSISTENT_SIZE = 256


@dataclass(frozen=True)
class _Flags:
    """All that the steps of a recurrence depend on, tensors apart."""

    activation: str
    gate_norm: str | None
    has_eta: bool
    precision: str

    def constants(self, block: int) -> dict[str, Any]:
        """Arguments of a kernel known at compile time, for rows of up to `block` numbers."""
        return {
            "ACTIVATION": self.activation,
            "GATE_NORM": self.gate_norm,
            "HAS_ETA": self.has_eta,
            "BLOCK_N": block,
        }


_GRAPHS = Graphs()


class TritonRecurrence:
    """A `rum.kernels.recurrence.Recurrence`, see there; what it serves, `rum.kernels.gpu` says."""

    def __init__(
        self,
        weight: Tensor,
        norms: tuple[Tensor, ...],
        options: RecurrenceOptions,
        *,
        persistent: bool | None = None,
    ) -> None:
        """As `Recurrence`.

        Args:
            weight: See `Recurrence`.
            norms: See `Recurrence`.
            options: See `Recurrence`.
            persistent: Whether the loop over time runs inside a kernel with lambda = 0; None: as
                the size suggests.
        """
        size = weight.shape[2]
        self._persistent = size <= LARGEST_PERSISTENT_SIZE if persistent is None else persistent
        self._block = block_of(size)
        self._weight = weight.to(options.product_dtype or weight.dtype)
        self._norms = norms or (None,) * 4
        self._flags = _flags(options)
        self._options = options

    def piece(self, rows: int) -> int | None:
        """All steps at once."""
        return None

    def forward(
        self,
        pre: Tensor,
        hidden: Tensor,
        mask: Tensor | None,
        memory: Tensor | None,
        outputs: Tensor,
    ) -> None:
        """See `Recurrence`."""
        if outputs.numel() == 0:
            return
        with torch.cuda.device_of(outputs):
            scalars = _scalars(self._options.eta, self._options.zoneout, outputs.device)
            if memory is not None:
                self._forward_with_memory(pre, hidden, mask, memory, scalars, outputs)
            elif self._persistent:
                self._forward_in_one(pre, hidden, mask, scalars, outputs)
            else:
                read = (hidden, mask, self._weight, *self._norms, scalars)
                _GRAPHS.run(_steps_forward, self._flags, read, (pre,), (outputs,))

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
        if outputs.numel() == 0:
            return
        _, replicas, batch, size = outputs.shape
        rows = _rows_of_program(self._weight, self._flags)
        programs = batch
        if memory is None and self._persistent:
            programs = triton.cdiv(batch, rows)
        # of each program its own, so that the order of the sum does not depend on their timing
        of_norms = hidden.new_zeros(replicas, programs, 6 * size if grad_norms else 0)
        with torch.cuda.device_of(outputs):
            scalars = _scalars(self._options.eta, self._options.zoneout, outputs.device)
            read = (pre, hidden, mask)
            constant = (*self._norms, scalars, outputs, grad_outputs)
            if memory is not None and skew is not None:
                weight = _padded(self._weight, self._block)
                matrix, carried = _square(memory, self._block), _square(skew, self._block)
                kernels.memory_backward[(replicas * batch,)](
                    *read,
                    weight,
                    matrix,
                    carried,
                    *constant,
                    grad_state,
                    grad_pre,
                    of_norms,
                    len(outputs),
                    batch,
                    size,
                    **self._flags.constants(self._block),
                    CHUNK=min(32, self._block),
                    **launched_on(_warps_with_memory(self._block)),
                )
                _take_square(memory, matrix)
                _take_square(skew, carried)
            elif self._persistent:
                kernels.sequence_backward[(programs, replicas)](
                    *read,
                    _padded(self._weight, self._block),
                    *constant,
                    grad_state,
                    grad_pre,
                    of_norms,
                    len(outputs),
                    batch,
                    size,
                    **self._flags.constants(self._block),
                    PRECISION=self._flags.precision,
                    ROWS=rows,
                    CHUNK=min(32, self._block),
                    **launched_on(min(8, self._block // 16)),
                    num_stages=2,
                )
            else:
                _GRAPHS.run(
                    _steps_backward,
                    self._flags,
                    (*read, self._weight, *constant),
                    (grad_state, of_norms),
                    (grad_pre,),
                )
            if grad_norms:
                for total, part in zip(grad_norms, _split_norms(of_norms.sum(1)), strict=True):
                    total += part

    def _forward_with_memory(
        self,
        pre: Tensor,
        hidden: Tensor,
        mask: Tensor | None,
        memory: Tensor,
        scalars: Tensor,
        outputs: Tensor,
    ) -> None:
        steps, replicas, batch, size = outputs.shape
        matrix = _square(memory, self._block)
        kernels.memory_forward[(replicas * batch,)](
            pre,
            hidden,
            mask,
            _padded(self._weight, self._block),
            matrix,
            *self._norms,
            scalars,
            outputs,
            steps,
            batch,
            size,
            **self._flags.constants(self._block),
            **launched_on(_warps_with_memory(self._block)),
        )
        _take_square(memory, matrix)

    def _forward_in_one(
        self, pre: Tensor, hidden: Tensor, mask: Tensor | None, scalars: Tensor, outputs: Tensor
    ) -> None:
        steps, replicas, batch, size = outputs.shape
        rows = _rows_of_program(self._weight, self._flags)
        kernels.sequence_forward[(triton.cdiv(batch, rows), replicas)](
            pre,
            hidden,
            mask,
            _padded(self._weight, self._block).permute(0, 3, 1, 2).contiguous(),
            *self._norms,
            scalars,
            outputs,
            steps,
            batch,
            size,
            **self._flags.constants(self._block),
            PRECISION=self._flags.precision,
            ROWS=rows,
            CHUNK=min(32, self._block),
            **launched_on(min(8, self._block // 16)),
            num_stages=2,
        )


class RUMRows:
    """A `rum.kernels.recurrence.Rows`, see there: one step of a RUM with lambda = 0, K = 1."""

    def __init__(self, norms: tuple[Tensor, ...], options: RecurrenceOptions) -> None:
        """As `Rows`."""
        self._norms = norms
        self._options = options
        self._flags = _flags(options)
        self._scalars: Tensor | None = None
        self._of_norms: Tensor | None = None  # by row, summed when asked for

    @property
    def grad_norms(self) -> tuple[Tensor, ...]:
        """As the norms."""
        if self._of_norms is None:
            return tuple(torch.zeros_like(norm) for norm in self._norms)
        sums = _split_norms(self._of_norms.sum(0, keepdim=True))
        return tuple(part.view_as(norm) for part, norm in zip(sums, self._norms, strict=True))

    def forward(
        self,
        pre: Tensor,
        states: tuple[Tensor, ...],
        masks: tuple[Tensor, ...],
        new_states: tuple[Tensor, ...],
    ) -> None:
        """See `Rows`."""
        rows, size = new_states[0].shape
        block = block_of(size)
        if rows == 0:
            return
        with torch.cuda.device_of(pre):
            kernels.rows_forward[(rows,)](
                pre,
                states[0],
                masks[0] if masks else None,
                *(self._norms or (None,) * 4),
                self._scalars_on(pre.device),
                new_states[0],
                None,
                0,
                rows,
                size,
                **self._flags.constants(block),
                **launched_on(warps_of(block)),
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
        rows, size = new_states[0].shape
        block = block_of(size)
        if rows == 0:
            return
        if self._norms and self._of_norms is None:
            self._of_norms = pre.new_zeros(rows, 6 * size)
        with torch.cuda.device_of(pre):
            kernels.rows_backward[(rows,)](
                pre,
                states[0],
                masks[0] if masks else None,
                *(self._norms or (None,) * 4),
                self._scalars_on(pre.device),
                new_states[0],
                None,
                grads[0],
                grad_pre,
                self._of_norms,
                None,
                0,
                rows,
                size,
                **self._flags.constants(block),
                **launched_on(warps_of(block)),
            )

    def _scalars_on(self, device: torch.device) -> Tensor:
        """As `_scalars`, filled on the device: a graph cannot hold a copy from the host."""
        if self._scalars is None:
            eta, zoneout = self._options.eta, self._options.zoneout
            self._scalars = torch.full((1, 2), 0.0 if eta is None else eta[0], device=device)
            self._scalars[:, 1] = zoneout[0]
        return self._scalars


def _steps_forward(
    flags: _Flags,
    hidden: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    gate_gain: Tensor | None,
    gate_shift: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    scalars: Tensor,
    pre: Tensor,
    outputs: Tensor,
) -> None:
    """All steps with lambda = 0, two kernels each."""
    steps, replicas, batch, size = outputs.shape
    block = block_of(size)
    is_cast = weight.dtype != hidden.dtype
    operand = hidden.to(weight.dtype)
    for step in range(steps):
        _add_product(pre[step, ..., : 2 * size], operand, weight.mT)
        kernels.rows_forward[(replicas * batch,)](
            pre,
            hidden,
            mask,
            gate_gain,
            gate_shift,
            gain,
            shift,
            scalars,
            outputs,
            operand if is_cast else None,
            step,
            batch,
            size,
            **flags.constants(block),
            **launched_on(warps_of(block)),
        )
        if not is_cast:
            operand = outputs[step]


def _steps_backward(
    flags: _Flags,
    pre: Tensor,
    hidden: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    gate_gain: Tensor | None,
    gate_shift: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    scalars: Tensor,
    outputs: Tensor,
    grad_outputs: Tensor,
    grad_state: Tensor,
    grad_norms: Tensor,
    grad_pre: Tensor,
) -> None:
    """All steps back with lambda = 0, two kernels each."""
    steps, replicas, batch, size = outputs.shape
    block = block_of(size)
    operand = None
    if weight.dtype != hidden.dtype:
        operand = hidden.new_empty(replicas, batch, 2 * size, dtype=weight.dtype)
    for step in reversed(range(steps)):
        kernels.rows_backward[(replicas * batch,)](
            pre,
            hidden,
            mask,
            gate_gain,
            gate_shift,
            gain,
            shift,
            scalars,
            outputs,
            grad_outputs,
            grad_state,
            grad_pre,
            grad_norms,
            operand,
            step,
            batch,
            size,
            **flags.constants(block),
            **launched_on(warps_of(block)),
        )
        of_gates = grad_pre[step, ..., : 2 * size] if operand is None else operand
        _add_product(grad_state, of_gates, weight)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left right to `total`, in float32 also where the operands are not; all (K, ., .)."""
    if left.dtype != total.dtype and total.is_cuda:
        total += torch.bmm(left, right, out_dtype=total.dtype)
    elif len(total) == 1:
        total[0].addmm_(left[0].to(total.dtype), right[0].to(total.dtype))
    else:
        total.baddbmm_(left.to(total.dtype), right.to(total.dtype))


def _flags(options: RecurrenceOptions) -> _Flags:
    is_exact = options.product_dtype or torch.backends.cuda.matmul.fp32_precision != "tf32"
    return _Flags(
        options.activation,
        options.layer_norm_gate,
        options.eta is not None,
        "ieee" if is_exact else "tf32",
    )


@lru_cache(maxsize=64)  # a copy to the device would break into a capture, and cost a wait
def _scalars(
    eta: tuple[float, ...] | None, zoneout: tuple[float, ...], device: torch.device
) -> Tensor:
    """Eta and zoneout of every replica, (K, 2)."""
    pairs = list(zip(eta or (0.0,) * len(zoneout), zoneout, strict=True))
    return torch.tensor(pairs, dtype=torch.float32, device=device)


def _rows_of_program(weight: Tensor, flags: _Flags) -> int:
    """Rows of a program: few make many programs, and a step's numbers fit into registers.

    Half a tensor core's 16 rows idle; with 16 the backward pass spills 500 bytes a thread.
    """
    return 4 if weight.dtype == torch.float32 and flags.precision == "ieee" else 8


def _warps_with_memory(block: int) -> int:
    return min(8, max(1, block * block // 512))


def _padded(weight: Tensor, block: int) -> Tensor:
    """The weight `(K, 2N, N)` as `(K, 2, block, block)`: no masks, offsets known in advance."""
    replicas, _, size = weight.shape
    return _square(weight.view(replicas, 2, size, size), block)


def _square(matrix: Tensor, block: int) -> Tensor:
    """Fills up to (..., block, block) with zeros."""
    missing = block - matrix.shape[-1]
    return F.pad(matrix, (0, missing, 0, missing)) if missing else matrix


def _take_square(matrix: Tensor, padded: Tensor) -> None:
    """Back from `_square`."""
    if padded is not matrix:
        matrix.copy_(padded[..., : matrix.shape[-1], : matrix.shape[-1]])


def _split_norms(sums: Tensor) -> tuple[Tensor, ...]:
    """From (K, 6N) in the kernels' order to the norms'."""
    gate_gain, gain, gate_shift, shift = sums.split(
        [sums.shape[1] * part // 6 for part in (2, 1, 2, 1)], 1
    )
    return gate_gain, gate_shift, gain, shift
