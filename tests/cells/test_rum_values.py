"""The RUM cell against its equations, written out again with explicit N x N matrices."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rum.cells import RUMCell
from rum.cells.layer_norm import LayerNorm

Array = NDArray[np.float64]

STEPS, BATCH, INPUT_SIZE, SIZE = 5, 3, 4, 6

# layer_norm, layer_norm_gate
LAYER_NORMS = {
    "off": (False, "post_sigmoid"),
    "post_sigmoid": (True, "post_sigmoid"),
    "pre_sigmoid": (True, "pre_sigmoid"),
}
# embedding_bias, zoneout, activation
VARIANTS = [
    (True, 0.0, "relu"),
    (False, 0.1, "relu"),
    (True, 0.1, "tanh"),
    (False, 0.0, "tanh"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of tiny operations only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def every_option(test: Any) -> Any:
    for name, values in (
        ("layer_norm", list(LAYER_NORMS)),
        ("eta", [None, 0.7]),
        ("lambda_", [0.0, 1.0]),
    ):
        test = pytest.mark.parametrize(name, values)(test)
    return pytest.mark.parametrize(("embedding_bias", "zoneout", "activation"), VARIANTS)(test)


def random_cell(*, layer_norm: str = "off", **options: Any) -> RUMCell:
    """A cell in evaluation with every parameter drawn at random, layer norm and biases too."""
    use, gate = LAYER_NORMS[layer_norm]
    cell = RUMCell(
        INPUT_SIZE,
        SIZE,
        layer_norm=use,
        layer_norm_gate=gate,
        dtype=torch.float64,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * draw if name.endswith("gain") else 0.6 * draw)
    return cell.eval()


def random_input() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(STEPS, BATCH, INPUT_SIZE, generator=generator, dtype=torch.float64)


def random_state(lambda_: float) -> tuple[Tensor, ...]:
    """A hidden state and, for lambda = 1, orthogonal matrices other than the identity."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(BATCH, SIZE, generator=generator, dtype=torch.float64)
    if lambda_ == 0:
        return (hidden,)
    noise = torch.randn(BATCH, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return hidden, torch.linalg.qr(noise)[0]


def numpy_rotation(source: Array, target: Array) -> Array:
    """Turns the direction of `source` to that of `target`; the rest stays."""
    u = source / np.sqrt(source @ source)
    rest = target - (u @ target) * u
    v = rest / np.sqrt(rest @ rest)
    cosine = (u @ target) / np.sqrt(target @ target)
    plane = np.stack((u, v), axis=1)
    sine = np.sqrt(1 - cosine**2)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    matrix: Array = np.eye(len(u)) - plane @ plane.T + plane @ turn @ plane.T
    return matrix


def numpy_layer_norm(x: Array, gain: Array, shift: Array) -> Array:
    normal: Array = (x - x.mean()) / np.sqrt(x.var() + 1e-3) * gain + shift
    return normal


def numpy_sigmoid(x: Array) -> Array:
    value: Array = 1 / (1 + np.exp(-x))
    return value


def numpy_rum(cell: RUMCell, input: Array, hidden: Array, memory: Array) -> tuple[Array, Array]:
    """One sample, one step: h and R before, h and R after."""
    size = cell.hidden_size
    weights = {name: tensor.numpy() for name, tensor in cell.state_dict().items()}
    w_target, w_update, w_embedding = weights["weight_ih"].reshape(3, size, -1)
    v_target, v_update = weights["weight_hh"].reshape(2, size, size)
    b_target, b_update = weights["bias"].reshape(2, size)

    target = w_target @ input + v_target @ hidden + b_target
    update = w_update @ input + v_update @ hidden + b_update
    if cell.layer_norm_gate != "pre_sigmoid":
        update = numpy_sigmoid(update)
    if cell.layer_norm_gate is not None:
        gain = weights["gate_norm.gain"].reshape(2, size)
        shift = weights["gate_norm.shift"].reshape(2, size)
        target = numpy_layer_norm(target, gain[0], shift[0])
        update = numpy_layer_norm(update, gain[1], shift[1])
    if cell.layer_norm_gate == "pre_sigmoid":
        update = numpy_sigmoid(update)
    embedded = w_embedding @ input + weights.get("embedding_bias", np.zeros(size))

    turn = numpy_rotation(embedded, target)
    memory = memory @ turn if cell.lambda_ else turn
    candidate = embedded + memory @ hidden
    if cell.layer_norm_gate is not None:
        candidate = numpy_layer_norm(
            candidate, weights["candidate_norm.gain"], weights["candidate_norm.shift"]
        )
    candidate = np.maximum(candidate, 0) if cell.activation == "relu" else np.tanh(candidate)
    new = update * hidden + (1 - update) * candidate
    if cell.eta is not None:
        new = cell.eta * new / np.sqrt(new @ new)
    return (1 - cell.zoneout) * new + cell.zoneout * hidden, memory


def numpy_rum_sequence(
    cell: RUMCell, input: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    outputs = np.zeros((STEPS, BATCH, SIZE))
    memories = np.zeros((BATCH, SIZE, SIZE))
    for b in range(BATCH):
        hidden = state[0][b].numpy()
        memory = state[1][b].numpy() if len(state) > 1 else np.eye(SIZE)
        for t in range(STEPS):
            hidden, memory = numpy_rum(cell, input[t, b].numpy(), hidden, memory)
            outputs[t, b] = hidden
        memories[b] = memory
    last = torch.from_numpy(outputs)
    after = (last[-1],) if len(state) == 1 else (last[-1], torch.from_numpy(memories))
    return last, after


def torch_rum_sequence(
    cell: RUMCell, input: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same equations for plain autograd, batched, with explicit matrices."""
    size = cell.hidden_size
    w_target, w_update, w_embedding = cell.weight_ih.split(size)
    v_target, v_update = cell.weight_hh.split(size)
    b_target, b_update = cell.bias.split(size)
    identity = torch.eye(size, dtype=torch.float64)

    def normalized(x: Tensor, norm: LayerNorm, part: int) -> Tensor:
        variance = x.var(-1, unbiased=False, keepdim=True)
        gain, shift = norm.gain.split(size)[part], norm.shift.split(size)[part]
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-3) * gain + shift

    hidden = state[0]
    memory = state[1] if len(state) > 1 else identity
    outputs = []
    for x in input:
        target = x @ w_target.T + hidden @ v_target.T + b_target
        update = x @ w_update.T + hidden @ v_update.T + b_update
        if cell.layer_norm_gate != "pre_sigmoid":
            update = torch.sigmoid(update)
        if cell.gate_norm is not None:
            target = normalized(target, cell.gate_norm, 0)
            update = normalized(update, cell.gate_norm, 1)
        if cell.layer_norm_gate == "pre_sigmoid":
            update = torch.sigmoid(update)
        embedded = x @ w_embedding.T
        if cell.embedding_bias is not None:
            embedded = embedded + cell.embedding_bias
        a = embedded / torch.linalg.vector_norm(embedded, dim=-1, keepdim=True)
        b = target / torch.linalg.vector_norm(target, dim=-1, keepdim=True)
        k = b[:, :, None] * a[:, None, :] - a[:, :, None] * b[:, None, :]
        turn = identity + k + k @ k / (1 + (a * b).sum(-1))[:, None, None]
        memory = memory @ turn if cell.lambda_ else turn
        candidate = embedded + torch.einsum("bij,bj->bi", memory, hidden)
        if cell.candidate_norm is not None:
            candidate = normalized(candidate, cell.candidate_norm, 0)
        candidate = candidate.clamp(min=0) if cell.activation == "relu" else candidate.tanh()
        new = update * hidden + (1 - update) * candidate
        if cell.eta is not None:
            new = cell.eta * new / torch.linalg.vector_norm(new, dim=-1, keepdim=True)
        hidden = (1 - cell.zoneout) * new + cell.zoneout * hidden
        outputs.append(hidden)
    after = (hidden,) if len(state) == 1 else (hidden, memory)
    return torch.stack(outputs), after


@pytest.mark.parametrize("backend", ["auto", "reference"])
@every_option
def test_values_equal_the_equations(
    layer_norm: str,
    eta: float | None,
    lambda_: float,
    embedding_bias: bool,
    zoneout: float,
    activation: str,
    backend: str,
) -> None:
    cell = random_cell(
        layer_norm=layer_norm,
        eta=eta,
        lambda_=lambda_,
        embedding_bias=embedding_bias,
        zoneout=zoneout,
        activation=activation,
        backend=backend,
    )
    input, state = random_input(), random_state(lambda_)

    with torch.no_grad():
        actual = cell.unroll(input, state)

    expected = numpy_rum_sequence(cell, input, state)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@every_option
def test_gradients_equal_those_of_the_equations(
    layer_norm: str,
    eta: float | None,
    lambda_: float,
    embedding_bias: bool,
    zoneout: float,
    activation: str,
    backend: str,
) -> None:
    cell = random_cell(
        layer_norm=layer_norm,
        eta=eta,
        lambda_=lambda_,
        embedding_bias=embedding_bias,
        zoneout=zoneout,
        activation=activation,
        backend=backend,
    )
    input = random_input().requires_grad_()
    state = tuple(tensor.requires_grad_() for tensor in random_state(lambda_))
    leaves = [input, *state, *cell.parameters()]

    results = []
    for run in (cell.unroll, lambda x, s: torch_rum_sequence(cell, x, s)):
        output, after = run(input, state)
        loss = sum(
            (tensor * torch.linspace(-1, 1, tensor.numel()).double().view_as(tensor)).sum()
            for tensor in (output, *after)
        )
        assert isinstance(loss, Tensor)
        results.append(torch.autograd.grad(loss, leaves))

    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("input_size", "size"), [(4, 6), (12, 5), (1, 3)])
def test_input_and_hidden_weights_of_a_gate_are_orthogonal_together(
    input_size: int, size: int
) -> None:
    torch.manual_seed(4)
    cell = RUMCell(input_size, size, dtype=torch.float64)

    for gate in range(2):
        rows = slice(gate * size, (gate + 1) * size)
        joint = torch.cat((cell.weight_ih[rows], cell.weight_hh[rows]), 1)
        torch.testing.assert_close(
            joint @ joint.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_recurrent_weights_of_a_gate_are_not_orthogonal_alone() -> None:
    torch.manual_seed(5)
    cell = RUMCell(40, 40, dtype=torch.float64)

    for weight in cell.weight_hh.detach().split(40):
        # half of the 40 unit columns over (input, hidden) lies in the hidden part
        assert float(weight.square().sum()) == pytest.approx(20, rel=0.1)


def test_target_and_update_weights_are_drawn_independently() -> None:
    torch.manual_seed(6)
    cell = RUMCell(40, 10, dtype=torch.float64)

    target, update = torch.cat((cell.weight_ih[:20], cell.weight_hh), 1).detach().split(10)

    # drawn as one (50, 20) orthogonal matrix the product would be zero, drawn once the identity
    overlap = target @ update.T
    assert 0.05 < float(overlap.square().mean().sqrt()) < 0.3


@pytest.mark.parametrize(("input_size", "size"), [(4, 6), (12, 5)])
def test_embedding_weight_is_semi_orthogonal(input_size: int, size: int) -> None:
    torch.manual_seed(7)
    cell = RUMCell(input_size, size, dtype=torch.float64)

    singular_values = torch.linalg.svdvals(cell.weight_ih[2 * size :])

    expected = torch.ones(min(input_size, size), dtype=torch.float64)
    torch.testing.assert_close(singular_values, expected, rtol=0, atol=1e-12)


def test_biases_start_at_one_for_the_target_too_and_at_zero_for_the_embedding() -> None:
    cell = RUMCell(4, 6)

    assert torch.equal(cell.bias, torch.ones(12))
    assert cell.embedding_bias is not None
    assert torch.equal(cell.embedding_bias, torch.zeros(6))


def test_layer_norms_start_at_gain_one_and_shift_zero() -> None:
    cell = RUMCell(4, 6, layer_norm=True)

    for norm, groups in ((cell.gate_norm, 2), (cell.candidate_norm, 1)):
        assert norm is not None
        assert torch.equal(norm.gain, torch.ones(groups * 6))
        assert torch.equal(norm.shift, torch.zeros(groups * 6))


def test_reset_parameters_draws_new_weights_from_torch_seed() -> None:
    cell = RUMCell(4, 6)
    torch.manual_seed(8)
    cell.reset_parameters()
    first = {name: tensor.clone() for name, tensor in cell.state_dict().items()}
    cell.reset_parameters()
    assert not torch.equal(cell.weight_hh, first["weight_hh"])

    torch.manual_seed(8)
    cell.reset_parameters()

    for name, tensor in cell.state_dict().items():
        assert torch.equal(tensor, first[name])


def test_memory_starts_as_the_identity() -> None:
    cell = RUMCell(4, 6, lambda_=1)

    hidden, memory = cell.initial_state(3, device=torch.device("cpu"), dtype=torch.float32)

    assert torch.equal(hidden, torch.zeros(3, 6))
    assert torch.equal(memory, torch.eye(6).expand(3, 6, 6))


def test_first_step_from_no_state_starts_from_the_identity() -> None:
    cell = random_cell(lambda_=1.0)
    input = random_input()[0]

    with torch.no_grad():
        _, (_, memory) = cell(input)

    zeros, identity = np.zeros(SIZE), np.eye(SIZE)
    expected = np.stack([numpy_rum(cell, x, zeros, identity)[1] for x in input.numpy()])
    torch.testing.assert_close(memory, torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_memory_takes_the_new_rotation_on_its_right() -> None:
    cell = random_cell(lambda_=1.0)
    input = random_input()[0]
    hidden, before = random_state(1.0)

    with torch.no_grad():
        _, (_, after) = cell(input, (hidden, before))

    # before^-1 after must be the rotation of this step, which takes embedded to target
    turn = before.transpose(-1, -2) @ after
    w_target, _, w_embedding = cell.weight_ih.detach().split(SIZE)
    assert cell.embedding_bias is not None
    embedded = input @ w_embedding.T + cell.embedding_bias.detach()
    target = input @ w_target.T + hidden @ cell.weight_hh.detach()[:SIZE].T
    target = target + cell.bias.detach()[:SIZE]
    source = torch.nn.functional.normalize(embedded, dim=-1)
    expected = torch.nn.functional.normalize(target, dim=-1)
    turned = (turn @ source.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-12)


def test_memory_stays_orthogonal_over_a_thousand_steps_in_float32() -> None:
    torch.manual_seed(9)
    cell = RUMCell(4, 16, lambda_=1, eta=1.0)

    with torch.no_grad():
        _, (_, memory) = cell.unroll(torch.randn(1000, 2, 4))

    product = memory.transpose(-1, -2) @ memory
    torch.testing.assert_close(product, torch.eye(16).expand(2, 16, 16), rtol=0, atol=2e-5)


def test_embedded_input_is_turned_to_the_target_and_not_back() -> None:
    # no update, an identity as embedding and a hidden state along it: c = relu(eps + n(target))
    cell = RUMCell(3, 3, dtype=torch.float64)
    with torch.no_grad():
        cell.weight_ih.zero_()
        cell.weight_ih[6:] = torch.eye(3)
        cell.weight_hh.zero_()
        cell.bias.copy_(torch.tensor([0.0, 2.0, 0.0, -1e4, -1e4, -1e4]))
        output, _ = cell(torch.tensor([[5.0, 0.0, 0.0]]).double(), (torch.eye(3).double()[:1],))

    torch.testing.assert_close(output, torch.tensor([[5.0, 1.0, 0.0]]).double())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_update_gate_of_one_keeps_the_old_state(backend: str) -> None:
    cell = random_cell(backend=backend)
    with torch.no_grad():
        cell.bias[SIZE:] = 1e4
    (hidden,) = random_state(0.0)

    with torch.no_grad():
        output, _ = cell.unroll(random_input(), (hidden,))

    torch.testing.assert_close(output, hidden.expand(STEPS, -1, -1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("lambda_", [0.0, 1.0])
def test_time_normalization_gives_norm_eta_per_sample_and_step(lambda_: float) -> None:
    cell = random_cell(eta=0.7, lambda_=lambda_)

    with torch.no_grad():
        output, _ = cell.unroll(random_input())

    norms = torch.linalg.vector_norm(output, dim=-1)
    expected = torch.full((STEPS, BATCH), 0.7, dtype=torch.float64)
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_zoneout_follows_time_normalization(backend: str) -> None:
    cell = random_cell(eta=1.0, zoneout=0.1, backend=backend)

    with torch.no_grad():
        output, _ = cell.unroll(random_input()[:1])

    # 0.9 of a state of norm 1, 0.1 of the zero state; the other order would give norm 1
    norms = torch.linalg.vector_norm(output, dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.9), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_zoneout_in_training_keeps_single_units_of_the_previous_state(backend: str) -> None:
    cell = random_cell(zoneout=0.4, backend=backend).train()
    without = random_cell(backend=backend)
    input, (hidden,) = random_input()[:1], random_state(0.0)
    with torch.no_grad():
        new, _ = without.unroll(input, (hidden,))
        torch.manual_seed(10)
        output, (after,) = cell.unroll(input, (hidden,))

    kept = output == hidden
    torch.testing.assert_close(output, torch.where(kept, hidden, new), rtol=0, atol=1e-15)
    assert torch.equal(after, output[0])
    assert 0 < int(kept.sum()) < kept.numel()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_zoneout_is_the_probability_of_keeping_the_previous_state(backend: str) -> None:
    cell = random_cell(zoneout=0.1, activation="tanh", backend=backend).train()
    torch.manual_seed(11)
    generator = torch.Generator().manual_seed(12)
    hidden = torch.randn(2000, SIZE, generator=generator, dtype=torch.float64)
    input = torch.randn(1, 2000, INPUT_SIZE, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        output, _ = cell.unroll(input, (hidden,))

    kept = (output[0] == hidden).double()
    assert float(kept.mean()) == pytest.approx(0.1, abs=0.01)  # 12000 draws: deviation 0.0027
    assert float(kept.mean(0).max() - kept.mean(0).min()) < 0.05  # every unit alike


def test_zoneout_draws_every_step_sample_and_unit_for_itself() -> None:
    cell = random_cell(zoneout=0.5).train()
    torch.manual_seed(13)

    (mask,) = cell.sample_noise(20, 15)

    assert isinstance(mask, Tensor)
    assert mask.unique().tolist() == [0.0, 1.0]
    for dim in range(3):
        means = mask.mean(dim)  # constant along `dim` these would be 0 or 1
        assert float(means.std()) < 2 * 0.5 / math.sqrt(mask.shape[dim])
        assert float(means.std()) > 0.25 / math.sqrt(mask.shape[dim])


def test_zoneout_leaves_the_memory_alone() -> None:
    cell, without = random_cell(lambda_=1.0, zoneout=0.9), random_cell(lambda_=1.0)
    input, state = random_input()[0], random_state(1.0)

    with torch.no_grad():
        _, (_, memory) = cell.train()(input, state)
        _, (_, expected) = without(input, state)

    assert torch.equal(memory, expected)


def test_no_masks_are_drawn_in_evaluation() -> None:
    assert random_cell(zoneout=0.5).sample_noise(4, 2) == ()


def test_the_released_order_of_layer_norm_lets_the_gate_leave_zero_to_one() -> None:
    # at gain 1, shift 0: with u in (0, 1) a unit of h' lies between old state and candidate
    torch.manual_seed(14)
    input, hidden = torch.randn(50, 8), torch.randn(50, 32)
    outside = {}
    for gate in ("post_sigmoid", "pre_sigmoid"):
        torch.manual_seed(15)
        cell = RUMCell(8, 32, layer_norm=True, layer_norm_gate=gate, activation="sigmoid")
        with torch.no_grad():
            output, _ = cell(input, (hidden,))
        # the candidate is in (0, 1)
        low, high = hidden.clamp(max=0), hidden.clamp(min=1)
        outside[gate] = float(((output < low) | (output > high)).float().mean())

    assert outside["pre_sigmoid"] == 0
    assert outside["post_sigmoid"] > 0.1


def test_layer_norm_epsilon_is_a_thousandth_inside_the_root() -> None:
    norm = LayerNorm(4, dtype=torch.float64)
    small = 0.01 * torch.tensor([[-1.0, -1.0, 1.0, 1.0]], dtype=torch.float64)

    normalized = norm(small + 3.0)

    # variance 1e-4: with an epsilon of 1e-5 these would be 0.95
    expected = small / math.sqrt(1e-4 + 1e-3)
    torch.testing.assert_close(normalized, expected, rtol=1e-10, atol=0)


def test_layer_norm_takes_statistics_per_sample_and_group() -> None:
    rng = np.random.default_rng(16)
    input = rng.standard_normal((3, 10)) * np.arange(1, 11)
    gain, shift = rng.standard_normal(10), rng.standard_normal(10)
    norm = LayerNorm(5, groups=2, dtype=torch.float64)
    with torch.no_grad():
        norm.gain.copy_(torch.from_numpy(gain))
        norm.shift.copy_(torch.from_numpy(shift))
        normalized = norm(torch.from_numpy(input))

    expected = np.zeros((3, 10))
    for row in range(3):
        for part in (slice(0, 5), slice(5, 10)):
            expected[row, part] = numpy_layer_norm(input[row, part], gain[part], shift[part])
    torch.testing.assert_close(normalized, torch.from_numpy(expected), rtol=0, atol=1e-12)
