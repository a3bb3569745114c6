"""The peers that the timings compare with are what they are said to be."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from rum.cells import RUMCell


@pytest.fixture(scope="module")
def peers() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "peers.py"
    spec = importlib.util.spec_from_file_location("peers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_loop_is_a_rum(peers: Any) -> None:
    torch.manual_seed(0)
    cell = RUMCell(4, 6, backend="reference", dtype=torch.float64)
    plain = peers.EagerRUM(4, 6).double()
    with torch.no_grad():
        plain.gates.weight.copy_(torch.cat((cell.weight_ih[:12], cell.weight_hh), 1))
        plain.gates.bias.copy_(cell.bias)
        plain.embed.weight.copy_(cell.weight_ih[12:])
        plain.embed.bias.copy_(cell.embedding_bias)
    input = torch.randn(5, 3, 4, dtype=torch.float64)
    # the root of the plain form has a floor of 1e-8
    torch.testing.assert_close(plain(input)[0], cell.unroll(input)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [50, 250, 1024, 2000])
def test_equal_layers_have_the_parameters_of_a_rum(peers: Any, size: int) -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    wanted = count(RUMCell(32, size))
    for kind, gates in ((torch.nn.LSTM, 4), (torch.nn.GRU, 3)):
        got = count(kind(32, peers.equal_size(size, 32, gates)))
        assert abs(got - wanted) < 0.02 * wanted


def test_measured_times_are_medians_of_turns(peers: Any) -> None:
    calls: list[str] = []
    medians = peers.measure({name: lambda n=name: calls.append(n) for name in "ab"}, 3)
    assert calls == ["a", "b"] * 5  # two rounds to warm up
    assert set(medians) == {"a", "b"}
