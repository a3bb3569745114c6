"""The fused recurrence against the step-by-step reference."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rum.cells import RUMCell
from rum.errors import ConfigError
from rum.kernels.cpu import library
from rum.kernels.recurrence import RecurrenceOptions
from rum.kernels.sequence import Weights
from rum.kernels.sequence import run as run_sequence

STEPS, BATCH, INPUT_SIZE, SIZE = 4, 3, 4, 5
LAYER_NORMS = {
    "off": (False, "post_sigmoid"),
    "post_sigmoid": (True, "post_sigmoid"),
    "pre_sigmoid": (True, "pre_sigmoid"),
}


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
        ("zoneout", [0.0, 0.3]),
        ("activation", ["relu", "tanh", "sigmoid", "softsign"]),
    ):
        test = pytest.mark.parametrize(name, values)(test)
    return test


def random_cell(*, backend: str, layer_norm: str = "off", **options: Any) -> RUMCell:
    """A cell with every parameter drawn at random, the same for every backend."""
    use, gate = LAYER_NORMS[layer_norm]
    sizes = options.pop("sizes", (INPUT_SIZE, SIZE))
    options = {"dtype": torch.float64, **options}
    cell = RUMCell(*sizes, layer_norm=use, layer_norm_gate=gate, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * draw if name.endswith("gain") else 0.6 * draw)
    return cell.eval()


def draw(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def run(cell: RUMCell, input: Tensor, hidden: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Output, last state and the gradients of one loss in everything, by name."""
    leaves = {
        "input": input.detach().clone().requires_grad_(),
        "hidden": hidden.detach().clone().requires_grad_(),
        **dict(cell.named_parameters()),
    }
    torch.manual_seed(seed)
    output, (last,) = cell.unroll(leaves["input"], (leaves["hidden"],))
    loss = (output * draw(*output.shape, seed=98, dtype=output.dtype)).sum()
    loss = loss + (last * draw(*last.shape, seed=99, dtype=last.dtype)).sum()
    gradients = torch.autograd.grad(loss, tuple(leaves.values()))
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"output": output.detach(), "last state": last.detach(), **named}


def set_rotation(cell: RUMCell, embedding: Tensor, target_per_embedding: float) -> None:
    """Makes the target a fixed multiple of the embedded input, whatever the hidden state."""
    with torch.no_grad():
        cell.weight_ih[2 * SIZE :] = embedding
        cell.weight_ih[:SIZE] = target_per_embedding * embedding
        cell.weight_hh[:SIZE] = 0
        cell.bias[:SIZE] = 0
        if cell.embedding_bias is not None:
            cell.bias[:SIZE] = target_per_embedding * cell.embedding_bias


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("embedding_bias", [True, False])
@every_option
def test_values_and_gradients_equal_the_reference_in_float64(
    layer_norm: str,
    eta: float | None,
    zoneout: float,
    activation: str,
    embedding_bias: bool,
    training: bool,
) -> None:
    options: dict[str, Any] = {
        "layer_norm": layer_norm,
        "eta": eta,
        "zoneout": zoneout,
        "activation": activation,
        "embedding_bias": embedding_bias,
    }
    input, hidden = draw(STEPS, BATCH, INPUT_SIZE), draw(BATCH, SIZE, seed=3)

    fused = run(random_cell(backend="fused", **options).train(training), input, hidden)
    reference = run(random_cell(backend="reference", **options).train(training), input, hidden)

    torch.testing.assert_close(fused, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layer_norm", LAYER_NORMS)
def test_gradients_pass_gradcheck(layer_norm: str) -> None:
    cell = random_cell(
        backend="fused",
        layer_norm=layer_norm,
        eta=0.7,
        zoneout=0.2,
        activation="tanh",
        sizes=(2, 3),
    )

    def unroll(input: Tensor, hidden: Tensor, *_: Tensor) -> Tensor:
        return cell.unroll(input, (hidden,))[0]

    # gradcheck perturbs the parameters in place, so the cell need not be given them
    leaves = (draw(3, 2, 2).requires_grad_(), draw(2, 3, seed=3).requires_grad_())
    assert torch.autograd.gradcheck(unroll, (*leaves, *cell.parameters()))


def test_training_draws_the_masks_of_the_reference() -> None:
    fused, reference = (
        random_cell(backend=backend, zoneout=0.5).train() for backend in ("fused", "reference")
    )
    input = draw(STEPS, BATCH, INPUT_SIZE)

    torch.manual_seed(4)
    first = fused.unroll(input)[0]
    after_fused = torch.rand(3)
    torch.manual_seed(4)
    second = reference.unroll(input)[0]
    after_reference = torch.rand(3)

    # where a unit is kept it equals its predecessor exactly
    before = torch.cat((torch.zeros(1, BATCH, SIZE).double(), first[:-1]))
    before_reference = torch.cat((torch.zeros(1, BATCH, SIZE).double(), second[:-1]))
    kept = first == before
    assert torch.equal(kept, second == before_reference)
    assert 0.2 < float(kept.double().mean()) < 0.8
    assert torch.equal(after_fused, after_reference)


@pytest.mark.parametrize("layer_norm", LAYER_NORMS)
@pytest.mark.parametrize("eta", [None, 0.7])
def test_float32_follows_float64(eta: float | None, layer_norm: str) -> None:
    options: dict[str, Any] = {
        "eta": eta,
        "layer_norm": layer_norm,
        "activation": "tanh",
        "zoneout": 0.1,
    }
    cell = random_cell(backend="fused", dtype=torch.float32, **options)
    exact = random_cell(backend="reference", **options)
    exact.load_state_dict(cell.state_dict())  # the rounded weights
    input = draw(STEPS, BATCH, INPUT_SIZE, dtype=torch.float32)
    hidden = draw(BATCH, SIZE, seed=3, dtype=torch.float32)

    actual = run(cell, input, hidden)
    # the loss weights of `run` are drawn in float64 and differ by rounding only
    expected = run(exact, input.double(), hidden.double())

    for name, tensor in actual.items():
        assert tensor.dtype == torch.float32
        scale = expected[name].abs().max()
        error = (tensor.double() - expected[name]).abs().max() / scale
        assert error < (1e-4 if name.startswith("gradient") else 1e-5), name


@pytest.mark.parametrize("layer_norm", LAYER_NORMS)
@pytest.mark.parametrize("eta", [None, 0.7])
def test_a_zero_embedded_input_is_the_reference_and_turns_nothing(
    eta: float | None, layer_norm: str
) -> None:
    options: dict[str, Any] = {"embedding_bias": False, "eta": eta, "layer_norm": layer_norm}
    fused, reference = (
        random_cell(backend=backend, **options) for backend in ("fused", "reference")
    )
    for cell in (fused, reference):
        with torch.no_grad():
            cell.weight_ih.zero_()
    input, hidden = draw(STEPS, BATCH, INPUT_SIZE), draw(BATCH, SIZE, seed=3)

    actual = run(fused, input, hidden)

    assert all(tensor.isfinite().all() for tensor in actual.values())
    assert not actual["gradient of input"].any()
    assert actual["gradient of hidden"].any()
    torch.testing.assert_close(actual, run(reference, input, hidden), rtol=1e-11, atol=1e-11)


def test_a_zero_target_is_the_reference() -> None:
    fused, reference = (
        random_cell(backend=backend, activation="tanh") for backend in ("fused", "reference")
    )
    for cell in (fused, reference):
        set_rotation(cell, draw(SIZE, INPUT_SIZE, seed=5), 0.0)
    input, hidden = draw(STEPS, BATCH, INPUT_SIZE), draw(BATCH, SIZE, seed=3)

    actual = run(fused, input, hidden)

    assert all(tensor.isfinite().all() for tensor in actual.values())
    torch.testing.assert_close(actual, run(reference, input, hidden), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target_per_embedding", [1.0, 2.0, 3.0, -1.0, -2.0])
@pytest.mark.parametrize("eta", [None, 0.7])
def test_a_target_along_or_against_the_embedded_input_is_the_reference(
    eta: float | None, target_per_embedding: float, dtype: torch.dtype
) -> None:
    fused, reference = (
        random_cell(backend=backend, activation="tanh", eta=eta, dtype=dtype)
        for backend in ("fused", "reference")
    )
    for cell in (fused, reference):
        set_rotation(cell, draw(SIZE, INPUT_SIZE, seed=5), target_per_embedding)
    input = draw(STEPS, BATCH, INPUT_SIZE, dtype=dtype)
    hidden = draw(BATCH, SIZE, seed=3, dtype=dtype)

    actual = run(fused, input, hidden)

    assert all(tensor.isfinite().all() for tensor in actual.values())
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(
        actual, run(reference, input, hidden), rtol=tolerance, atol=tolerance
    )


def test_a_target_along_the_embedded_input_turns_nothing() -> None:
    cell = random_cell(backend="fused", activation="tanh")
    set_rotation(cell, draw(SIZE, INPUT_SIZE, seed=5), 2.0)
    input, hidden = draw(1, BATCH, INPUT_SIZE), draw(BATCH, SIZE, seed=3)

    with torch.no_grad():
        output, _ = cell.unroll(input, (hidden,))

        assert cell.embedding_bias is not None
        embedded = input[0] @ cell.weight_ih[2 * SIZE :].T + cell.embedding_bias
        update = input[0] @ cell.weight_ih[SIZE : 2 * SIZE].T + hidden @ cell.weight_hh[SIZE:].T
        update = torch.sigmoid(update + cell.bias[SIZE:])
        expected = update * hidden + (1 - update) * torch.tanh(embedded + hidden)
    torch.testing.assert_close(output[0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("eta", [None, 0.7])
def test_a_dead_state_of_zeros_has_the_gradients_of_the_reference(eta: float | None) -> None:
    # candidates below zero under a ReLU: the state stays zero, below the floor of eta's norm
    fused, reference = (
        random_cell(backend=backend, eta=eta) for backend in ("fused", "reference")
    )
    for cell in (fused, reference):
        with torch.no_grad():
            cell.weight_ih[2 * SIZE :] = 0
            assert cell.embedding_bias is not None
            cell.embedding_bias.fill_(-1.0)
    input, hidden = draw(STEPS, BATCH, INPUT_SIZE), torch.zeros(BATCH, SIZE).double()

    actual = run(fused, input, hidden)

    assert not actual["output"].any()
    assert actual["gradient of hidden"].any()
    torch.testing.assert_close(actual, run(reference, input, hidden), rtol=1e-11, atol=1e-11)


def test_a_state_below_the_floor_of_eta_has_the_gradients_of_the_reference() -> None:
    # as above, from a state of 1e-8, whose norm is divided by the constant 1e-6
    fused, reference = (
        random_cell(backend=backend, eta=0.7) for backend in ("fused", "reference")
    )
    for cell in (fused, reference):
        with torch.no_grad():
            cell.weight_ih[2 * SIZE :] = 0
            assert cell.embedding_bias is not None
            cell.embedding_bias.fill_(-1.0)
    input, hidden = draw(1, BATCH, INPUT_SIZE), 1e-8 * draw(BATCH, SIZE, seed=3)

    actual = run(fused, input, hidden)

    assert 1e-4 < float(actual["output"].abs().max()) < 0.1
    torch.testing.assert_close(actual, run(reference, input, hidden), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("loss", [torch.sum, lambda output: output.square().sum()])
def test_second_derivative_of_the_fused_backend_raises_whatever_the_loss(
    loss: Callable[[Tensor], Tensor],
) -> None:
    cell = random_cell(backend="fused", activation="tanh")
    input = draw(STEPS, BATCH, INPUT_SIZE).requires_grad_()
    output, _ = cell.unroll(input)
    (gradient,) = torch.autograd.grad(loss(output), input, create_graph=True)

    with pytest.raises(RuntimeError, match="twice: use backend='reference'"):
        gradient.sum().backward()


def test_second_derivative_of_the_reference_backend_is_right() -> None:
    cell = random_cell(backend="reference", activation="tanh", sizes=(2, 3))
    leaves = (draw(2, 1, 2).requires_grad_(), draw(1, 3, seed=3).requires_grad_())

    assert torch.autograd.gradgradcheck(lambda x, h: cell.unroll(x, (h,))[0], leaves)


@pytest.mark.parametrize("lambda_", [0, 1])
@pytest.mark.parametrize("layer_norm", LAYER_NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_follow_float64(
    dtype: torch.dtype, layer_norm: str, lambda_: int
) -> None:
    options: dict[str, Any] = {"layer_norm": layer_norm, "activation": "tanh", "eta": 1.0}
    cell = random_cell(backend="fused", dtype=dtype, lambda_=lambda_, **options)
    exact = random_cell(backend="reference", lambda_=lambda_, **options)
    exact.load_state_dict(cell.state_dict())  # the rounded weights
    input = draw(STEPS, BATCH, INPUT_SIZE, dtype=dtype).requires_grad_()

    output, (last, *memory) = cell.unroll(input)
    expected, _ = exact.unroll(input.double())

    assert output.dtype == last.dtype == dtype
    assert all(matrix.dtype == torch.float32 for matrix in memory)
    assert relative(output, expected) < 3e-2
    ours = torch.autograd.grad(output.sum(), (input, *cell.parameters()))
    theirs = torch.autograd.grad(expected.sum(), (input, *exact.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert relative(a, b) < 3e-2


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(((actual.double() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("backend", ["auto", "reference", "fused"])
def test_another_dtype_than_that_of_the_weights_is_refused(backend: str) -> None:
    cell = RUMCell(INPUT_SIZE, SIZE, backend=backend)
    for dtype in (torch.float64, torch.bfloat16, torch.long):
        with pytest.raises(
            ValueError, match=r"must have the dtype of the weights, torch\.float32"
        ):
            cell.unroll(torch.zeros(2, 1, INPUT_SIZE, dtype=dtype))


@pytest.mark.parametrize("lambda_", [0.5, 1.0])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_memory_stays_orthogonal_under_autocast_of_half_precision_inputs(
    backend: str, lambda_: float
) -> None:
    torch.manual_seed(0)
    cell = RUMCell(INPUT_SIZE, SIZE, lambda_=lambda_, backend=backend)
    input = torch.randn(200, 3, INPUT_SIZE).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, (hidden, memory) = cell.unroll(input)
    assert hidden.dtype == memory.dtype == torch.float32
    assert (memory.mT @ memory - torch.eye(SIZE)).abs().max() < 2e-5


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"backend must be one of .*'fused'.*got 'cuda'"):
        RUMCell(INPUT_SIZE, SIZE, backend="cuda")


@pytest.mark.parametrize(
    ("lambda_", "dtype", "backend"),
    [
        (0.0, torch.float64, "fused"),
        (1.0, torch.float64, "fused"),
        (0.5, torch.float64, "reference"),
        (0.0, torch.float32, "fused" if library() is None else "cpu"),
        (1.0, torch.float32, "fused" if library() is None else "cpu"),
        (0.0, torch.bfloat16, "fused" if library() is None else "cpu"),
        (1.0, torch.float16, "fused" if library() is None else "cpu"),
    ],
    ids=str,
)
def test_auto_is_the_fastest_that_can_serve_and_says_so_once(
    lambda_: float, dtype: torch.dtype, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    cell = random_cell(backend="auto", lambda_=lambda_, dtype=dtype)
    with caplog.at_level("DEBUG", logger="rum.cells.base"):
        for _ in range(2):
            cell.unroll(draw(STEPS, BATCH, INPUT_SIZE, dtype=dtype))
    assert [record.getMessage() for record in caplog.records] == [
        f"RUMCell runs on backend {backend!r} (cpu)"
    ]


def saved_elements(cell: RUMCell, input: Tensor, hidden: Tensor) -> int:
    """Elements kept for backward, each storage once, the cell's parameters apart."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in cell.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = cell.unroll(input, (hidden,))  # held, so that no address is used twice
    assert output.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("layer_norm", ["off", "post_sigmoid"])
@pytest.mark.parametrize(("zoneout", "tensors"), [(0.0, 4), (0.1, 5)])
def test_fused_saves_four_states_a_step_and_the_zoneout_mask(
    zoneout: float, tensors: int, layer_norm: str
) -> None:
    length, batch, size = 20, 8, 32
    cell = random_cell(
        backend="fused", zoneout=zoneout, layer_norm=layer_norm, eta=1.0, sizes=(1, size)
    ).train()
    input, hidden = draw(length, batch, 1), draw(batch, size)

    saved = saved_elements(cell, input, hidden)

    # two pre-activations, the embedded input and the output (and the mask); the initial state,
    # the input (for the gradient of its weight) and a margin for small things, a tenth of a state
    exact = tensors * length * batch * size + batch * size + length * batch
    assert exact - length * batch <= saved <= exact + 0.1 * length * batch * size


def test_with_recompute_fused_saves_one_state_a_step() -> None:
    length, batch, size = 20, 8, 32
    cell = random_cell(backend="fused", eta=1.0, sizes=(1, size))
    cell.recompute = True
    input, hidden = draw(length, batch, 1), draw(batch, size)

    saved = saved_elements(cell, input, hidden)

    exact = length * batch * size + batch * size + length * batch
    assert exact <= saved <= exact + 0.1 * length * batch * size


@pytest.mark.parametrize("lambda_", [0, 1])
@pytest.mark.parametrize("layer_norm", LAYER_NORMS)
def test_recompute_gives_the_same_gradients(layer_norm: str, lambda_: int) -> None:
    options: dict[str, Any] = {"layer_norm": layer_norm, "eta": 0.7, "lambda_": lambda_}
    cell, recomputed = (random_cell(backend="fused", **options) for _ in range(2))
    recomputed.recompute = True
    input = draw(150, BATCH, INPUT_SIZE).requires_grad_()  # past a checkpoint of the memory

    gradients = [
        torch.autograd.grad(each.unroll(input)[0].square().sum(), (input, *each.parameters()))
        for each in (cell, recomputed)
    ]

    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_fused_saves_a_fraction_of_the_reference() -> None:
    sizes = (1, 32)
    input, hidden = draw(20, 8, 1), draw(8, 32)

    fused, reference = (
        saved_elements(
            random_cell(backend=backend, layer_norm="post_sigmoid", eta=1.0, sizes=sizes),
            input,
            hidden,
        )
        for backend in ("fused", "reference")
    )

    assert reference > 3 * fused


def recurrence(
    input: Tensor, hidden: Tensor, weights: Weights, options: RecurrenceOptions
) -> Tensor:
    """Outputs without replicas."""
    outputs, _ = run_sequence(
        "fused", input.unsqueeze(1), hidden.unsqueeze(0), None, weights, None, options
    )
    return outputs.squeeze(1)


def test_gradient_of_the_recurrent_weight_is_the_sum_over_the_steps() -> None:
    options = RecurrenceOptions(
        activation="tanh", eta=(0.7,), layer_norm_gate="post_sigmoid", zoneout=(0.2,)
    )
    input, weight_ih = draw(STEPS, BATCH, INPUT_SIZE), draw(1, 3 * SIZE, INPUT_SIZE, seed=3)
    hidden, weight = draw(BATCH, SIZE, seed=4), draw(1, 2 * SIZE, SIZE, seed=5)
    norms = tuple(
        draw(1, n, seed=seed) for n, seed in ((2 * SIZE, 6), (2 * SIZE, 7), (SIZE, 8), (SIZE, 9))
    )
    bias, loss_weight = draw(1, 3 * SIZE, seed=11), draw(STEPS, BATCH, SIZE, seed=10)

    whole = weight.clone().requires_grad_()
    output = recurrence(input, hidden, (weight_ih, bias, whole, norms), options)
    (gradient,) = torch.autograd.grad((output * loss_weight).sum(), whole)

    # the same sequence in runs of one step, each with a weight of its own
    state = hidden
    weights, outputs = [], []
    for t in range(STEPS):
        weights.append(weight.clone().requires_grad_())
        of_step = (weight_ih, bias, weights[t], norms)
        state = recurrence(input[t : t + 1], state, of_step, options)[0]
        outputs.append(state)
    by_step = torch.autograd.grad((torch.stack(outputs) * loss_weight).sum(), weights)
    assert min(float(each.abs().max()) for each in by_step) > 1e-3
    torch.testing.assert_close(gradient, sum(by_step), rtol=1e-12, atol=1e-12)


def test_a_frozen_recurrent_weight_leaves_the_other_gradients_as_they_are() -> None:
    input, hidden = draw(STEPS, BATCH, INPUT_SIZE), draw(BATCH, SIZE, seed=3)
    expected = run(random_cell(backend="fused"), input, hidden)
    cell = random_cell(backend="fused")
    cell.weight_hh.requires_grad_(False)

    output, (last,) = cell.unroll(input, (hidden,))
    loss = (output * draw(*output.shape, seed=98)).sum() + (
        last * draw(*last.shape, seed=99)
    ).sum()
    loss.backward()

    assert cell.weight_hh.grad is None
    for name in ("weight_ih", "bias", "embedding_bias"):
        gradient = getattr(cell, name).grad
        torch.testing.assert_close(gradient, expected[f"gradient of {name}"], rtol=0, atol=0)


def test_a_non_contiguous_input_gives_the_values_and_gradients_of_a_copy() -> None:
    cell = random_cell(backend="fused")
    input = draw(BATCH, INPUT_SIZE, STEPS).permute(2, 0, 1)
    hidden = draw(SIZE, BATCH, seed=3).t()
    assert not input.is_contiguous()
    assert not hidden.is_contiguous()
    outputs, gradients = [], []
    for x, h in ((input, hidden), (input.contiguous(), hidden.contiguous())):
        leaf, state = x.requires_grad_(), h.requires_grad_()
        output, _ = cell.unroll(leaf, (state,))
        outputs.append(output.detach())
        gradients.append(torch.autograd.grad(output.square().sum(), (leaf, state)))

    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-14)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-13)


def test_weights_in_any_memory_order() -> None:
    plain, strange = random_cell(backend="fused"), random_cell(backend="fused")
    for name in ("weight_ih", "weight_hh"):
        turned = getattr(strange, name).detach().t().contiguous().t()
        assert not turned.is_contiguous()
        setattr(strange, name, torch.nn.Parameter(turned))
    inputs = draw(STEPS, BATCH, INPUT_SIZE), draw(BATCH, SIZE, seed=3)

    torch.testing.assert_close(run(strange, *inputs), run(plain, *inputs), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("layer_norm", LAYER_NORMS)
def test_autocast_gives_float32_close_to_full_precision(layer_norm: str, backend: str) -> None:
    cell = random_cell(
        backend=backend, layer_norm=layer_norm, eta=1.0, zoneout=0.1, dtype=torch.float32
    )
    input = draw(STEPS, BATCH, INPUT_SIZE, dtype=torch.float32)
    expected, _ = cell.unroll(input)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, (last,) = cell.unroll(input)
    output.square().sum().backward()

    assert output.dtype == last.dtype == torch.float32
    # bfloat16 rounds to 0.4 per cent; the states have norm one
    difference = (output - expected).detach().abs().max()
    assert 0 < float(difference) < 0.1
    for name, parameter in cell.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
