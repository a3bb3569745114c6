"""What every recurrent cell and its configuration promise, and the registry of models."""

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from rum.checks import check_at_least, check_choice, check_probability
from rum.errors import ConfigError
from rum.kernels.backends import BACKENDS, Request, choose

logger = logging.getLogger(__name__)

State = tuple[Tensor, ...]
"""What a cell carries from step to step: tensors `(B, ...)`, the output's own state first."""

Noise = tuple["Tensor | Noise", ...]
"""Random masks of a sequence, each `(T, B, ...)`, nested as the cell that drew them needs."""


class Cell(nn.Module, ABC):
    """A recurrent cell: `output, state = cell(input, state)` is one step.

    A subclass writes its mathematics in `step`; `unroll`, a whole sequence, follows from it and
    may be overridden by something faster that agrees with it. All randomness of a sequence is
    drawn at once by `sample_noise`, from torch's default generator of the device, and handed to
    whichever implementation runs, so that implementations agree in training too.

    Attributes:
        input_size: Features of the input.
        hidden_size: Features of the output.
    """

    input_size: int
    hidden_size: int

    @abstractmethod
    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Returns the state before the first step, tensors `(batch_size, ...)`."""

    @abstractmethod
    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One step of the reference mathematics.

        Args:
            projected: `(B, ...)`, `project` of the step's input.
            state: The state before the step.
            noise: This step's masks; empty in evaluation.

        Returns:
            The output `(B, hidden_size)` and the state after the step.
        """

    def project(self, input: Tensor) -> Tensor:
        """Computes what depends on the input alone, for a step or a whole sequence at once."""
        return input

    def sample_noise(self, length: int, batch_size: int) -> Noise:
        """Draws all masks for `length` steps in training; `()` where nothing is random."""
        return ()

    def unroll(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs a sequence.

        Args:
            input: `(T, B, input_size)`.
            state: Before the first step; None for `initial_state`.

        Returns:
            Outputs `(T, B, hidden_size)` and the state after the last step.
        """
        length, batch_size, _ = input.shape
        state = self.begin(input, state)
        return self.unroll_steps(input, state, self.sample_noise(length, batch_size))

    def unroll_steps(self, input: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """Runs a sequence step by step, with the noise of the sequence drawn already."""
        outputs = []
        # Not indexed step by step: each gradient would be a sequence of zeros but for one step.
        for t, projected in enumerate(self.project(input).unbind()):
            output, state = self.step(projected, state, noise_at(noise, t))
            outputs.append(output)
        if not outputs:
            return input.new_zeros(0, input.shape[1], self.hidden_size), state
        return torch.stack(outputs), state

    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs one step: input `(B, input_size)`, output `(B, hidden_size)`."""
        state = self.begin(input, state)
        noise = noise_at(self.sample_noise(1, input.shape[0]), 0)
        return self.step(self.project(input), state, noise)

    def begin(self, input: Tensor, state: State | None) -> State:
        """Checks input `(..., B, input_size)` and state; returns the state, None as the initial.

        Raises:
            ValueError: If a shape does not fit, or outside of autocast a dtype.
        """
        if input.shape[-1] != self.input_size:
            raise ValueError(
                f"input must have {self.input_size} features, got shape {tuple(input.shape)}"
            )
        weights = next(self.parameters()).dtype
        # Under autocast the input may be in half precision, the state is not.
        dtype = torch.promote_types(input.dtype, weights)
        initial = self.initial_state(input.shape[-2], device=input.device, dtype=dtype)
        if state is not None:
            expected = [tuple(tensor.shape) for tensor in initial]
            got = [tuple(tensor.shape) for tensor in state]
            if expected != got:
                raise ValueError(f"state must be tensors of shapes {expected}, got {got}")
        given = [input.dtype] if state is None else [input.dtype, state[0].dtype]
        if any(each != weights for each in given) and not _is_autocast(input.device.type):
            raise ValueError(
                f"input and state must have the dtype of the weights, {weights}, got {given}"
            )
        return initial if state is None else state


class AcceleratedCell(Cell):
    """A cell with whole-sequence kernels beside its `step`.

    Attributes:
        backend: "auto", or the one of `rum.kernels.backends.BACKENDS` that is to run sequences.
    """

    backend: str
    _logged_backend = ""

    def set_backend(self, backend: str) -> None:
        """Raises ConfigError if there is no such backend."""
        check_choice("backend", backend, BACKENDS)
        self.backend = backend

    @abstractmethod
    def request(self, state: State) -> Request:
        """What a sequence that begins with `state` asks of a backend."""

    def choose_backend(self, state: State) -> str:
        """Names the backend that runs sequences from `state`; the first time it is logged.

        Raises:
            ConfigError: If the one that was asked for cannot.
        """
        request = self.request(state)
        backend = choose(self.backend, request)
        if backend != self._logged_backend and not torch.compiler.is_compiling():
            self._logged_backend = backend
            name = type(self).__name__
            logger.debug("%s runs on backend %r (%s)", name, backend, request.device)
        return backend


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def noise_at(noise: Noise, t: int) -> Noise:
    """Selects one step's masks."""
    return tuple(item[t] if isinstance(item, Tensor) else noise_at(item, t) for item in noise)


def first_mask(noise: Noise) -> Tensor | None:
    """The first mask of a flat noise, None where there is none (evaluation)."""
    mask = noise[0] if noise else None
    assert mask is None or isinstance(mask, Tensor)
    return mask


def bernoulli_mask(
    probability: float, *shape: int, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draws ones with `probability`, zeros otherwise, on the device and in the dtype of `like`."""
    draw = torch.rand(*shape, device=like.device, dtype=torch.float32, generator=generator)
    return (draw < probability).to(like.dtype)


def semi_orthogonal(rows: int, columns: int, like: Tensor) -> Tensor:
    """Draws a semi-orthogonal matrix, in float32 for half precision, which has no QR."""
    half = like.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half else like.dtype
    drawn = nn.init.orthogonal_(torch.empty(rows, columns, device=like.device, dtype=dtype))
    return drawn.to(like.dtype)


def glorot_uniform_(kernel: Tensor) -> None:
    """Fills a kernel with the uniform distribution of Glorot and Bengio 2010, by its two sizes."""
    bound = math.sqrt(6 / sum(kernel.shape))
    with torch.no_grad():
        kernel.uniform_(-bound, bound)


class Options(ABC):  # noqa: B024  # its two kinds differ in how they are built
    """Typed options; they check themselves and are never changed after construction."""

    def __post_init__(self) -> None:  # noqa: B027  # options without limits have no checks
        """Subclasses call this, then raise ConfigError on a value that is not accepted."""


@dataclass(kw_only=True)
class CellConfig(Options):
    """The typed options of one cell."""

    @abstractmethod
    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Cell:
        """Builds the cell for inputs of `input_size` features."""


@dataclass(kw_only=True)
class ModelConfig(Options):
    """One option of `model=`: a `StackConfig`, or a `WholeConfig` that is no recurrent cell."""

    name: str = "???"
    """Registry key; each model sets its own."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a name that belongs to another model."""
        super().__post_init__()
        registered = next((key for key, value in MODELS.items() if value is type(self)), self.name)
        if self.name != registered:
            raise ConfigError(f"name of this model must be {registered!r}, got {self.name!r}")


@dataclass(kw_only=True)
class StackConfig(ModelConfig, CellConfig):
    """A cell together with how it is stacked; `rum.models.SequenceModel` is built around it."""

    num_layers: int = 1
    """Cells on top of each other."""
    dropout: float = 0.0
    """Probability of zeroing a unit of the embedded input, between layers and before the
    read-out. The released RUM and 2xRUM code has none; the paper's Table 5 says 0.35."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that no model accepts."""
        super().__post_init__()
        check_at_least("num_layers", self.num_layers, 1)
        check_probability("dropout", self.dropout)

    def build_layer(self, layer: int, input_size: int) -> Cell:
        """Builds the cell of a layer, counted from 0, for inputs of `input_size` features."""
        return self.build(input_size)


@dataclass(kw_only=True)
class WholeConfig(ModelConfig):
    """A model from symbols to answers that is not made of recurrent cells."""

    @abstractmethod
    def build_model(self, *, vocab_size: int, num_classes: int, story: "StoryLayout") -> nn.Module:
        """Builds it; called as `logits, state = model(symbols, state)` like a `SequenceModel`."""


@dataclass(frozen=True)
class StoryLayout:
    """How a story and a question lie in an input sequence."""

    question_length: int
    """The last so many symbols are the question, padded on the right with 0."""
    sentence_ends: tuple[int, ...]
    """Symbols that end a sentence of the story, which is padded on the left with 0."""


MODELS: dict[str, type[ModelConfig]] = {}
"""Every model by name: an option of `model=` in Hydra and the key in a checkpoint."""

_Model = TypeVar("_Model", bound=type[ModelConfig])


def register_model(config: _Model) -> _Model:
    """Class decorator: makes a model known under its default `name`.

    Raises:
        ValueError: If the name is taken.
    """
    name = config.name
    if name in MODELS:
        raise ValueError(f"model {name!r} is registered twice")
    MODELS[name] = config
    return config
