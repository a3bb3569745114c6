"""Many small models at once: RUM layers of one shape side by side, for the price of about one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rum.cells import RUMCell, State
from rum.cells.base import first_mask
from rum.cells.rum import unroll_replicas
from rum.layers import RecurrentLayer


class Replicas(nn.Module):
    """K layers of one shape with weights of their own, each on its own input, in one kernel.

    ```
    layers = [rum.RUM(10, 100, eta=eta) for eta in (0.5, 1.0, 2.0)]
    replicas = rum.Replicas(layers, seeds=[1, 2, 3])
    optimizer = Adam([{"params": layer.parameters(), "lr": lr} for layer, lr in ...])
    output, state = replicas(input)         # (3, T, B, 10) to (3, T, B, 100)
    ```

    A small recurrence leaves most of a device idle; its replicas fill it. The layers stay what
    they are: parameters, learning rates, clipping and checkpoints are each layer's own, and
    `replicas[k] = layer` gives a place to another one. They may differ in weights, eta, zoneout,
    dropout and the seed of their masks, not in sizes and other options.

    Shapes: those of the layers with the replica first: input `(K, T, B, input_size)`, or
    `(K, B, T, input_size)` with `batch_first`; state tensors `(K, num_layers, B, ...)`.
    """

    def __init__(
        self, layers: Sequence[RecurrentLayer], *, seeds: Sequence[int] | None = None
    ) -> None:
        """Puts layers side by side.

        Args:
            layers: At least one, of RUM cells.
            seeds: One a layer: its masks (zoneout, dropout) come from a generator of its own, on
                the device that the layer is on now, so that they do not depend on its neighbours;
                None: all come from torch's default generator.

        Raises:
            ValueError: If the layers differ in more than they may or have other cells, or seeds
                are too few or many.
        """
        super().__init__()
        if not layers:
            raise ValueError("layers must be at least one, got none")
        if seeds is not None and len(seeds) != len(layers):
            raise ValueError(f"seeds must be one for each of {len(layers)} layers, got {seeds}")
        _cell(layers[0], 0)
        self.layers = nn.ModuleList(layers[:1])
        for layer in layers[1:]:
            self._check(layer)
            self.layers.append(layer)
        self.generators: list[torch.Generator | None] = [None] * len(layers)
        if seeds is not None:
            self.generators = [
                torch.Generator(next(layer.parameters()).device).manual_seed(seed)
                for layer, seed in zip(layers, seeds, strict=True)
            ]

    def __len__(self) -> int:
        """K."""
        return len(self.layers)

    def __getitem__(self, index: int) -> RecurrentLayer:
        """The layer at a place."""
        layer = self.layers[index]
        assert isinstance(layer, RecurrentLayer)
        return layer

    def __setitem__(self, index: int, layer: RecurrentLayer) -> None:
        """Gives a place to another layer.

        Raises:
            ValueError: If it differs from the others in more than it may.
        """
        self._check(layer)
        self.layers[index] = layer

    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs every layer on its own sequences; see the class for shapes.

        Raises:
            ValueError: If a shape does not fit.
        """
        if input.dim() != 4 or len(input) != len(self):
            raise ValueError(
                f"input must have {len(self)} replicas first and 4 dimensions, got shape "
                f"{tuple(input.shape)}"
            )
        if state is not None and any(
            tensor.shape[:2] != (len(self), self[0].num_layers) for tensor in state
        ):
            raise ValueError(
                f"state tensors must have {len(self)} replicas and {self[0].num_layers} layers "
                f"first, got shapes {[tuple(tensor.shape) for tensor in state]}"
            )
        batch_first = self[0].batch_first
        output = input.permute(2, 0, 1, 3) if batch_first else input.transpose(0, 1)
        states = []
        for index in range(self[0].num_layers):
            if index:
                output = self._drop(output)
            before = None if state is None else tuple(tensor[:, index] for tensor in state)
            output, after = self._unroll(index, output, before)
            states.append(after)
        new_state = tuple(torch.stack(tensors, 1) for tensors in zip(*states, strict=True))
        return output.permute(1, 2, 0, 3) if batch_first else output.transpose(0, 1), new_state

    def _unroll(self, index: int, input: Tensor, state: State | None) -> tuple[Tensor, State]:
        """One layer of cells; input and output `(T, K, B, ...)`, states `(K, B, ...)`."""
        cells = [_cell(self[lane], index) for lane in range(len(self))]
        begun = [
            cell.begin(input[:, lane], None if state is None else tuple(s[lane] for s in state))
            for lane, cell in enumerate(cells)
        ]
        backend = cells[0].choose_backend(begun[0])
        length, _, batch_size, _ = input.shape
        noises = [
            cell.sample_noise(length, batch_size, generator)
            for cell, generator in zip(cells, self.generators, strict=True)
        ]
        if backend == "reference":
            lanes = [
                cell.unroll_steps(values, begun[lane], noises[lane])
                for lane, (cell, values) in enumerate(zip(cells, input.unbind(1), strict=True))
            ]
            outputs, after = zip(*lanes, strict=True)
            return torch.stack(outputs, 1), _joined(after)
        masks = [first_mask(noise) for noise in noises]
        mask = None
        if any(each is not None for each in masks):
            none = input.new_zeros(length, batch_size, cells[0].hidden_size)
            mask = torch.stack([none if each is None else each for each in masks], 1)
        return unroll_replicas(cells, backend, input, _joined(begun), mask)

    def _drop(self, output: Tensor) -> Tensor:
        """Dropout between layers, with each layer's own probability."""
        layers = [self[lane] for lane in range(len(self))]
        if not any(layer.dropout and layer.training for layer in layers):
            return output
        dropped = []
        lanes = zip(layers, self.generators, output.unbind(1), strict=True)
        for layer, generator, values in lanes:
            with drawing_from(generator):
                dropped.append(nn.functional.dropout(values, layer.dropout, layer.training))
        return torch.stack(dropped, 1)

    def _check(self, layer: RecurrentLayer) -> None:
        expected, got = _shape(self[0]), _shape(layer)
        different = {name: got[name] for name in got if got[name] != expected[name]}
        if different:
            first = {name: expected[name] for name in different}
            raise ValueError(f"layers must be equal in {first}, got one with {different}")


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Puts a generator in the place of torch's default one of its device; None changes nothing."""
    if generator is None:
        yield
        return
    default = torch.default_generator
    if generator.device.type == "cuda":
        default = torch.cuda.default_generators[generator.device.index or 0]
    before = default.get_state()
    default.set_state(generator.get_state())
    try:
        yield
        generator.set_state(default.get_state())
    finally:
        default.set_state(before)


def _cell(layer: RecurrentLayer, index: int) -> RUMCell:
    cell = layer.cells[index]
    if not isinstance(cell, RUMCell):
        raise ValueError(f"layers must be of RUM cells, got {type(cell).__name__}")
    return cell


def _joined(states: Sequence[State]) -> State:
    """States of all lanes as tensors `(K, B, ...)`."""
    return tuple(torch.stack(tensors) for tensors in zip(*states, strict=True))


def _shape(layer: RecurrentLayer) -> dict[str, object]:
    """What replicas must have in common."""
    cells = [_cell(layer, index) for index in range(layer.num_layers)]
    of_layers = {
        "lambda_": [cell.lambda_ for cell in cells],
        "lambda_trainable": [cell.lambda_trainable for cell in cells],
        "orthonormalize": [cell.orthonormalize for cell in cells],
        "has eta": [cell.eta is not None for cell in cells],
        "layer_norm_gate": [cell.layer_norm_gate for cell in cells],
        "embedding_bias": [cell.embedding_bias is not None for cell in cells],
        "activation": [cell.activation for cell in cells],
        "backend": [cell.backend for cell in cells],
        "recompute": [cell.recompute for cell in cells],
        "dtype": [cell.weight_hh.dtype for cell in cells],
        "device": [cell.weight_hh.device for cell in cells],
    }
    return {
        "input_size": layer.input_size,
        "hidden_size": layer.hidden_size,
        "num_layers": layer.num_layers,
        "batch_first": layer.batch_first,
        **of_layers,
    }
