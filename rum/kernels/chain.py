"""Sequences through several cells a step, one after the other, as one operator of torch.

A Fast-Slow RNN is a chain: fast cells that hand one state on, a slow cell with its own between
them. An LSTM or a GRU is a chain of one. Each cell is a `Link`: products with its input and its
state, taken here, and what happens to the rows, a backend's `Rows`.

`torch.ops.rum.chain` and its gradient are opaque to torch.compile and torch.export. Saved for the
backward pass: each cell's pre-activations and states. Gradients of weights are single products
over all steps.
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rum.kernels import cpu, fused, gates, gates_cpu
from rum.kernels.graphs import Graphs
from rum.kernels.recurrence import RecurrenceOptions, Rows
from rum.kernels.sequence import product_dtype_of, refuse_second_derivative

INPUT, PREVIOUS, NOTHING = "input", "previous", "nothing"

_BLOCKS = {"rum": 3, "lstm": 4, "gru": 4}
"""Pre-activations of a row, in units of N."""

Options = RecurrenceOptions | gates.LSTMOptions | None


@dataclass(frozen=True, kw_only=True)
class Link:
    """One cell of a chain."""

    kind: str
    """"rum" (lambda = 0), "lstm" or "gru" (reset gate after the product)."""
    weight_ih: Tensor
    """`(P, M)`, for the first P of its pre-activations as `Rows` orders them."""
    bias: Tensor
    """`(G N,)`, of all pre-activations."""
    weight_hh: Tensor
    """`(Q, N)`; of a RUM for the first 2N, of an LSTM for all, of a GRU for reset gate, update
    gate and the last N."""
    norms: tuple[Tensor, ...]
    """As its `Rows`."""
    options: Options
    """As its `Rows`."""
    source: str
    """What it gets: "input" (of the step), the output of the "previous" cell, or "nothing" (a
    zero feature; its weights for it stay untrained)."""
    slot: int
    """Which of the chain's states it takes and leaves."""
    masks: tuple[Tensor, ...]
    """Of zoneout, `(T, B, N)`, one for each tensor of its state, or none (expectation)."""
    dropout: Tensor | None = None
    """Multiplies what it gets from the previous cell, `(T, B, M)`."""


def run(
    backend: str, input: Tensor, states: Sequence[tuple[Tensor, ...]], links: Sequence[Link]
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Runs a chain over a sequence.

    States, norms and row mathematics are in the dtype of the weights; under autocast operands of
    products are rounded.

    Args:
        backend: "fused", "cpu" or "triton".
        input: `(T, B, M)`.
        states: The initial ones by slot, each a tuple of `(B, N)`.
        links: The cells in the order of a step.

    Returns:
        `(T, B, N)`, the last cell's hidden state after every step, and the states by slot.

    Raises:
        RuntimeError: When differentiated twice; the reference backend can do that.
    """
    dtype = links[0].weight_hh.dtype
    cells = [
        {
            "kind": link.kind,
            "options": None if link.options is None else asdict(link.options),
            "source": link.source,
            "slot": link.slot,
            "norms": len(link.norms),
            "masks": len(link.masks),
            "dropout": link.dropout is not None,
        }
        for link in links
    ]
    weights = [
        tensor.contiguous()
        for link in links
        for tensor in (link.weight_ih, link.bias, link.weight_hh, *link.norms)
    ]
    masks = [
        mask.to(dtype).contiguous()
        for link in links
        for mask in (*link.masks, *([] if link.dropout is None else [link.dropout]))
    ]
    flat = [tensor.to(dtype).contiguous() for state in states for tensor in state]
    outputs, *rest = _chain(
        input.to(dtype).contiguous(),
        flat,
        weights,
        masks,
        repr((cells, [len(state) for state in states])),  # as text: operators take no dicts
        backend,
        product_dtype_of(links[0].weight_hh),
    )
    last = iter(rest)
    return outputs, [tuple(next(last) for _ in state) for state in states]


@torch.library.custom_op("rum::chain", mutates_args=())
def _chain(
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    cells: str,
    backend: str,
    product_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Outputs, last states, then pre-activations and states of all cells but the outputs."""
    with torch.autocast(input.device.type, enabled=False):
        chain = _Chain(cells, backend, product_dtype, states, weights, masks)
        pre, after = chain.empty(input)
        flags = cells, backend, product_dtype, len(states), len(weights), len(masks)
        read = (input, *states, *weights, *masks)
        _GRAPHS.run(_steps_forward, flags, read, (), (*pre, *_flat(after)))
        return [after[-1][0], *chain.last_states(after), *_saved(pre, after)]


def _steps_forward(flags: "_Flags", input: Tensor, *tensors: Tensor) -> None:
    """All steps: from states, weights and masks to pre-activations and states of every cell."""
    chain, buffers = _rebuilt(flags, tensors)
    pre, after = chain.cut(buffers)
    chain.project(input, pre[0])
    for t in range(len(input)):
        chain.forward(t, pre, after)


@_chain.register_fake
def _(  # type: ignore[no-untyped-def]  # the operator's arguments, named above
    input, states, weights, masks, cells, backend, product_dtype
) -> list[Tensor]:
    chain = _Chain(cells, "fused", product_dtype, states, weights, masks)
    pre, after = chain.empty(input)
    return [after[-1][0], *(torch.empty_like(state) for state in states), *_saved(pre, after)]


def _saved(pre: list[Tensor], after: list[list[Tensor]]) -> list[Tensor]:
    """All buffers but the one that is the output."""
    *others, last = after
    return [*pre, *(buffer for buffers in others for buffer in buffers), *last[1:]]


@torch.library.custom_op("rum::chain_backward", mutates_args=())
def _chain_backward(
    grad_outputs: Tensor,
    grad_states: Sequence[Tensor],
    results: Sequence[Tensor],
    wants_input: bool,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    cells: str,
    backend: str,
    product_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients of input (empty if not wanted), states and weights."""
    with torch.autocast(input.device.type, enabled=False):
        chain = _Chain(cells, backend, product_dtype, states, weights, masks)
        pre, after = chain.buffers(results)
        grads = [grad.clone(memory_format=torch.contiguous_format) for grad in grad_states]
        grad_pre = [torch.empty_like(each) for each in pre]
        of_norms = [torch.empty_like(norm) for cell in chain.cells for norm in cell.norms]
        flags = cells, backend, product_dtype, len(states), len(weights), len(masks)
        read = (grad_outputs.contiguous(), *states, *weights, *masks, *pre, *_flat(after))
        _GRAPHS.run(_steps_backward, flags, read, tuple(grads), (*grad_pre, *of_norms))
        of_weights = chain.weight_gradients(input, after, grad_pre, of_norms)
        of_input = input.new_empty(0)
        if wants_input:
            of_input = chain.input_gradient(grad_pre[0])
        return [of_input, *grads, *of_weights]


def _steps_backward(flags: "_Flags", grad_outputs: Tensor, *tensors: Tensor) -> None:
    """All steps back: `grads` of states, then gradients of pre-activations and layer norms."""
    chain, buffers = _rebuilt(flags, tensors)
    num_cells, num_states = len(chain.cells), flags[3]
    count = num_cells + sum(chain.sizes_of_states)
    pre, after = chain.cut(buffers[:count])
    grads = buffers[count : count + num_states]
    grad_pre = buffers[count + num_states : count + num_states + num_cells]
    for t in reversed(range(len(grad_outputs))):
        chain.backward(t, pre, after, grad_outputs[t], grads, grad_pre)
    of_norms = (norm for cell in chain.cells for norm in cell.rows.grad_norms)
    for out, norm in zip(buffers[count + num_states + num_cells :], of_norms, strict=True):
        out.copy_(norm)


@_chain_backward.register_fake
def _(  # type: ignore[no-untyped-def]  # the operator's arguments, named above
    grad_outputs, grad_states, results, wants_input, input, states, weights, *rest
) -> list[Tensor]:
    of_input = torch.empty_like(input) if wants_input else input.new_empty(0)
    return [of_input, *(torch.empty_like(tensor) for tensor in (*states, *weights))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    input, states, weights, masks, *ctx.rest = inputs
    ctx.counts = len(output), len(states), len(weights)
    ctx.save_for_backward(*output, input, *states, *weights, *masks)


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    num_results, num_states, num_weights = ctx.counts
    saved = ctx.saved_tensors
    results, (input, *tensors) = saved[:num_results], saved[num_results:]
    states, tensors = tensors[:num_states], tensors[num_states:]
    given = [
        torch.zeros_like(result) if grad is None else grad
        for grad, result in zip(grads[: 1 + num_states], results, strict=False)
    ]
    of_input, *rest = _chain_backward(
        given[0],
        given[1:],
        results,
        ctx.needs_input_grad[0],
        input,
        states,
        tensors[:num_weights],
        tensors[num_weights:],
        *ctx.rest,
    )
    num_masks = len(tensors) - num_weights
    return (
        of_input if ctx.needs_input_grad[0] else None,
        rest[:num_states],
        rest[num_states:],
        [None] * num_masks,
        *[None] * len(ctx.rest),
    )


_chain.register_autograd(_gradients, setup_context=_save)
_chain_backward.register_autograd(refuse_second_derivative)


_Flags = tuple[str, str, torch.dtype | None, int, int, int]
"""The operator's plain arguments, then how many states, weights and masks there are."""

_GRAPHS = Graphs()


def _rebuilt(flags: _Flags, tensors: Sequence[Tensor]) -> tuple["_Chain", list[Tensor]]:
    """The chain of an operator's arguments, and the tensors after states, weights and masks."""
    cells, backend, product_dtype, num_states, num_weights, num_masks = flags
    cuts = num_states, num_states + num_weights, num_states + num_weights + num_masks
    states, weights, masks = (
        tensors[begin:end] for begin, end in zip((0, *cuts), cuts, strict=False)
    )
    chain = _Chain(cells, backend, product_dtype, states, weights, masks)
    return chain, list(tensors[cuts[-1] :])


def _flat(after: list[list[Tensor]]) -> list[Tensor]:
    return [buffer for buffers in after for buffer in buffers]


class _Weight:
    """A weight `(P, M)` for some columns of pre-activations, in the dtype of its products."""

    def __init__(self, columns: slice, weight: Tensor) -> None:
        self.columns, self.weight = columns, weight

    def add_to(self, pre: Tensor, rows: Tensor) -> None:
        """Adds rows weight' to the columns."""
        self._add(pre[..., self.columns], rows, self.weight.t())

    def add_gradient(self, grad: Tensor, grad_pre: Tensor) -> None:
        """Adds the gradient of the rows."""
        self._add(grad, grad_pre[..., self.columns], self.weight)

    @staticmethod
    def _add(total: Tensor, rows: Tensor, weight: Tensor) -> None:
        if weight.dtype == total.dtype:
            total.addmm_(rows, weight)
        else:
            total += rows.to(weight.dtype) @ weight


class _CompiledWeight(_Weight):
    """The same on the CPU, by compiled products, each way packed when first used."""

    @cached_property
    def _forward(self) -> cpu.PackedWeight:
        return cpu.PackedWeight(self.weight.float())

    @cached_property
    def _backward(self) -> cpu.PackedWeight:
        return cpu.PackedWeight(self.weight.float().t())

    def add_to(self, pre: Tensor, rows: Tensor) -> None:
        self._forward.add_to(pre[..., self.columns], rows)

    def add_gradient(self, grad: Tensor, grad_pre: Tensor) -> None:
        self._backward.add_to(grad, grad_pre[..., self.columns])


class _Cell:
    """A cell in the operator: its place, weights ready for products, and rows."""

    def __init__(
        self,
        plan: dict[str, Any],
        tensors: Iterator[Tensor],
        masks: Iterator[Tensor],
        backend: str,
        product_dtype: torch.dtype | None,
    ) -> None:
        self.kind, self.source, self.slot = plan["kind"], plan["source"], plan["slot"]
        self.weight_ih, self.bias, self.weight_hh = (next(tensors) for _ in range(3))
        self.norms = tuple(next(tensors) for _ in range(plan["norms"]))
        self.masks = tuple(next(masks) for _ in range(plan["masks"]))
        self.dropout = next(masks) if plan["dropout"] else None
        self.size = self.weight_hh.shape[1]
        self.width = _BLOCKS[self.kind] * self.size
        self.rows = _rows(backend, self.kind, self.norms, plan["options"])
        self._dtype = product_dtype or self.weight_hh.dtype
        gates = slice(0, (4 if self.kind == "lstm" else 2) * self.size)
        # columns of the pre-activations, and the weight from the state that is added to them
        parts = [(gates, self.weight_hh[gates])]
        if self.kind == "gru":
            last = slice(3 * self.size, 4 * self.size)
            parts.append((last, self.weight_hh[2 * self.size :]))
        make = _CompiledWeight if backend == "cpu" else _Weight
        self._of_input = make(slice(0, len(self.weight_ih)), self.weight_ih.to(self._dtype))
        self._of_state = [make(columns, weight.to(self._dtype)) for columns, weight in parts]

    def masks_at(self, t: int) -> tuple[Tensor, ...]:
        return tuple(mask[t] for mask in self.masks)

    def add_input(self, pre: Tensor, input: Tensor) -> None:
        self._of_input.add_to(pre, input)

    def add_state(self, pre: Tensor, hidden: Tensor) -> None:
        for weight in self._of_state:
            weight.add_to(pre, hidden)

    def add_state_gradient(self, grad: Tensor, grad_pre: Tensor) -> None:
        for weight in self._of_state:
            weight.add_gradient(grad, grad_pre)

    def input_gradient(self, grad_pre: Tensor) -> Tensor:
        grad = grad_pre.new_zeros(*grad_pre.shape[:-1], self.weight_ih.shape[1])
        self._of_input.add_gradient(grad, grad_pre)
        return grad

    def weight_gradients(
        self, grad_pre: Tensor, input: Tensor | None, hidden: Tensor
    ) -> list[Tensor]:
        """Of weight_ih, bias and weight_hh, from all steps; input None: nothing."""
        of_input, of_state = torch.zeros_like(self.weight_ih), torch.zeros_like(self.weight_hh)
        if input is not None:
            self._add_weight_gradient(of_input, grad_pre[..., self._of_input.columns], input)
        parts = of_state.split([len(part.weight) for part in self._of_state])
        for part, weight in zip(parts, self._of_state, strict=True):
            self._add_weight_gradient(part, grad_pre[..., weight.columns], hidden)
        return [of_input, grad_pre.sum((0, 1)), of_state]

    def _add_weight_gradient(self, total: Tensor, grad: Tensor, values: Tensor) -> None:
        # contiguous: oneDNN would take a hundred times as long with columns of wider rows
        rows = grad.flatten(0, 1).to(self._dtype).contiguous()
        cpu.add_product(total, rows, values.flatten(0, 1).to(self._dtype))


class _Chain:
    """All cells, and where each finds its state."""

    def __init__(
        self,
        cells: str,
        backend: str,
        product_dtype: torch.dtype | None,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        masks: Sequence[Tensor],
    ) -> None:
        plans, sizes = ast.literal_eval(cells)
        tensors, remaining = iter(weights), iter(masks)
        self.cells = [_Cell(plan, tensors, remaining, backend, product_dtype) for plan in plans]
        self._places: list[slice] = []
        for size in sizes:
            begin = self._places[-1].stop if self._places else 0
            self._places.append(slice(begin, begin + size))
        self._initial = [tuple(states[place]) for place in self._places]

    def empty(self, input: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Buffers for each cell's pre-activations and for its states after every step."""
        leading = input.shape[:2]
        pre = [input.new_empty(*leading, cell.width) for cell in self.cells]
        after = [
            [input.new_empty(*leading, cell.size) for _ in self._initial[cell.slot]]
            for cell in self.cells
        ]
        return pre, after

    @property
    def sizes_of_states(self) -> list[int]:
        """How many tensors each cell's state has."""
        return [len(self._initial[cell.slot]) for cell in self.cells]

    def cut(self, buffers: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Those of `empty`, from one sequence."""
        rest = iter(buffers)
        pre = [next(rest) for _ in self.cells]
        return pre, [[next(rest) for _ in range(size)] for size in self.sizes_of_states]

    def buffers(self, results: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Those of `empty`, from what the forward operator returned."""
        num_states = sum(len(state) for state in self._initial)
        outputs, saved = results[0], iter(results[1 + num_states :])
        pre = [next(saved) for _ in self.cells]
        after = []
        for cell in self.cells:
            is_last = cell is self.cells[-1]
            own = [outputs] if is_last else [next(saved)]
            after.append(own + [next(saved) for _ in self._initial[cell.slot][1:]])
        return pre, after

    def last_states(self, after: list[list[Tensor]]) -> list[Tensor]:
        """By slot, as copies."""
        result = []
        for slot, initial in enumerate(self._initial):
            own = [i for i, cell in enumerate(self.cells) if cell.slot == slot]
            buffers = after[own[-1]]
            last = [buffer[-1] for buffer in buffers] if len(buffers[0]) else list(initial)
            result += [state.clone() for state in last]
        return result

    def project(self, input: Tensor, pre: Tensor) -> None:
        """The input's share of the first cell's pre-activations, for all steps."""
        pre.copy_(self.cells[0].bias.expand_as(pre))
        self.cells[0].add_input(pre.flatten(0, 1), input.flatten(0, 1))

    def input_gradient(self, grad_pre: Tensor) -> Tensor:
        """Of the sequence's input."""
        grad = self.cells[0].input_gradient(grad_pre.flatten(0, 1))
        return grad.view(*grad_pre.shape[:2], grad.shape[1])

    def forward(self, t: int, pre: list[Tensor], after: list[list[Tensor]]) -> None:
        """One step of all cells."""
        for index, cell in enumerate(self.cells):
            own = pre[index][t]
            if cell.source != INPUT:
                own.copy_(cell.bias.expand_as(own))
            if cell.source == PREVIOUS:
                cell.add_input(own, self._passed(index, t, after))
            states = self._before(index, t, after)
            cell.add_state(own, states[0])
            new = tuple(buffer[t] for buffer in after[index])
            cell.rows.forward(own, states, cell.masks_at(t), new)

    def backward(
        self,
        t: int,
        pre: list[Tensor],
        after: list[list[Tensor]],
        grad_output: Tensor,
        grads: list[Tensor],
        grad_pre: list[Tensor],
    ) -> None:
        """Back by one step; `grads`, of the states by slot, go from after to before it."""
        passed: Tensor | None = grad_output
        for index in reversed(range(len(self.cells))):
            cell = self.cells[index]
            own = tuple(grads[self._places[cell.slot]])
            if passed is not None:
                own[0].add_(passed)
            states = self._before(index, t, after)
            new = tuple(buffer[t] for buffer in after[index])
            of_pre = grad_pre[index][t]
            cell.rows.backward(pre[index][t], states, cell.masks_at(t), new, own, of_pre)
            cell.add_state_gradient(own[0], of_pre)
            passed = None
            if cell.source == PREVIOUS:
                passed = cell.input_gradient(of_pre)
                if cell.dropout is not None:
                    passed.mul_(cell.dropout[t])

    def weight_gradients(
        self,
        input: Tensor,
        after: list[list[Tensor]],
        grad_pre: list[Tensor],
        of_norms: list[Tensor],
    ) -> list[Tensor]:
        """Of all cells' weights, from all steps at once."""
        result = []
        norms = iter(of_norms)
        for index, cell in enumerate(self.cells):
            values: Tensor | None = input if cell.source == INPUT else None
            if cell.source == PREVIOUS:
                values = after[index - 1][0]
                if cell.dropout is not None:
                    values = values * cell.dropout
            result += cell.weight_gradients(
                grad_pre[index], values, self._all_before(index, after)
            )
            result += [next(norms) for _ in cell.norms]
        return result

    def _passed(self, index: int, t: int, after: list[list[Tensor]]) -> Tensor:
        """What the cell before hands on at a step."""
        output, dropout = after[index - 1][0][t], self.cells[index].dropout
        return output if dropout is None else output * dropout[t]

    def _source_of_state(self, index: int) -> tuple[int, bool]:
        """The cell whose state this one takes, and whether it is that of the step before."""
        own = [i for i, cell in enumerate(self.cells) if cell.slot == self.cells[index].slot]
        position = own.index(index)
        return own[position - 1], position == 0

    def _before(self, index: int, t: int, after: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """The states that a cell takes at a step."""
        source, is_earlier = self._source_of_state(index)
        if is_earlier and t == 0:
            initial: tuple[Tensor, ...] = self._initial[self.cells[index].slot]
            return initial
        return tuple(buffer[t - is_earlier] for buffer in after[source])

    def _all_before(self, index: int, after: list[list[Tensor]]) -> Tensor:
        """The hidden states that a cell takes at all steps."""
        source, is_earlier = self._source_of_state(index)
        states = after[source][0]
        if not is_earlier:
            return states
        return torch.cat((self._initial[self.cells[index].slot][0].unsqueeze(0), states))[:-1]


def _rows(
    backend: str, kind: str, norms: tuple[Tensor, ...], plain: dict[str, Any] | None
) -> Rows:
    """A cell's rows on a backend, its options from plain values."""
    modules: Any = (gates, fused)
    if backend == "cpu":
        modules = (gates_cpu, cpu)
    elif backend == "triton":
        from rum.kernels import triton_gates, triton_rum  # Triton need not be installed

        modules = (triton_gates, triton_rum)
    rows: Rows
    of_gates, of_rum = modules
    if kind == "rum":
        assert plain is not None
        eta = plain["eta"]
        options = RecurrenceOptions(
            activation=plain["activation"],
            eta=None if eta is None else tuple(eta),
            layer_norm_gate=plain["layer_norm_gate"],
            zoneout=tuple(plain["zoneout"]),
        )
        rows = of_rum.RUMRows(norms, options)
    elif kind == "lstm":
        assert plain is not None
        rows = of_gates.LSTMRows(norms, gates.LSTMOptions(**plain))
    else:
        rows = of_gates.GRURows()
    return rows
