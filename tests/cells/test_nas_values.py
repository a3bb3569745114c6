"""NASCell worked out by hand; random weights are in test_compact_cells_values.py."""

import math

import pytest
import torch

from rum.cells import NASCell

LOG_3 = math.log(3)  # sigmoid(log 3) = 3 / 4, tanh(log(3) / 2) = 1 / 2


@pytest.mark.parametrize(
    ("recurrent", "cell_state", "hidden"),
    [
        # m = tanh(3/4 * 2), tanh(1/4 + 2 * 3/2), tanh(1/2 * 3/4), sigmoid(1/2 + 1/2)
        (1.5, 0.716637326232316579, 0.516034458347772650),
        # the fourth product is negative: tanh(1/4 + 0); a sum would be 2 - 3/2 > 0
        (-1.5, 0.176046410866098343, 0.139337596497310645),
    ],
)
def test_a_single_unit(recurrent: float, cell_state: float, hidden: float) -> None:
    cell = NASCell(1, 1).double()
    from_input = [LOG_3, 2.0, -LOG_3, 2.0, LOG_3 / 2, LOG_3, LOG_3 / 2, 0.0]
    with torch.no_grad():
        cell.weight_ih.copy_(torch.tensor(from_input, dtype=torch.float64).unsqueeze(-1))
        cell.bias.zero_()
        cell.bias[3] = recurrent

        output, (_, after) = cell(torch.ones(1, 1, dtype=torch.float64))

    assert output.item() == pytest.approx(hidden, rel=0, abs=1e-14)
    assert after.item() == pytest.approx(cell_state, rel=0, abs=1e-14)


def test_the_cell_state_is_added_before_the_gate_and_after_the_first_tanh() -> None:
    """With all products 0: m1 = 0, m2 = tanh(1/2), m3 = 0, m4 = sigmoid(1/2)."""
    cell = NASCell(1, 1).double()
    before = torch.full((1, 1), LOG_3 / 2, dtype=torch.float64)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        output, (_, after) = cell(torch.zeros_like(before), (torch.zeros_like(before), before))

    expected = 0.5 * math.tanh(0.5)
    assert after.item() == pytest.approx(expected, rel=0, abs=1e-14)
    by_hand = math.tanh(expected * math.tanh(1 / (1 + math.exp(-0.5))))
    assert output.item() == pytest.approx(by_hand, rel=0, abs=1e-14)
