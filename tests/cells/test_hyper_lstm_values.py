"""What a HyperLSTM becomes where its hyper cell says nothing, or only something of the bias.

Random weights are compared with NumPy in test_compact_cells_values.py.
"""

import torch
from torch import Tensor

from rum.cells import HyperLSTMCell, LSTMCell

INPUT_SIZE, SIZE, EMBEDDING = 3, 4, 2


def quiet_pair() -> tuple[HyperLSTMCell, LSTMCell]:
    """A HyperLSTM that scales every row by 1, and the LSTM with its weights."""
    torch.manual_seed(1)
    hyper = HyperLSTMCell(INPUT_SIZE, SIZE, hyper_size=5, embedding_size=EMBEDDING).double()
    lstm = LSTMCell(INPUT_SIZE, SIZE, layer_norm=True).double()
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        hyper.load_state_dict(hyper.state_dict() | lstm.state_dict())
        hyper.embed.zero_()
        hyper.scale[:2].fill_(1 / EMBEDDING)
    return hyper, lstm


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, 2, INPUT_SIZE, generator=generator, dtype=torch.float64)


def test_rows_scaled_by_one_are_an_lstm_with_layer_norm() -> None:
    hyper, lstm = quiet_pair()
    with torch.no_grad():
        output, state = hyper.unroll(inputs())
        expected, (_, cell) = lstm.unroll(inputs())

    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state[1], cell, rtol=0, atol=1e-12)
    assert state[2].abs().max() > 0.01  # the hyper cell runs, unheard


def test_each_scale_is_of_its_own_product() -> None:
    """Doubling the rows of h, of x is doubling W_hh, W_ih: no scale is applied to another part."""
    for part, weight in ((0, "weight_hh"), (1, "weight_ih")):
        hyper, lstm = quiet_pair()
        with torch.no_grad():
            hyper.scale[part].mul_(2)
            getattr(lstm, weight).mul_(2)
            output, expected = hyper.unroll(inputs())[0], lstm.unroll(inputs())[0]
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_the_hyper_cell_is_heard_in_the_step_that_it_takes() -> None:
    hyper, _ = quiet_pair()
    with torch.no_grad():
        before = hyper.unroll(inputs()[:1])[0]
        hyper.embed[8 * EMBEDDING :].fill_(1.0)  # the bias's embeddings
        hyper.scale[2].copy_(torch.arange(hyper.scale[2].numel()).view_as(hyper.scale[2]))
        after = hyper.unroll(inputs()[:1])[0]

    assert (after - before).abs().max() > 1e-3
