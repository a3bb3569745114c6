"""Evaluating checkpoints: the test split is looked at once, and on the corpus that was named."""

import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rum.cells import RUMConfig
from rum.data.corpora import load_corpus
from rum.errors import CheckpointError
from rum.experiment import ExperimentConfig, run_experiment
from rum.tasks import CharacterLMConfig
from rum.train import TrackingConfig
from rum.training.checkpoint import CheckpointStore, read_checkpoint
from rum.training.config import TrainingConfig
from rum.tune.config import EvaluateConfig
from rum.tune.evaluation import TEST_TAG, evaluate_checkpoint
from rum.tune.registry import model_name, register
from rum.tune.tracking import connect

SPLITS = ["validation", "test"]
HEADLINE = "test/bits_per_character"
NAMES = [
    f"{split}/{metric}{suffix}"
    for split, suffixes in (("validation", [""]), ("test", ["", "_batch_20", "_batch_128"]))
    for suffix in suffixes
    for metric in ("bits_per_character", "accuracy")
]


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def text(seed: int, symbols: str = "abcd") -> str:
    return "".join(random.Random(seed).choices(symbols, weights=range(1, 5), k=30_000))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder with corpora and a trained run, and what validation measured in training."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "mine.txt").write_text(text(0))
    (folder / "other.txt").write_text(text(1))
    (folder / "reversed.txt").write_text(text(2, "dcba"))
    (folder / "foreign.txt").write_text(text(3, "wxyz"))
    experiment = ExperimentConfig(
        model=RUMConfig(hidden_size=8),
        task=CharacterLMConfig(
            corpus=str(folder / "mine.txt"),
            batch_size=32,
            bptt_length=5,
            embedding_size=4,
            train_characters=2000,
        ),
        training=TrainingConfig(max_epochs=1, threads=1),
    )
    task = experiment.task.load(seed=0)
    progress = run_experiment(experiment, task, folder / "run", lambda report: None)
    assert progress.best_value is not None
    return folder, progress.best_value


@pytest.fixture
def registered(trained: tuple[Path, float], output_dir: Path) -> tuple[str, MlflowClient, str]:
    """The trained run in the registry: its URI, MLflow, and the run's id."""
    folder, _ = trained
    client, experiment_id = connect(TrackingConfig(), output_dir)
    run_id = client.create_run(experiment_id).info.run_id
    checkpoint = CheckpointStore(folder / "run").best()
    assert checkpoint is not None
    config = CharacterLMConfig(corpus=str(folder / "mine.txt"), batch_size=32, bptt_length=5)
    task = config.load(seed=0)
    register(client, run_id, checkpoint, task, "character_lm")
    return f"models:/{model_name(task, 'character_lm')}@best", client, run_id


@pytest.fixture
def evaluate(output_dir: Path) -> Callable[..., dict[str, float]]:
    """Evaluates and reads the numbers off what is printed."""

    def evaluate(checkpoint: object, **options: object) -> dict[str, float]:
        config = EvaluateConfig(checkpoint=str(checkpoint), output_dir=str(output_dir), threads=1)
        printed = evaluate_checkpoint(replace(config, **options))
        lines = [line.split() for line in printed.splitlines() if not line.startswith("models:/")]
        return {line[0]: float(line[1].replace(",", "")) for line in lines if len(line) == 2}

    return evaluate


def best(folder: Path) -> Path:
    checkpoint = CheckpointStore(folder / "run").best()
    assert checkpoint is not None
    return checkpoint.path


def test_a_checkpoint_gives_the_validation_metric_that_training_measured(
    trained: tuple[Path, float], evaluate: Callable[..., dict[str, float]]
) -> None:
    folder, measured = trained
    metrics = evaluate(best(folder))
    assert metrics["validation/bits_per_character"] == round(measured, 4)
    assert list(metrics) == ["parameters", *NAMES]


def test_only_the_splits_that_are_asked_for_are_evaluated(
    trained: tuple[Path, float], evaluate: Callable[..., dict[str, float]]
) -> None:
    metrics = evaluate(best(trained[0]), splits=["validation"])
    assert list(metrics) == ["parameters", *NAMES[:2]]


def test_a_registered_models_test_metrics_go_into_its_run(
    registered: tuple[str, MlflowClient, str], evaluate: Callable[..., dict[str, float]]
) -> None:
    uri, client, run_id = registered
    metrics = evaluate(uri)
    data = client.get_run(run_id).data
    assert {name: round(value, 4) for name, value in data.metrics.items()} == {
        name: metrics[name] for name in NAMES if name.startswith("test/")
    }
    assert TEST_TAG in data.tags


def test_test_is_looked_at_once(
    registered: tuple[str, MlflowClient, str], evaluate: Callable[..., dict[str, float]]
) -> None:
    uri, client, run_id = registered
    evaluate(uri)
    looked_at = client.get_run(run_id).data.tags[TEST_TAG]
    client.log_metric(run_id, HEADLINE, 7.5, step=9)  # what is recorded is what is shown
    metrics = evaluate(uri)
    assert metrics[HEADLINE] == 7.5
    assert metrics["validation/bits_per_character"] < 2.5  # computed
    assert client.get_run(run_id).data.tags[TEST_TAG] == looked_at


def test_again_repeats_the_test(
    registered: tuple[str, MlflowClient, str], evaluate: Callable[..., dict[str, float]]
) -> None:
    uri, client, run_id = registered
    first = evaluate(uri)
    client.log_metric(run_id, HEADLINE, 7.5, step=9)
    assert evaluate(uri, again=True) == first


def test_without_the_test_split_nothing_is_recorded(
    registered: tuple[str, MlflowClient, str], evaluate: Callable[..., dict[str, float]]
) -> None:
    uri, client, run_id = registered
    evaluate(uri, splits=["validation"])
    data = client.get_run(run_id).data
    assert data.metrics == {}
    assert TEST_TAG not in data.tags


def test_another_corpus_gives_its_own_numbers_and_is_not_recorded(
    trained: tuple[Path, float],
    registered: tuple[str, MlflowClient, str],
    evaluate: Callable[..., dict[str, float]],
) -> None:
    uri, client, run_id = registered
    metrics = evaluate(uri, corpus=str(trained[0] / "other.txt"))
    assert client.get_run(run_id).data.metrics == {}
    assert (
        metrics[HEADLINE]
        == evaluate(best(trained[0]), corpus=str(trained[0] / "other.txt"))[HEADLINE]
    )
    assert metrics[HEADLINE] != evaluate(best(trained[0]))[HEADLINE]


def test_another_corpus_gives_its_own_numbers_after_test_was_recorded(
    trained: tuple[Path, float],
    registered: tuple[str, MlflowClient, str],
    evaluate: Callable[..., dict[str, float]],
) -> None:
    other = str(trained[0] / "other.txt")
    expected = evaluate(best(trained[0]), corpus=other)[HEADLINE]
    evaluate(registered[0])
    assert evaluate(registered[0], corpus=other)[HEADLINE] == expected


def test_a_corpus_with_the_same_symbols_in_another_order_of_frequency_is_evaluated(
    trained: tuple[Path, float], evaluate: Callable[..., dict[str, float]]
) -> None:
    folder, measured = trained
    metrics = evaluate(best(folder), corpus=str(folder / "reversed.txt"))
    assert metrics["validation/bits_per_character"] > measured  # it learnt other frequencies

    # The same text, with letters that stand in the checkpoint's places.
    checkpoint = read_checkpoint(best(folder))
    numbers = checkpoint.description["task"]["vocabulary"]
    task = CharacterLMConfig(corpus=str(folder / "reversed.txt"), batch_size=32, bptt_length=5)
    symbols = next(task.load(seed=0, vocabulary=numbers).evaluation_batches("test", 1)).input
    characters = load_corpus(task.corpus, None).test[:5]
    assert bytes(numbers[i] for i in symbols[:, 0].tolist()) == characters


def test_a_text_without_some_of_the_symbols_is_evaluated(
    trained: tuple[Path, float], evaluate: Callable[..., dict[str, float]]
) -> None:
    folder, measured = trained
    (folder / "frequent.txt").write_text(text(4).replace("a", "d").replace("b", "d"))
    metrics = evaluate(best(folder), corpus=str(folder / "frequent.txt"))
    assert metrics["validation/bits_per_character"] < measured  # the two that it expects most


def test_a_text_too_short_for_large_batches_has_its_headline(trained: tuple[Path, float]) -> None:
    folder, _ = trained
    (folder / "short.txt").write_text(text(5)[:12_000])  # 600 characters of test: 128 x 6 > 600
    config = EvaluateConfig(
        checkpoint=str(best(folder)), corpus=str(folder / "short.txt"), splits=["test"], threads=1
    )
    lines = evaluate_checkpoint(config).splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["parameters", *NAMES[2:6]]
    assert lines[-1].startswith(
        "test with batch size 128 is left out: test text of corpus 'short'"
    )
    assert lines[-1].endswith("got 600")


def test_a_corpus_with_other_symbols_is_refused(
    trained: tuple[Path, float], evaluate: Callable[..., dict[str, float]]
) -> None:
    with pytest.raises(CheckpointError, match=r"'mine' with other symbols than 'foreign'"):
        evaluate(best(trained[0]), corpus=str(trained[0] / "foreign.txt"))


def test_a_damaged_checkpoint_is_refused(
    trained: tuple[Path, float], tmp_path: Path, evaluate: Callable[..., dict[str, float]]
) -> None:
    copy = shutil.copytree(best(trained[0]), tmp_path / "copy")
    state = bytearray((copy / "state.pt").read_bytes())
    state[len(state) // 2] ^= 1
    (copy / "state.pt").write_bytes(state)
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged: expected SHA-256"):
        evaluate(copy)


def test_the_home_folder_may_be_written_as_a_tilde(
    registered: tuple[str, MlflowClient, str],
    output_dir: Path,
    evaluate: Callable[..., dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    shutil.copytree(output_dir, tmp_path / "~" / "outputs")  # so that the wrong place is quick
    client = MlflowClient(f"sqlite:///{tmp_path}/~/outputs/mlflow.db")
    client.delete_registered_model(registered[0].removeprefix("models:/").removesuffix("@best"))
    assert HEADLINE in evaluate(registered[0], output_dir="~/outputs")


def test_nothing_stays_in_the_temporary_folder(
    registered: tuple[str, MlflowClient, str],
    evaluate: Callable[..., dict[str, float]],
    temporary_folder: Path,
) -> None:
    evaluate(registered[0])
    assert list(temporary_folder.iterdir()) == []
