"""Metrics of models on all of a split."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rum.tasks.base import Task, Totals
from rum.training.forward import Call, Forward, State, apart


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
    return evaluate_all([model], [task], split, device, batch_size=batch_size)[0]


@torch.no_grad()
def evaluate_all(
    models: Sequence[nn.Module],
    tasks: Sequence[Task],
    split: str,
    device: str,
    *,
    batch_size: int | None = None,
    forward: Forward = apart,
) -> list[dict[str, float]]:
    """Evaluates models, each on its own task, batch by batch; see `evaluate`.

    Args:
        models: Any number.
        tasks: One a model, with batches of the same shapes.
        split: "validation" or "test".
        device: Where to compute.
        batch_size: None takes the tasks' protocol.
        forward: Computes the models' outputs on a batch.
    """
    were_training = [model.training for model in models]
    for model in models:
        model.eval()
    sums = [{"": _Sums(device)} for _ in models]
    states: list[State | None] = [None] * len(models)
    streams = [task.evaluation_batches(split, batch_size) for task in tasks]
    for batches in zip(*streams, strict=True):
        calls = [
            Call(model, batch.input.to(device), state if batch.carry_state else None)
            for model, batch, state in zip(models, batches, states, strict=True)
        ]
        for lane, (logits, state) in enumerate(forward(calls)):
            states[lane] = state
            batch = batches[lane]
            for part in {"", batch.part}:
                each = sums[lane].setdefault(part, _Sums(device))
                each.add(logits, batch.target.to(device), tasks[lane])
    for model, was_training in zip(models, were_training, strict=True):
        model.train(was_training)
    return [_metrics(task, parts) for task, parts in zip(tasks, sums, strict=True)]


def _metrics(task: Task, parts: "dict[str, _Sums]") -> dict[str, float]:
    metrics = task.metrics(parts.pop("").totals())
    for part, each in parts.items():
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
