"""Statistics of RUM cells against values made another way."""

import math

import numpy as np
import pytest
import torch

from rum.cells import FSRUMConfig, LSTMCellConfig, LSTMConfig, RUMCell, RUMCellConfig, RUMConfig
from rum.diagnostics import rum_kernels, rum_statistics
from rum.models import SequenceModel
from rum.training.config import TrainingConfig


def model(config: RUMConfig | LSTMConfig | FSRUMConfig) -> SequenceModel:
    torch.manual_seed(1)
    return (
        SequenceModel(
            config, vocab_size=5, num_classes=4, embedding_size=3, initialization="orthogonal"
        )
        .double()
        .eval()
    )


def symbols() -> torch.Tensor:
    return torch.randint(5, (6, 7), generator=torch.Generator().manual_seed(2))


def test_statistics_are_those_of_a_loop_over_samples() -> None:
    net = model(RUMConfig(hidden_size=4, layer_norm=True, eta=0.8))
    cell = net.recurrent.cells[0]
    assert isinstance(cell, RUMCell)
    with torch.no_grad():
        embedded = net.embedding(symbols())  # type: ignore[misc]
        weights = {name: tensor.numpy() for name, tensor in cell.named_parameters()}
    angles, gates, zeros, norms = [], [], [], []

    def normal(x: np.ndarray) -> np.ndarray:
        return (x - x.mean()) / np.sqrt(x.var() + 1e-3)

    for column in range(7):
        hidden = np.zeros(4)
        for step in range(6):
            x = embedded[step, column].numpy()
            gate_in = weights["weight_ih"][:8] @ x + weights["weight_hh"] @ hidden
            gate_in = gate_in + weights["bias"]
            target = normal(gate_in[:4])
            update = normal(1 / (1 + np.exp(-gate_in[4:])))
            e = weights["weight_ih"][8:] @ x + weights["embedding_bias"]
            cosine = e @ target / np.linalg.norm(e) / np.linalg.norm(target)
            u = e / np.linalg.norm(e)
            v = target - (u @ target) * u
            v = v / np.linalg.norm(v)
            sine = math.sqrt(1 - cosine**2)
            plane = np.stack((u, v), 1)
            turn = np.array([[cosine, -sine], [sine, cosine]])
            rotation = np.eye(4) + plane @ (turn - np.eye(2)) @ plane.T
            candidate = np.maximum(normal(e + rotation @ hidden), 0)
            hidden = update * hidden + (1 - update) * candidate
            hidden = 0.8 * hidden / np.linalg.norm(hidden)
            angles.append(math.acos(cosine))
            gates.append(update)
            zeros.append(candidate == 0)
            norms.append(np.linalg.norm(hidden))

    statistics = rum_statistics(net, lambda: net(symbols()))

    gates_seen = np.stack(gates)
    assert statistics == pytest.approx(
        {
            "rotation_angle_mean": np.mean(angles),
            "rotation_angle_std": np.std(angles),
            "near_opposite_pairs": 0,
            "hidden_norm_mean": np.mean(norms),
            "update_gate_mean": np.mean(gates_seen),
            "update_gate_std": np.std(gates_seen),
            "update_gate_outside": np.mean((gates_seen < 0) | (gates_seen > 1)),
            "candidate_zeros": np.mean(np.stack(zeros)),
        },
        rel=1e-9,
    )
    assert statistics["hidden_norm_mean"] == pytest.approx(0.8)


def test_nearly_opposite_pairs_are_counted() -> None:
    net = model(RUMConfig(hidden_size=4))
    cell = net.recurrent.cells[0]
    assert isinstance(cell, RUMCell)
    with torch.no_grad():
        cell.weight_ih.zero_()
        cell.weight_hh.zero_()
        cell.bias[:4] = torch.tensor([1.0, 2.0, 0.0, 0.0])
        assert cell.embedding_bias is not None
        cell.embedding_bias.copy_(-2 * cell.bias[:4])
    statistics = rum_statistics(net, lambda: net(symbols()))
    assert statistics["near_opposite_pairs"] == 6 * 7
    assert statistics["rotation_angle_mean"] == pytest.approx(math.pi)


def test_every_cell_is_told_apart_and_the_slow_cell_is_seen() -> None:
    two = model(RUMConfig(hidden_size=4, num_layers=2))
    names = set(rum_statistics(two, lambda: two(symbols())))
    assert {"hidden_norm_mean", "hidden_norm_mean_cell_2"} <= names
    slow = model(
        FSRUMConfig(fast=LSTMCellConfig(hidden_size=3), slow=RUMCellConfig(hidden_size=4, eta=0.5))
    )
    statistics = rum_statistics(slow, lambda: slow(symbols()))
    assert statistics["hidden_norm_mean"] == pytest.approx(0.5)


def test_nothing_is_run_without_a_rum_cell_and_nothing_stays_after_an_error() -> None:
    lstm = model(LSTMConfig(hidden_size=4))
    assert rum_statistics(lstm, lambda: pytest.fail("was run")) == {}
    net = model(RUMConfig(hidden_size=4))
    with pytest.raises(ZeroDivisionError):
        rum_statistics(net, lambda: 1 // 0)
    assert all(cell.observer is None for cell in net.recurrent.cells)


def test_kernels_compute_target_and_gate_by_the_papers_equations() -> None:
    net = model(RUMConfig(hidden_size=4, num_layers=2))
    cell = net.recurrent.cells[0]
    assert isinstance(cell, RUMCell)
    seen = []
    cell.observer = seen.append
    net(symbols())
    cell.observer = None
    kernels = rum_kernels(net)
    names = {f"W_{kind}_{gate}" for kind in ("xh", "hh") for gate in ("target", "update_gate")}
    assert set(kernels) == names | {f"{name}_cell_2" for name in names}
    assert kernels["W_xh_target"].shape == (3, 4)
    assert kernels["W_xh_target_cell_2"].shape == (4, 4)
    assert net.embedding is not None
    x, h = net.embedding(symbols()[1]), seen[0].hidden
    bias = cell.bias.detach()
    target = x @ kernels["W_xh_target"] + h @ kernels["W_hh_target"] + bias[:4]
    gate = x @ kernels["W_xh_update_gate"] + h @ kernels["W_hh_update_gate"] + bias[4:]
    torch.testing.assert_close(seen[1].target, target, rtol=0, atol=1e-12)
    torch.testing.assert_close(seen[1].update_gate, torch.sigmoid(gate), rtol=0, atol=1e-12)


def test_diagnostics_are_on_by_default() -> None:
    assert TrainingConfig().diagnostics
