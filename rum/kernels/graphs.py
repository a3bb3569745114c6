"""CUDA graphs over buffers of their own: many small launches for the price of one.

A step of a recurrence is two kernels of a few microseconds each; launching them one by one costs
about as much as running them.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]


@dataclass
class _Captured:
    """A graph, and the buffers that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    read: Tensors
    changed: Tensors
    filled: Tensors


class Graphs:
    """Runs functions from captured graphs, of which it keeps those that were used last.

    The first call with a key runs the function as it is, the second captures it: sequences whose
    length changes with every call are not worth a capture.
    """

    def __init__(self, capacity: int = 4) -> None:
        """Keeps at most `capacity` graphs, each with buffers of the size of its tensors."""
        self._capacity = capacity
        self._seen: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self._lock = threading.Lock()  # backward runs in threads of autograd

    def run(
        self,
        function: Callable[..., None],
        flags: Hashable,
        read: Tensors,
        changed: Tensors = (),
        filled: Tensors = (),
    ) -> None:
        """Calls `function(flags, *read, *changed, *filled)`, or replays such a call.

        Args:
            function: Writes into the tensors that it gets, without waiting for the device; one
                object for all calls.
            flags: All that it depends on, tensors apart.
            read: Contiguous, not written.
            changed: Contiguous, read and written.
            filled: Contiguous, written without being read.
        """
        tensors = (*read, *changed, *filled)
        if not _can_capture(tensors):
            function(flags, *tensors)
            return
        key = key_of(function, flags, tensors)
        with self._lock:
            is_known, captured = self.look_up(key)
            if is_known and captured is None:
                captured = self._seen[key] = _capture(function, flags, read, changed, filled)
        if captured is None:
            function(flags, *tensors)
            return
        _copy((*captured.read, *captured.changed), (*read, *changed))
        captured.graph.replay()
        _copy((*changed, *filled), (*captured.changed, *captured.filled))

    def look_up(self, key: Hashable) -> tuple[bool, Any]:
        """Whether the key was there, and its graph if captured; it is now the last one used."""
        is_known = key in self._seen
        captured = self._seen.setdefault(key, None)
        self._seen.move_to_end(key)
        while len(self._seen) > self._capacity:
            self._seen.popitem(last=False)
        return is_known, captured


def key_of(function: Callable[..., None], flags: Hashable, tensors: Tensors) -> Hashable:
    """What calls must share to share a graph.

    The stream is a part of it: two streams would write into the same buffers at once.
    """
    device = next(tensor.device for tensor in tensors if tensor is not None)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    like = tuple(None if x is None else (tuple(x.shape), x.dtype) for x in tensors)
    return function, flags, like, device, stream


def _can_capture(tensors: Tensors) -> bool:
    if any(tensor is not None and tensor.device.type != "cuda" for tensor in tensors):
        return False
    return not torch.cuda.is_current_stream_capturing()


def _capture(
    function: Callable[..., None],
    flags: Hashable,
    read: Tensors,
    changed: Tensors,
    filled: Tensors,
) -> _Captured:
    buffers = [
        tuple(None if x is None else torch.empty_like(x) for x in group)
        for group in (read, changed, filled)
    ]
    _copy((*buffers[0], *buffers[1]), (*read, *changed))
    arguments = (flags, *buffers[0], *buffers[1], *buffers[2])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels and makes the libraries' workspaces
        function(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # "thread_local": another thread's loader may allocate pinned memory meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function(*arguments)
    return _Captured(graph, buffers[0], buffers[1], buffers[2])


def _copy(to: Tensors, of: Tensors) -> None:
    for a, b in zip(to, of, strict=True):
        if a is not None and b is not None:
            a.copy_(b)
