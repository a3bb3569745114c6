"""Recurrent Highway RUM: several RUM micro-steps on one hidden state at every time step.

The paper (section 5.4) names Recurrent Highway Networks (Zilly et al. 2017) as a structure that
RUM can go into, and gives no equations: these are ours.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rum.cells.base import Cell, CellConfig, Noise, StackConfig, State, register_model
from rum.cells.rum import RUMCell, RUMCellConfig
from rum.checks import check_at_least


class HighwayRUMCell(Cell):
    """One time step: `depth` RUM micro-steps with weights of their own hand on one state.

    ```
    s_0 = h
    s_l = RUM_l(x, s_{l-1})        l = 1 .. depth
    h   = s_depth
    ```

    RUM's update gate is the carry gate of a highway layer, coupled with its transform gate.
    Differs from Zilly et al.: there the input enters the first micro-step only; a rotation needs
    an embedded input at each.

    State: a RUM's, `(h,)` or `(h, R)`; R accumulates over micro-steps.

    Source: Zilly et al. 2017 (Recurrent Highway Networks), section 4, with RUM as the layer.
    """

    def __init__(
        self,
        input_size: int,
        rum: RUMCellConfig,
        *,
        depth: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Builds `depth` cells of the options `rum`."""
        super().__init__()
        check_at_least("depth", depth, 1)
        self.input_size = input_size
        self.hidden_size = rum.hidden_size
        self.micro = nn.ModuleList(
            rum.build(input_size, device=device, dtype=dtype) for _ in range(depth)
        )

    def _cells(self) -> list[RUMCell]:
        return [cell for cell in self.micro if isinstance(cell, RUMCell)]

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Returns a RUM's initial state."""
        return self._cells()[0].initial_state(batch_size, device=device, dtype=dtype)

    def sample_noise(self, length: int, batch_size: int) -> Noise:
        """Draws the masks of every micro-step."""
        noise = tuple(cell.sample_noise(length, batch_size) for cell in self._cells())
        return noise if any(masks for masks in noise) else ()

    def project(self, input: Tensor) -> Tensor:
        """The projections of all micro-steps side by side."""
        return torch.cat([cell.project(input) for cell in self._cells()], -1)

    def step(self, projected: Tensor, state: State, noise: Noise) -> tuple[Tensor, State]:
        """One time step; see the class."""
        parts = projected.chunk(len(self.micro), -1)
        masks_of = noise or ((),) * len(parts)
        for cell, part, masks in zip(self._cells(), parts, masks_of, strict=True):
            assert isinstance(masks, tuple)
            _, state = cell.step(part, state, masks)
        return state[0], state


@dataclass(kw_only=True)
class HighwayRUMCellConfig(CellConfig):
    """Options of a Recurrent Highway RUM cell."""

    rum: RUMCellConfig = field(default_factory=RUMCellConfig)
    """The micro-steps, all alike; weights are separate."""
    depth: int = 2
    """Micro-steps in a time step, >= 1."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the cell does not accept."""
        super().__post_init__()
        check_at_least("depth", self.depth, 1)

    def build(
        self,
        input_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HighwayRUMCell:
        """Builds the cell."""
        return HighwayRUMCell(input_size, self.rum, depth=self.depth, device=device, dtype=dtype)


@register_model
@dataclass(kw_only=True)
class HighwayRUMConfig(StackConfig, HighwayRUMCellConfig):
    """A stack of Recurrent Highway RUM cells."""

    name: str = "highway_rum"
