"""Recurrent Highway RUM: micro-steps of RUM cells, written out."""

import pytest
import torch

from rum.cells import HighwayRUMCell, RUMCell, RUMCellConfig
from rum.errors import ConfigError


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("lambda_", [0.0, 1.0])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_time_step_is_one_step_of_each_cell_on_one_state(depth: int, lambda_: float) -> None:
    torch.manual_seed(1)
    config = RUMCellConfig(hidden_size=5, lambda_=lambda_, eta=0.9, layer_norm=True)
    cell = HighwayRUMCell(3, config, depth=depth, dtype=torch.float64)
    input = draw(6, 2, 3)

    output, state = cell.unroll(input)

    cells = [module for module in cell.micro if isinstance(module, RUMCell)]
    assert len(cells) == depth
    carried = cells[0].initial_state(2, device=torch.device("cpu"), dtype=torch.float64)
    for t in range(6):
        for micro in cells:
            _, carried = micro(input[t], carried)
        torch.testing.assert_close(output[t], carried[0], rtol=0, atol=1e-12)
    for ours, theirs in zip(state, carried, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_depth_one_is_a_rum() -> None:
    torch.manual_seed(1)
    cell = HighwayRUMCell(3, RUMCellConfig(hidden_size=5), depth=1, dtype=torch.float64)
    plain = RUMCell(3, 5, dtype=torch.float64)
    plain.load_state_dict(cell.micro[0].state_dict())
    input = draw(6, 2, 3)
    torch.testing.assert_close(cell.unroll(input)[0], plain.unroll(input)[0], rtol=0, atol=1e-12)


def test_micro_steps_have_weights_of_their_own() -> None:
    cell = HighwayRUMCell(3, RUMCellConfig(hidden_size=5), depth=3)
    first, second = cell.micro[0], cell.micro[1]
    assert isinstance(first, RUMCell)
    assert isinstance(second, RUMCell)
    assert not torch.equal(first.weight_hh, second.weight_hh)
    one = sum(p.numel() for p in first.parameters())
    assert sum(p.numel() for p in cell.parameters()) == 3 * one


def test_depth_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="depth must be an integer >= 1, got 0"):
        HighwayRUMCell(3, RUMCellConfig(), depth=0)
