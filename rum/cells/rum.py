"""Rotational Unit of Memory cell (Dangovski et al., section 3.2; 2019 in TACL 7)."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rum.cells.base import (
    AcceleratedCell,
    Cell,
    CellConfig,
    Noise,
    Options,
    StackConfig,
    State,
    bernoulli_mask,
    first_mask,
    register_model,
    semi_orthogonal,
)
from rum.cells.layer_norm import LayerNorm
from rum.checks import check_at_least, check_choice, check_positive, check_probability
from rum.errors import ConfigError
from rum.functional import (
    accumulate_rotation,
    leak_rotation,
    orthonormalize,
    rotate,
    time_normalize,
    without_autocast,
    zoneout,
)
from rum.kernels.backends import Request
from rum.kernels.chain import Link
from rum.kernels.recurrence import RecurrenceOptions
from rum.kernels.sequence import replicas_at_a_time, run
from rum.kernels.step import ACTIVATIONS

LOWEST_LEAK = 1e-5
"""Smallest power between 0 and 1: below, float32 loses orthogonality at exactly opposite pairs."""


@dataclass(frozen=True)
class Observation:
    """What one step of a cell computed, each `(B, N)`; for diagnostics."""

    embedded: Tensor
    target: Tensor
    update_gate: Tensor
    candidate: Tensor
    hidden: Tensor


class RUMCell(AcceleratedCell):
    """One step of a RUM, with hidden state h and, for lambda = 1, associative memory R.

    ```
    tau  = W_tau [x; h] + b_tau                    target (no activation)
    u    = sigmoid(W_u [x; h] + b_u)               update gate
    eps  = W_eps x + b_eps                         embedded input
    R    = P(R_previous) Rotation(eps, tau)        R starts as the identity
    c    = activation(eps + R h)                   candidate
    h'   = u * h + (1 - u) * c                     u keeps the old state
    h''  = eta h' / |h'|                           where eta is set
    h    = zoneout(h'', h)
    ```

    With layer norm (gain and shift learned, eps 1e-3 inside the root), target and update gate are
    normalised each over the hidden units, and so is eps + R h before the activation. As released
    the gate is normalised *after* its sigmoid, so it leaves (0, 1) and the mix extrapolates;
    "pre_sigmoid" is the usual order. The paper's Penn Treebank numbers were very probably made
    with the former.

    Parameters: `weight_ih (3N, input_size)`, rows target, update gate, embedded input;
    `weight_hh (2N, N)`, rows target, update gate; `bias (2N,)`; `embedding_bias (N,)` or None.

    P is the lambda-th power: the identity matrix for 0, R itself for 1, a matrix power for whole
    numbers >= 2, and between 0 and 1 `rum.functional.leak_rotation`, which stands for the real
    power that the paper leaves to future work (section 5.2): an associative memory that leaks.

    State: `(h,)` for lambda = 0, else `(h, R)` with R `(B, N, N)`.

    Cost of a step: O(N^2) per sample, also for lambda = 1; O(N^3) with other powers, which run
    step by step and keep several N x N matrices per sample and step for the backward pass.

    Differs from the released code only where that yields NaN or leaves the orthogonal matrices
    (see `rum.functional.rotate`).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        lambda_: float = 0.0,
        lambda_trainable: bool = False,
        orthonormalize: bool = True,
        eta: float | None = None,
        layer_norm: bool = False,
        layer_norm_gate: str = "post_sigmoid",
        zoneout: float = 0.0,
        embedding_bias: bool = True,
        activation: str = "relu",
        backend: str = "auto",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `RUMCellConfig` for the options.

        Args:
            backend: "reference" (step by step; differentiable twice), "fused" (one autograd
                function for a whole sequence; lambda = 0, or lambda = 1 without a gradient for
                an initial memory), "cpu" (the same, compiled C in float32, if a compiler was there
                when the package was installed), "triton" (the same on CUDA devices; with lambda =
                1 up to N = 128) or "auto": the fastest that can serve the request,
                with the same results up to rounding. Derivatives of derivatives and the transforms
                of `torch.func` need "reference".
            recompute: Save memory: keep only hidden states for the backward pass, a quarter, and
                compute the rest again by one more product. No effect on "reference".
        """
        super().__init__()
        RUMCellConfig(  # checks the options
            hidden_size=hidden_size,
            lambda_=lambda_,
            lambda_trainable=lambda_trainable,
            eta=eta,
            layer_norm_gate=layer_norm_gate,
            zoneout=zoneout,
            activation=activation,
        )
        self.set_backend(backend)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.lambda_ = lambda_
        self.lambda_trainable = lambda_trainable
        if backend not in ("auto", "reference") and not self._has_fixed_power:
            raise ConfigError(
                f"backend {backend!r} serves a fixed lambda_ of 0 or 1, got {lambda_}"
                f"{' trainable' if lambda_trainable else ''}: use 'reference'"
            )
        self.orthonormalize = orthonormalize
        if lambda_ > 1:
            warnings.warn(
                f"lambda_ = {lambda_:g} multiplies rounding errors and rotation angles "
                f"{lambda_:g}-fold at every step: values stay finite with orthonormalize only, "
                "gradients for some hundred steps at most",
                stacklevel=2,
            )
        self.eta = eta
        self.layer_norm_gate = layer_norm_gate if layer_norm else None
        self.zoneout = zoneout
        self.activation = activation
        self.recompute = recompute
        self.observer: Callable[[Observation], None] | None = None
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size, **like))
        self.weight_hh = nn.Parameter(torch.empty(2 * hidden_size, hidden_size, **like))
        self.bias = nn.Parameter(torch.empty(2 * hidden_size, **like))
        self.embedding_bias = (
            nn.Parameter(torch.empty(hidden_size, **like)) if embedding_bias else None
        )
        self.lambda_logit = nn.Parameter(torch.empty((), **like)) if lambda_trainable else None
        self.gate_norm = LayerNorm(hidden_size, groups=2, **like) if layer_norm else None
        self.candidate_norm = LayerNorm(hidden_size, **like) if layer_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws initial weights as released.

        One semi-orthogonal `(input_size + N) x N` matrix for the target and an independent one
        for the update gate, each over input and hidden state *together*; a semi-orthogonal
        embedding; biases 1, target included; embedding bias 0.
        """
        size = self.hidden_size
        with torch.no_grad():
            for gate in range(2):
                rows = slice(gate * size, (gate + 1) * size)
                joint = semi_orthogonal(self.input_size + size, size, self.weight_hh)
                self.weight_ih[rows] = joint[: self.input_size].t()
                self.weight_hh[rows] = joint[self.input_size :].t()
            embedding = semi_orthogonal(self.input_size, size, self.weight_ih)
            self.weight_ih[2 * size :] = embedding.t()
            self.bias.fill_(1.0)
            if self.embedding_bias is not None:
                self.embedding_bias.zero_()
            if self.lambda_logit is not None:
                self.lambda_logit.fill_(math.log(self.lambda_ / (1 - self.lambda_)))

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Returns h = 0 and, unless lambda = 0, R = identity."""
        hidden = torch.zeros(batch_size, self.hidden_size, device=device, dtype=dtype)
        if self.lambda_ == 0:
            return (hidden,)
        # In half precision it would not stay orthogonal.
        full = torch.promote_types(dtype, torch.float32)
        identity = torch.eye(self.hidden_size, device=device, dtype=full)
        return hidden, identity.expand(batch_size, -1, -1)

    def sample_noise(
        self, length: int, batch_size: int, generator: torch.Generator | None = None
    ) -> Noise:
        """Draws the zoneout mask `(T, B, N)`, from torch's default generator or another."""
        if not self.training or self.zoneout == 0:
            return ()
        shape = (length, batch_size, self.hidden_size)
        mask = bernoulli_mask(self.zoneout, *shape, like=self.weight_hh, generator=generator)
        return (mask,)

    def project(self, input: Tensor) -> Tensor:
        """Input shares of target and update gate, and the embedded input: `(..., 3N)`."""
        return F.linear(input, self.weight_ih, self.input_bias())

    def input_bias(self) -> Tensor:
        """Biases of what `project` returns, `(3N,)`."""
        embedding_bias = (
            self.bias.new_zeros(self.hidden_size)
            if self.embedding_bias is None
            else self.embedding_bias
        )
        return torch.cat((self.bias, embedding_bias))

    def norms(self) -> tuple[Tensor, ...]:
        """Gain and shift of the gates' layer norm, then of the candidate's; empty without."""
        if self.gate_norm is None or self.candidate_norm is None:
            return ()
        return (
            self.gate_norm.gain,
            self.gate_norm.shift,
            self.candidate_norm.gain,
            self.candidate_norm.shift,
        )

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One step; see the class."""
        hidden = state[0]
        from_input, embedded = torch.tensor_split(projected, (2 * self.hidden_size,), -1)
        gates = from_input + F.linear(hidden, self.weight_hh)
        if self.gate_norm is not None and self.layer_norm_gate == "pre_sigmoid":
            gates = self.gate_norm(gates)
        target, update = gates.chunk(2, -1)
        update = torch.sigmoid(update)
        if self.gate_norm is not None and self.layer_norm_gate == "post_sigmoid":
            target, update = self.gate_norm(torch.cat((target, update), -1)).chunk(2, -1)

        memory = state[1:]
        if self.lambda_ == 0:
            turned = rotate(embedded, target, hidden)
        else:
            accumulated = accumulate_rotation(self._power(state[1]), embedded, target)
            with without_autocast(hidden.device):
                vector = hidden.to(accumulated.dtype).unsqueeze(-1)
                turned = (accumulated @ vector).squeeze(-1).to(hidden.dtype)
            memory = (accumulated,)

        candidate = embedded + turned
        if self.candidate_norm is not None:
            candidate = self.candidate_norm(candidate)
        candidate = ACTIVATIONS[self.activation](candidate)
        new = update * hidden + (1 - update) * candidate
        if self.eta is not None:
            new = time_normalize(new, self.eta)
        new = zoneout(new, hidden, self.zoneout, first_mask(noise))
        if self.observer is not None:
            self.observer(Observation(embedded, target, update, candidate, new))
        return new, (new, *memory)

    def _power(self, memory: Tensor) -> Tensor:
        """The lambda-th power of the associative memory."""
        if self.lambda_logit is not None:
            memory = leak_rotation(memory, torch.sigmoid(self.lambda_logit).clamp(LOWEST_LEAK))
        elif self.lambda_ == 1:
            return memory  # float32 keeps orthogonality to 5e-6 over 1000 rotations
        elif self.lambda_ < 1:
            memory = leak_rotation(memory, self.lambda_)
        else:
            with without_autocast(memory.device):
                memory = torch.linalg.matrix_power(memory, int(self.lambda_))
        return orthonormalize(memory) if self.orthonormalize else memory

    def unroll(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs a sequence on the backend in force; see `Cell.unroll`."""
        state = self.begin(input, state)
        backend = self.choose_backend(state)
        if backend == "reference":
            return super().unroll(input, state)
        mask = first_mask(self.sample_noise(input.shape[0], input.shape[1]))
        outputs, state = unroll_replicas(
            [self],
            backend,
            input.unsqueeze(1),
            tuple(tensor.unsqueeze(0) for tensor in state),
            None if mask is None else mask.unsqueeze(1),
        )
        return outputs.squeeze(1), tuple(tensor.squeeze(0) for tensor in state)

    def choose_backend(self, state: State) -> str:
        """See `AcceleratedCell`; with an observer "reference", which computes what it sees."""
        return "reference" if self.observer is not None else super().choose_backend(state)

    def request(self, state: State) -> Request:
        """See `AcceleratedCell`."""
        obstacle = None
        if not self._has_fixed_power:
            obstacle = "serves a fixed lambda_ of 0 or 1"
        elif torch.is_grad_enabled() and any(memory.requires_grad for memory in state[1:]):
            obstacle = "gives no gradient to an initial associative memory"
        weight = self.weight_hh
        return Request(
            size=self.hidden_size,
            dtype=torch.promote_types(weight.dtype, torch.float32),
            device=weight.device,
            has_memory=self.lambda_ == 1,
            obstacle=obstacle,
        )

    def link(self, source: str, slot: int, noise: Noise, dropout: Tensor | None) -> Link:
        """This cell, with lambda = 0, as one of several in a step."""
        mask = first_mask(noise)
        return Link(
            kind="rum",
            weight_ih=self.weight_ih,
            bias=self.input_bias(),
            weight_hh=self.weight_hh,
            norms=self.norms(),
            options=_options([self]),
            source=source,
            slot=slot,
            masks=() if mask is None else (mask,),
            dropout=dropout,
        )

    @property
    def _has_fixed_power(self) -> bool:
        return self.lambda_ in (0, 1) and not self.lambda_trainable

    def extra_repr(self) -> str:
        """Sizes and options, for `print(model)`."""
        return (
            f"{self.input_size}, {self.hidden_size}, lambda_={self.lambda_:g}, eta={self.eta}, "
            f"layer_norm_gate={self.layer_norm_gate}, zoneout={self.zoneout}, "
            f"activation={self.activation}, backend={self.backend}"
        )


def unroll_replicas(
    cells: list[RUMCell], backend: str, input: Tensor, state: State, mask: Tensor | None
) -> tuple[Tensor, State]:
    """Runs K cells of one shape side by side on a fast backend, each with weights of its own.

    Args:
        cells: The same in everything but weights, eta and zoneout.
        backend: Not "reference".
        input: `(T, K, B, input_size)`.
        state: Tensors `(K, B, ...)`.
        mask: Of zoneout, `(T, K, B, N)`, or None (expectation).

    Returns:
        Outputs `(T, K, B, N)` and the state after the last step.
    """
    cell = cells[0]
    together = replicas_at_a_time(backend, input, cell.hidden_size)
    if together < len(cells):
        lanes = [slice(first, first + together) for first in range(0, len(cells), together)]
        results = [
            unroll_replicas(
                cells[part],
                backend,
                inputs,
                tuple(tensor[part] for tensor in state),
                None if mask is None else mask[:, part],
            )
            # Not slices of the input: each gradient would be one of all, mostly zeros.
            for part, inputs in zip(lanes, input.split(together, 1), strict=True)
        ]
        outputs = torch.cat([output for output, _ in results], 1)
        states = zip(*(after for _, after in results), strict=True)
        return outputs, tuple(torch.cat(tensors) for tensors in states)
    norms: tuple[Tensor, ...] = ()
    if cell.layer_norm_gate is not None:
        norms = tuple(map(_stack, zip(*(each.norms() for each in cells), strict=True)))
    weights = (
        _stack([each.weight_ih for each in cells]),
        _stack([each.input_bias() for each in cells]),
        _stack([each.weight_hh for each in cells]),
        norms,
    )
    options = _options(cells)
    hidden, memory = state[0], state[1] if len(state) == 2 else None
    outputs, memory = run(
        backend, input, hidden, memory, weights, mask, options, recompute=cell.recompute
    )
    outputs = outputs.to(torch.promote_types(input.dtype, cell.weight_hh.dtype))
    last = outputs[-1] if outputs.shape[0] else hidden
    return outputs, (last,) if memory is None else (last, memory)


def _options(cells: Sequence[RUMCell]) -> RecurrenceOptions:
    cell = cells[0]
    return RecurrenceOptions(
        activation=cell.activation,
        eta=None if cell.eta is None else tuple(each.eta or 0.0 for each in cells),
        layer_norm_gate=cell.layer_norm_gate,
        zoneout=tuple(each.zoneout for each in cells),
    )


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


@dataclass(kw_only=True)
class RUMCellConfig(CellConfig):
    """Options of a RUM cell."""

    hidden_size: int = 256
    """Size of the hidden state."""
    lambda_: float = 0.0
    """Power of the associative memory: 0 (none), 1 (rotations accumulate), between (they leak
    away), or a whole number >= 2 (angles and rounding errors multiply at every step: for short
    sequences)."""
    lambda_trainable: bool = False
    """Learn the power, between 0 and 1, from `lambda_` on (one parameter, its logit)."""
    orthonormalize: bool = True
    """For powers other than 0 and 1: take the associative memory back to the orthogonal matrices
    at each step; off computes the plain recurrence."""
    eta: float | None = None
    """Norm of the hidden state after time normalisation, > 0; None switches it off."""
    layer_norm: bool = False
    """Layer norm of target, update gate and candidate; on for Penn Treebank only, as released."""
    layer_norm_gate: str = "post_sigmoid"
    """Where the update gate is normalised: "post_sigmoid" (as released) or "pre_sigmoid"."""
    zoneout: float = 0.0
    """Probability of keeping the previous state, in [0, 1); released Penn Treebank code: 0.1."""
    embedding_bias: bool = True
    """Bias of the embedded input: in the paper and at submission; dropped in 2018."""
    activation: str = "relu"
    """Of the candidate: relu, tanh, sigmoid or softsign."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the cell does not accept."""
        super().__post_init__()
        check_at_least("hidden_size", self.hidden_size, 1)
        is_whole = math.isfinite(self.lambda_) and self.lambda_ == int(self.lambda_)
        if not (0 <= self.lambda_ <= 1 or (is_whole and self.lambda_ >= 2)):
            raise ConfigError(
                f"lambda_ must be in [0, 1] or a whole number >= 2, got {self.lambda_}"
            )
        if 0 < self.lambda_ < LOWEST_LEAK:
            raise ConfigError(f"lambda_ must be 0 or at least {LOWEST_LEAK}, got {self.lambda_}")
        if self.lambda_trainable and not LOWEST_LEAK < self.lambda_ < 1:
            raise ConfigError(
                f"lambda_trainable must start strictly between {LOWEST_LEAK} and 1, got lambda_ "
                f"{self.lambda_}"
            )
        if self.eta is not None:
            check_positive("eta", self.eta)
        check_choice("layer_norm_gate", self.layer_norm_gate, ("post_sigmoid", "pre_sigmoid"))
        check_probability("zoneout", self.zoneout)
        check_choice("activation", self.activation, ACTIVATIONS)

    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RUMCell:
        """Builds the cell."""
        return RUMCell(
            input_size,
            self.hidden_size,
            lambda_=self.lambda_,
            lambda_trainable=self.lambda_trainable,
            orthonormalize=self.orthonormalize,
            eta=self.eta,
            layer_norm=self.layer_norm,
            layer_norm_gate=self.layer_norm_gate,
            zoneout=self.zoneout,
            embedding_bias=self.embedding_bias,
            activation=self.activation,
            device=device,
            dtype=dtype,
        )


@dataclass(kw_only=True)
class UpperRUMConfig(Options):
    """What differs in the cells above the first of a stack; null: as in the first."""

    lambda_: float | None = None
    """Power of the associative memory; 0 if and only if it is in the first."""
    eta: float | None = None
    """Norm after time normalisation; 0 switches it off."""
    zoneout: float | None = None
    """Probability of keeping the previous state."""


@register_model
@dataclass(kw_only=True)
class RUMConfig(StackConfig, RUMCellConfig):
    """A stack of RUM cells; two layers are the paper's 2xRUM."""

    name: str = "rum"
    upper: UpperRUMConfig = field(default_factory=UpperRUMConfig)
    """Options of the cells above the first, where they differ."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that no layer accepts."""
        super().__post_init__()
        given = {k: v for k, v in vars(self.upper).items() if v is not None}
        if given and self.num_layers == 1:
            raise ConfigError(
                f"upper.{next(iter(given))} has no effect with num_layers = 1: there is no layer "
                "above the first"
            )
        try:
            above = self._cell_above()
        except ConfigError as error:
            raise ConfigError(f"upper.{error}") from error
        if (above.lambda_ == 0) != (self.lambda_ == 0):
            raise ConfigError(
                "upper.lambda_ must be 0 if and only if lambda_ is, since the states of all "
                f"layers have the same parts, got {above.lambda_} above {self.lambda_}"
            )

    def _cell_above(self) -> RUMCellConfig:
        upper = self.upper
        cell = {each.name: getattr(self, each.name) for each in fields(RUMCellConfig)}
        cell |= {name: value for name, value in vars(upper).items() if value is not None}
        if upper.eta == 0:
            cell["eta"] = None
        return RUMCellConfig(**cell)

    def build_layer(self, layer: int, input_size: int) -> Cell:
        """Builds the cell of a layer, counted from 0, for inputs of `input_size` features."""
        return self.build(input_size) if layer == 0 else self._cell_above().build(input_size)
