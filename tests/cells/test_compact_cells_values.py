"""NASCell, HyperLSTM and HM-LSTM with random weights against NumPy forms of their equations."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rum.cells import Cell, HMLSTMCell, HyperLSTMCell, NASCell
from rum.errors import ConfigError

Array = NDArray[np.float64]
STEPS, BATCH, INPUT_SIZE = 9, 3, 4


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def normal(x: Array, gain: Array, shift: Array) -> Array:
    return gain * (x - x.mean()) / np.sqrt(x.var() + 1e-3) + shift


def build(make: Callable[[], Cell]) -> tuple[Cell, dict[str, Array]]:
    """The cell with random weights everywhere, and those weights."""
    torch.manual_seed(1)
    cell = make().double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in cell.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.5 * drawn)
    return cell, {name: value.detach().numpy() for name, value in cell.named_parameters()}


def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(STEPS, BATCH, INPUT_SIZE, generator=generator, dtype=torch.float64)


def outputs(cell: Cell, by_hand: Callable[[Array], Array]) -> tuple[Array, Array]:
    """The cell's, and those worked out by hand row by row, `(T, B, N)`."""
    with torch.no_grad():
        output, _ = cell.unroll(inputs())
    rows = [by_hand(inputs()[:, row].numpy()) for row in range(BATCH)]
    return output.numpy(), np.stack(rows, 1)


@pytest.mark.parametrize("size", [1, 5])
def test_nas(size: int) -> None:
    cell, w = build(lambda: NASCell(INPUT_SIZE, size))

    def by_hand(sequence: Array) -> Array:
        h, c, outputs = np.zeros(size), np.zeros(size), []
        for x in sequence:
            a = (w["weight_ih"] @ x).reshape(8, size)
            b = (w["weight_hh"] @ h + w["bias"]).reshape(8, size)
            first = [
                sigmoid(a[0] + b[0]),
                np.maximum(a[1] + b[1], 0),
                sigmoid(a[2] + b[2]),
                np.maximum(a[3] * b[3], 0),
                np.tanh(a[4] + b[4]),
                sigmoid(a[5] + b[5]),
                np.tanh(a[6] + b[6]),
                sigmoid(a[7] + b[7]),
            ]
            left = np.tanh(np.tanh(first[0] * first[1]) + c) * np.tanh(first[2] + first[3])
            right = np.tanh(np.tanh(first[4] * first[5]) + sigmoid(first[6] + first[7]))
            c, h = left, np.tanh(left * right)
            outputs.append(h)
        return np.stack(outputs)

    np.testing.assert_allclose(*outputs(cell, by_hand), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("hyper_size", "embedding_size"), [(3, 2), (2, 1)])
def test_hyper_lstm(hyper_size: int, embedding_size: int) -> None:
    size, e = 5, embedding_size
    cell, w = build(
        lambda: HyperLSTMCell(INPUT_SIZE, size, hyper_size=hyper_size, embedding_size=e)
    )

    def lstm(gates: Array, c: Array, forget: float, norm: Callable[[Array], Array]) -> tuple:
        i, f, g, o = gates
        c = sigmoid(f + forget) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(norm(c)), c

    def by_hand(sequence: Array) -> Array:
        h, c = np.zeros(size), np.zeros(size)
        k, ck = np.zeros(hyper_size), np.zeros(hyper_size)
        outputs = []
        for x in sequence:
            total = w["hyper.weight_ih"] @ np.concatenate((x, h)) + w["hyper.bias"]
            total = (total + w["hyper.weight_hh"] @ k).reshape(4, hyper_size)
            gain = w["hyper.gate_norm.gain"].reshape(4, -1)
            shift = w["hyper.gate_norm.shift"].reshape(4, -1)
            gates = np.stack([normal(total[n], gain[n], shift[n]) for n in range(4)])
            k, ck = lstm(
                gates,
                ck,
                1.0,
                lambda v: normal(v, w["hyper.cell_norm.gain"], w["hyper.cell_norm.shift"]),
            )
            rows = w["embed"] @ k
            rows[: 8 * e] += w["embed_bias"]
            z = rows.reshape(3, 4, e)
            gates_out = []
            for n in range(4):
                part = slice(n * size, (n + 1) * size)
                value = (w["scale"][0, n] @ z[0, n]) * (w["weight_hh"][part] @ h)
                value = value + (w["scale"][1, n] @ z[1, n]) * (w["weight_ih"][part] @ x)
                value = value + w["scale"][2, n] @ z[2, n] + w["bias"][part]
                gates_out.append(
                    normal(value, w["gate_norm.gain"][part], w["gate_norm.shift"][part])
                )
            h, c = lstm(
                np.stack(gates_out),
                c,
                1.0,
                lambda v: normal(v, w["cell_norm.gain"], w["cell_norm.shift"]),
            )
            outputs.append(h)
        return np.stack(outputs)

    np.testing.assert_allclose(*outputs(cell, by_hand), rtol=0, atol=1e-10)


def test_hyper_lstm_begins_with_every_row_scaled_by_a_tenth() -> None:
    cell = HyperLSTMCell(INPUT_SIZE, 5, hyper_size=3, embedding_size=2)
    assert (cell.scale[:2] == 0.05).all()
    assert (cell.scale[2] == 0).all()
    assert (cell.embed[:16] == 0).all()
    assert (cell.embed_bias == 1).all()
    assert 0.002 < cell.embed[16:].std().item() < 0.05
    for gate in cell.weight_hh.detach().chunk(4):
        torch.testing.assert_close(gate @ gate.t(), torch.eye(5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_levels", [2, 3])
def test_hm_lstm(num_levels: int) -> None:
    size, slope = 4, 1.5
    cell, w = build(lambda: HMLSTMCell(INPUT_SIZE, size, num_levels=num_levels, slope=slope))
    seen: set[tuple[int, str]] = set()

    def by_hand(sequence: Array) -> Array:
        top = num_levels - 1
        h = [np.zeros(size) for _ in range(num_levels)]
        c = [np.zeros(size) for _ in range(num_levels)]
        z = [0.0] * num_levels
        outputs = []
        for x in sequence:
            below = 1.0
            for level in range(num_levels):
                source = x if level == 0 else h[level - 1]
                s = w[f"weight_hh.{level}"] @ h[level] + w[f"bias.{level}"]
                s = s + below * (w[f"weight_below.{level}"] @ source)
                if level < top:
                    s = s + z[level] * (w[f"weight_above.{level}"] @ h[level + 1])
                f, i, o = (sigmoid(s[k * size : (k + 1) * size]) for k in range(3))
                g = np.tanh(s[3 * size : 4 * size])
                if z[level] == 1:
                    operation, c[level] = "flush", i * g
                elif below == 1:
                    operation, c[level] = "update", f * c[level] + i * g
                else:
                    operation = "copy"
                seen.add((level, operation))
                if operation != "copy":
                    h[level] = o * np.tanh(c[level])
                if level < top:
                    soft = np.clip((slope * s[4 * size] + 1) / 2, 0, 1)
                    below = z[level] = 1.0 if soft > 0.5 else 0.0
            joined = np.concatenate(h)
            gates = sigmoid(w["output_gate"] @ joined)
            total = np.zeros(size)
            for level in range(num_levels):
                part = slice(level * size, (level + 1) * size)
                total += gates[level] * (w["output_weight"][:, part] @ h[level])
            outputs.append(np.maximum(total, 0))
        return np.stack(outputs)

    np.testing.assert_allclose(*outputs(cell, by_hand), rtol=0, atol=1e-10)
    assert {"flush", "update"} <= {operation for level, operation in seen if level == 0}
    assert {"copy", "update"} <= {operation for level, operation in seen if level == 1}


def test_hm_lstm_passes_gradients_straight_through_its_boundaries() -> None:
    cell = HMLSTMCell(INPUT_SIZE, 4, num_levels=2).double()
    output, state = cell.unroll(inputs())
    assert set(state[-1].unique().tolist()) <= {0.0, 1.0}
    output.sum().backward()
    gradient = cell.bias[0].grad
    assert gradient is not None
    assert gradient[-1] != 0  # of the boundary detector


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NASCell(2, 0), "hidden_size must be an integer >= 1, got 0"),
        (lambda: HyperLSTMCell(2, 3, hyper_size=0), "hyper_size must be an integer >= 1, got 0"),
        (lambda: HMLSTMCell(2, 3, num_levels=1), "num_levels must be an integer >= 2, got 1"),
        (lambda: HMLSTMCell(2, 3, slope=0.0), "slope must be a finite number > 0, got 0"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], Cell], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
