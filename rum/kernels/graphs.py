"""CUDA graphs over buffers of their own: many small launches for the price of one.

A step of a recurrence is two kernels of a few microseconds each; launching them one by one costs
about as much as running them.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]


@dataclass
class Captured:
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
        self._seen: OrderedDict[Hashable, Captured | None] = OrderedDict()
        self._lock = threading.Lock()  # backward runs in threads of autograd

    @torch.no_grad()
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
        if can_capture(tensors):
            with self._lock:  # also for the replay: the buffers serve one call at a time
                key = key_of(function, flags, tensors)
                is_known = key in self._seen
                captured = self._seen.setdefault(key, None)
                self._seen.move_to_end(key)
                if is_known and captured is None:
                    captured = self._seen[key] = capture(function, flags, read, changed, filled)
                elif len(self._seen) > self._capacity:
                    self._seen.popitem(last=False)
                if captured is not None:
                    _copy((*captured.read, *captured.changed), (*read, *changed))
                    captured.graph.replay()
                    _copy((*changed, *filled), (*captured.changed, *captured.filled))
                    return
        function(flags, *tensors)


def key_of(function: Callable[..., None], flags: Hashable, tensors: Tensors) -> Hashable:
    """What calls must share to share a graph.

    The stream is a part of it: two streams would write into the same buffers at once.
    """
    device = next(tensor.device for tensor in tensors if tensor is not None)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    like = tuple(None if x is None else (tuple(x.shape), x.dtype) for x in tensors)
    return function, flags, like, device, stream


def can_capture(tensors: Tensors) -> bool:
    """Not off a CUDA device, and not into a capture that is under way."""
    if any(tensor is not None and tensor.device.type != "cuda" for tensor in tensors):
        return False
    return not torch.cuda.is_current_stream_capturing()


def capture(
    function: Callable[..., None],
    flags: Hashable,
    read: Tensors,
    changed: Tensors,
    filled: Tensors,
) -> Captured:
    """Captures a call on the current device, over new buffers."""
    with torch.inference_mode(False):  # the buffers serve calls in other modes too
        groups = [
            tuple(None if x is None else torch.empty_like(x) for x in group)
            for group in (read, changed, filled)
        ]
    _copy((*groups[0], *groups[1]), (*read, *changed))
    arguments = (flags, *groups[0], *groups[1], *groups[2])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels and makes the libraries' workspaces
        function(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # "thread_local": another thread's loader may allocate pinned memory meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function(*arguments)
    return Captured(graph, *groups)


def _copy(to: Tensors, of: Tensors) -> None:
    for a, b in zip(to, of, strict=True):
        if a is not None and b is not None:
            a.copy_(b)
