"""Evaluates a checkpoint on validation and test; a registered model's test result is kept."""

import dataclasses
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

from rum.errors import CheckpointError, DataError
from rum.experiment import check_device, experiment_from_plain, load_model
from rum.models import count_parameters
from rum.tasks import CharacterLMConfig, Task
from rum.training.checkpoint import Checkpoint, read_checkpoint
from rum.training.evaluation import evaluate
from rum.tune.config import EvaluateConfig, output_folder

TEST_TAG = "rum.test_evaluated_at"


def evaluate_checkpoint(config: EvaluateConfig) -> str:
    """Evaluates a checkpoint folder or a registered model.

    A registered model's test metrics go into its run, with the time. Test is looked at once: a
    second call shows what is recorded, unless `again` is set.

    Returns:
        A line for each metric; test with the headline batch size first. Where the test text is
        too short for another batch size, a line that says so.

    Raises:
        CheckpointError: If the checkpoint is damaged or does not fit the corpus.
        DataError: If the corpus is missing, altered or too short.
        TrackingError: If the registered model cannot be had.
    """
    check_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if not config.checkpoint.startswith("models:/"):
        checkpoint = read_checkpoint(Path(config.checkpoint).expanduser().absolute())
        metrics, skipped = _measure(config, checkpoint, config.splits)
        return "\n".join([*_lines(metrics), *skipped])
    with tempfile.TemporaryDirectory(prefix="rum-checkpoint-") as folder:
        return _evaluate_registered(config, Path(folder))


def _evaluate_registered(config: EvaluateConfig, folder: Path) -> str:
    """Evaluates a registered model, downloaded into `folder`; records its test metrics."""
    from rum.tune.registry import fetch
    from rum.tune.tracking import connect, tracking_uri

    output_dir = output_folder(config.output_dir)
    client, _ = connect(config.tracking, output_dir)
    uri = tracking_uri(config.tracking, output_dir)
    fetched = fetch(client, config.checkpoint, uri, folder)
    run = client.get_run(fetched.run_id)
    checkpoint = read_checkpoint(fetched.path)
    splits = list(config.splits)
    recorded: dict[str, float] = {}
    notes: list[str] = []
    if "test" in splits and TEST_TAG in run.data.tags and not (config.again or config.corpus):
        splits.remove("test")
        recorded = {k: v for k, v in run.data.metrics.items() if k.startswith("test/")}
        notes.append(f"test as recorded at {run.data.tags[TEST_TAG]}; again=true repeats it")
    metrics, skipped = _measure(config, checkpoint, splits)
    if "test" in splits and config.corpus is None:
        for name, value in metrics.items():
            if name.startswith("test/"):
                client.log_metric(
                    fetched.run_id, name, value, step=checkpoint.description["epoch"]
                )
        client.set_tag(fetched.run_id, TEST_TAG, datetime.now(UTC).isoformat(timespec="seconds"))
    title = f"{config.checkpoint} (run {fetched.run_id})"
    return "\n".join([title, *_lines(metrics | recorded), *skipped, *notes])


def _measure(
    config: EvaluateConfig, checkpoint: Checkpoint, splits: list[str]
) -> tuple[dict[str, float], list[str]]:
    """Metrics by name, and a line for each batch size that the text is too short for."""
    task = _load_task(config, checkpoint)
    trained_on = checkpoint.description.get("task", {}).get("checksum")
    if config.corpus is None and task.checksum != trained_on:
        raise CheckpointError(
            f"{checkpoint.path} was made with other data: checksum {trained_on}, here "
            f"{task.checksum}"
        )
    model = load_model(checkpoint, task, config.device)
    metrics: dict[str, float] = {"parameters": count_parameters(model)}
    skipped = []
    for split in splits:
        sizes = task.headline_batch_sizes if split == "test" else (None,)
        for size in sizes:
            suffix = "" if size == sizes[0] else f"_batch_{size}"
            try:
                values = evaluate(model, task, split, config.device, size)
            except DataError as error:
                if size == sizes[0]:
                    raise
                skipped.append(f"{split} with batch size {size} is left out: {error}")
                continue
            metrics |= {f"{split}/{name}{suffix}": value for name, value in values.items()}
    return metrics, skipped


def _load_task(config: EvaluateConfig, checkpoint: Checkpoint) -> Task:
    experiment = experiment_from_plain(checkpoint.description["experiment"])
    task, seed = experiment.task, experiment.training.seed
    data_dir = Path(config.data_dir).absolute() if config.data_dir else None
    if config.corpus is not None and isinstance(task, CharacterLMConfig):
        task = dataclasses.replace(task, corpus=config.corpus)
        vocabulary = checkpoint.description["task"]["vocabulary"]
        return task.load(seed=seed, data_dir=data_dir, vocabulary=vocabulary)
    return task.load(seed=seed, data_dir=data_dir)


def _lines(metrics: dict[str, float]) -> list[str]:
    return [
        f"{name:<42} {value:,.0f}" if name == "parameters" else f"{name:<42} {value:.4f}"
        for name, value in metrics.items()
    ]
