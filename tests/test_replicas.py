"""RUM layers side by side are what they are alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

import rum
from rum.kernels.cpu import library

STEPS, BATCH, INPUT_SIZE, SIZE = 6, 3, 4, 5
ETAS, ZONEOUTS = (0.5, 1.0, 2.0), (0.0, 0.2, 0.5)
BACKENDS = ["reference", "fused", *(["cpu"] if library() else [])]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "memory": {"lambda_": 1, "num_layers": 2},
    "layer-norm": {"layer_norm": True, "num_layers": 2},
    "memory-layer-norm": {"lambda_": 1, "layer_norm": True, "layer_norm_gate": "pre_sigmoid"},
    "batch-first": {"batch_first": True, "activation": "tanh"},
    "recompute": {"recompute": True, "layer_norm": True},
}


def layers(backend: str, dropout: float = 0.0, **options: Any) -> list[rum.RUM]:
    torch.manual_seed(1)
    if dropout:
        options["num_layers"] = 2
    dtype = torch.float32 if backend == "cpu" else torch.float64
    return [
        rum.RUM(
            INPUT_SIZE,
            SIZE,
            backend=backend,
            eta=eta,
            zoneout=zoneout,
            dropout=dropout * lane / 2,
            dtype=dtype,
            **options,
        )
        for lane, (eta, zoneout) in enumerate(zip(ETAS, ZONEOUTS, strict=True))
    ]


def draw(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(output: Tensor, state: rum.cells.State, *leaves: Tensor) -> list[Tensor]:
    loss = output.square().sum() + state[0].sum() + state[-1].square().sum()
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients_are_those_of_each_layer_alone(
    options: dict[str, Any], backend: str
) -> None:
    alone = layers(backend, **options)
    replicas = rum.Replicas(alone).eval()
    input = draw(len(alone), STEPS, BATCH, INPUT_SIZE).to(alone[0].cells[0].weight_hh.dtype)
    input.requires_grad_()
    output, state = replicas(input)
    output, state = replicas(input, tuple(tensor.detach() for tensor in state))
    together = gradients(output, state, input, *replicas.parameters())

    tolerance = 1e-4 if backend == "cpu" else 1e-11
    expected: list[Tensor] = []
    for lane, layer in enumerate(alone):
        leaf = input[lane].detach().requires_grad_()
        _, before = layer(leaf)
        out, last = layer(leaf, tuple(tensor.detach() for tensor in before))
        of_input, *rest = gradients(out, last, leaf, *layer.parameters())
        torch.testing.assert_close(output[lane], out, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(state, last, strict=True):
            torch.testing.assert_close(ours[lane], theirs, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(together[0][lane], of_input, rtol=tolerance, atol=tolerance)
        expected += rest
    torch.testing.assert_close(together[1:], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_follow_a_seed_whoever_the_neighbours_are(backend: str) -> None:
    alone = layers(backend, dropout=0.5, activation="tanh")  # smooth
    together = rum.Replicas(alone, seeds=[7, 8, 9]).train()
    input = draw(3, STEPS, BATCH, INPUT_SIZE).to(alone[0].cells[0].weight_hh.dtype)
    output, _ = together(input)
    for lane in range(3):
        single = rum.Replicas([alone[lane]], seeds=[7 + lane]).train()
        torch.testing.assert_close(
            single(input[lane : lane + 1])[0][0], output[lane], rtol=1e-4, atol=1e-4
        )
        is_random = bool(ZONEOUTS[lane] or alone[lane].dropout)
        again = single(input[lane : lane + 1])[0][0]
        assert torch.allclose(again, output[lane], rtol=1e-4, atol=1e-4) != is_random


def test_without_seeds_masks_come_from_the_default_generator() -> None:
    replicas = rum.Replicas(layers("fused"))
    input = draw(3, STEPS, BATCH, INPUT_SIZE)
    torch.manual_seed(5)
    first, _ = replicas(input)
    second, _ = replicas(input)
    torch.manual_seed(5)
    assert torch.equal(replicas(input)[0], first)
    assert not torch.equal(second, first)


def test_each_layer_learns_at_its_own_rate() -> None:
    alone = layers("fused")
    replicas = rum.Replicas(alone)
    before = [layer.cells[0].weight_hh.detach().clone() for layer in alone]
    optimizer = torch.optim.SGD(
        [{"params": layer.parameters(), "lr": lane} for lane, layer in enumerate(alone)], lr=0.0
    )
    replicas(draw(3, STEPS, BATCH, INPUT_SIZE))[0].square().sum().backward()
    optimizer.step()
    for lane, layer in enumerate(alone):
        weight = layer.cells[0].weight_hh
        torch.testing.assert_close(weight, before[lane] - lane * weight.grad)
    assert torch.equal(alone[0].cells[0].weight_hh, before[0])
    assert not torch.equal(alone[1].cells[0].weight_hh, before[1])


def test_a_place_goes_to_another_layer() -> None:
    replicas = rum.Replicas(layers("fused")).eval()
    input = draw(3, STEPS, BATCH, INPUT_SIZE)
    before, _ = replicas(input)
    other = layers("fused")[2].eval()
    torch.nn.init.normal_(other.cells[0].weight_hh)
    replicas[1] = other
    after, _ = replicas(input)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(after[1], other(input[1])[0])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="layers must be at least one"):
        rum.Replicas([])
    replicas = rum.Replicas(layers("fused"))
    with pytest.raises(
        ValueError, match=r"equal in {'hidden_size': 5}, got one with {'hidden_size': 6}"
    ):
        replicas[0] = rum.RUM(INPUT_SIZE, 6, eta=1.0, backend="fused", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'has eta': \[True\].*'has eta': \[False\]"):
        rum.Replicas([rum.RUM(4, 5, eta=1.0), rum.RUM(4, 5)])
    with pytest.raises(ValueError, match="one for each of 3 layers"):
        rum.Replicas(layers("fused"), seeds=[1])
    with pytest.raises(
        ValueError, match=r"3 replicas first and 4 dimensions, got shape \(6, 3, 4\)"
    ):
        replicas(draw(STEPS, BATCH, INPUT_SIZE))
    with pytest.raises(ValueError, match="3 replicas and 1 layers first"):
        replicas(draw(3, STEPS, BATCH, INPUT_SIZE), (draw(3, BATCH, SIZE),))


def test_layers_may_have_options_of_their_own_in_every_replica() -> None:
    options = {"lambda_": [1.0, 0.5], "eta": [0.5, None], "backend": "reference"}
    alone = [rum.RUM(4, 5, num_layers=2, dtype=torch.float64, **options) for _ in range(2)]
    input = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    output, _ = rum.Replicas(alone)(input)
    for lane, layer in enumerate(alone):
        torch.testing.assert_close(output[lane], layer(input[lane])[0])
    other = rum.RUM(4, 5, num_layers=2, dtype=torch.float64, **(options | {"eta": [0.5, 1.0]}))
    with pytest.raises(ValueError, match=r"'has eta': \[True, False\]"):
        rum.Replicas([alone[0], other])
    relu, tanh = (
        rum.RUM(4, 5, num_layers=2, activation=["relu", upper]) for upper in ("relu", "tanh")
    )
    with pytest.raises(ValueError, match=r"'activation': \['relu', 'tanh'\]"):
        rum.Replicas([relu, tanh])
