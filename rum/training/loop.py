"""The training loop: epochs of updates, validation, checkpoints; resumed runs are bit-identical.

One run is one lane of the loop; several take their updates in step, so that `forward` may compute
them as one.

All that a run depends on is in its checkpoint: model, optimiser, random states, position in the
data, carried recurrent state, sums of the epoch under way, and the reports so far. The schedule
is a function of the epoch and needs no state.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rum.diagnostics import rum_statistics
from rum.errors import CheckpointError, DivergedError, RumError
from rum.tasks.base import Task
from rum.training.checkpoint import Checkpoint, CheckpointStore, load_state
from rum.training.config import TrainingConfig
from rum.training.evaluation import evaluate_all
from rum.training.forward import Call, Forward, State, apart
from rum.training.optim import build_optimizer

logger = logging.getLogger(__name__)

FINITE_CHECK_INTERVAL = 10  # updates between looks at the sums; a look waits for the device

PLATEAU_SHARES = (0.9, 0.99)

Report = dict[str, float]
"""One epoch's numbers by name, unit in the name: `epoch`, `step`, `train/...`, `validation/...`"""


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Updates done."""
    reports: list[Report] = field(default_factory=list)
    before: list[Report] = field(default_factory=list)
    """Reports of the run that this one began from, which it does not repeat."""
    best_value: float | None = None
    """Best validation metric so far, as measured (not a running mean)."""
    best_step: int | None = None
    """Update after which it was measured."""


class Trainer:
    """One model on one task: what a run has of its own, while `train` has the order of things."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainingConfig,
        store: CheckpointStore,
        description: dict[str, Any],
        *,
        last_epoch: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Prepares a fresh run; `restore` makes it go on from a checkpoint.

        Args:
            model: Called as `logits, state = model(symbols, state)`.
            task: Data, loss and metric.
            config: How to train.
            store: Where checkpoints go.
            description: Plain values to keep with every checkpoint.
            last_epoch: Where to stop before `max_epochs`, which the schedule still goes by.
            generator: Of masks, on the device; None: torch's default generator.
        """
        self.model = model.to(config.device)
        self.task = task
        self.config = config
        self.store = store
        self.description = description
        self.optimizer = build_optimizer(model, config)
        self.progress = Progress()
        # In every report, so that a curve's chart can show the line to beat beside it.
        self._baselines = {
            f"baseline/{name}_{task.metric}": value for name, value in task.baselines().items()
        }
        epochs = config.max_epochs if last_epoch is None else last_epoch
        self._total_steps = epochs * task.steps_per_epoch
        self._generator = generator
        self._seconds = 0.0
        self._last_saved = time.monotonic()
        self._state: State | None = None
        self._sums = self._zero_sums()

    def _zero_sums(self) -> Tensor:
        """Loss and gradient norm, summed over the updates of an epoch."""
        return torch.zeros(2, dtype=torch.float64, device=self.config.device)

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done."""
        return self.progress.step >= self._total_steps

    @property
    def step_in_epoch(self) -> int:
        """Updates done in the epoch under way, 0 where it has not begun."""
        return self.progress.step % self.task.steps_per_epoch

    def begin_update(self) -> tuple[Call, Tensor]:
        """Sets the learning rate of the next update; returns its forward pass and its target."""
        config, step = self.config, self.progress.step
        learning_rate = config.learning_rate * config.schedule.factor(
            step, self.task.steps_per_epoch, config.max_epochs, self._validation_losses()
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        self.optimizer.zero_grad()
        batch = self.task.training_batch(step)
        state = self._state if batch.carry_state else None
        call = Call(self.model, batch.input.to(config.device), state, self._generator)
        return call, batch.target.to(config.device)

    def end_update(self, loss: Tensor, state: State) -> None:
        """Takes a step along the gradients, which are there, of `loss`."""
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self._state = tuple(tensor.detach() for tensor in state)
        self._sums += torch.stack((loss.detach(), norm)).double()
        self.progress.step += 1

    def spend(self, seconds: float) -> None:
        """Takes that an update took so long."""
        self._seconds += seconds

    def _validation_losses(self) -> list[float]:
        """The selection metric of every epoch so far, negated where higher is better."""
        sign = 1.0 if self.task.mode == "min" else -1.0
        name = f"validation/{self.task.metric}"
        return [sign * report[name] for report in self._all_reports()]

    def _all_reports(self) -> list[Report]:
        return [*self.progress.before, *self.progress.reports]

    def check_finite(self) -> None:
        """Raises DivergedError if loss or gradient norm was not finite since the epoch began.

        It looks now and then, and when an epoch is done.
        """
        in_epoch = self.step_in_epoch
        if in_epoch % FINITE_CHECK_INTERVAL == 0:
            self._check_sums()

    def _check_sums(self) -> None:
        loss, norm = self._sums.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "gradient norm" if math.isfinite(loss) else "loss"
            raise DivergedError(f"{what} is not finite at update {self.progress.step}")

    def save_if_due(self) -> None:
        """Writes a checkpoint within an epoch when the time has come.

        Raises:
            DivergedError: If loss or gradient norm was not finite.
        """
        if time.monotonic() - self._last_saved > self.config.checkpoint_seconds:
            self._check_sums()
            self._save()

    def end_epoch(self, validation: dict[str, float], validation_seconds: float) -> Report:
        """Makes the report of an epoch and writes the checkpoint.

        Args:
            validation: The task's metrics.
            validation_seconds: What they took.

        Raises:
            DivergedError: If the metric is not finite.
        """
        task, progress = self.task, self.progress
        epoch = progress.step // task.steps_per_epoch
        mean_loss, mean_norm = (self._sums / task.steps_per_epoch).tolist()
        value = validation[task.metric]
        if not math.isfinite(value):
            raise DivergedError(f"validation {task.metric} is {value} after epoch {epoch}")
        best = progress.best_value
        if best is None or (value < best if task.mode == "min" else value > best):
            best = progress.best_value = value
            progress.best_step = progress.step
        report: Report = {
            "epoch": epoch,
            "step": progress.step,
            **{f"train/{name}": x for name, x in task.training_metrics(mean_loss).items()},
            **{f"validation/{name}": x for name, x in validation.items()},
            f"validation/best_{task.metric}": best,
            **self._baselines,
            "train/gradient_norm": mean_norm,
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            **{f"diagnostics/{name}": x for name, x in self._diagnostics().items()},
            "time/training_seconds": self._seconds,
            "time/validation_seconds": validation_seconds,
        }
        report |= self._breakthroughs(validation)
        progress.reports.append(report)
        self._sums = self._zero_sums()
        self._seconds = 0.0
        self._save()
        return report

    def _diagnostics(self) -> dict[str, float]:
        if not self.config.diagnostics:
            return {}
        batch = next(iter(self.task.evaluation_batches("validation")))
        self.model.eval()
        return rum_statistics(self.model, lambda: self.model(batch.input.to(self.config.device)))

    def _breakthroughs(self, validation: dict[str, float]) -> Report:
        """The updates after which a plateau task's metric first reached 0.9 and 0.99."""
        metric = self.task.plateau_metric
        if metric is None:
            return {}
        last = (self._all_reports() or [{}])[-1]
        reached: Report = {}
        for share in PLATEAU_SHARES:
            name = f"validation/steps_to_{share:g}_{metric}"
            if name in last:
                reached[name] = last[name]
            elif validation[metric] >= share:
                reached[name] = self.progress.step
        return reached

    def _save(self) -> None:
        progress = self.progress
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self._random_state(),
            # Of lanes these are parts of a tensor, which would be written whole.
            "recurrent_state": [tensor.clone() for tensor in self._state or ()],
            "sums": self._sums,
        }
        self.store.save(
            state,
            {
                "step": progress.step,
                "epoch": progress.step // self.task.steps_per_epoch,
                "best_step": progress.best_step,
                "best_value": progress.best_value,
                "reports": progress.reports,
                "before": progress.before,
                **self.description,
            },
        )
        self._last_saved = time.monotonic()

    def _random_state(self) -> dict[str, Any]:
        """As an ordinary run has it: of a lane with its own generator in the default's place."""
        on_cpu = torch.get_rng_state()
        on_cuda = torch.cuda.get_rng_state_all() if self.config.device != "cpu" else []
        if self._generator is not None:
            if self._generator.device.type == "cpu":
                on_cpu = self._generator.get_state()
            else:
                on_cuda[_index(self._generator.device)] = self._generator.get_state()
        return {"python": random.getstate(), "torch": on_cpu, "cuda": on_cuda}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        on_cpu, on_cuda = state["torch"].cpu(), [each.cpu() for each in state["cuda"]]
        if self._generator is not None:
            device = self._generator.device
            if device.type == "cpu":
                self._generator.set_state(on_cpu)
            elif on_cuda:
                self._generator.set_state(on_cuda[_index(device)])
            return
        random.setstate(_as_tuple(state["python"]))
        torch.set_rng_state(on_cpu)
        if self.config.device != "cpu" and on_cuda:
            torch.cuda.set_rng_state_all(on_cuda)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from `checkpoint`.

        Raises:
            CheckpointError: If it is of another model or another data set.
        """
        description = checkpoint.description
        ours, theirs = self.description["task"], description.get("task", {})
        for key in ("checksum", "vocabulary", "steps_per_epoch", "protocol"):
            if ours[key] != theirs.get(key):
                raise CheckpointError(
                    f"{checkpoint.path} was made with another {key} of the data: "
                    f"{_short(theirs.get(key))}, now it is {_short(ours[key])}"
                )
        for section, key in (("task", "batch_size"), ("training", "optimizer")):
            was = description.get("experiment", {}).get(section, {}).get(key)
            now = self.description["experiment"][section][key]
            if was != now:
                raise CheckpointError(
                    f"{checkpoint.path} was made with {section}.{key} = {was}, now it is {now}"
                )
        state = load_state(checkpoint, self.config.device)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._set_random_state(state["random"])
            self._state = tuple(state["recurrent_state"])
            self._sums = state["sums"]
            self.progress = Progress(
                step=description["step"],
                reports=list(description["reports"]),
                before=list(description.get("before", [])),
                best_value=description["best_value"],
                best_step=description["best_step"],
            )
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{checkpoint.path} is of another model: {error}") from error
        logger.info("resumed from %s", checkpoint.path)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _as_tuple(value: Any) -> Any:
    """`random.setstate` takes nested tuples only."""
    return tuple(map(_as_tuple, value)) if isinstance(value, (list, tuple)) else value


@dataclass
class Turn:
    """What lanes came to at the same update."""

    reports: list[tuple[Trainer, Report]] = field(default_factory=list)
    """Of epochs that are done, their checkpoints on disk."""
    errors: list[tuple[Trainer, RumError]] = field(default_factory=list)
    """Of lanes that cannot go on: a loss that is not finite, a folder that another process has
    taken over."""


def train(
    lanes: Sequence[Trainer],
    decide: Callable[[Turn, list[Trainer]], Sequence[Trainer]],
    *,
    forward: Forward = apart,
    on_step: Callable[[Trainer], None] = lambda lane: None,
) -> None:
    """Trains lanes, an update of each at a time, until none is left.

    Args:
        lanes: The first; those that are at their end are left out, here and later.
        decide: Called with what lanes came to and with those that would go on; returns the lanes
            that are trained from here on, some of them perhaps new.
        forward: Computes their forward passes; with lanes that it can take together.
        on_step: Called for each lane after each of its updates.
    """
    under_way = [lane for lane in lanes if not lane.is_done]
    while under_way:
        began = time.monotonic()
        _update(under_way, forward)
        for lane in under_way:
            on_step(lane)
        turn = Turn()
        sound = _try(Trainer.check_finite, under_way, turn)
        for lane in under_way:
            lane.spend((time.monotonic() - began) / len(under_way))
        at_end = [lane for lane in sound if not lane.step_in_epoch]
        within = [lane for lane in sound if lane.step_in_epoch]
        goes_on = [*_end_epochs(at_end, forward, turn), *_try(Trainer.save_if_due, within, turn)]
        if turn.reports or turn.errors:
            left = [lane for lane in under_way if lane in goes_on and not lane.is_done]
            under_way = [lane for lane in decide(turn, left) if not lane.is_done]


def _update(lanes: Sequence[Trainer], forward: Forward) -> None:
    """One update of each lane; no parameter is shared, so each has its gradients of the sum."""
    calls, targets = zip(*(lane.begin_update() for lane in lanes), strict=True)
    results = forward(calls)
    losses = [
        lane.task.loss(logits, target)
        for lane, (logits, _), target in zip(lanes, results, targets, strict=True)
    ]
    torch.stack(losses).sum().backward()
    for lane, loss, (_, state) in zip(lanes, losses, results, strict=True):
        lane.end_update(loss, state)


def _end_epochs(lanes: Sequence[Trainer], forward: Forward, turn: Turn) -> list[Trainer]:
    """Validates lanes at the end of an epoch and makes their reports."""
    if not lanes:
        return []
    began = time.monotonic()
    device = lanes[0].config.device
    models, tasks = [lane.model for lane in lanes], [lane.task for lane in lanes]
    metrics = evaluate_all(models, tasks, "validation", device, forward=forward)
    of_lane = dict(zip(lanes, metrics, strict=True))
    seconds = (time.monotonic() - began) / len(lanes)

    def end(lane: Trainer) -> None:
        turn.reports.append((lane, lane.end_epoch(of_lane[lane], seconds)))

    return _try(end, lanes, turn)


def _try(action: Callable[[Trainer], None], lanes: Sequence[Trainer], turn: Turn) -> list[Trainer]:
    """Does something to each lane; returns those that did not fail at it."""
    sound = []
    for lane in lanes:
        try:
            action(lane)
            sound.append(lane)
        except RumError as error:
            turn.errors.append((lane, error))
    return sound
