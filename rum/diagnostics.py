"""What goes on inside of RUM cells: rotation angles, gates and norms over a run of a model."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rum.cells import RUMCell
from rum.cells.rum import Observation

NEAR_OPPOSITE_COSINE = -0.999
"""Pairs of embedded input and target with a smaller cosine count as nearly opposite: there the
rotation's gradient is large, and where it is exactly -1 no plane of rotation is defined."""


@torch.no_grad()
def rum_statistics(model: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Runs a model on the reference backend and sums up what its RUM cells did.

    Args:
        model: Any module; without a RUM cell nothing is run and nothing returned.
        run: Calls the model.

    Returns:
        For each RUM cell (from the second on with the suffix `_cell_2`, ...), over all steps and
        samples: `rotation_angle_mean` and `rotation_angle_std` (radians, of the step's own
        rotation), `near_opposite_pairs` (a count), `update_gate_mean`, `update_gate_std` and
        `update_gate_outside` (share outside of [0, 1], where a gate that is normalised after its
        sigmoid extrapolates), `candidate_zeros` (share of exact zeros) and `hidden_norm_mean`.
    """
    cells = [module for module in model.modules() if isinstance(module, RUMCell)]
    if not cells:
        return {}
    sums = [_Sums() for _ in cells]
    with _observed(cells, sums):
        run()
    statistics: dict[str, float] = {}
    for index, each in enumerate(sums):
        suffix = f"_cell_{index + 1}" if index else ""
        statistics |= {f"{name}{suffix}": value for name, value in each.result().items()}
    return statistics


def rum_kernels(model: nn.Module) -> dict[str, Tensor]:
    """The kernels that the paper draws (Figures 3, 7 and 8), as copies on the CPU.

    Args:
        model: Any module; also one read from a checkpoint with `rum.experiment.load_model`.

    Returns:
        For each RUM cell (from the second on with the suffix `_cell_2`, ...) `W_xh_target` and
        `W_xh_update_gate` `(input_size, N)`, `W_hh_target` and `W_hh_update_gate` `(N, N)`, in
        the released code's orientation: rows are what comes in, columns hidden units.
    """
    kernels: dict[str, Tensor] = {}
    cells = [module for module in model.modules() if isinstance(module, RUMCell)]
    for index, cell in enumerate(cells):
        suffix = f"_cell_{index + 1}" if index else ""
        size = cell.hidden_size
        for gate, name in enumerate(("target", "update_gate")):
            rows = slice(gate * size, (gate + 1) * size)
            for kind, weight in (("xh", cell.weight_ih), ("hh", cell.weight_hh)):
                kernels[f"W_{kind}_{name}{suffix}"] = weight[rows].detach().cpu().t().clone()
    return kernels


@contextmanager
def _observed(cells: list[RUMCell], sums: "list[_Sums]") -> Iterator[None]:
    for cell, each in zip(cells, sums, strict=True):
        cell.observer = each.add
    try:
        yield
    finally:
        for cell in cells:
            cell.observer = None


class _Sums:
    """Sums over the steps of one cell."""

    def __init__(self) -> None:
        self._pairs = 0
        self._units = 0
        self._sums: Tensor | None = None

    def add(self, seen: Observation) -> None:
        cosine = torch.cosine_similarity(seen.embedded.double(), seen.target.double(), dim=-1)
        angle = torch.acos(cosine.clamp(-1, 1))
        gate = seen.update_gate.double()
        sums = torch.stack(
            [
                angle.sum(),
                angle.square().sum(),
                (cosine < NEAR_OPPOSITE_COSINE).sum(),
                seen.hidden.double().norm(dim=-1).sum(),
                gate.sum(),
                gate.square().sum(),
                ((gate < 0) | (gate > 1)).sum(),
                (seen.candidate == 0).sum(),
            ]
        )
        self._sums = sums if self._sums is None else self._sums + sums
        self._pairs += angle.numel()
        self._units += gate.numel()

    def result(self) -> dict[str, float]:
        if self._sums is None or not self._pairs:
            return {}
        values = self._sums.tolist()
        angle, square, opposite, norm, gate, gate_square, outside, zeros = values
        return {
            "rotation_angle_mean": angle / self._pairs,
            "rotation_angle_std": _std(angle, square, self._pairs),
            "near_opposite_pairs": opposite,
            "hidden_norm_mean": norm / self._pairs,
            "update_gate_mean": gate / self._units,
            "update_gate_std": _std(gate, gate_square, self._units),
            "update_gate_outside": outside / self._units,
            "candidate_zeros": zeros / self._units,
        }


def _std(total: float, square: float, count: int) -> float:
    return math.sqrt(max(0.0, square / count - (total / count) ** 2))
