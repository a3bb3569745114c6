"""Efficient unitary recurrent network, real (Jing et al. 2017, "Tunable EUNN")."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rum.cells.base import Cell, CellConfig, Noise, StackConfig, State, register_model
from rum.checks import check_at_least, check_choice
from rum.errors import ConfigError

STYLES = ("tunable", "fft")
INPUT_BOUND = 0.01  # initial input weights are uniform in +- this, as released


Layer = tuple[Tensor, Tensor, Tensor]
"""Cosine, signed sine and partner of every unit, each `(N,)`."""


class OrthogonalProduct(nn.Module):
    """An orthogonal matrix as a product of layers of plane rotations, applied in O(N) a layer.

    Layer l turns pairs of units (p, q) by angles of their own:
    `(p, q) -> (p cos t - q sin t, q cos t + p sin t)`.

    - "tunable", `capacity` layers: even layers pair (0, 1), (2, 3), ..., odd ones (1, 2), (3, 4),
      ...; units left over stay as they are.
    - "fft", log2 N layers: layer k pairs units at distance 2^k, as a fast Fourier transform does.

    Parameters: `angles`, a vector for each layer, in the order of the pairs' first units.

    Source: Jing et al. 2017, sections 4.1 and 4.2; RUM-Tensorflow/baselineModels/EUNN.py.
    """

    def __init__(
        self,
        size: int,
        *,
        style: str = "tunable",
        capacity: int = 2,
        zero_last_unit: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `OrthogonalOptions`; angles are uniform in (-pi, pi)."""
        super().__init__()
        OrthogonalOptions(  # checks the options
            hidden_size=size, style=style, capacity=capacity, zero_last_unit=zero_last_unit
        )
        self.size = size
        self.style = style
        self.zero_last_unit = zero_last_unit
        pairs = _fft_pairs(size) if style == "fft" else _tunable_pairs(size, capacity)
        self.angles = nn.ParameterList(
            nn.Parameter(torch.empty(len(first), device=device, dtype=dtype)) for first, _ in pairs
        )
        self._pairs = pairs
        self._reused: list[Layer] | None = None
        for angles in self.angles:
            nn.init.uniform_(angles, -math.pi, math.pi)

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Computes sines and cosines once for all calls inside: the steps of a sequence."""
        self._reused = self._layers()
        try:
            yield
        finally:
            self._reused = None

    def _layers(self) -> list[Layer]:
        layers = []
        for angles, (first, second) in zip(self.angles, self._pairs, strict=True):
            cosine = torch.ones(self.size, device=angles.device, dtype=angles.dtype)
            sine = torch.zeros_like(cosine)
            partner = torch.arange(self.size, device=angles.device)
            left, right = first.to(angles.device), second.to(angles.device)
            both = torch.cat((left, right))
            cosine = cosine.index_put((both,), angles.cos().repeat(2))
            sine = sine.index_put((both,), torch.cat((-angles.sin(), angles.sin())))
            partner[left], partner[right] = right, left
            if self.zero_last_unit and self._leaves_last_unit(first):
                mask = torch.ones_like(cosine)
                mask[-1] = 0
                cosine = cosine * mask
            layers.append((cosine, sine, partner))
        return layers

    def _leaves_last_unit(self, first: Tensor) -> bool:
        """Whether a layer is an odd one of the tunable style with an even number of units."""
        odd = len(first) == 0 or int(first[0]) == 1
        return self.style == "tunable" and odd and self.size % 2 == 0

    def forward(self, hidden: Tensor) -> Tensor:
        """Applies the matrix to `(..., N)`."""
        for cosine, sine, partner in self._reused or self._layers():
            hidden = hidden * cosine + hidden[..., partner] * sine
        return hidden

    def matrix(self) -> Tensor:
        """The matrix W that `forward` applies, `(N, N)`: h becomes W h."""
        basis = torch.eye(self.size, device=self.angles[0].device, dtype=self.angles[0].dtype)
        return self.forward(basis).t()


def _tunable_pairs(size: int, capacity: int) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for layer in range(capacity):
        first = torch.arange(layer % 2, size - 1, 2, device="cpu")
        pairs.append((first, first + 1))
    return pairs


def _fft_pairs(size: int) -> list[tuple[Tensor, Tensor]]:
    units = torch.arange(size, device="cpu")  # also while a model is built on meta
    pairs = []
    for layer in range(size.bit_length() - 1):
        distance = 2**layer
        first = units[(units // distance) % 2 == 0]
        pairs.append((first, first + distance))
    return pairs


def mod_relu(input: Tensor, bias: Tensor) -> Tensor:
    """sign(z) ReLU(|z| + 1e-5 + b), with 1e-5 as released (Arjovsky et al. 2016, for reals)."""
    return torch.sign(input) * torch.relu(input.abs() + 1e-5 + bias)


class EUNNCell(Cell):
    """One step of a real EUNN: `h = modReLU(U x + W h, b)` with W orthogonal at any angles.

    Parameters: `weight_ih (N, input_size)`, `bias (N,)`, `orthogonal` (see `OrthogonalProduct`).

    State: `(h,)`.

    Source: Jing et al. 2017; RUM-Tensorflow/baselineModels/EUNN.py.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        style: str = "tunable",
        capacity: int = 2,
        zero_last_unit: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `OrthogonalOptions`."""
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.orthogonal = OrthogonalProduct(
            hidden_size, style=style, capacity=capacity, zero_last_unit=zero_last_unit, **like
        )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size, **like))
        self.bias = nn.Parameter(torch.empty(hidden_size, **like))
        nn.init.uniform_(self.weight_ih, -INPUT_BOUND, INPUT_BOUND)
        nn.init.zeros_(self.bias)

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Returns h = 0."""
        return (torch.zeros(batch_size, self.hidden_size, device=device, dtype=dtype),)

    def project(self, input: Tensor) -> Tensor:
        """U x, `(..., N)`."""
        return F.linear(input, self.weight_ih)

    def unroll(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs a sequence; see `Cell.unroll`."""
        with self.orthogonal.reused():
            return super().unroll(input, state)

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One step; see the class."""
        new = mod_relu(projected + self.orthogonal(state[0]), self.bias)
        return new, (new,)


@dataclass(kw_only=True)
class OrthogonalOptions(CellConfig):
    """Options of a cell around an `OrthogonalProduct`."""

    hidden_size: int = 256
    """Size of the hidden state; a power of two for style "fft"."""
    style: str = "tunable"
    """"tunable" (`capacity` layers of neighbours) or "fft" (log2 N layers)."""
    capacity: int = 2
    """Layers of the tunable style, >= 1; "fft" has its own number."""
    zero_last_unit: bool = False
    """Repeat a slip of the released code: for even N, odd layers of the tunable style
    multiply the last unit by 0 instead of 1, so that the matrix is singular. Of no effect for
    "fft"."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the cell does not accept."""
        super().__post_init__()
        check_at_least("hidden_size", self.hidden_size, 2)
        check_choice("style", self.style, STYLES)
        check_at_least("capacity", self.capacity, 1)
        if self.style == "fft" and self.hidden_size.bit_count() != 1:
            raise ConfigError(
                f"hidden_size must be a power of two for style 'fft', got {self.hidden_size}"
            )

    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Cell:
        """Builds an `EUNNCell`."""
        return EUNNCell(
            input_size,
            self.hidden_size,
            style=self.style,
            capacity=self.capacity,
            zero_last_unit=self.zero_last_unit,
            device=device,
            dtype=dtype,
        )


@register_model
@dataclass(kw_only=True)
class EUNNConfig(StackConfig, OrthogonalOptions):
    """A stack of EUNN cells."""

    name: str = "eunn"
