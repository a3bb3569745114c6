"""Powers of the associative memory between 0 and 1 and whole ones, against eigenvalues."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rum.cells import RUMCell
from rum.errors import ConfigError
from rum.functional import leak_rotation, orthonormalize

Array = NDArray[np.float64]

BATCH = 3

every_size = pytest.mark.parametrize(("input_size", "size"), [(4, 6), (5, 7), (3, 1), (1, 2)])
# every power of the issue that is not 0 or 1, with the steps float64 allows for
every_power = pytest.mark.parametrize(
    ("lambda_", "steps"), [(0.1, 12), (0.5, 12), (0.95, 12), (2.0, 8), (3.0, 8)]
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of tiny operations only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def build(input_size: int, size: int, lambda_: float, **options: Any) -> RUMCell:
    if lambda_ < 2:
        return RUMCell(input_size, size, lambda_=lambda_, **options)
    with pytest.warns(UserWarning, match="lambda_"):
        return RUMCell(input_size, size, lambda_=lambda_, **options)


def random_cell(input_size: int, size: int, lambda_: float, **options: Any) -> RUMCell:
    cell = build(input_size, size, lambda_, dtype=torch.float64, **options)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(cell.named_parameters()):
            if name != "lambda_logit":
                parameter.copy_(0.6 * normal(10 + index, *parameter.shape))
    return cell.eval()


def random_rotation(seed: int, *shape: int) -> Tensor:
    """Orthogonal matrices of determinant 1."""
    matrices = torch.linalg.qr(normal(seed, *shape, shape[-1]))[0]
    signs = torch.linalg.det(matrices)
    first = matrices[..., :1] * signs[..., None, None]
    return torch.cat((first, matrices[..., 1:]), -1)


def unitary_eigenvectors(matrix: Array) -> NDArray[np.complex128]:
    """Of a normal matrix: those of a Hermitian one that commutes with it."""
    symmetric, skew = (matrix + matrix.T) / 2, (matrix - matrix.T) / 2
    vectors: NDArray[np.complex128] = np.linalg.eigh(
        math.cos(0.7) * symmetric + math.sin(0.7) * skew / 1j
    )[1]
    return vectors


def numpy_leak(matrix: Array, lambda_: float) -> Array:
    """Every rotation angle becomes 2 atan(lambda tan(angle / 2))."""
    vectors = unitary_eigenvectors(matrix)
    angles = np.angle(np.diag(vectors.conj().T @ matrix @ vectors))
    leaked = 2 * np.arctan(lambda_ * np.tan(angles / 2))
    result: Array = (vectors * np.exp(1j * leaked) @ vectors.conj().T).real
    return result


def numpy_power(matrix: Array, lambda_: float) -> Array:
    if lambda_ < 1:
        return numpy_leak(matrix, lambda_)
    power: Array = np.linalg.matrix_power(matrix, int(lambda_))
    return power


def numpy_rotation(source: Array, target: Array) -> Array:
    """Turns the direction of `source` to that of `target`; the rest stays."""
    if len(source) == 1:  # there are two orthogonal matrices only
        return np.sign(source * target).reshape(1, 1)
    u = source / np.sqrt(source @ source)
    rest = target - (u @ target) * u
    v = rest / np.sqrt(rest @ rest)
    cosine = (u @ target) / np.sqrt(target @ target)
    sine = np.sqrt(1 - cosine**2)
    plane = np.stack((u, v), axis=1)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    matrix: Array = np.eye(len(u)) - plane @ plane.T + plane @ turn @ plane.T
    return matrix


def sigmoid(x: Array) -> Array:
    value: Array = 1 / (1 + np.exp(-x))
    return value


def numpy_rum(
    cell: RUMCell, lambda_: float, input: Array, hidden: Array, memory: Array
) -> tuple[Array, Array]:
    """One sample, one step: h and R before, h and R after."""
    size = cell.hidden_size
    weights = {name: tensor.numpy() for name, tensor in cell.state_dict().items()}
    w_target, w_update, w_embedding = weights["weight_ih"].reshape(3, size, -1)
    v_target, v_update = weights["weight_hh"].reshape(2, size, size)
    b_target, b_update = weights["bias"].reshape(2, size)
    target = w_target @ input + v_target @ hidden + b_target
    update = sigmoid(w_update @ input + v_update @ hidden + b_update)
    embedded = w_embedding @ input + weights["embedding_bias"]
    memory = numpy_power(memory, lambda_) @ numpy_rotation(embedded, target)
    candidate = np.maximum(embedded + memory @ hidden, 0)
    new = update * hidden + (1 - update) * candidate
    if cell.eta is not None:
        new = cell.eta * new / np.sqrt(max(new @ new, 1e-12))
    new = (1 - cell.zoneout) * new + cell.zoneout * hidden
    return new, memory


def numpy_sequence(
    cell: RUMCell, lambda_: float, input: Tensor, hidden: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    outputs, memories = np.zeros((*input.shape[:2], cell.hidden_size)), np.zeros(memory.shape)
    for b in range(input.shape[1]):
        h, r = hidden[b].numpy(), memory[b].numpy()
        for t in range(len(input)):
            h, r = numpy_rum(cell, lambda_, input[t, b].numpy(), h, r)
            outputs[t, b] = h
        memories[b] = r
    return torch.from_numpy(outputs), torch.from_numpy(memories)


@pytest.mark.parametrize("options", [{}, {"eta": 0.7, "zoneout": 0.1}], ids=str)
@pytest.mark.parametrize("uses_newton_schulz", [False, True])
@pytest.mark.parametrize("is_given", [False, True])
@every_power
@every_size
def test_values_equal_the_equations(
    input_size: int,
    size: int,
    lambda_: float,
    steps: int,
    is_given: bool,
    uses_newton_schulz: bool,
    options: dict[str, Any],
) -> None:
    cell = random_cell(input_size, size, lambda_, orthonormalize=uses_newton_schulz, **options)
    input = normal(1, steps, BATCH, input_size)
    hidden = torch.zeros(BATCH, size, dtype=torch.float64)
    memory = torch.eye(size, dtype=torch.float64).expand(BATCH, -1, -1)
    if is_given:
        hidden, memory = normal(2, BATCH, size), random_rotation(3, BATCH, size)

    with torch.no_grad():
        output, (last, after) = cell.unroll(input, (hidden, memory) if is_given else None)

    expected, expected_memory = numpy_sequence(cell, lambda_, input, hidden, memory)
    tolerance = 1e-10
    if size == 1 and not uses_newton_schulz:
        # the rotation may be -1, where the leak divides an error of orthogonality by lambda
        tolerance = max(tolerance, 1e-16 / lambda_**steps)
    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(after, expected_memory, rtol=0, atol=tolerance)
    assert torch.equal(last, output[-1])


@pytest.mark.parametrize("lambda_", [1e-6, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_leak_shrinks_every_angle_and_keeps_the_planes(size: int, lambda_: float) -> None:
    memory = random_rotation(1, size)

    leaked = leak_rotation(memory, lambda_)

    angles = np.sort(np.angle(np.linalg.eig(memory.numpy())[0]))
    expected = np.sort(2 * np.arctan(lambda_ * np.tan(angles / 2)))
    actual = np.sort(np.angle(np.linalg.eig(leaked.numpy())[0]))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(leaked @ memory, memory @ leaked, rtol=0, atol=1e-12)
    matrix = torch.from_numpy(numpy_leak(memory.numpy(), lambda_))
    torch.testing.assert_close(leaked, matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lambda_", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("size", [1, 2, 7, 50])
@pytest.mark.parametrize("determinant", [1, -1])
def test_leak_of_an_orthogonal_matrix_is_orthogonal_of_the_same_determinant(
    determinant: int, size: int, lambda_: float
) -> None:
    memory = random_rotation(2, 4, size)
    memory = torch.cat((determinant * memory[..., :1], memory[..., 1:]), -1)

    leaked = leak_rotation(memory, lambda_)

    values = torch.linalg.svdvals(leaked)
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-11)
    expected = torch.full((4,), float(determinant), dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.det(leaked), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("first", "second"), [(0.5, 0.5), (0.9, 0.2), (0.05, 0.7)])
@pytest.mark.parametrize("size", [2, 7, 50])
def test_leaking_twice_is_leaking_by_the_product(size: int, first: float, second: float) -> None:
    memory = random_rotation(3, 4, size)

    twice = leak_rotation(leak_rotation(memory, first), second)

    expected = leak_rotation(memory, first * second)
    torch.testing.assert_close(twice, expected, rtol=0, atol=1e-11)


def test_leak_at_one_is_the_matrix_and_near_zero_the_identity() -> None:
    memory = random_rotation(4, 4, 7)

    torch.testing.assert_close(leak_rotation(memory, 1.0), memory, rtol=0, atol=1e-14)
    identity = torch.eye(7, dtype=torch.float64).expand(4, -1, -1)
    torch.testing.assert_close(leak_rotation(memory, 1e-12), identity, rtol=0, atol=1e-9)


def test_a_half_turn_stays_one_as_the_leak_has_no_way_to_choose_a_side() -> None:
    half_turn = torch.diag(torch.tensor([1.0, -1.0, -1.0])).double()

    for lambda_ in (0.01, 0.5, 0.9):
        torch.testing.assert_close(
            leak_rotation(half_turn, lambda_), half_turn, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("lambda_", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["random", "identity", "half_turn", "reflection"])
def test_gradients_of_the_leak_at_every_kind_of_matrix(kind: str, lambda_: float) -> None:
    memory = {
        "random": random_rotation(5, 4),
        "identity": torch.eye(4, dtype=torch.float64),
        "half_turn": torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0])).double(),
        "reflection": torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])).double(),
    }[kind].requires_grad_()
    power = torch.tensor(lambda_, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(leak_rotation, (memory, power))
    assert torch.autograd.gradgradcheck(leak_rotation, (memory, power))


def test_an_orthonormalizing_step_is_newton_and_schulzs() -> None:
    memory = random_rotation(6, 4, 7)
    off = memory + 1e-4 * normal(7, 4, 7, 7)

    step = orthonormalize(off)

    expected = 1.5 * off - 0.5 * off @ off.mT @ off
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-14)
    identity = torch.eye(7, dtype=torch.float64).expand(4, -1, -1)
    before = float((off @ off.mT - identity).abs().max())
    after = float((step @ step.mT - identity).abs().max())
    assert after < 5 * before**2  # quadratic
    torch.testing.assert_close(orthonormalize(memory), memory, rtol=0, atol=1e-14)


def test_old_rotations_leak_away_while_nothing_is_read() -> None:
    # a zero embedded input makes no rotation: R_T is R_0 leaked T times, that is by lambda^T
    cell = random_cell(4, 6, 0.8)
    with torch.no_grad():
        assert cell.embedding_bias is not None
        cell.embedding_bias.zero_()
        memory = random_rotation(8, BATCH, 6)
        start = (normal(2, BATCH, 6), memory)
        _, (_, after) = cell.unroll(torch.zeros(10, BATCH, 4, dtype=torch.float64), start)

    expected = leak_rotation(memory, 0.8**10)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-10)


def default_cells(size: int, *powers: float) -> list[RUMCell]:
    cells = []
    for power in powers:
        torch.manual_seed(9)
        cells.append(RUMCell(10, size, lambda_=power, eta=1.0))
    return cells


@pytest.mark.parametrize(("near", "end"), [(1e-5, 0.0), (1 - 1e-8, 1.0)])
def test_float32_outputs_reach_those_of_zero_and_one(near: float, end: float) -> None:
    close, exact = default_cells(50, near, end)
    input = normal(1, 50, BATCH, 10).float()

    with torch.no_grad():
        output, state = close.unroll(input)
        expected, expected_state = exact.unroll(input)

    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    if end == 1:
        torch.testing.assert_close(state[1], expected_state[1], rtol=0, atol=1e-5)


def test_powers_between_differ_from_the_ends() -> None:
    none, half, all_ = default_cells(50, 0.0, 0.5, 1.0)
    input = normal(1, 50, BATCH, 10).float()

    with torch.no_grad():
        middle = half.unroll(input)[0]
        for cell in (none, all_):
            assert float((cell.unroll(input)[0] - middle).abs().max()) > 0.01


@pytest.mark.parametrize("lambda_", [0.5, 0.99, 2.0, 3.0])
def test_memory_stays_orthogonal_over_a_thousand_steps_in_float32(lambda_: float) -> None:
    torch.manual_seed(10)
    cell = build(4, 16, lambda_, eta=1.0)

    with torch.no_grad():
        output, (_, memory) = cell.unroll(torch.randn(1000, 2, 4))

    assert output.isfinite().all()
    identity = torch.eye(16).expand(2, -1, -1)
    torch.testing.assert_close(memory.mT @ memory, identity, rtol=0, atol=2e-5)


@pytest.mark.parametrize("lambda_", [0.01, 0.1, 0.5])
def test_memory_stays_orthogonal_when_every_rotation_is_a_reflection(lambda_: float) -> None:
    # there the leak alone divides an error of orthogonality by lambda, a hundredfold at 0.01
    torch.manual_seed(13)
    cell = RUMCell(4, 6, lambda_=lambda_, eta=1.0)
    with torch.no_grad():
        cell.weight_ih[:6] = -2 * cell.weight_ih[12:]
        cell.weight_hh.zero_()
        cell.bias.zero_()
        _, (_, memory) = cell.unroll(torch.randn(500, 2, 4))

    identity = torch.eye(6).expand(2, -1, -1)
    torch.testing.assert_close(memory.mT @ memory, identity, rtol=0, atol=2e-5)


def test_a_plain_square_overflows_in_float32_within_tens_of_steps() -> None:
    torch.manual_seed(11)
    cell = build(10, 50, 2.0, eta=1.0, orthonormalize=False)
    input = torch.randn(80, 2, 10)

    with torch.no_grad():
        _, (_, early) = cell.unroll(input[:5])
        _, (_, late) = cell.unroll(input)

    torch.testing.assert_close(
        early.mT @ early, torch.eye(50).expand(2, -1, -1), rtol=0, atol=1e-3
    )
    assert not late.isfinite().all()


@pytest.mark.parametrize("lambda_", [2.0, 3.0, 2])
def test_whole_powers_warn_and_smaller_ones_do_not(lambda_: float) -> None:
    with pytest.warns(UserWarning, match="lambda_") as warned:
        RUMCell(4, 6, lambda_=lambda_)
    assert len(warned) == 1
    for power in (0.0, 0.5, 1.0):
        RUMCell(4, 6, lambda_=power)  # warnings are errors here


@pytest.mark.parametrize("lambda_", [-0.1, 1.5, 2.5, math.inf, math.nan])
def test_other_powers_are_refused(lambda_: float) -> None:
    with pytest.raises(ConfigError, match="lambda_"):
        RUMCell(4, 6, lambda_=lambda_)


@pytest.mark.parametrize("lambda_", [0.0, 1.0, 2.0])
def test_a_learned_power_starts_strictly_between_zero_and_one(lambda_: float) -> None:
    with pytest.raises(ConfigError, match="lambda_trainable"):
        RUMCell(4, 6, lambda_=lambda_, lambda_trainable=True)


def test_a_learned_power_is_one_parameter_more_and_starts_where_told() -> None:
    fixed = RUMCell(4, 6, lambda_=0.3)
    learned = RUMCell(4, 6, lambda_=0.3, lambda_trainable=True, dtype=torch.float64)

    assert fixed.lambda_logit is None
    assert learned.lambda_logit is not None
    assert learned.lambda_logit.numel() == 1
    assert float(torch.sigmoid(learned.lambda_logit.detach())) == pytest.approx(0.3, abs=1e-12)


@pytest.mark.parametrize("value", [0.05, 0.3, 0.95])
def test_values_follow_the_learned_power(value: float) -> None:
    cell = random_cell(4, 6, 0.3, lambda_trainable=True)
    with torch.no_grad():
        assert cell.lambda_logit is not None
        cell.lambda_logit.fill_(math.log(value / (1 - value)))
        input, hidden = normal(1, 12, BATCH, 4), normal(2, BATCH, 6)
        memory = random_rotation(3, BATCH, 6)
        output, (_, after) = cell.unroll(input, (hidden, memory))

    expected, expected_memory = numpy_sequence(cell, value, input, hidden, memory)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(after, expected_memory, rtol=0, atol=1e-10)


def test_gradient_of_the_learned_power_is_the_slope_of_the_loss() -> None:
    cell = random_cell(4, 6, 0.4, lambda_trainable=True)
    logit = cell.lambda_logit
    assert logit is not None
    input, state = normal(1, 10, BATCH, 4), (normal(2, BATCH, 6), random_rotation(3, BATCH, 6))

    def loss() -> Tensor:
        return cell.unroll(input, state)[0].square().sum()

    (gradient,) = torch.autograd.grad(loss(), logit)
    start, step, ends = float(logit.detach()), 1e-5, []
    with torch.no_grad():
        for sign in (1, -1):
            logit.fill_(start + sign * step)
            ends.append(float(loss()))

    slope = (ends[0] - ends[1]) / (2 * step)
    assert abs(slope) > 1e-4
    assert float(gradient) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [0.0, 2.0, -2.0], ids=["zero", "parallel", "opposite"])
@pytest.mark.parametrize("is_silent", [False, True])
@pytest.mark.parametrize(
    ("lambda_", "options"),
    [(0.5, {}), (0.5, {"lambda_trainable": True}), (0.01, {}), (2.0, {}), (3.0, {})],
)
def test_value_and_gradient_are_finite_at_degenerate_inputs(
    lambda_: float,
    options: dict[str, Any],
    is_silent: bool,
    factor: float,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(12)
    cell = build(4, 6, lambda_, dtype=dtype, **options)
    with torch.no_grad():  # the target is `factor` times the embedded input, exactly
        cell.weight_ih[:6] = factor * cell.weight_ih[12:]
        cell.weight_hh.zero_()
        cell.bias.zero_()
    input = (0.0 if is_silent else 1.0) * normal(1, 10, BATCH, 4).to(dtype)
    hidden = normal(2, BATCH, 6).to(dtype).requires_grad_()
    input.requires_grad_()
    memory = torch.eye(6, dtype=dtype).expand(BATCH, -1, -1)

    output, (_, after) = cell.unroll(input, (hidden, memory))
    (output.square().sum() + after.sin().sum()).backward()

    assert output.isfinite().all()
    values = torch.linalg.svdvals(after.detach())
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-5)
    if factor >= 0 or is_silent:  # no rotation at all, but rounding grows by the power
        identity = torch.eye(6, dtype=dtype).expand(BATCH, -1, -1)
        rounding = 10 * torch.finfo(dtype).eps * max(1, lambda_) ** 10
        torch.testing.assert_close(after.detach(), identity, rtol=0, atol=rounding)
    for leaf in (input, hidden, *cell.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("lambda_", [0.5, 2.0])
def test_the_state_handed_on_equals_one_long_run(lambda_: float) -> None:
    cell = random_cell(4, 6, lambda_)
    input = normal(1, 8, BATCH, 4)

    with torch.no_grad():
        first, state = cell.unroll(input[:3])
        second, _ = cell.unroll(input[3:], state)
        expected, _ = cell.unroll(input)

    torch.testing.assert_close(torch.cat((first, second)), expected, rtol=0, atol=1e-13)
