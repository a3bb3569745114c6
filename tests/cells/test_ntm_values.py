"""The Neural Turing Machine against NumPy, and its memory as a memory."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rum.cells import NTMCell
from rum.errors import ConfigError

Array = NDArray[np.float64]
STEPS, BATCH, INPUT_SIZE, SIZE = 7, 2, 3, 4


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    return np.exp(x) / np.exp(x).sum()


def random_cell(memory_size: int, memory_width: int, shift_range: int) -> NTMCell:
    torch.manual_seed(1)
    cell = NTMCell(
        INPUT_SIZE,
        SIZE,
        memory_size=memory_size,
        memory_width=memory_width,
        shift_range=shift_range,
    ).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return cell


def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(STEPS, BATCH, INPUT_SIZE, generator=generator, dtype=torch.float64)


def address(memory: Array, before: Array, head: Array, shift_range: int) -> Array:
    """Section 3.3: content, gate, circular shift, sharpening."""
    places, width = memory.shape
    key, (strength, gate), power = head[:width], head[width : width + 2], head[-1]
    similar = memory @ key / np.linalg.norm(memory, axis=1) / np.linalg.norm(key)
    by_content = softmax(np.log1p(np.exp(strength)) * similar)
    gated = sigmoid(gate) * by_content + (1 - sigmoid(gate)) * before
    shift = np.zeros(places)  # of a shift by 0, 1, ..; a negative one counts from the end
    shift[np.arange(-shift_range, shift_range + 1)] = softmax(head[width + 2 : -1])
    moved = np.array(
        [sum(gated[j] * shift[(i - j) % places] for j in range(places)) for i in range(places)]
    )
    sharp = (moved + 1e-8) ** (1 + np.log1p(np.exp(power)))
    return sharp / sharp.sum()


@pytest.mark.parametrize(
    ("places", "width", "shift_range"),
    [(5, 2, 2), (8, 3, 2), (7, 1, 3), (3, 2, 1), (5, 3, 1), (3, 1, 1)],
)
def test_every_step(places: int, width: int, shift_range: int) -> None:
    cell = random_cell(places, width, shift_range)
    w = {name: value.detach().numpy() for name, value in cell.named_parameters()}
    head = width + 3 + 2 * shift_range + 1
    with torch.no_grad():
        output, state = cell.unroll(inputs())

    for row in range(BATCH):
        h, c, read = np.zeros(SIZE), np.zeros(SIZE), np.zeros(width)
        at_read, at_write = np.eye(places)[0], np.eye(places)[0]
        memory = np.full((places, width), 0.01)
        for t, x in enumerate(inputs()[:, row].numpy()):
            gates = w["controller.weight_ih"] @ np.concatenate((x, read))
            gates = gates + w["controller.weight_hh"] @ h + w["controller.bias"]
            i, f, g, o = gates.reshape(4, SIZE)
            c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            said = w["heads.weight"] @ h + w["heads.bias"]
            at_write = address(memory, at_write, said[head : 2 * head], shift_range)
            erase, add = sigmoid(said[2 * head : -width]), said[-width:]
            memory = memory * (1 - np.outer(at_write, erase)) + np.outer(at_write, add)
            at_read = address(memory, at_read, said[:head], shift_range)
            read = at_read @ memory
            y = w["output.weight"] @ np.concatenate((h, read)) + w["output.bias"]
            np.testing.assert_allclose(output[t, row].numpy(), y, rtol=0, atol=1e-10)
        for tensor, by_hand in zip(state, (y, h, c, read, at_read, at_write, memory), strict=True):
            np.testing.assert_allclose(tensor[row].numpy(), by_hand, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shift_range", [1, 2])
def test_weights_sum_to_one_after_every_step(shift_range: int) -> None:
    cell = random_cell(6, 2, shift_range)
    state = None
    for x in inputs():
        with torch.no_grad():
            _, state = cell(x, state)
        for weight in state[4:6]:
            assert (weight >= 0).all()
            torch.testing.assert_close(
                weight.sum(-1), torch.ones(BATCH, dtype=torch.float64), rtol=0, atol=1e-12
            )


SHIFT_RANGE, WIDTH, PLACES = 2, 2, 7
HEAD = WIDTH + 3 + 2 * SHIFT_RANGE + 1


class Told:
    """A machine that does what it is told, whatever its input."""

    def __init__(self) -> None:
        self.cell = random_cell(PLACES, WIDTH, SHIFT_RANGE)
        self.state: tuple[torch.Tensor, ...] | None = None

    def step(
        self, *, move: int, write: tuple[float, float], key: tuple[float, float] | None = None
    ) -> None:
        """Both heads move and the write head overwrites; with a key the read head seeks it."""
        read_head, write_head = ([*(key or (1.0, 1.0)), 50.0] for _ in range(2))
        read_head += [-100.0 if key is None else 100.0]
        write_head += [-100.0]
        for head, by in ((read_head, move if key is None else 0), (write_head, move)):
            head += [100.0 if by == j else 0.0 for j in range(-SHIFT_RANGE, SHIFT_RANGE + 1)]
            head += [3.0]
        said = [*read_head, *write_head, 100.0, 100.0, *write]
        with torch.no_grad():
            self.cell.heads.weight.zero_()
            self.cell.heads.bias.copy_(torch.tensor(said))
            _, self.state = self.cell(inputs()[0], self.state)

    @property
    def read(self) -> list[float]:
        assert self.state is not None
        return [round(value, 5) for value in self.state[3][0].tolist()]

    @property
    def writes_at(self) -> int:
        assert self.state is not None
        weight = self.state[5][0]
        assert weight.max() > 1 - 1e-6
        return int(weight.argmax())


@pytest.mark.parametrize("move", [-2, -1, 0, 1, 2])
def test_heads_move_in_a_circle(move: int) -> None:
    told = Told()
    for t in range(1, PLACES + 1):
        told.step(move=move, write=(1.0, -2.0))
        assert told.writes_at == t * move % PLACES
        assert told.read == [1.0, -2.0]  # the read head stands where the write head just wrote


def test_what_was_written_is_found_by_its_content() -> None:
    told = Told()
    told.step(move=2, write=(1.0, -2.0))
    told.step(move=2, write=(3.0, 1.0))
    told.step(move=1, write=(-2.0, 1.0))
    assert told.read == [-2.0, 1.0]
    told.step(move=1, write=(-3.0, -3.0), key=(0.5, -1.0))
    assert told.read == [1.0, -2.0]
    told.step(move=1, write=(-3.0, -3.0), key=(6.0, 2.0))
    assert told.read == [3.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_size": 2}, "memory_size must be an integer >= 3, got 2"),
        ({"shift_range": 0}, "shift_range must be an integer >= 1, got 0"),
        ({"shift_range": 1.0}, "shift_range must be an integer >= 1, got 1.0"),
        ({"shift_range": 2, "memory_size": 4}, "memory_size must be an integer >= 5, got 4"),
        ({"memory_width": 0}, "memory_width must be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NTMCell(2, 3, **options)


def test_sharpening_of_many_equal_weights_neither_vanishes_nor_overflows() -> None:
    """Powers of 1/128 underflow; their quotient does not."""
    cell = NTMCell(INPUT_SIZE, SIZE, memory_size=128, memory_width=2)
    with torch.no_grad():
        cell.heads.weight.zero_()
        cell.heads.bias.zero_()
        cell.heads.bias[2 + 1] = 30.0  # the read head's gate: by content, where all are equal
        cell.heads.bias[2 + 2 + 3] = 40.0  # and its sharpening
    output, state = cell.unroll(inputs().float())
    gradients = torch.autograd.grad(output.sum(), tuple(cell.parameters()), allow_unused=True)
    torch.testing.assert_close(state[4], torch.full((BATCH, 128), 1 / 128), rtol=1e-4, atol=0)
    assert all(g is None or g.isfinite().all() for g in gradients)


def test_what_both_heads_are_told_to_stay_at_is_written_and_read() -> None:
    cell = NTMCell(INPUT_SIZE, 4, memory_size=5, memory_width=2).double()
    with torch.no_grad():
        _, state = cell.unroll(inputs())
        for weight in state[4:6]:
            torch.testing.assert_close(weight.sum(-1), torch.ones(BATCH).double())
            assert (weight >= 0).all()
        # both heads stay where they are, the write head erases all and adds (1, -2)
        cell.heads.weight.zero_()
        cell.heads.bias.zero_()
        for head in (0, 8):
            cell.heads.bias[head + 3] = -100.0  # gate: not by content
            cell.heads.bias[head + 5] = 100.0  # shift: none
        cell.heads.bias[16:18] = 100.0
        cell.heads.bias[18:] = torch.tensor([1.0, -2.0])
        _, state = cell.unroll(inputs()[:3])
    expected = torch.tensor([1.0, -2.0]).double().expand(BATCH, -1)
    torch.testing.assert_close(state[3], expected, rtol=0, atol=1e-6)
