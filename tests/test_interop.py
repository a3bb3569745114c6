"""Weights of the authors' PyTorch RUM and of `torch.nn.LSTM` in this library."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rum.interop import gru_from_torch, lstm_from_torch, rum_from_authors

BATCH, STEPS, INPUT_SIZE, SIZE = 3, 6, 4, 5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of tiny operations only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def authors_weights(prefix: str = "", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of the authors' RUMCell."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "r_kernel": (INPUT_SIZE + SIZE, SIZE),
        "r_bias": (SIZE,),
        "u_kernel": (INPUT_SIZE + SIZE, SIZE),
        "u_bias": (SIZE,),
        "inp_emb_kernel": (INPUT_SIZE, SIZE),
        "inp_emb_bias": (SIZE,),
    }
    return {
        prefix + name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def draw(*shape: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rotation(source: Tensor, target: Tensor) -> Tensor:
    """The authors' matrix for one pair: I - uu' - vv' + [u v] R(angle) [u v]'."""
    u = source / source.norm()
    v = target - (u @ target) * u
    v = v / v.norm()
    cosine = u @ target / target.norm()
    sine = torch.sqrt(1 - cosine**2)
    plane = torch.stack((u, v), 1)
    turn = torch.stack((torch.stack((cosine, -sine)), torch.stack((sine, cosine))))
    return torch.eye(len(u), dtype=u.dtype) - plane @ plane.T + plane @ turn @ plane.T


def authors_rum(
    weights: dict[str, Tensor], input: Tensor, lambda_: int, eta: float | None
) -> tuple[Tensor, Tensor]:
    """Outputs `(B, T, N)` and the last memories, from zero states and identities."""
    outputs = torch.zeros(BATCH, STEPS, SIZE, dtype=torch.float64)
    memories = torch.zeros(BATCH, SIZE, SIZE, dtype=torch.float64)
    for b in range(BATCH):
        h = torch.zeros(SIZE, dtype=torch.float64)
        memory = torch.eye(SIZE, dtype=torch.float64)
        for t in range(STEPS):
            x = input[b, t]
            joint = torch.cat((x, h))
            r = joint @ weights["r_kernel"] + weights["r_bias"]
            u = torch.sigmoid(joint @ weights["u_kernel"] + weights["u_bias"])
            embedded = x @ weights["inp_emb_kernel"] + weights["inp_emb_bias"]
            turn = rotation(embedded, r)
            memory = memory @ turn if lambda_ == 1 else turn
            candidate = torch.relu(memory @ h + embedded)
            h = u * h + (1 - u) * candidate
            if eta is not None:
                h = eta * h / h.norm()
            outputs[b, t] = h
        memories[b] = memory
    return outputs, memories


@pytest.mark.parametrize("prefix", ["", "rum_cell."])
@pytest.mark.parametrize("eta", [None, 0.7])
@pytest.mark.parametrize("lambda_", [0, 1])
def test_rum_from_authors_computes_their_equations(
    lambda_: int, eta: float | None, prefix: str
) -> None:
    input = draw(BATCH, STEPS, INPUT_SIZE)
    layer = rum_from_authors(authors_weights(prefix), lambda_=lambda_, eta=eta)

    with torch.no_grad():
        output, state = layer(input)

    expected, memories = authors_rum(authors_weights(), input, lambda_, eta)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)
    assert len(state) == 1 + lambda_
    if lambda_ == 1:
        torch.testing.assert_close(state[1][0], memories, rtol=0, atol=1e-11)


def test_rum_from_authors_may_be_time_first() -> None:
    input = draw(BATCH, STEPS, INPUT_SIZE)
    layer = rum_from_authors(authors_weights(), batch_first=False)

    with torch.no_grad():
        output, _ = layer(input.transpose(0, 1))

    expected, _ = authors_rum(authors_weights(), input, 0, None)
    torch.testing.assert_close(output.transpose(0, 1), expected, rtol=0, atol=1e-11)


def test_rum_from_authors_copies_the_weights_in_their_dtype() -> None:
    weights = authors_weights(dtype=torch.float32)
    layer = rum_from_authors(weights)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}

    for tensor in weights.values():
        tensor.zero_()

    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.any()


@pytest.mark.parametrize("prefix", ["", "rum_cell."])
@pytest.mark.parametrize("missing", sorted(authors_weights()))
def test_rum_from_authors_refuses_a_missing_weight(missing: str, prefix: str) -> None:
    weights = authors_weights(prefix)
    del weights[prefix + missing]

    with pytest.raises(ValueError, match=r"weights must be \['inp_emb_bias', .*got \["):
        rum_from_authors(weights)


@pytest.mark.parametrize("extra", ["gates.weight", "cell.r_kernel", "rum_cell.kernel"])
def test_rum_from_authors_refuses_an_unknown_weight(extra: str) -> None:
    with pytest.raises(ValueError, match=extra):
        rum_from_authors({**authors_weights(), extra: torch.zeros(1)})


@pytest.mark.parametrize(
    "options", [{"bidirectional": True}, {"proj_size": 2}], ids=["bidirectional", "projections"]
)
def test_lstm_from_torch_refuses_what_it_cannot_compute(options: dict[str, int]) -> None:
    module = torch.nn.LSTM(INPUT_SIZE, SIZE, **options)

    with pytest.raises(ValueError, match="unidirectional and without projections"):
        lstm_from_torch(module)


@pytest.mark.parametrize("training", [True, False])
def test_lstm_from_torch_keeps_mode_dtype_and_options(training: bool) -> None:
    module = torch.nn.LSTM(
        INPUT_SIZE, SIZE, 2, batch_first=True, dropout=0.25, dtype=torch.float64
    )

    layer = lstm_from_torch(module.train(training))

    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert layer.training is training
    assert all(cell.training is training for cell in layer.cells)
    assert (layer.batch_first, layer.dropout, layer.num_layers) == (True, 0.25, 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_gru_from_torch_computes_the_same(num_layers: int, bias: bool) -> None:
    torch.manual_seed(3)
    module = torch.nn.GRU(INPUT_SIZE, SIZE, num_layers, bias=bias, batch_first=True).double()
    input, start = draw(BATCH, STEPS, INPUT_SIZE), draw(num_layers, BATCH, SIZE)

    with torch.no_grad():
        output, (hidden,) = gru_from_torch(module)(input, (start,))
        expected, expected_hidden = module(input, start)

    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden, expected_hidden, rtol=0, atol=1e-12)


def test_gru_from_torch_refuses_two_directions() -> None:
    with pytest.raises(ValueError, match="unidirectional"):
        gru_from_torch(torch.nn.GRU(INPUT_SIZE, SIZE, bidirectional=True))
