"""What a trial will take, before it runs: parameters, memory, time.

Parameters are counted, and what the forward pass keeps for the backward pass is traced, on torch's
meta device, where tensors have shapes and no values: both are exact for every model. The working
memory of the backward pass and the time of an update follow from them by the constants below,
measured once; `Correction` puts a factor on both from what was measured here.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rum.cells.base import AcceleratedCell, Cell, ModelConfig
from rum.experiment import ExperimentConfig, model_sizes
from rum.models import SequenceModel, build_model, build_on_meta, count_parameters
from rum.tasks import Task
from rum.tune.sizing import fitting

SHARES = (1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8)
"""Of a GPU that `search.gpus_per_trial=auto` chooses from."""

# Memory, in bytes.
CONTEXT_BYTES = 600 * 2**20  # of CUDA in each process, beside what torch allocates
_PROCESS_BYTES = 600 * 2**20  # of a worker on the CPU before there is a model
_MOMENTS = {"adam": 2, "rmsprop": 1, "rmsprop_tensorflow": 1, "sgd": 0}
# Working memory of the backward pass, as a share of what one layer saved: seen were 0.9 to 1.9
# with the kernels, which take the gradients of a whole sequence, and at most 0.2 step by step.
_WORKING_KERNELS, _WORKING_STEPS = 1.5, 0.2

# Time of an update on one thread of a processor and on a GPU: a size to begin with.
_OPERATIONS_PER_SECOND = {"cpu": 5e10, "cuda": 2e13}
_BYTES_PER_SECOND = {"cpu": 5e9, "cuda": 1e12}
_SECONDS_PER_STEP = {"cpu": 2e-5, "cuda": 2e-5}  # of a cell in a kernel
_SECONDS_PER_TENSOR = {"cpu": 2e-5, "cuda": 4e-5}  # saved by autograd: a few operators around it
_PASSES = 3  # over a tensor that is kept, and over a state at each step: forward and backward


@dataclass(frozen=True)
class Cost:
    """What a trial takes."""

    parameters: int
    saved_bytes: int
    """What the forward pass keeps for the backward pass, weights not counted."""
    memory_bytes: int
    """At the peak of an update: allocated on the GPU, or all of the process on the CPU."""
    seconds_per_update: float


@dataclass(frozen=True)
class Correction:
    """Factors on what is predicted."""

    memory: float = 1.0
    seconds: float = 1.0


def median_ratio(pairs: Iterable[tuple[float, float | None]]) -> float:
    """The median of measured / predicted over `(predicted, measured)`; 1 where nothing is."""
    ratios = [measured / predicted for predicted, measured in pairs if measured]
    return statistics.median(ratios) if ratios else 1.0


@dataclass(frozen=True)
class _Trace:
    parameters: int
    weight_bytes: int
    saved_bytes: int
    working_bytes: float
    operations: float
    traffic_bytes: float
    launches: float
    """Steps of cells in kernels."""
    tensors: float
    """Saved step by step."""


class Predictor:
    """Predicts the trials of one search."""

    def __init__(self, base: ExperimentConfig, task: Task, data_dir: Path | None = None) -> None:
        """Begins without a correction.

        Args:
            base: The experiment around the searched options.
            task: `base.task`, loaded.
            data_dir: Where corpora are looked for when a trial's task has other options.
        """
        self.correction = Correction()
        self.fit = fitting(base, model_sizes(task))
        self._data_dir = data_dir
        self._tasks = {repr(base.task): task}
        self._traces: dict[str, _Trace] = {}

    def predict(self, experiment: ExperimentConfig) -> Cost:
        """The cost of a trial, corrected.

        Raises:
            ConfigError: If the model cannot serve the task.
        """
        cost = self._uncorrected(experiment)
        return Cost(
            parameters=cost.parameters,
            saved_bytes=cost.saved_bytes,
            memory_bytes=int(cost.memory_bytes * self.correction.memory),
            seconds_per_update=cost.seconds_per_update * self.correction.seconds,
        )

    def calibrate(
        self, measured: Iterable[tuple[ExperimentConfig, Mapping[str, float]]]
    ) -> Correction:
        """Corrects by what trials measured: the median ratio, which outliers do not move.

        Args:
            measured: Trials with their last reports, as MLflow has them.
        """
        memory: list[tuple[float, float | None]] = []
        seconds: list[tuple[float, float | None]] = []
        for experiment, report in measured:
            cost = self._uncorrected(experiment)
            kind = "memory" if experiment.training.device == "cpu" else "gpu_memory"
            megabytes = report.get(f"system/{kind}_megabytes")
            memory.append((cost.memory_bytes, megabytes and megabytes * 2**20))
            per_epoch = cost.seconds_per_update * self._task(experiment).steps_per_epoch
            seconds.append((per_epoch, report.get("time/training_seconds")))
        self.correction = Correction(median_ratio(memory), median_ratio(seconds))
        return self.correction

    def _uncorrected(self, experiment: ExperimentConfig) -> Cost:
        training = experiment.training
        trace = self._trace(experiment)
        states = 2 + _MOMENTS[training.optimizer]  # weights and gradients
        memory = trace.weight_bytes * states + trace.saved_bytes + trace.working_bytes
        kind = training.device.split(":")[0]
        if kind == "cpu":
            memory += _PROCESS_BYTES
        speed = (training.threads or 1) if kind == "cpu" else 1
        seconds = (
            trace.operations / (_OPERATIONS_PER_SECOND[kind] * speed)
            + trace.traffic_bytes / (_BYTES_PER_SECOND[kind] * speed)
            + trace.launches * _SECONDS_PER_STEP[kind]
            + trace.tensors * _SECONDS_PER_TENSOR[kind]
        )
        return Cost(trace.parameters, trace.saved_bytes, int(memory), seconds)

    def _trace(self, experiment: ExperimentConfig) -> _Trace:
        key = repr((experiment.model, experiment.task))
        if key not in self._traces:
            self._traces[key] = _trace(experiment.model, self._task(experiment))
        return self._traces[key]

    def _task(self, experiment: ExperimentConfig) -> Task:
        """The trial's own task: its batch and its length may be searched."""
        key = repr(experiment.task)
        if key not in self._tasks:
            seed = experiment.training.seed
            self._tasks[key] = experiment.task.load(seed=seed, data_dir=self._data_dir)
        return self._tasks[key]


def _trace(config: ModelConfig, task: Task) -> _Trace:
    batch = task.training_batch(0)
    steps, batch_size = batch.input.shape
    model = build_on_meta(config, model_sizes(task))
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    matrices = sum(
        p.numel()
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
        if p.dim() > 1
    )
    operations = 6.0 * matrices * steps * batch_size  # multiply and add, forward and twice back
    launches, tensors, state_bytes = 0.0, 0.0, 0.0
    if not isinstance(model, SequenceModel):
        # Its shapes depend on the values of the symbols; it is small.
        saved_bytes, count = _saved(build_model(config, model_sizes(task)), task, batch.input)
        working_bytes, tensors = _WORKING_STEPS * saved_bytes, float(count)
    else:
        input = batch.input.to("meta")
        cells = [cell for cell in model.recurrent.cells if isinstance(cell, Cell)]
        states = [
            cell.initial_state(batch_size, device=torch.device("meta"), dtype=torch.float32)
            for cell in cells
        ]
        state_bytes = sum(s.numel() * s.element_size() for state in states for s in state) * steps
        pairs = zip(cells, states, strict=True)
        if all(
            isinstance(cell, AcceleratedCell) and cell.choose_backend(state) != "reference"
            for cell, state in pairs
        ):
            saved_bytes, _ = _saved(model, task, input)
            working_bytes = _WORKING_KERNELS * saved_bytes / len(cells)
            launches = float(steps * sum(isinstance(each, Cell) for each in model.modules()))
        else:  # every step but the first keeps the same: two short lengths say how much
            short, few = _saved(model, task, input[:2])
            longer, more = _saved(model, task, input[:3])
            saved_bytes = short + (longer - short) * (steps - 2)
            tensors = float(few + (more - few) * (steps - 2))
            working_bytes = _WORKING_STEPS * saved_bytes
    return _Trace(
        parameters=count_parameters(model),
        weight_bytes=weight_bytes,
        saved_bytes=saved_bytes,
        working_bytes=working_bytes,
        operations=operations,
        traffic_bytes=_PASSES * (saved_bytes + state_bytes),
        launches=launches,
        tensors=tensors,
    )


def _saved(model: nn.Module, task: Task, input: Tensor) -> tuple[int, int]:
    """Bytes and tensors that the forward pass keeps for the backward pass, each memory once."""
    weights = {_memory(parameter) for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}
    count = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if _memory(tensor) not in weights:
            kept[_memory(tensor)] = tensor  # holds it, so that its place is not used again
        return tensor

    model.train()
    steps = 1 if task.answers_last else len(input)
    target = torch.zeros(steps, input.shape[1], dtype=torch.long, device=input.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.loss(model(input)[0], target)
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), count


def _memory(tensor: Tensor) -> int:
    """Tells memories apart, also on the meta device, where all addresses are 0."""
    return int(tensor.untyped_storage()._cdata)


def share_for(memory_bytes: float, card_bytes: float) -> float | None:
    """The smallest of `SHARES` in which a trial fits a card; None where it does not fit at all.

    Args:
        memory_bytes: What torch will allocate.
        card_bytes: Memory of the card.
    """
    holding = [share for share in SHARES if memory_bytes <= allocatable(share, card_bytes)]
    return min(holding, default=None)


def larger_share(share: float) -> float | None:
    """The next larger of `SHARES`; None for a whole GPU, or none."""
    return min((each for each in SHARES if each > share > 0), default=None)


def allocatable(share: float, card_bytes: float) -> float:
    """Bytes that torch may allocate in a share of a card, its CUDA context taken off."""
    return max(0.0, share * card_bytes - CONTEXT_BYTES)
