"""Graphs: which calls share one, what is copied, and on a device that a replay is the call."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rum.kernels import graphs
from rum.kernels.graphs import Captured, Graphs, key_of


def double(flags: float, read: Tensor, bias: Tensor | None, total: Tensor, filled: Tensor) -> None:
    filled.copy_(flags * read + (0 if bias is None else bias))
    total += filled


class FakeGraphs:
    """Stands in for the device: a replay calls the function on the buffers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures = 0
        monkeypatch.setattr(graphs, "can_capture", lambda tensors: True)
        monkeypatch.setattr(graphs, "capture", self.capture)

    def capture(self, function: Any, flags: Any, *groups: Any) -> Captured:
        self.captures += 1
        buffers = [tuple(x if x is None else x.new_zeros(x.shape) for x in g) for g in groups]

        class Graph:
            def replay(self) -> None:
                function(flags, *buffers[0], *buffers[1], *buffers[2])

        return Captured(Graph(), *buffers)  # type: ignore[arg-type]


def call(runner: Graphs, size: int = 3, flags: float = 2.0, device: str = "cpu") -> list[Tensor]:
    read = torch.arange(size, dtype=torch.float32, device=device)
    total, filled = torch.ones_like(read), torch.full_like(read, torch.nan)
    runner.run(double, flags, (read, None), (total,), (filled,))
    return [read, total, filled]


def assert_is_doubled(tensors: list[Tensor], flags: float = 2.0) -> None:
    read, total, filled = tensors
    assert torch.equal(filled, flags * read)
    assert torch.equal(total, 1 + flags * read)


def test_without_a_device_the_function_is_called() -> None:
    runner = Graphs()
    for _ in range(3):
        assert_is_doubled(call(runner))
    assert not runner._seen


def test_the_second_call_captures_and_later_ones_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, runner = FakeGraphs(monkeypatch), Graphs()
    for captures in (0, 1, 1, 1):
        assert_is_doubled(call(runner))
        assert fake.captures == captures


def test_other_shapes_and_flags_have_other_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, runner = FakeGraphs(monkeypatch), Graphs()
    for _ in range(3):
        assert_is_doubled(call(runner, size=3))
        assert_is_doubled(call(runner, size=4))
        assert_is_doubled(call(runner, flags=3.0), 3.0)
    assert fake.captures == 3


def test_those_used_longest_ago_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, runner = FakeGraphs(monkeypatch), Graphs(capacity=2)
    for size in (3, 3, 4, 4, 3, 5):  # 4 goes
        call(runner, size)
    assert fake.captures == 2
    call(runner, 3)
    assert fake.captures == 2  # still there
    for _ in range(2):
        call(runner, 4)
    assert fake.captures == 3


def test_keys() -> None:
    x, y = torch.zeros(2, 3), torch.zeros(3, 2)
    assert key_of(double, 1, (x, None)) == key_of(double, 1, (x + 1, None))
    others = [(x, x), (y, None), (x.double(), None)]
    assert len({key_of(double, 1, tensors) for tensors in [(x, None), *others]}) == 4
    assert key_of(double, 1, (x,)) != key_of(double, 2, (x,))
    assert key_of(double, 1, (x,)) != key_of(assert_is_doubled, 1, (x,))


@pytest.mark.gpu
def test_replays_on_a_device() -> None:
    runner = Graphs()
    for _ in range(4):
        assert_is_doubled(call(runner, device="cuda"))
    assert any(captured is not None for captured in runner._seen.values())


@pytest.mark.gpu
def test_a_graph_of_inference_serves_training() -> None:
    runner = Graphs()
    with torch.inference_mode():
        for _ in range(2):
            assert_is_doubled(call(runner, device="cuda"))
    assert_is_doubled(call(runner, device="cuda"))


@pytest.mark.gpu
def test_within_another_capture_the_function_is_called() -> None:
    runner, other = Graphs(), torch.cuda.CUDAGraph()
    call(runner, device="cuda")
    with torch.cuda.graph(other):
        tensors = call(runner, device="cuda")
    other.replay()
    assert_is_doubled(tensors)
