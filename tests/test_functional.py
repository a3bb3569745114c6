"""Rotation, time normalisation and zoneout against forms written another way."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rum.functional import accumulate_rotation, rotate, rotation_matrix, time_normalize, zoneout

Array = NDArray[np.float64]

ANGLES = (0.0, 1e-6, 1e-3, 0.1, 1.0, 45.0, 90.0, 135.0, 179.0, 179.9, 179.99, 180.0)  # degrees
DTYPES = (torch.float32, torch.float64)
CASES = [(1, 0.0), (1, 180.0)] + [(size, angle) for size in (2, 7, 64) for angle in ANGLES]

every_case = pytest.mark.parametrize(("size", "angle"), CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of tiny operations only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pairs(size: int, angle: float, dtype: torch.dtype, count: int = 8) -> tuple[Tensor, Tensor]:
    """Random vectors of random lengths, `angle` degrees apart in random planes."""
    rng = np.random.default_rng(int(angle * 1e6) % 2**31 + size)
    sources, targets = [], []
    for _ in range(count):
        basis = np.linalg.qr(rng.standard_normal((size, min(size, 2))))[0]
        # at 0 and 180 degrees the cosine is exact and the second direction stays out of it
        cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        direction = cosine * basis[:, 0]
        if angle not in (0.0, 180.0):
            direction = direction + sine * basis[:, 1]
        sources.append(rng.uniform(0.3, 3.0) * basis[:, 0])
        targets.append(rng.uniform(0.3, 3.0) * direction)
    return (
        torch.tensor(np.array(sources), dtype=dtype),
        torch.tensor(np.array(targets), dtype=dtype),
    )


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def unit(vectors: Tensor) -> Tensor:
    """Directions in float64, whatever the dtype of `vectors`."""
    exact = vectors.double()
    return exact / torch.linalg.vector_norm(exact, dim=-1, keepdim=True)


def rounding(dtype: torch.dtype) -> float:
    return 16 * torch.finfo(dtype).eps


def conditioned(dtype: torch.dtype, angle: float) -> float:
    """Rounding of source and target times the condition of the rotation, 1 / cos(angle / 2).

    At 180 degrees only the target is used, which is well conditioned.
    """
    return rounding(dtype) / (1.0 if angle == 180.0 else math.cos(math.radians(angle / 2)))


def paper_matrix(source: Array, target: Array) -> Array:
    """I - uu' - vv' + [u v] R(angle) [u v]', the paper's form with the signs that it lost."""
    u = source / np.linalg.norm(source)
    rest = target - (u @ target) * u
    v = rest / np.linalg.norm(rest)
    cosine = u @ target / np.linalg.norm(target)
    sine = np.sqrt(1.0 - cosine**2)
    plane = np.stack((u, v), axis=1)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    complement = np.eye(len(u)) - np.outer(u, u) - np.outer(v, v)
    matrix: Array = complement + plane @ turn @ plane.T
    return matrix


def generator_form(source: Tensor, target: Tensor, vector: Tensor) -> Tensor:
    """(I + K + K^2 / (1 + cos)) vector with K = b a' - a b': smooth wherever angle < 180."""
    a = source / torch.linalg.vector_norm(source, dim=-1, keepdim=True)
    b = target / torch.linalg.vector_norm(target, dim=-1, keepdim=True)
    cosine = (a * b).sum(-1, keepdim=True).unsqueeze(-1)
    k = b.unsqueeze(-1) * a.unsqueeze(-2) - a.unsqueeze(-1) * b.unsqueeze(-2)
    matrix = torch.eye(a.shape[-1], dtype=a.dtype) + k + k @ k / (1 + cosine)
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    result = function(*leaves)
    weights = normal(99, *result.shape, dtype=result.dtype)
    return torch.autograd.grad((result * weights).sum(), leaves)


@every_dtype
@every_case
def test_rotation_takes_source_direction_to_target_direction(
    size: int, angle: float, dtype: torch.dtype
) -> None:
    source, target = pairs(size, angle, dtype)

    turned = rotate(source, target, unit(source).to(dtype))

    tolerance = conditioned(dtype, angle)
    torch.testing.assert_close(turned.double(), unit(target), rtol=0, atol=tolerance)


@every_dtype
@every_case
def test_rotation_preserves_norms(size: int, angle: float, dtype: torch.dtype) -> None:
    source, target = pairs(size, angle, dtype)
    vector = normal(1, len(source), size, dtype=dtype)

    before = torch.linalg.vector_norm(vector.double(), dim=-1)
    after = torch.linalg.vector_norm(rotate(source, target, vector).double(), dim=-1)

    torch.testing.assert_close(after, before, rtol=rounding(dtype), atol=0)


@every_dtype
@every_case
def test_rotation_matrix_is_orthogonal(size: int, angle: float, dtype: torch.dtype) -> None:
    matrix = rotation_matrix(*pairs(size, angle, dtype)).double()

    identity = torch.eye(size, dtype=torch.float64).expand(len(matrix), -1, -1)
    product = matrix.transpose(-1, -2) @ matrix
    torch.testing.assert_close(product, identity, rtol=0, atol=rounding(dtype))


@every_dtype
@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("size", [7, 64])
def test_rotation_fixes_the_complement_of_its_plane(
    size: int, angle: float, dtype: torch.dtype
) -> None:
    source, target = pairs(size, angle, dtype)
    plane = torch.stack((source, target), -1).double()
    basis, _, _ = torch.linalg.svd(plane)
    outside = basis[..., 2:].sum(-1).to(dtype)

    turned = rotate(source, target, outside)

    tolerance = conditioned(dtype, angle) * math.sqrt(size)
    torch.testing.assert_close(turned, outside, rtol=0, atol=tolerance)


@pytest.mark.parametrize("angle", ANGLES[:-1])
@pytest.mark.parametrize("size", [2, 7, 64])
def test_determinant_is_one_below_180_degrees(size: int, angle: float) -> None:
    matrix = rotation_matrix(*pairs(size, angle, torch.float64))

    determinant = torch.linalg.det(matrix)

    torch.testing.assert_close(determinant, torch.ones_like(determinant), rtol=0, atol=1e-12)


@every_dtype
@every_case
def test_swapping_source_and_target_gives_the_inverse(
    size: int, angle: float, dtype: torch.dtype
) -> None:
    source, target = pairs(size, angle, dtype)
    vector = normal(2, len(source), size, dtype=dtype)

    back = rotate(target, source, rotate(source, target, vector))

    tolerance = 2 * conditioned(dtype, angle) * math.sqrt(size)
    torch.testing.assert_close(back, vector, rtol=0, atol=tolerance)


@pytest.mark.parametrize("angle", [1.0, 45.0, 90.0, 135.0, 179.0])
@pytest.mark.parametrize("size", [2, 7, 64])
def test_rotation_matrix_equals_the_form_of_the_paper(size: int, angle: float) -> None:
    source, target = pairs(size, angle, torch.float64)

    matrix = rotation_matrix(source, target)

    expected = np.stack(
        [paper_matrix(a, b) for a, b in zip(source.numpy(), target.numpy(), strict=True)]
    )
    torch.testing.assert_close(matrix, torch.from_numpy(expected), rtol=0, atol=1e-11)


def test_rotation_by_a_quarter_turn_goes_from_source_to_target() -> None:
    source = torch.tensor([2.0, 0.0, 0.0])
    target = torch.tensor([0.0, 3.0, 0.0])

    matrix = rotation_matrix(source, target)

    expected = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-6)


def test_rotation_matrix_applied_to_a_vector_is_rotate() -> None:
    source, target, vector = (normal(seed, 5, 7) for seed in (3, 4, 5))

    applied = (rotation_matrix(source, target) @ vector.unsqueeze(-1)).squeeze(-1)

    torch.testing.assert_close(applied, rotate(source, target, vector), rtol=0, atol=1e-13)


def test_leading_dimensions_are_broadcast() -> None:
    source, target, vector = normal(6, 1, 4, 7), normal(7, 3, 1, 7), normal(8, 7)

    turned = rotate(source, target, vector)

    one_by_one = torch.stack(
        [
            torch.stack([rotate(source[0, j], target[i, 0], vector) for j in range(4)])
            for i in range(3)
        ]
    )
    torch.testing.assert_close(turned, one_by_one, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-1.0, -2.0, -0.3])
def test_exactly_opposite_gives_the_reflection_along_the_target(
    scale: float, dtype: torch.dtype
) -> None:
    source, vector = normal(9, 20, 7, dtype=dtype), normal(10, 20, 7, dtype=dtype)

    turned = rotate(source, scale * source, vector)

    r = unit(scale * source)
    h = vector.double()
    expected = h - 2 * (r * h).sum(-1, keepdim=True) * r
    torch.testing.assert_close(turned.double(), expected, rtol=0, atol=rounding(dtype))


def test_determinant_is_minus_one_at_exactly_180_degrees() -> None:
    matrix = rotation_matrix(*pairs(7, 180.0, torch.float64))

    determinant = torch.linalg.det(matrix)

    torch.testing.assert_close(determinant, -torch.ones_like(determinant), rtol=0, atol=1e-12)


@every_dtype
@pytest.mark.parametrize("zero", ["source", "target", "both"])
def test_a_zero_source_or_target_returns_the_vector_unchanged(
    zero: str, dtype: torch.dtype
) -> None:
    source, target, vector = (normal(seed, 5, 7, dtype=dtype) for seed in (11, 12, 13))
    rows = torch.tensor([1, 3])
    if zero in ("source", "both"):
        source[rows] = 0
    if zero in ("target", "both"):
        target[rows] = 0

    turned = rotate(source, target, vector)

    assert torch.equal(turned[rows], vector[rows])
    assert (turned[[0, 2, 4]] - vector[[0, 2, 4]]).abs().amax(-1).min() > 0.01


@pytest.mark.parametrize(("length", "is_turned"), [(0.9e-6, False), (1.1e-6, True)])
def test_a_source_counts_as_zero_below_the_floor_on_its_squared_norm(
    length: float, is_turned: bool
) -> None:
    source, target, vector = torch.eye(3, dtype=torch.float64).unbind()
    vector = vector + target

    turned = rotate(length * source, target, vector)

    expected = torch.tensor([-1.0, 0.0, 1.0] if is_turned else [0.0, 1.0, 1.0]).double()
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-9)


@every_dtype
@every_case
def test_gradients_are_finite_at_every_angle(size: int, angle: float, dtype: torch.dtype) -> None:
    source, target = pairs(size, angle, dtype)
    vector = normal(14, len(source), size, dtype=dtype)

    for gradient in gradients(rotate, source, target, vector):
        assert gradient.isfinite().all()


@every_dtype
@pytest.mark.parametrize("zero", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_gradients_are_finite_at_zero_inputs(zero: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [normal(seed, 5, 7, dtype=dtype) for seed in (15, 16, 17)]
    for index in zero:
        inputs[index].zero_()

    for gradient in gradients(rotate, *inputs):
        assert gradient.isfinite().all()


def test_a_zero_source_passes_the_gradient_straight_to_the_vector() -> None:
    source, target, vector = torch.zeros(5, 7), normal(18, 5, 7).float(), normal(19, 5, 7).float()

    for_source, for_target, for_vector = gradients(rotate, source, target, vector)

    assert not for_source.any()
    assert not for_target.any()
    assert torch.equal(for_vector, normal(99, 5, 7).float())


@pytest.mark.parametrize("angle", ANGLES[:-1])
@pytest.mark.parametrize("size", [7, 64])
def test_float32_gradients_follow_float64_gradients_of_another_form(
    size: int, angle: float
) -> None:
    source, target = pairs(size, angle, torch.float32)
    vector = normal(20, len(source), size, dtype=torch.float32)

    actual = gradients(rotate, source, target, vector)

    exact = gradients(generator_form, source.double(), target.double(), vector.double())
    # the gradient (for N > 2) grows like 1 / cos(angle / 2), and so does its relative error
    tolerance = conditioned(torch.float32, angle)
    for gradient, expected in zip(actual, exact, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(
            gradient.double() / scale, expected / scale, rtol=0, atol=tolerance
        )


@every_dtype
@pytest.mark.parametrize("size", [2, 7, 64])
@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-7])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_nearly_parallel_pairs_have_the_value_and_gradient_of_another_form(
    scale: float, noise: float, size: int, dtype: torch.dtype
) -> None:
    source = normal(21, 200, size, dtype=dtype)
    target = scale * source + noise * normal(22, 200, size, dtype=dtype)
    vector = normal(23, 200, size, dtype=dtype)

    turned = rotate(source, target, vector)
    actual = gradients(rotate, source, target, vector)

    exact = [tensor.double() for tensor in (source, target, vector)]
    torch.testing.assert_close(
        turned.double(), generator_form(*exact), rtol=0, atol=4 * rounding(dtype)
    )
    for gradient, expected in zip(actual, gradients(generator_form, *exact), strict=True):
        peak = expected.abs().max()
        torch.testing.assert_close(
            gradient.double() / peak, expected / peak, rtol=0, atol=rounding(dtype)
        )


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-3, 0.1, 1.0, 45.0, 90.0, 135.0])
def test_gradcheck(angle: float) -> None:
    source, target = pairs(4, angle, torch.float64, count=2)
    inputs = (source, target, normal(24, 2, 4))

    assert torch.autograd.gradcheck(rotate, tuple(tensor.requires_grad_() for tensor in inputs))


def test_second_derivatives() -> None:
    source, target = pairs(3, 60.0, torch.float64, count=1)
    inputs = (source, target, normal(25, 1, 3))

    assert torch.autograd.gradgradcheck(
        rotate, tuple(tensor.requires_grad_() for tensor in inputs)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32_and_returned_in_half(dtype: torch.dtype) -> None:
    # squares of 1e-4 are zero in float16: computed there the rotation would be the identity
    source, target = (1e-4 * normal(seed, 9, 16, dtype=dtype) for seed in (26, 27))
    vector = normal(28, 9, 16, dtype=dtype)

    turned = rotate(source, target, vector)

    assert turned.dtype == dtype
    expected = rotate(source.float(), target.float(), vector.float())
    assert torch.equal(turned, expected.to(dtype))
    assert (turned - vector).abs().amax(-1).min() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gradients_are_finite_for_parallel_inputs(dtype: torch.dtype) -> None:
    source, vector = normal(29, 9, 16, dtype=dtype), normal(30, 9, 16, dtype=dtype)

    for gradient in gradients(rotate, source, 2 * source, vector):
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


@every_dtype
@every_case
def test_accumulated_rotation_is_the_matrix_product_with_the_rotation_on_the_right(
    size: int, angle: float, dtype: torch.dtype
) -> None:
    source, target = pairs(size, angle, dtype)
    memory = normal(50, len(source), size, size, dtype=dtype)

    product = accumulate_rotation(memory, source, target)

    expected = memory @ rotation_matrix(source, target)
    tolerance = conditioned(dtype, angle) * size
    torch.testing.assert_close(product, expected, rtol=0, atol=tolerance)


@every_dtype
@every_case
def test_accumulated_rotation_keeps_an_orthogonal_matrix_orthogonal(
    size: int, angle: float, dtype: torch.dtype
) -> None:
    source, target = pairs(size, angle, dtype)
    memory = torch.linalg.qr(normal(51, len(source), size, size))[0].to(dtype)

    after = accumulate_rotation(memory, source, target).double()

    identity = torch.eye(size, dtype=torch.float64).expand_as(after)
    product = after.transpose(-1, -2) @ after
    torch.testing.assert_close(product, identity, rtol=0, atol=2 * rounding(dtype))


@every_dtype
@every_case
def test_gradients_of_an_accumulated_rotation_are_finite_at_every_angle(
    size: int, angle: float, dtype: torch.dtype
) -> None:
    source, target = pairs(size, angle, dtype)
    memory = normal(52, len(source), size, size, dtype=dtype)

    for gradient in gradients(accumulate_rotation, memory, source, target):
        assert gradient.isfinite().all()


@every_dtype
@pytest.mark.parametrize("zero", ["source", "target", "both"])
def test_accumulating_a_zero_source_or_target_changes_nothing(
    zero: str, dtype: torch.dtype
) -> None:
    source, target = normal(53, 5, 7, dtype=dtype), normal(54, 5, 7, dtype=dtype)
    memory = normal(55, 5, 7, 7, dtype=dtype)
    if zero in ("source", "both"):
        source[3] = 0
    if zero in ("target", "both"):
        target[3] = 0

    after = accumulate_rotation(memory, source, target)

    assert torch.equal(after[3], memory[3])
    assert (after[:3] - memory[:3]).abs().amax((-1, -2)).min() > 0.01
    for gradient in gradients(accumulate_rotation, memory, source, target):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("angle", [0.0, 1e-3, 1.0, 90.0, 135.0])
def test_accumulated_rotation_gradcheck(angle: float) -> None:
    source, target = pairs(3, angle, torch.float64, count=2)
    inputs = (normal(56, 2, 3, 3), source, target)

    assert torch.autograd.gradcheck(
        accumulate_rotation, tuple(tensor.requires_grad_() for tensor in inputs)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_accumulated_in_float32_and_returned_in_half(dtype: torch.dtype) -> None:
    source, target = (1e-4 * normal(seed, 9, 16, dtype=dtype) for seed in (57, 58))
    memory = normal(59, 9, 16, 16, dtype=dtype)

    after = accumulate_rotation(memory, source, target)

    assert after.dtype == dtype
    expected = accumulate_rotation(memory.float(), source.float(), target.float())
    assert torch.equal(after, expected.to(dtype))


def test_an_accumulated_rotation_stays_orthogonal_under_autocast() -> None:
    memory = torch.eye(16).expand(5, -1, -1)
    steps = normal(60, 100, 2, 5, 16, dtype=torch.float32)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        for source, target in steps:
            memory = accumulate_rotation(memory, source, target)

    product = memory.transpose(-1, -2) @ memory
    torch.testing.assert_close(product, torch.eye(16).expand_as(product), rtol=0, atol=1e-4)


@every_dtype
@pytest.mark.parametrize("eta", [0.3, 1.0, 2.5])
def test_time_normalize_gives_every_row_the_norm_eta(eta: float, dtype: torch.dtype) -> None:
    hidden = normal(31, 4, 3, 7, dtype=dtype)

    normalized = time_normalize(hidden, eta)

    norms = np.linalg.norm(hidden.numpy(), axis=-1, keepdims=True)
    expected = torch.from_numpy(eta * hidden.numpy() / norms)
    torch.testing.assert_close(normalized, expected.to(dtype), rtol=rounding(dtype), atol=0)


def test_time_normalize_of_a_row_does_not_depend_on_other_rows() -> None:
    hidden = normal(32, 4, 3, 7)
    changed = hidden.clone()
    changed[1] *= 100
    changed[:, 2] *= -3

    kept = time_normalize(changed, 1.0)[[0, 2, 3], :2]

    assert torch.equal(kept, time_normalize(hidden, 1.0)[[0, 2, 3], :2])


@every_dtype
def test_time_normalize_keeps_a_zero_row_zero_with_a_finite_gradient(dtype: torch.dtype) -> None:
    hidden = normal(33, 3, 7, dtype=dtype)
    hidden[1] = 0
    hidden.requires_grad_()

    normalized = time_normalize(hidden, 0.5)
    (gradient,) = torch.autograd.grad(normalized.sum(), hidden)

    assert torch.equal(normalized[1], torch.zeros(7, dtype=dtype))
    # below the floor the divisor is the constant 1e-6
    torch.testing.assert_close(gradient[1], torch.full((7,), 0.5e6, dtype=dtype))
    assert gradient.isfinite().all()


def test_time_normalize_divides_by_a_millionth_at_least() -> None:
    hidden = torch.tensor([3e-8, 4e-8], dtype=torch.float64)

    normalized = time_normalize(hidden, 1.0)

    torch.testing.assert_close(normalized, torch.tensor([0.03, 0.04], dtype=torch.float64))


def test_time_normalize_gradcheck() -> None:
    hidden = normal(34, 3, 4).requires_grad_()

    assert torch.autograd.gradcheck(lambda h: time_normalize(h, 0.7), (hidden,))


def test_time_normalize_of_float16_is_computed_in_float32() -> None:
    hidden = torch.full((4,), 1e-4, dtype=torch.float16)  # its square is zero in float16

    normalized = time_normalize(hidden, 1.0)

    torch.testing.assert_close(normalized, torch.full((4,), 0.5, dtype=torch.float16))


def test_zoneout_without_a_mask_is_the_expectation() -> None:
    new, previous = normal(35, 3, 7), normal(36, 3, 7)

    mixed = zoneout(new, previous, 0.1)

    expected = torch.from_numpy(0.9 * new.numpy() + 0.1 * previous.numpy())
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-15)


def test_zoneout_of_probability_zero_is_the_new_state() -> None:
    new, previous = normal(37, 3, 7), normal(38, 3, 7)

    assert torch.equal(zoneout(new, previous, 0.0), new)


@every_dtype
def test_zoneout_mask_keeps_previous_where_one_and_new_where_zero(dtype: torch.dtype) -> None:
    new, previous = normal(39, 3, 7, dtype=dtype), 1e6 * normal(40, 3, 7, dtype=dtype)
    mask = (normal(41, 3, 7) > 0).to(dtype)

    mixed = zoneout(new, previous, 0.1, mask)

    assert torch.equal(mixed, torch.where(mask == 1, previous, new))


def test_zoneout_average_over_masks_is_the_expectation() -> None:
    new, previous = normal(42, 7), normal(43, 7)
    generator = torch.Generator().manual_seed(44)
    masks = (torch.rand(40_000, 7, generator=generator) < 0.3).double()

    average = zoneout(new.expand_as(masks), previous.expand_as(masks), 0.3, masks).mean(0)

    torch.testing.assert_close(average, zoneout(new, previous, 0.3), rtol=0, atol=0.03)
