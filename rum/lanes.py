"""Experiments of one shape side by side in one process: each the run it is alone, for less time.

Every lane has its own model, optimiser, schedule, clipping, data, random numbers, checkpoints and
reports; only the recurrent layers run as one (`rum.Replicas`). Masks come from a generator of the
lane's own, in the state that torch's default one has in an ordinary run: so a lane draws what the
ordinary run draws, whoever its neighbours are, and each goes on from the other's checkpoints.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rum.cells import Cell, ModelConfig, RUMConfig
from rum.checks import check_at_least
from rum.errors import ConfigError, RumError
from rum.experiment import ExperimentConfig, check_device, model_sizes, open_trainer
from rum.models import SequenceModel, build_model
from rum.parameters import flatten
from rum.replicas import Replicas, drawing_from
from rum.tasks import Task
from rum.training.checkpoint import Checkpoint
from rum.training.forward import Call, State
from rum.training.loop import Report, Trainer, Turn, train

FREE = ("model.zoneout", "model.dropout", "model.upper.zoneout")
"""Options of the model in which lanes may differ, and in any eta but none; of the training all but
device and threads."""
SHARED_TRAINING = ("training.device", "training.threads")


def check_model(config: ModelConfig) -> None:
    """Raises ConfigError if models of this configuration cannot run side by side."""
    if not isinstance(config, RUMConfig):
        raise ConfigError(
            f"only stacks of RUM cells run as replicas: model must be 'rum', got {config.name!r}"
        )


def shape_of(config: ExperimentConfig) -> dict[str, Any]:
    """What lanes must have in common, by dotted name."""
    flat = flatten({"model": config.model, "task": config.task})
    shape = {name: value for name, value in flat.items() if name not in FREE}
    for name in ("model.eta", "model.upper.eta"):
        shape[name] = "a number" if shape.get(name) else shape.get(name)
    training = flatten({"training": config.training})
    return shape | {name: training[name] for name in SHARED_TRAINING}


def check_same_shape(first: ExperimentConfig, other: ExperimentConfig) -> None:
    """Raises ConfigError, naming the options, if two experiments cannot run side by side."""
    expected, got = shape_of(first), shape_of(other)
    different = [
        f"{name}: {got.get(name)}, in the first {expected.get(name)}"
        for name in dict.fromkeys((*expected, *got))
        if expected.get(name) != got.get(name)
    ]
    if different:
        raise ConfigError(f"replicas must be of equal shapes, got one with {'; '.join(different)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """An experiment that is to run in a lane; see `rum.experiment.run_experiment`."""

    config: ExperimentConfig
    task: Task
    folder: Path
    begin_from: Checkpoint | None = None
    last_epoch: int | None = None


def open_lane(run: Run) -> Trainer:
    """Builds the model of a run and takes it up where it stands.

    Raises:
        CheckpointError: If the checkpoint is damaged or does not fit.
    """
    training = run.config.training
    generator = torch.Generator(training.device).manual_seed(training.seed)
    on_cpu = generator.device.type == "cpu"
    with drawing_from(generator if on_cpu else torch.Generator().manual_seed(training.seed)):
        model = build_model(run.config.model, model_sizes(run.task))
    return open_trainer(
        run.config,
        run.task,
        run.folder,
        model,
        begin_from=run.begin_from,
        last_epoch=run.last_epoch,
        generator=generator,
    )


class SideBySide:
    """Forward passes of models of one shape: their recurrent layers as one."""

    def __init__(self) -> None:
        """Takes any models of one shape; it looks for which when called."""
        self._models: list[nn.Module] = []
        self._replicas: Replicas | None = None

    def __call__(self, calls: Sequence[Call]) -> list[tuple[Tensor, State]]:
        """Computes logits and new state of each call; see `rum.training.forward.Forward`."""
        models = [_sequence_model(call) for call in calls]
        if self._replicas is None or models != self._models:
            self._models = list(models)
            self._replicas = Replicas([model.recurrent for model in models])
        self._replicas.generators = [call.generator for call in calls]
        inputs = []
        for model, call in zip(models, calls, strict=True):
            with drawing_from(_generator(model, call)):
                inputs.append(model.encode(call.input))
        states = None
        if any(call.state is not None for call in calls):
            states = tuple(map(torch.stack, zip(*map(_state, models, calls, inputs), strict=True)))
        outputs, after = self._replicas(torch.stack(inputs), states)
        results = []
        # Not indexed lane by lane: each gradient would be one of all lanes, zeros but for one.
        lanes = zip(models, calls, outputs.unbind(), zip(*after, strict=True), strict=True)
        for model, call, output, state in lanes:
            with drawing_from(_generator(model, call)):
                results.append((model.decode(output), state))
        return results


def _sequence_model(call: Call) -> SequenceModel:
    assert isinstance(call.model, SequenceModel)
    return call.model


def _generator(model: SequenceModel, call: Call) -> torch.Generator | None:
    """None where nothing is drawn: exchanging the default generator's state takes time."""
    return call.generator if model.training and model.dropout else None


def _state(model: SequenceModel, call: Call, input: Tensor) -> State:
    """Tensors `(num_layers, B, ...)`: a lane may begin afresh beside others that do not."""
    if call.state is not None:
        return call.state
    begun = []
    for cell in model.recurrent.cells:
        assert isinstance(cell, Cell)
        begun.append(cell.initial_state(input.shape[1], device=input.device, dtype=input.dtype))
    return tuple(map(torch.stack, zip(*begun, strict=True)))


def run_side_by_side(
    runs: Iterable[Run],
    lanes: int,
    report: Callable[[Run, Report], bool] = lambda run, report: True,
    on_error: Callable[[Run, RumError], None] | None = None,
) -> None:
    """Trains experiments of one shape, some at a time, each from its last checkpoint.

    Args:
        runs: The next one is taken where a lane is free, between two updates.
        lanes: How many at a time.
        report: Called after each epoch of a run; returns whether the run goes on.
        on_error: Called with what ends a single run, as a loss that is not finite, while the
            others go on; None raises it.

    Raises:
        ConfigError: If a run is of another shape than the first, or of a model that cannot run
            side by side.
        CheckpointError: If a checkpoint is damaged or does not fit.
    """
    check_at_least("lanes", lanes, 1)
    waiting = iter(runs)
    of_lane: dict[Trainer, Run] = {}
    first: ExperimentConfig | None = None

    def refill(count: int) -> list[Trainer]:
        nonlocal first
        opened: list[Trainer] = []
        while len(opened) < count and (taken := next(waiting, None)) is not None:
            if first is None:
                first = taken.config
                check_model(first.model)
                check_device(first.training.device)
                if first.training.threads is not None:
                    torch.set_num_threads(first.training.threads)
            check_same_shape(first, taken.config)
            lane = open_lane(taken)
            if not lane.is_done:
                of_lane[lane] = taken
                opened.append(lane)
        return opened

    def decide(turn: Turn, left: list[Trainer]) -> list[Trainer]:
        for lane, error in turn.errors:
            if on_error is None:
                raise error
            on_error(of_lane[lane], error)
        stopped = [lane for lane, each in turn.reports if not report(of_lane[lane], each)]
        kept = [lane for lane in left if lane not in stopped]
        return [*kept, *refill(lanes - len(kept))]

    train(refill(lanes), decide, forward=SideBySide())
