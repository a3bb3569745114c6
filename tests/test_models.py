"""Parameter counts of the published models, and the model around the recurrent layers."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rum.cells import (
    CellConfig,
    FastWeightsConfig,
    FSLSTMConfig,
    FSRUMConfig,
    GORUCellConfig,
    GORUConfig,
    GRUCellConfig,
    GRUConfig,
    LSTMCellConfig,
    LSTMConfig,
    ModelConfig,
    RUMCellConfig,
    RUMConfig,
)
from rum.models import ModelSizes, SequenceModel, build_on_meta, count_parameters


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of tiny operations only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def penn_treebank_rum(hidden_size: int, num_layers: int, embedding_bias: bool) -> RUMConfig:
    return RUMConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        layer_norm=True,
        eta=1.0,
        zoneout=0.1,
        embedding_bias=embedding_bias,
    )


def fs_rum(fast: int, slow: int, num_fast_cells: int, embedding_bias: bool) -> FSRUMConfig:
    return FSRUMConfig(
        fast=LSTMCellConfig(hidden_size=fast, layer_norm=True),
        slow=RUMCellConfig(hidden_size=slow, layer_norm=True, embedding_bias=embedding_bias),
        num_fast_cells=num_fast_cells,
    )


def fs_lstm(fast: int, slow: int, num_fast_cells: int) -> FSLSTMConfig:
    return FSLSTMConfig(
        fast=LSTMCellConfig(hidden_size=fast, layer_norm=True),
        slow=LSTMCellConfig(hidden_size=slow, layer_norm=True),
        num_fast_cells=num_fast_cells,
    )


# counted by hand in the specification; without and with the bias of the embedded input
PENN_TREEBANK_SIZES = ModelSizes(
    vocab_size=50, num_classes=50, embedding_size=128, initialization="orthogonal"
)
COPYING_SIZES = ModelSizes(
    vocab_size=10, num_classes=9, embedding_size=None, initialization="uniform"
)
RECALL_SIZES = ModelSizes(
    vocab_size=36,
    num_classes=10,
    embedding_size=None,
    initialization="uniform",
    answers_last=True,
)
PENN_TREEBANK = [
    ("RUM 2000", lambda bias: penn_treebank_rum(2000, 1, bias), 8_890_450, 8_892_450),
    ("2xRUM 1500", lambda bias: penn_treebank_rum(1500, 2, bias), 16_431_450, 16_434_450),
    ("FS-RUM-2", lambda bias: fs_rum(700, 1000, 2, bias), 11_247_450, 11_248_450),
    ("(S)800-1100", lambda bias: fs_rum(800, 1100, 2, bias), 14_187_250, 14_188_350),
    ("(S)900-1200", lambda bias: fs_rum(900, 1200, 2, bias), 17_467_050, 17_468_250),
    ("(S)1000-1000", lambda bias: fs_rum(1000, 1000, 2, bias), 17_604_450, 17_605_450),
    ("(S)1000-1200", lambda bias: fs_rum(1000, 1200, 2, bias), 19_886_050, 19_887_250),
    ("FS-RUM-3", lambda bias: fs_rum(500, 1000, 3, bias), 8_818_450, 8_819_450),
    ("FS-LSTM-2", lambda bias: fs_lstm(700, 400, 2), 7_225_050, 7_225_050),
    ("FS-LSTM-4", lambda bias: fs_lstm(500, 400, 4), 6_565_050, 6_565_050),
]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(make(bias), (without, with_bias)[bias], id=f"{name}-bias-{bias}")
        for name, make, without, with_bias in PENN_TREEBANK
        for bias in (False, True)
    ],
)
def test_penn_treebank_models_have_the_published_size(config: ModelConfig, expected: int) -> None:
    model = build_on_meta(config, PENN_TREEBANK_SIZES)

    assert count_parameters(model) == expected


def test_rum_2000_without_layer_norm_has_six_vectors_less() -> None:
    config = RUMConfig(hidden_size=2000, embedding_bias=False)
    model = build_on_meta(config, PENN_TREEBANK_SIZES)

    assert count_parameters(model) == 8_878_450


def test_default_fs_rum_and_fs_lstm_are_those_of_the_paper() -> None:
    assert count_parameters(build_on_meta(FSRUMConfig(), PENN_TREEBANK_SIZES)) == 11_248_450
    assert count_parameters(build_on_meta(FSLSTMConfig(), PENN_TREEBANK_SIZES)) == 7_225_050


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LSTMConfig(hidden_size=250), 263_259),
        (RUMConfig(hidden_size=250), 135_509),
        (RUMConfig(hidden_size=100), 24_209),
        (RUMConfig(hidden_size=100, lambda_=1), 24_209),
    ],
)
def test_copying_models_have_the_specified_size(config: ModelConfig, expected: int) -> None:
    model = build_on_meta(config, COPYING_SIZES)

    assert count_parameters(model) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [(RUMCellConfig(hidden_size=256), 180_992), (LSTMCellConfig(hidden_size=256), 328_704)],
)
def test_babi_cells_have_the_specified_size(
    config: RUMCellConfig | LSTMCellConfig, expected: int
) -> None:
    assert count_parameters(config.build(64, device="meta")) == expected


BASELINES = {
    "copying GRU": (GRUConfig(hidden_size=250), COPYING_SIZES, 198_009),
    "copying GORU": (GORUConfig(hidden_size=250), COPYING_SIZES, 135_758),
    "bAbI GRU": (GRUCellConfig(hidden_size=256), None, 246_528),
    "bAbI GORU": (GORUCellConfig(hidden_size=256, style="fft"), None, 182_016),
    "recall LSTM": (LSTMConfig(hidden_size=50), RECALL_SIZES, 17_910),
    "recall GORU": (GORUConfig(hidden_size=50), RECALL_SIZES, 11_109),
    "recall RUM": (RUMConfig(hidden_size=50, lambda_=1), RECALL_SIZES, 11_060),
    "recall FW-LN": (FastWeightsConfig(hidden_size=50), RECALL_SIZES, 4_960),
}


@pytest.mark.parametrize(("config", "sizes", "expected"), BASELINES.values(), ids=BASELINES)
def test_models_to_compare_with_have_the_specified_size(
    config: ModelConfig | CellConfig, sizes: ModelSizes | None, expected: int
) -> None:
    if sizes is None:
        assert isinstance(config, CellConfig)
        model = config.build(64, device="meta")
    else:
        assert isinstance(config, ModelConfig)
        model = build_on_meta(config, sizes)

    assert count_parameters(model) == expected


def test_count_leaves_frozen_parameters_out() -> None:
    layer = torch.nn.Linear(3, 4)
    layer.weight.requires_grad_(False)

    assert count_parameters(layer) == 4


def test_build_on_meta_makes_no_values() -> None:
    model = build_on_meta(LSTMConfig(), COPYING_SIZES)

    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.empty(1).device.type == "cpu"


def small_model(
    config: ModelConfig | None = None,
    *,
    embedding_size: int | None = 6,
    initialization: str = "orthogonal",
    num_classes: int = 4,
) -> SequenceModel:
    torch.manual_seed(1)
    return SequenceModel(
        config or LSTMConfig(hidden_size=8),
        vocab_size=5,
        num_classes=num_classes,
        embedding_size=embedding_size,
        initialization=initialization,
    )


def random_symbols(*shape: int) -> Tensor:
    return torch.randint(5, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("num_classes", [3, 20])
def test_orthogonal_readout_is_semi_orthogonal_with_a_small_uniform_bias(num_classes: int) -> None:
    model = small_model(num_classes=num_classes)

    singular_values = torch.linalg.svdvals(model.readout.weight)
    expected = torch.ones(min(num_classes, 8))
    torch.testing.assert_close(singular_values, expected, rtol=0, atol=1e-5)
    bias = model.readout.bias.detach()
    assert 0 < float(bias.abs().max()) <= 0.01
    assert len(bias.unique()) == num_classes


@pytest.mark.parametrize("embedding_size", [3, 6])
def test_orthogonal_embedding_is_semi_orthogonal(embedding_size: int) -> None:
    model = small_model(embedding_size=embedding_size)

    assert model.embedding is not None
    singular_values = torch.linalg.svdvals(model.embedding.weight)
    expected = torch.ones(min(5, embedding_size))
    torch.testing.assert_close(singular_values, expected, rtol=0, atol=1e-5)


def test_synthetic_readout_is_uniform_by_input_and_class_counts_with_bias_one_hundredth() -> None:
    torch.manual_seed(3)
    model = SequenceModel(
        RUMConfig(hidden_size=1000),
        vocab_size=10,
        num_classes=9,
        embedding_size=None,
        initialization="uniform",
    )

    weight = model.readout.weight.detach()
    bound = math.sqrt(6 / (10 + 9))  # not the layer's fan-in of 1000
    assert 0.99 * bound < float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert torch.equal(model.readout.bias, torch.full((9,), 0.01))


def test_synthetic_readout_counts_symbols_and_not_features_of_the_embedding() -> None:
    torch.manual_seed(4)
    model = SequenceModel(
        LSTMConfig(hidden_size=500),
        vocab_size=30,
        num_classes=20,
        embedding_size=2,
        initialization="uniform",
    )

    bound = math.sqrt(6 / (30 + 20))
    assert 0.99 * bound < float(model.readout.weight.detach().abs().max()) <= bound


@pytest.mark.parametrize(("embedding_size", "input_size"), [(None, 5), (6, 6)])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_logits_have_a_class_axis_and_the_state_one_entry_a_layer(
    num_layers: int, embedding_size: int | None, input_size: int
) -> None:
    config = RUMConfig(hidden_size=8, num_layers=num_layers)
    model = small_model(config, embedding_size=embedding_size)

    logits, (hidden,) = model(random_symbols(7, 3))

    assert logits.shape == (7, 3, 4)
    assert hidden.shape == (num_layers, 3, 8)
    assert model.recurrent.input_size == input_size


@pytest.mark.parametrize("embedding_size", [None, 6])
def test_logits_are_the_read_out_of_the_recurrent_layers(embedding_size: int | None) -> None:
    model = small_model(embedding_size=embedding_size)
    symbols = random_symbols(7, 3)

    logits, state = model(symbols)

    # one-hot: row k of the identity for symbol k
    table = torch.eye(5) if model.embedding is None else model.embedding.weight
    output, expected_state = model.recurrent(table[symbols])
    expected = output @ model.readout.weight.T + model.readout.bias
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(state, expected_state)


def test_one_hot_and_an_identity_embedding_give_the_same_logits() -> None:
    one_hot = small_model(embedding_size=None)
    embedded = small_model(embedding_size=5)
    embedded.load_state_dict({**one_hot.state_dict(), "embedding.weight": torch.eye(5)})
    symbols = random_symbols(7, 3)

    torch.testing.assert_close(embedded(symbols)[0], one_hot(symbols)[0])


def test_one_hot_input_takes_the_dtype_of_the_model() -> None:
    model = small_model(embedding_size=None).double()

    logits, _ = model(random_symbols(7, 3))

    assert logits.dtype == torch.float64


def test_state_handed_over_equals_one_long_run() -> None:
    model = small_model(RUMConfig(hidden_size=8, num_layers=2, lambda_=1))
    symbols = random_symbols(7, 3)

    first, state = model(symbols[:4])
    second, _ = model(symbols[4:], state)

    torch.testing.assert_close(torch.cat((first, second)), model(symbols)[0])


def test_fast_slow_configuration_hands_its_dropout_to_the_cell_too() -> None:
    model = small_model(fs_rum(8, 3, 2, True))

    assert model.dropout == model.recurrent.dropout == 0.35
    assert [cell.dropout for cell in model.recurrent.cells] == [0.35]


def watched(model: SequenceModel, symbols: Tensor) -> dict[str, Tensor]:
    """What goes into and comes out of the parts of a model in one call."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.recurrent.register_forward_hook(
            lambda _, inputs, outputs: seen.update(input=inputs[0], output=outputs[0])
        ),
        model.readout.register_forward_hook(
            lambda _, inputs, outputs: seen.update(features=inputs[0])
        ),
    ]
    seen["logits"] = model(symbols)[0]
    for hook in hooks:
        hook.remove()
    return {name: tensor.detach() for name, tensor in seen.items()}


def check_is_dropped(dropped: Tensor, original: Tensor, probability: float) -> None:
    is_zero = dropped == 0
    assert not (original == 0).any()
    assert float(is_zero.double().mean()) == pytest.approx(probability, abs=0.03)
    expected = torch.where(is_zero, 0.0, original / (1 - probability))
    torch.testing.assert_close(dropped, expected)


def test_dropout_acts_on_the_embedded_input_and_before_the_read_out() -> None:
    model = small_model(LSTMConfig(hidden_size=8, dropout=0.3))
    symbols = random_symbols(40, 30)

    seen = watched(model, symbols)

    assert model.embedding is not None
    check_is_dropped(seen["input"], model.embedding.weight.detach()[symbols], 0.3)
    check_is_dropped(seen["features"], seen["output"], 0.3)
    # symbols of one kind are dropped each for itself
    rows = seen["input"][symbols == 0] == 0
    assert len(rows.unique(dim=0)) > 20


def test_dropout_does_not_act_after_the_read_out() -> None:
    model = small_model(LSTMConfig(hidden_size=8, dropout=0.3))

    seen = watched(model, random_symbols(7, 3))

    expected = seen["features"] @ model.readout.weight.detach().T + model.readout.bias.detach()
    torch.testing.assert_close(seen["logits"], expected)


def test_nothing_is_dropped_in_evaluation() -> None:
    model = small_model(LSTMConfig(hidden_size=8, dropout=0.3)).eval()
    symbols = random_symbols(7, 3)

    seen = watched(model, symbols)

    assert model.embedding is not None
    assert torch.equal(seen["input"], model.embedding.weight.detach()[symbols])
    assert torch.equal(seen["features"], seen["output"])
