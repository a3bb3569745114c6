"""What every registered model promises, and what its configuration refuses."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rum.cells import (
    MODELS,
    Cell,
    FSLSTMConfig,
    FSRUMConfig,
    LSTMCellConfig,
    LSTMConfig,
    ModelConfig,
    RUMCellConfig,
    RUMConfig,
    StackConfig,
    State,
    register_model,
)
from rum.errors import ConfigError
from rum.models import ModelSizes, build_on_meta, count_parameters
from rum.parameters import from_plain

STACKS = {name: config for name, config in MODELS.items() if issubclass(config, StackConfig)}
# Options that make a model tiny; one that is not here is tested with `hidden_size` 3 alone.
SMALL_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "rum": [
        {"hidden_size": 3, "zoneout": 0.3},
        {"hidden_size": 3, "eta": 0.7, "layer_norm": True, "activation": "tanh"},
        {"hidden_size": 3, "lambda_": 1.0, "zoneout": 0.3},
        {"hidden_size": 3, "lambda_": 0.5},
        {
            "hidden_size": 3,
            "lambda_": 0.3,
            "lambda_trainable": True,
            "layer_norm": True,
            "eta": 1.0,
        },
    ],
    "gru": [
        {"hidden_size": 3},
        {"hidden_size": 3, "reset_after": True, "initialization": "orthogonal"},
    ],
    "hyper_lstm": [{"hidden_size": 3, "hyper_size": 2, "embedding_size": 2}],
    "ntm": [
        {"hidden_size": 3, "memory_size": 4, "memory_width": 2},
        {"hidden_size": 3, "memory_size": 5, "memory_width": 2, "shift_range": 2},
    ],
    "hm_lstm": [{"hidden_size": 3}, {"hidden_size": 2, "num_levels": 2, "slope": 2.0}],
    "goru": [{"hidden_size": 4, "style": "fft"}, {"hidden_size": 3}],
    "eunn": [{"hidden_size": 4, "style": "fft"}, {"hidden_size": 3, "capacity": 3}],
    "highway_rum": [
        {"rum": RUMCellConfig(hidden_size=3, zoneout=0.3), "depth": 3},
        {"rum": RUMCellConfig(hidden_size=3, lambda_=1.0)},
    ],
    "lstm": [
        {"hidden_size": 3},
        {"hidden_size": 3, "layer_norm": True, "zoneout_h": 0.3, "zoneout_c": 0.5},
    ],
    "fs_rum": [
        {
            "fast": LSTMCellConfig(hidden_size=3, layer_norm=True, zoneout_h=0.3),
            # tanh: two units of a ReLU are easily zero together, where eta has no derivative
            "slow": RUMCellConfig(hidden_size=2, eta=1.0, zoneout=0.3, activation="tanh"),
        },
        {
            "fast": LSTMCellConfig(hidden_size=3),
            "slow": RUMCellConfig(hidden_size=2, lambda_=1.0),
            "num_fast_cells": 3,
        },
    ],
    "fs_lstm": [
        {
            "fast": LSTMCellConfig(hidden_size=3, zoneout_c=0.5),
            "slow": LSTMCellConfig(hidden_size=2, layer_norm=True),
            "num_fast_cells": 4,
        },
    ],
}
INPUT_SIZE = 2
CPU = torch.device("cpu")

every_model = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}-{index}")
        for name in STACKS
        for index, options in enumerate(SMALL_OPTIONS.get(name, [{"hidden_size": 3}]))
    ],
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of tiny operations only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> Cell:
    torch.manual_seed(1)
    return STACKS[name](**options).build(INPUT_SIZE, dtype=torch.float64).to(dtype)


def draw(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def reached_state(cell: Cell, batch_size: int, dtype: torch.dtype = torch.float64) -> State:
    """A state that the cell reaches after a few steps (a random one need not be valid)."""
    training = cell.training
    with torch.no_grad():
        _, state = cell.eval().unroll(draw(3, batch_size, INPUT_SIZE, seed=3, dtype=dtype))
    cell.train(training)
    return state


def loss_of(output: Tensor, state: State) -> Tensor:
    terms = [
        (tensor * torch.linspace(-1, 2, tensor.numel()).to(tensor.dtype).view_as(tensor)).sum()
        for tensor in (output, *state)
    ]
    return torch.stack([term.double() for term in terms]).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_model
def test_shapes_and_dtype_are_kept(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    cell = build(name, options, dtype)
    initial = cell.initial_state(4, device=CPU, dtype=dtype)

    output, state = cell.unroll(draw(5, 4, INPUT_SIZE, dtype=dtype))

    assert output.shape == (5, 4, cell.hidden_size)
    assert [tensor.shape for tensor in state] == [tensor.shape for tensor in initial]
    for before, after in zip(initial, state, strict=True):
        # an associative memory would not stay orthogonal in half precision
        is_memory = before.dim() == 3 and "rum" in name
        expected = torch.promote_types(dtype, torch.float32) if is_memory else dtype
        assert before.dtype == after.dtype == expected
    assert output.dtype == dtype
    assert all(tensor.isfinite().all() for tensor in (output, *state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_model
def test_every_parameter_is_built_in_the_dtype_and_on_the_device_asked_for(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    cell = STACKS[name](**options).build(INPUT_SIZE, device="meta", dtype=dtype)

    placed = {(parameter.device.type, parameter.dtype) for parameter in cell.parameters()}
    assert placed == {("meta", dtype)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["rum", "fs_rum", "fs_lstm"])
def test_a_model_is_built_in_half_precision(name: str, dtype: torch.dtype) -> None:
    cell = STACKS[name](**SMALL_OPTIONS[name][0]).build(INPUT_SIZE, dtype=dtype)

    assert {parameter.dtype for parameter in cell.parameters()} == {dtype}


@every_model
def test_bfloat16_values_are_close_to_float64(name: str, options: dict[str, Any]) -> None:
    cell = build(name, options, torch.bfloat16).eval()
    exact = build(name, options).eval()
    exact.load_state_dict(cell.state_dict())  # the rounded weights
    input = draw(3, 4, INPUT_SIZE, dtype=torch.bfloat16)

    with torch.no_grad():
        output, _ = cell.unroll(input)
        expected, _ = exact.unroll(input.double())

    assert float((output.double() - expected).square().mean().sqrt()) < 0.03


@every_model
def test_a_sequence_is_two_halves_with_the_state_handed_on(
    name: str, options: dict[str, Any]
) -> None:
    cell = build(name, options).eval()
    input = draw(7, 4, INPUT_SIZE)

    whole, state = cell.unroll(input)
    first, between = cell.unroll(input[:3])
    second, last = cell.unroll(input[3:], between)

    torch.testing.assert_close(torch.cat((first, second)), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=0, atol=1e-12)


@every_model
def test_single_steps_are_the_sequence(name: str, options: dict[str, Any]) -> None:
    cell = build(name, options).eval()
    input = draw(5, 4, INPUT_SIZE)

    state = None
    outputs = []
    for x in input:
        output, state = cell(x, state)
        outputs.append(output)

    whole, after = cell.unroll(input)
    torch.testing.assert_close(torch.stack(outputs), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, after, rtol=0, atol=1e-12)


@every_model
def test_no_state_is_the_initial_state(name: str, options: dict[str, Any]) -> None:
    cell = build(name, options).eval()
    input = draw(3, 4, INPUT_SIZE)
    initial = cell.initial_state(4, device=CPU, dtype=torch.float64)

    torch.testing.assert_close(cell.unroll(input), cell.unroll(input, initial), rtol=0, atol=0)


@every_model
def test_the_first_tensor_of_the_state_comes_out_last_in_the_output(
    name: str, options: dict[str, Any]
) -> None:
    cell = build(name, options)

    output, state = cell.unroll(draw(3, 4, INPUT_SIZE))

    assert torch.equal(output[-1], state[0])


@every_model
def test_samples_of_a_batch_do_not_see_each_other(name: str, options: dict[str, Any]) -> None:
    cell = build(name, options).eval()
    state = reached_state(cell, 4)
    input = draw(3, 4, INPUT_SIZE)
    changed_input = input.clone()
    changed_input[:, 1] += 5
    changed_state = tuple(
        tensor.index_copy(0, torch.tensor([1]), 2 * tensor[1:2]) for tensor in state
    )

    output, _ = cell.unroll(input, state)
    changed, _ = cell.unroll(changed_input, changed_state)

    others = [0, 2, 3]
    torch.testing.assert_close(changed[:, others], output[:, others], rtol=0, atol=1e-12)
    assert (changed[:, 1] - output[:, 1]).abs().max() > 1e-3


@every_model
def test_evaluation_is_deterministic(name: str, options: dict[str, Any]) -> None:
    cell = build(name, options).eval()
    input = draw(5, 4, INPUT_SIZE)

    torch.manual_seed(4)
    first = cell.unroll(input)
    torch.manual_seed(5)
    second = cell.unroll(input)

    torch.testing.assert_close(first, second, rtol=0, atol=0)


@every_model
def test_training_is_reproducible_under_a_seed(name: str, options: dict[str, Any]) -> None:
    cell = build(name, options).train()
    input = draw(5, 4, INPUT_SIZE)

    torch.manual_seed(4)
    first = cell.unroll(input)
    torch.manual_seed(4)
    second = cell.unroll(input)

    torch.testing.assert_close(first, second, rtol=0, atol=0)


@every_model
def test_another_seed_changes_training_where_something_is_random(
    name: str, options: dict[str, Any]
) -> None:
    cell = build(name, options).train()
    input = draw(5, 4, INPUT_SIZE)
    is_random = cell.sample_noise(5, 4) != ()

    torch.manual_seed(4)
    first, _ = cell.unroll(input)
    torch.manual_seed(5)
    second, _ = cell.unroll(input)

    assert torch.equal(first, second) is not is_random


@every_model
def test_gradcheck(name: str, options: dict[str, Any]) -> None:
    if name == "hm_lstm":
        pytest.skip("its boundaries pass gradients straight through, on purpose not their own")
    cell = build(name, options).eval()
    parameters = {key: value.detach() for key, value in cell.named_parameters()}
    with torch.no_grad():  # away from the special values 0 and 1
        for index, value in enumerate(parameters.values()):
            value.add_(0.2 * draw(*value.shape, seed=10 + index))
    input = draw(2, 2, INPUT_SIZE)
    state = reached_state(cell, 2)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(parameters, tensors[1 + len(state) :], strict=True))
        output, after = torch.func.functional_call(
            Unrolled(cell),
            {f"cell.{key}": value for key, value in values.items()},
            (tensors[0], *tensors[1 : 1 + len(state)]),
        )
        return (output, *after)

    inputs = tuple(
        tensor.clone().requires_grad_() for tensor in (input, *state, *parameters.values())
    )
    assert torch.autograd.gradcheck(run, inputs)


class Unrolled(torch.nn.Module):
    """A cell called for a sequence (functional_call calls `forward`, which is one step)."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, input: Tensor, *state: Tensor) -> tuple[Tensor, State]:
        return self.cell.unroll(input, state)


@every_model
def test_every_parameter_that_sees_an_input_gets_a_gradient(
    name: str, options: dict[str, Any]
) -> None:
    cell = build(name, options)

    loss_of(*cell.unroll(draw(3, 4, INPUT_SIZE))).backward()

    for key, parameter in cell.named_parameters():
        assert parameter.grad is not None, key
        # the fast cells from the third on are fed zeros
        is_fed_zeros = key.endswith("weight_ih") and parameter.shape[1] == 1
        assert bool(parameter.grad.any()) is not is_fed_zeros, key


@every_model
def test_state_dict_brings_a_fresh_cell_to_the_same_outputs(
    name: str, options: dict[str, Any]
) -> None:
    cell = build(name, options).eval()
    torch.manual_seed(6)
    fresh = STACKS[name](**options).build(INPUT_SIZE, dtype=torch.float64).eval()
    input = draw(3, 4, INPUT_SIZE)
    assert not torch.equal(fresh.unroll(input)[0], cell.unroll(input)[0])

    fresh.load_state_dict(cell.state_dict())

    torch.testing.assert_close(fresh.unroll(input), cell.unroll(input), rtol=0, atol=0)


@every_model
def test_a_deep_copy_gives_the_same_outputs_and_shares_nothing(
    name: str, options: dict[str, Any]
) -> None:
    cell = build(name, options).eval()
    input = draw(3, 4, INPUT_SIZE)
    expected = cell.unroll(input)

    duplicate = copy.deepcopy(cell)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.fill_(0.5)

    torch.testing.assert_close(duplicate.unroll(input), expected, rtol=0, atol=0)


def zero_state(cell: Cell, input: Tensor) -> None:
    """Leaves the initial state, zeros, and the first input as they are."""


def zero_input(cell: Cell, input: Tensor) -> None:
    input.zero_()


def zero_parameters(cell: Cell, input: Tensor) -> None:
    for parameter in cell.parameters():
        parameter.zero_()


def zero_everything(cell: Cell, input: Tensor) -> None:
    zero_input(cell, input)
    zero_parameters(cell, input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("degenerate", [zero_state, zero_input, zero_parameters, zero_everything])
@every_model
def test_value_and_gradient_are_finite_at_zeros(
    name: str,
    options: dict[str, Any],
    degenerate: Callable[[Cell, Tensor], None],
    dtype: torch.dtype,
) -> None:
    cell = build(name, options, dtype)
    input = draw(4, 3, INPUT_SIZE, dtype=dtype)
    with torch.no_grad():
        degenerate(cell, input)
    input.requires_grad_()
    state = cell.initial_state(3, device=CPU, dtype=dtype)
    state = tuple(tensor.clone().requires_grad_() for tensor in state)

    output, after = cell.unroll(input, state)
    leaves = (input, *state, *cell.parameters())
    gradients = torch.autograd.grad(
        loss_of(output, after), leaves, allow_unused=True, materialize_grads=True
    )

    for tensor in (output, *after, *gradients):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("is_given", [True, False])
@every_model
def test_a_sequence_of_no_steps_returns_the_state_it_began_with(
    name: str, options: dict[str, Any], is_given: bool
) -> None:
    cell = build(name, options)
    initial = cell.initial_state(4, device=CPU, dtype=torch.float64)
    state = reached_state(cell, 4) if is_given else initial

    output, after = cell.unroll(draw(0, 4, INPUT_SIZE), state if is_given else None)

    assert output.shape == (0, 4, cell.hidden_size)
    assert output.dtype == torch.float64
    torch.testing.assert_close(after, state, rtol=0, atol=0)


@every_model
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(
    name: str, options: dict[str, Any]
) -> None:
    cell = build(name, options)

    output, state = cell.unroll(draw(3, 0, INPUT_SIZE))
    gradients = torch.autograd.grad(
        output.sum() + sum(tensor.sum() for tensor in state), tuple(cell.parameters())
    )

    assert output.shape == (3, 0, cell.hidden_size)
    assert {tensor.shape[0] for tensor in state} == {0}
    assert not any(gradient.any() for gradient in gradients)


@every_model
def test_an_input_of_another_size_is_refused(name: str, options: dict[str, Any]) -> None:
    cell = build(name, options)

    with pytest.raises(ValueError, match=r"2 features, got shape \(4, 7\)"):
        cell(draw(4, 7))
    with pytest.raises(ValueError, match=r"2 features, got shape \(3, 4, 7\)"):
        cell.unroll(draw(3, 4, 7))


@every_model
def test_a_state_of_another_batch_is_refused(name: str, options: dict[str, Any]) -> None:
    cell = build(name, options)
    state = reached_state(cell, 5)

    for run, input in ((cell, draw(4, INPUT_SIZE)), (cell.unroll, draw(3, 4, INPUT_SIZE))):
        with pytest.raises(ValueError, match=r"\[\(4, \d\).*got \[\(5, \d\)"):
            run(input, state)


@every_model
def test_a_state_with_too_many_tensors_is_refused(name: str, options: dict[str, Any]) -> None:
    cell = build(name, options)
    state = reached_state(cell, 4)

    with pytest.raises(ValueError, match=r"\(4, 99\)"):
        cell(draw(4, INPUT_SIZE), (*state, torch.zeros(4, 99)))
    with pytest.raises(ValueError, match=r"got \[\]"):
        cell(draw(4, INPUT_SIZE), ())


@every_model
def test_a_config_survives_its_plain_form(name: str, options: dict[str, Any]) -> None:
    config = STACKS[name](**options, num_layers=2, dropout=0.25)

    again = from_plain(STACKS[name], dataclasses.asdict(config), "model")

    assert again == config
    assert type(again) is type(config)
    sizes = ModelSizes(vocab_size=5, num_classes=3, embedding_size=4, initialization="orthogonal")
    counts = {count_parameters(build_on_meta(each, sizes)) for each in (config, again)}
    assert len(counts) == 1
    assert min(counts) > 0


@pytest.mark.parametrize("name", MODELS)
def test_the_default_name_of_a_config_is_its_key(name: str) -> None:
    assert MODELS[name].name == name


def test_registering_a_name_twice_is_refused() -> None:
    @dataclass(kw_only=True)
    class AnotherConfig(RUMConfig):
        name: str = "rum"

    with pytest.raises(ValueError, match="'rum' is registered twice"):
        register_model(AnotherConfig)

    assert MODELS["rum"] is RUMConfig


def test_a_config_under_another_models_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="name of this model must be 'rum', got 'lstm'"):
        RUMConfig(name="lstm")


NAN = math.nan
REFUSED: list[tuple[type[ModelConfig], str, list[Any]]] = [
    (RUMConfig, "hidden_size", [0, -1, 2.0, True]),
    (RUMConfig, "eta", [0, 0.0, -1.0, NAN, math.inf]),
    (RUMConfig, "zoneout", [1.0, -0.1, NAN]),
    (RUMConfig, "lambda_", [-1, 1e-6, 1.5, 2.5, NAN, float("inf")]),
    (RUMConfig, "activation", ["gelu", "ReLU", ""]),
    (RUMConfig, "layer_norm_gate", ["before", ""]),
    (RUMConfig, "num_layers", [0, -1, 1.5]),
    (RUMConfig, "dropout", [1, 1.0, -0.1, NAN]),
    (LSTMConfig, "hidden_size", [0]),
    (LSTMConfig, "zoneout_h", [1.0, -0.1, NAN]),
    (LSTMConfig, "zoneout_c", [1.0, -0.1, NAN]),
    (LSTMConfig, "num_layers", [0]),
    (LSTMConfig, "dropout", [1, NAN]),
    (FSRUMConfig, "num_fast_cells", [1, 0, 2.0]),
    (FSRUMConfig, "dropout", [1, NAN]),
    (FSRUMConfig, "num_layers", [0]),
    (FSLSTMConfig, "num_fast_cells", [1]),
    (FSLSTMConfig, "dropout", [1, -0.1]),
]


@pytest.mark.parametrize(
    ("config", "option", "value"),
    [(config, option, value) for config, option, values in REFUSED for value in values],
)
def test_a_value_that_cannot_work_is_refused_by_name(
    config: type[ModelConfig], option: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=rf"^{option} must be .*got "):
        config(**{option: value})


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (RUMConfig, {"hidden_size": 1, "eta": 1e-3, "zoneout": 0.0, "dropout": 0.0}),
        (RUMConfig, {"zoneout": 0.999, "dropout": 0.999, "lambda_": 1, "num_layers": 3}),
        (LSTMConfig, {"hidden_size": 1, "zoneout_h": 0.999, "zoneout_c": 0.999}),
        (FSRUMConfig, {"num_fast_cells": 2}),
        (FSLSTMConfig, {"num_fast_cells": 5, "dropout": 0.0}),
    ],
)
def test_values_at_the_edge_are_accepted(
    config: type[ModelConfig], options: dict[str, Any]
) -> None:
    plain = dataclasses.asdict(config(**options))

    assert {key: plain[key] for key in options} == options
