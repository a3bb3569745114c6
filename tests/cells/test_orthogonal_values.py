"""EUNN and GORU against their equations, with every plane rotation as an N x N matrix."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rum.cells import EUNNCell, GORUCell
from rum.cells.eunn import OrthogonalProduct
from rum.errors import ConfigError

Array = NDArray[np.float64]

STEPS, BATCH = 9, 3

# size, options of the orthogonal matrix
PRODUCTS: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (3, {}),
    (6, {}),
    (7, {}),
    (6, {"capacity": 1}),
    (6, {"capacity": 5}),
    (7, {"capacity": 4}),
    (6, {"zero_last_unit": True}),
    (7, {"zero_last_unit": True}),
    (8, {"capacity": 3, "zero_last_unit": True}),
    (2, {"style": "fft"}),
    (4, {"style": "fft"}),
    (8, {"style": "fft"}),
    (16, {"style": "fft"}),
]

every_product = pytest.mark.parametrize(
    ("size", "options"),
    [
        pytest.param(size, options, id="-".join(map(str, (size, *options.values()))))
        for size, options in PRODUCTS
    ],
)
every_cell = pytest.mark.parametrize("kind", [EUNNCell, GORUCell])


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


def fill(module: torch.nn.Module) -> None:
    """Draws every parameter, biases and angles too."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(0.8 * normal(10 + index, *parameter.shape))


def random_product(size: int, options: dict[str, Any]) -> OrthogonalProduct:
    product = OrthogonalProduct(size, **options, dtype=torch.float64)
    fill(product)
    return product


def pairs_of_layer(size: int, options: dict[str, Any], layer: int) -> list[tuple[int, int]]:
    if options.get("style") == "fft":
        distance = 2**layer
        return [(p, p + distance) for p in range(size) if p // distance % 2 == 0]
    return [(p, p + 1) for p in range(layer % 2, size - 1, 2)]


def numpy_matrix(size: int, options: dict[str, Any], angles: list[Array]) -> Array:
    """The product, its first layer acting first."""
    is_fft = options.get("style") == "fft"
    num_layers = round(math.log2(size)) if is_fft else options.get("capacity", 2)
    assert len(angles) == num_layers
    matrix = np.eye(size)
    for layer in range(num_layers):
        pairs = pairs_of_layer(size, options, layer)
        assert angles[layer].shape == (len(pairs),)
        for (p, q), angle in zip(pairs, angles[layer], strict=True):
            turn = np.eye(size)
            turn[p, p] = turn[q, q] = math.cos(angle)
            turn[p, q], turn[q, p] = -math.sin(angle), math.sin(angle)
            matrix = turn @ matrix
        # the released code: a 0 where the unit left over by an odd layer would need a 1
        if options.get("zero_last_unit") and not is_fft and layer % 2 == 1 and size % 2 == 0:
            matrix[size - 1] = 0
    return matrix


def matrix_of(module: torch.nn.Module, size: int, options: dict[str, Any]) -> Array:
    product = module if isinstance(module, OrthogonalProduct) else module.orthogonal
    angles = [angle.detach().numpy() for angle in product.angles]
    return numpy_matrix(size, options, angles)


@every_product
def test_the_product_is_its_plane_rotations(size: int, options: dict[str, Any]) -> None:
    product = random_product(size, options)
    vectors = normal(1, 5, BATCH, size)

    with torch.no_grad():
        matrix, turned = product.matrix(), product(vectors)

    expected = torch.from_numpy(matrix_of(product, size, options))
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned, vectors @ expected.T, rtol=0, atol=1e-12)


@every_product
def test_singular_values_are_one_but_for_the_unit_that_the_released_code_loses(
    size: int, options: dict[str, Any]
) -> None:
    with torch.no_grad():
        values = torch.linalg.svdvals(random_product(size, options).matrix())

    loses = options.get("zero_last_unit") and size % 2 == 0
    if not loses:
        torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-12)
    else:
        assert float(values.min()) < 1e-15


@pytest.mark.parametrize("size", [2, 6, 50])
def test_the_released_matrix_annihilates_the_last_unit_and_keeps_the_others(size: int) -> None:
    released = random_product(size, {"zero_last_unit": True})
    product = random_product(size, {})
    vectors = normal(1, BATCH, size)

    with torch.no_grad():
        actual, expected = released(vectors), product(vectors)

    assert torch.equal(actual[:, -1], torch.zeros(BATCH, dtype=torch.float64))
    assert float(expected[:, -1].abs().min()) > 0
    torch.testing.assert_close(actual[:, :-1], expected[:, :-1], rtol=0, atol=1e-15)


def test_the_last_unit_is_lost_between_layers_and_not_only_at_the_end() -> None:
    # layer 2 mixes unit 4 into unit 5 again, so that only its own part is gone
    with torch.no_grad():
        matrix = random_product(6, {"capacity": 3, "zero_last_unit": True}).matrix()

    assert float(torch.linalg.svdvals(matrix).min()) < 1e-15
    assert float(matrix[5].abs().max()) > 0.01


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        (250, {}, [125, 124]),
        (50, {}, [25, 24]),
        (7, {"capacity": 3}, [3, 3, 3]),
        (256, {"style": "fft"}, [128] * 8),
        (2, {}, [1, 0]),
    ],
)
def test_number_of_angles(size: int, options: dict[str, Any], expected: list[int]) -> None:
    product = OrthogonalProduct(size, **options)

    assert [len(angle) for angle in product.angles] == expected


@pytest.mark.parametrize("options", [{"capacity": 2}, {"style": "fft"}], ids=str)
def test_angles_start_uniform_over_the_whole_circle(options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    product = OrthogonalProduct(4096, **options)

    angles = torch.cat([angle.detach() for angle in product.angles])
    assert 0.99 * math.pi < float(angles.max()) <= math.pi
    assert 0.99 * math.pi < -float(angles.min()) <= math.pi
    assert abs(float(angles.mean())) < 0.1  # 4000 draws: deviation 0.029
    assert float(angles.std()) == pytest.approx(math.pi / math.sqrt(3), rel=0.03)
    assert len(angles.unique()) > 0.99 * len(angles)


@pytest.mark.parametrize("size", [3, 6, 12, 250])
@every_cell
def test_a_fourier_layout_needs_a_power_of_two(kind: type, size: int) -> None:
    with pytest.raises(ConfigError, match=str(size)):
        OrthogonalProduct(size, style="fft")
    with pytest.raises(ConfigError, match=str(size)):
        kind(4, size, style="fft")


@every_cell
def test_an_unknown_style_and_no_layers_are_refused(kind: type) -> None:
    with pytest.raises(ConfigError, match="style"):
        kind(4, 6, style="butterfly")
    with pytest.raises(ConfigError, match="capacity"):
        kind(4, 6, capacity=0)


@pytest.mark.parametrize("style", ["tunable", "fft"])
@every_cell
def test_a_single_unit_has_nothing_to_turn_with(kind: type, style: str) -> None:
    with pytest.raises(ConfigError, match="hidden_size"):
        kind(4, 1, style=style)


@pytest.mark.parametrize(("size", "options"), [(6, {"capacity": 3}), (8, {"style": "fft"})])
def test_gradients_of_angles_and_vector(size: int, options: dict[str, Any]) -> None:
    product = random_product(size, options)
    names = [name for name, _ in product.named_parameters()]

    def turned(vector: Tensor, *angles: Tensor) -> Tensor:
        values = dict(zip(names, angles, strict=True))
        output = torch.func.functional_call(product, values, (vector,))
        assert isinstance(output, Tensor)
        return output

    vector = normal(1, BATCH, size).requires_grad_()
    assert torch.autograd.gradcheck(turned, (vector, *product.parameters()))


def numpy_mod_relu(z: Array, bias: Array) -> Array:
    value: Array = np.sign(z) * np.maximum(np.abs(z) + 1e-5 + bias, 0)
    return value


def sigmoid(x: Array) -> Array:
    value: Array = 1 / (1 + np.exp(-x))
    return value


def numpy_eunn(cell: EUNNCell, matrix: Array, input: Array, hidden: Array) -> Array:
    weights = {name: tensor.numpy() for name, tensor in cell.state_dict().items()}
    return numpy_mod_relu(weights["weight_ih"] @ input + matrix @ hidden, weights["bias"])


def numpy_goru(cell: GORUCell, matrix: Array, input: Array, hidden: Array) -> Array:
    size = cell.hidden_size
    weights = {name: tensor.numpy() for name, tensor in cell.state_dict().items()}
    u_reset, u_gate, u_candidate = weights["weight_ih"].reshape(3, size, -1)
    w_reset, w_gate = weights["weight_hh"].reshape(2, size, size)
    b_reset, b_gate, b_candidate = weights["bias"].reshape(3, size)
    reset = sigmoid(u_reset @ input + w_reset @ hidden + b_reset)
    gate = sigmoid(u_gate @ input + w_gate @ hidden + b_gate)
    candidate = numpy_mod_relu(u_candidate @ input + reset * (matrix @ hidden), b_candidate)
    new: Array = gate * hidden + (1 - gate) * candidate
    return new


@every_product
@every_cell
def test_values_equal_the_equations(kind: Any, size: int, options: dict[str, Any]) -> None:
    cell = kind(4, size, **options, dtype=torch.float64)
    fill(cell)
    input, start = normal(1, STEPS, BATCH, 4), normal(2, BATCH, size)

    with torch.no_grad():
        output, (after,) = cell.unroll(input, (start,))

    step: Any = numpy_eunn if kind is EUNNCell else numpy_goru
    matrix = matrix_of(cell, size, options)
    expected = np.zeros((STEPS, BATCH, size))
    for b in range(BATCH):
        hidden = start[b].numpy()
        for t in range(STEPS):
            hidden = expected[t, b] = step(cell, matrix, input[t, b].numpy(), hidden)
    torch.testing.assert_close(output, torch.from_numpy(expected), rtol=0, atol=1e-10)
    assert torch.equal(after, output[-1])


def test_mod_relu_keeps_the_sign_and_adds_the_bias_and_its_epsilon_to_the_size() -> None:
    cell = EUNNCell(1, 6, dtype=torch.float64)
    with torch.no_grad():
        cell.weight_ih.copy_(torch.tensor([[2.0], [-2.0], [2.0], [-2.0], [0.0], [1.0]]))
        cell.bias.copy_(torch.tensor([0.5, 0.5, -3.0, -3.0, 0.5, -1.0]))
        output, _ = cell(torch.ones(1, 1, dtype=torch.float64))

    expected = torch.tensor([[2.50001, -2.50001, 0.0, 0.0, 0.0, 1e-5]], dtype=torch.float64)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"capacity": 4}, {"style": "fft"}], ids=str)
def test_an_eunn_without_input_and_bias_keeps_the_norm(options: dict[str, Any]) -> None:
    cell = EUNNCell(4, 16, **options, dtype=torch.float64)
    with torch.no_grad():
        start = normal(2, BATCH, 16)
        output, _ = cell.unroll(torch.zeros(50, BATCH, 4, dtype=torch.float64), (start,))

    # bias 0: only modReLU's 1e-5 a unit and step is added
    norms = torch.linalg.vector_norm(output[-1], dim=-1)
    expected = torch.linalg.vector_norm(start, dim=-1)
    torch.testing.assert_close(norms, expected, rtol=0, atol=50 * 4e-5)


def test_an_update_gate_of_one_keeps_the_old_state() -> None:
    cell = GORUCell(4, 6, dtype=torch.float64)
    fill(cell)
    with torch.no_grad():
        cell.bias[6:12] = 1e4
        start = normal(2, BATCH, 6)
        output, _ = cell.unroll(normal(1, STEPS, BATCH, 4), (start,))

    assert torch.equal(output, start.expand(STEPS, -1, -1))


def check_is_uniform(values: Tensor, bound: float) -> None:
    assert 0.98 * bound < float(values.abs().max()) <= bound
    assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(float(values.mean())) < 0.1 * bound


def test_initial_weights_of_an_eunn() -> None:
    torch.manual_seed(3)
    cell = EUNNCell(40, 64, dtype=torch.float64)

    check_is_uniform(cell.weight_ih.detach(), 0.01)
    assert torch.equal(cell.bias.detach(), torch.zeros(64, dtype=torch.float64))


def test_initial_weights_of_a_goru() -> None:
    torch.manual_seed(4)
    size = 1000
    cell = GORUCell(40, size, dtype=torch.float64)

    for rows in cell.weight_ih.detach().split(size):
        check_is_uniform(rows, 0.01)
    for rows in cell.weight_hh.detach().split(size):
        check_is_uniform(rows, 0.01)
    reset, gate, candidate = cell.bias.detach().split(size)
    assert torch.equal(reset, torch.full((size,), 2.0, dtype=torch.float64))
    assert torch.equal(candidate, torch.full((size,), 2.0, dtype=torch.float64))
    check_is_uniform(gate, math.sqrt(3 / size))  # Glorot, of a vector


@every_cell
@pytest.mark.parametrize("options", [{}, {"zero_last_unit": True}, {"style": "fft"}], ids=str)
@pytest.mark.parametrize("start", ["zero", "negated_input", "dead"])
def test_value_and_gradient_are_finite_where_mod_relu_has_its_kinks(
    kind: Any, options: dict[str, Any], start: str
) -> None:
    cell = kind(8, 8, **options)
    with torch.no_grad():
        for angle in cell.orthogonal.angles:
            angle.zero_()  # W h = h
        cell.weight_ih[-8:] = torch.eye(8)
        if start == "dead":
            cell.bias.fill_(-1e3)
    input = (0.0 if start == "zero" else 1.0) * normal(1, STEPS, BATCH, 8).float()
    hidden = (-1.0 if start == "negated_input" else 0.0) * input[0]
    input, hidden = input.requires_grad_(), hidden.detach().requires_grad_()

    output, _ = cell.unroll(input, (hidden,))
    output.sin().sum().backward()

    assert output.isfinite().all()
    for leaf in (input, hidden, *cell.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
