"""The training loop: epochs of updates, validation, checkpoints; resumed runs are bit-identical.

All that a run depends on is in its checkpoint: model, optimiser, random states, position in the
data, carried recurrent state, sums of the epoch under way, and the reports so far. The schedule
is a function of the epoch and needs no state.
"""

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rum.diagnostics import rum_statistics
from rum.errors import CheckpointError, DivergedError
from rum.tasks.base import Task, Totals
from rum.training.checkpoint import Checkpoint, CheckpointStore, load_state
from rum.training.config import TrainingConfig
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
    """Trains one model on one task."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainingConfig,
        store: CheckpointStore,
        description: dict[str, Any],
    ) -> None:
        """Prepares a fresh run; `restore` makes it go on from a checkpoint.

        Args:
            model: Called as `logits, state = model(symbols, state)`.
            task: Data, loss and metric.
            config: How to train.
            store: Where checkpoints go.
            description: Plain values to keep with every checkpoint.
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
        self._state: tuple[Tensor, ...] | None = None
        self._sums = self._zero_sums()

    def _zero_sums(self) -> Tensor:
        """Loss and gradient norm, summed over the updates of an epoch."""
        return torch.zeros(2, dtype=torch.float64, device=self.config.device)

    def run(
        self,
        report: Callable[[Report], None],
        on_step: Callable[[int, int], None] = lambda step, total: None,
        last_epoch: int | None = None,
    ) -> Progress:
        """Trains until `max_epochs` epochs are done.

        Args:
            report: Called after each epoch, when its checkpoint is on disk.
            on_step: Called after each update with its number in the epoch and their count.
            last_epoch: Where to stop before `max_epochs`, which the schedule still goes by.

        Raises:
            DivergedError: If loss or gradient norm is not finite.
        """
        steps_per_epoch = self.task.steps_per_epoch
        epochs = self.config.max_epochs if last_epoch is None else last_epoch
        total_steps = epochs * steps_per_epoch
        began = last_saved = time.monotonic()
        while self.progress.step < total_steps:
            self._update()
            in_epoch = (self.progress.step - 1) % steps_per_epoch + 1
            on_step(in_epoch, steps_per_epoch)
            if in_epoch % FINITE_CHECK_INTERVAL == 0 or in_epoch == steps_per_epoch:
                self._check_finite()
            if in_epoch == steps_per_epoch:
                report(self._finish_epoch(began))
                began = last_saved = time.monotonic()
            elif time.monotonic() - last_saved > self.config.checkpoint_seconds:
                self._check_finite()
                self._save()
                last_saved = time.monotonic()
        return self.progress

    def _update(self) -> None:
        config, step = self.config, self.progress.step
        learning_rate = config.learning_rate * config.schedule.factor(
            step, self.task.steps_per_epoch, config.max_epochs, self._validation_losses()
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        batch = self.task.training_batch(step)
        logits, state = self.model(
            batch.input.to(config.device), self._state if batch.carry_state else None
        )
        loss = self.task.loss(logits, batch.target.to(config.device))
        self.optimizer.zero_grad()
        loss.backward()
        limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self._state = tuple(tensor.detach() for tensor in state)
        self._sums += torch.stack((loss.detach(), norm)).double()
        self.progress.step += 1

    def _validation_losses(self) -> list[float]:
        """The selection metric of every epoch so far, negated where higher is better."""
        sign = 1.0 if self.task.mode == "min" else -1.0
        name = f"validation/{self.task.metric}"
        return [sign * report[name] for report in self._all_reports()]

    def _all_reports(self) -> list[Report]:
        return [*self.progress.before, *self.progress.reports]

    def _check_finite(self) -> None:
        loss, norm = self._sums.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "gradient norm" if math.isfinite(loss) else "loss"
            raise DivergedError(f"{what} is not finite at update {self.progress.step}")

    def _finish_epoch(self, began: float) -> Report:
        task, progress = self.task, self.progress
        epoch = progress.step // task.steps_per_epoch
        mean_loss, mean_norm = (self._sums / task.steps_per_epoch).tolist()
        trained = time.monotonic()
        validation = evaluate(self.model, task, "validation", self.config.device)
        validated = time.monotonic()
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
            "time/training_seconds": trained - began,
            "time/validation_seconds": validated - trained,
        }
        report |= self._breakthroughs(validation)
        progress.reports.append(report)
        self._sums = self._zero_sums()
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
            "random": {
                "python": random.getstate(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if self.config.device != "cpu" else [],
            },
            "recurrent_state": list(self._state or ()),
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
            random.setstate(_as_tuple(state["random"]["python"]))
            torch.set_rng_state(state["random"]["torch"].cpu())
            if self.config.device != "cpu" and state["random"]["cuda"]:
                torch.cuda.set_rng_state_all([s.cpu() for s in state["random"]["cuda"]])
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


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _as_tuple(value: Any) -> Any:
    """`random.setstate` takes nested tuples only."""
    return tuple(map(_as_tuple, value)) if isinstance(value, (list, tuple)) else value


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, split: str, device: str, batch_size: int | None = None
) -> dict[str, float]:
    """Evaluates a model on all of a split: dropout off, zoneout as its expectation.

    Args:
        model: Called as `logits, state = model(symbols, state)`.
        task: Gives the batches and the metric.
        split: "validation" or "test".
        device: Where to compute.
        batch_size: None takes the task's protocol.

    Returns:
        The task's metrics, by name; of each part of the data that the task names, its metric.
    """
    was_training = model.training
    model.eval()
    sums = {"": _Sums(device)}
    state = None
    for batch in task.evaluation_batches(split, batch_size):
        logits, state = model(batch.input.to(device), state if batch.carry_state else None)
        for part in {"", batch.part}:
            sums.setdefault(part, _Sums(device)).add(logits, batch.target.to(device), task)
    model.train(was_training)
    metrics = task.metrics(sums.pop("").totals())
    for part, each in sums.items():
        metrics[f"{task.metric}_{part}"] = task.metrics(each.totals())[task.metric]
    return metrics


class _Sums:
    """Totals under way, on the device: to read them after every batch would wait for it."""

    def __init__(self, device: str) -> None:
        self._cross_entropy = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros(2, dtype=torch.long, device=device)  # of all, of the answers
        self._count = self._answers = 0

    def add(self, logits: Tensor, target: Tensor, task: Task) -> None:
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="sum"
        )
        self._cross_entropy += losses.double()
        hits = logits.argmax(-1) == target
        answer_hits = hits if task.answer_steps is None else hits[-task.answer_steps :]
        self._correct += torch.stack((hits.sum(), answer_hits.sum()))
        self._count += target.numel()
        self._answers += answer_hits.numel()

    def totals(self) -> Totals:
        correct, answers_correct = self._correct.tolist()
        return Totals(
            self._cross_entropy.item(), correct, self._count, answers_correct, self._answers
        )
