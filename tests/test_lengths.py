"""Sequences of different lengths: `lengths=` and `PackedSequence`."""

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import rum
from rum.cells import LSTMCellConfig, RUMCellConfig
from rum.interop import lstm_from_torch
from rum.layers import RecurrentLayer

INPUT_SIZE = 3
LENGTHS = [2, 5, 0, 5, 1]
STEPS = 6  # one more than the longest

LAYERS = {
    "rum": lambda: rum.RUM(INPUT_SIZE, 4, num_layers=2, eta=1.0),
    "rum-memory": lambda: rum.RUM(INPUT_SIZE, 4, lambda_=1),
    "rum-leaking": lambda: rum.RUM(INPUT_SIZE, 4, lambda_=0.4, num_layers=2),
    "lstm": lambda: rum.LSTM(INPUT_SIZE, 4, num_layers=2, layer_norm=True),
    "gru": lambda: rum.GRU(INPUT_SIZE, 4),
    "goru": lambda: rum.GORU(INPUT_SIZE, 4),
    "eunn": lambda: rum.EUNN(INPUT_SIZE, 4),
    "fast-weights": lambda: rum.FastWeights(INPUT_SIZE, 4),
    "weinet": lambda: rum.WeiNet(INPUT_SIZE, 4),
    "nas": lambda: rum.NAS(INPUT_SIZE, 4, num_layers=2),
    "hyper-lstm": lambda: rum.HyperLSTM(INPUT_SIZE, 4, hyper_size=2),
    "hm-lstm": lambda: rum.HMLSTM(INPUT_SIZE, 4),
    "ntm": lambda: rum.NTM(INPUT_SIZE, 4, memory_size=5, memory_width=2),
    "highway": lambda: rum.HighwayRUM(INPUT_SIZE, RUMCellConfig(hidden_size=4)),
    "fs-rum": lambda: rum.FastSlowRNN(
        INPUT_SIZE,
        fast=LSTMCellConfig(hidden_size=3),
        slow=RUMCellConfig(hidden_size=2, lambda_=1),
    ),
}

every_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str) -> RecurrentLayer:
    torch.manual_seed(1)
    layer: RecurrentLayer = LAYERS[name]()
    return layer.double().eval()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@every_layer
def test_each_sequence_is_run_to_its_own_length(name: str) -> None:
    layer = build(name)
    input = draw(STEPS, len(LENGTHS), INPUT_SIZE)

    output, state = layer(input, lengths=torch.tensor(LENGTHS))

    assert output.shape == (STEPS, len(LENGTHS), layer.hidden_size)
    for row, length in enumerate(LENGTHS):
        alone, state_alone = layer(input[:length, row : row + 1])
        torch.testing.assert_close(output[:length, row : row + 1], alone, rtol=0, atol=1e-12)
        assert (output[length:, row] == 0).all()
        for ours, theirs in zip(state, state_alone, strict=True):
            torch.testing.assert_close(ours[:, row : row + 1], theirs, rtol=0, atol=1e-12)


@every_layer
def test_the_state_goes_on_where_each_sequence_ended(name: str) -> None:
    layer = build(name)
    lengths = torch.tensor([4, 1, 2])
    first, second = draw(4, 3, INPUT_SIZE), draw(3, 3, INPUT_SIZE)

    _, between = layer(first, lengths=lengths)
    output, _ = layer(second, between)

    for row, length in enumerate(lengths.tolist()):
        joined = torch.cat((first[:length, row], second[:, row])).unsqueeze(1)
        whole, _ = layer(joined)
        torch.testing.assert_close(output[:, row], whole[length:, 0], rtol=0, atol=1e-12)


def test_padding_has_no_gradient_and_counted_steps_have() -> None:
    layer = build("rum")
    input = draw(STEPS, len(LENGTHS), INPUT_SIZE).requires_grad_()
    layer(input, lengths=torch.tensor(LENGTHS))[0].sum().backward()
    assert input.grad is not None
    for row, length in enumerate(LENGTHS):
        assert (input.grad[length:, row] == 0).all()
        assert (input.grad[:length, row] != 0).any(-1).all()


def test_training_masks_are_drawn_for_each_sequence() -> None:
    torch.manual_seed(3)
    layer = rum.RUM(INPUT_SIZE, 4, zoneout=0.5).double()
    output, (hidden,) = layer(draw(4, 2, INPUT_SIZE), lengths=torch.tensor([4, 2]))
    assert torch.equal(hidden[0, 0], output[3, 0])
    assert torch.equal(hidden[0, 1], output[1, 1])


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_sequences_are_those_of_torch(batch_first: bool, enforce_sorted: bool) -> None:
    torch.manual_seed(4)
    theirs = torch.nn.LSTM(INPUT_SIZE, 5, batch_first=batch_first).double()
    ours = lstm_from_torch(theirs)
    lengths = [5, 4, 4, 1] if enforce_sorted else [1, 4, 5, 4]
    input = draw(4, 5, INPUT_SIZE) if batch_first else draw(5, 4, INPUT_SIZE)
    packed = pack_padded_sequence(
        input, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=enforce_sorted
    )

    output, (hidden, cell) = ours(packed)

    expected, (expected_hidden, expected_cell) = theirs(packed)
    assert isinstance(output, PackedSequence)
    torch.testing.assert_close(output.data, expected.data, rtol=0, atol=1e-12)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        got, wanted = getattr(output, name), getattr(expected, name)
        assert (got is None and wanted is None) or torch.equal(got, wanted)
    torch.testing.assert_close(hidden, expected_hidden, rtol=0, atol=1e-12)
    torch.testing.assert_close(cell, expected_cell, rtol=0, atol=1e-12)


def test_a_packed_sequence_equals_lengths() -> None:
    layer = build("rum-memory")
    sequences = [draw(length, INPUT_SIZE) for length in (2, 4, 3)]
    output, _ = pad_packed_sequence(layer(pack_sequence(sequences, enforce_sorted=False))[0])
    padded = torch.nn.utils.rnn.pad_sequence(sequences)
    expected, _ = layer(padded, lengths=torch.tensor([2, 4, 3]))
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "lengths", [[2, 3], [1, 2, 7], [1, -1, 2], [1.0, 2.0, 3.0], [[1, 2, 3]]], ids=str
)
def test_lengths_that_do_not_fit_are_refused(lengths: list[float]) -> None:
    with pytest.raises(ValueError, match=r"lengths must be 3 integers in \[0, 6\], got"):
        build("rum")(draw(STEPS, 3, INPUT_SIZE), lengths=torch.tensor(lengths))


def test_lengths_are_integers_in_a_tensor() -> None:
    with pytest.raises(ValueError, match="must be 3 integers"):
        build("rum")(draw(STEPS, 3, INPUT_SIZE), lengths=torch.tensor([True, True, False]))
    with pytest.raises(TypeError, match="lengths must be a tensor, got list"):
        build("rum")(draw(STEPS, 3, INPUT_SIZE), lengths=[1, 2, 3])


@every_layer
def test_an_empty_batch_has_lengths_too(name: str) -> None:
    output, state = build(name)(
        draw(STEPS, 0, INPUT_SIZE), lengths=torch.zeros(0, dtype=torch.long)
    )
    assert output.shape[:2] == (STEPS, 0)
    assert all(tensor.shape[1] == 0 for tensor in state)


def test_lengths_need_a_batch_and_no_packing() -> None:
    with pytest.raises(ValueError, match="belong to a batch"):
        build("rum")(draw(STEPS, INPUT_SIZE), lengths=torch.tensor([2]))
    packed = pack_sequence([draw(2, INPUT_SIZE)])
    with pytest.raises(ValueError, match="has its own"):
        build("rum")(packed, lengths=torch.tensor([2]))
