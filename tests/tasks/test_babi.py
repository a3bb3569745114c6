"""bAbI as a task: numbers written out by hand, and the real files."""

import dataclasses
import math
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from rum.cells import RUMConfig
from rum.data.babi import FOLDER, Subtask, file_name, parse
from rum.errors import ConfigError, DataError
from rum.models import SequenceModel
from rum.tasks import BabiConfig, BabiTask, Totals
from rum.training.evaluation import evaluate

TRAIN = """\
1 Bo is in A.
2 Where is Bo?\tA
3 Bo saw Cy.
4 Whom did Bo see?\tCy,Bo
"""
TEST = "1 Cy is in B.\n2 Where is Cy?\tB\n"
WORDS = ["", ".", "?", "A", "B", "Bo", "Cy", "Cy,Bo", "Where", "Whom", "did", "in", "is"]
WORDS += ["saw", "see"]


def subtask(number: int, repeat: int = 10, train: str = TRAIN, test: str = TEST) -> Subtask:
    return Subtask(number, parse(train, "") * repeat, parse(test, ""), f"sum{number}")


@pytest.fixture(scope="module")
def data_dir() -> Path:
    folder = os.environ.get("RUM_DATA_DIR")
    if not folder:
        pytest.skip("RUM_DATA_DIR is not set: no bAbI here")
    return Path(folder)


def test_sequences_are_story_from_the_right_and_question_from_the_left() -> None:
    task = BabiTask(BabiConfig(batch_size=2), [subtask(1)], "here")
    assert task.vocabulary == WORDS
    assert task.vocab_size == task.num_classes == 15
    n = {word: index for index, word in enumerate(WORDS)}
    batch = task.training_batch(0)
    story = ["Bo", "is", "in", "A", ".", "Bo", "saw", "Cy", "."]
    first = [""] * 4 + story[:5] + ["Where", "is", "Bo", "?", ""]
    second = [*story, "Whom", "did", "Bo", "see", "?"]
    assert batch.input.t().tolist() == [[n[w] for w in first], [n[w] for w in second]]
    assert batch.target.tolist() == [[n["A"], n["Cy,Bo"]]]
    assert task.story == (5, (n["."],))
    (test,) = task.evaluation_batches("test")
    assert test.input.t().tolist() == [
        [n[w] for w in [""] * 4 + ["Cy", "is", "in", "B", "."] + ["Where", "is", "Cy", "?", ""]]
    ]


def test_validation_is_the_last_tenth_and_training_goes_round_the_rest() -> None:
    places = "abcdefghijklm" * 2
    train = "".join(f"1 Bo is in {place}.\n2 Where is Bo?\t{place}\n" for place in places)
    task = BabiTask(BabiConfig(batch_size=5), [subtask(1, 1, train)], "here")
    answers = [task.vocabulary[i] for s in range(6) for i in task.training_batch(s).target[0]]
    order = list("abcdefghijklm" * 2)[:24]
    assert answers == (order + order)[:30]
    validation = [
        task.vocabulary[i] for b in task.evaluation_batches("validation") for i in b.target[0]
    ]
    assert validation == ["l", "m"]


def test_joint_training_takes_turns_and_pads_each_subtask_by_itself() -> None:
    long = "1 Bo saw A.\n2 Bo saw A.\n3 Bo saw A.\n4 Who is it?\tBo\n"
    config = BabiConfig(batch_size=3, joint=True)
    task = BabiTask(config, [subtask(1), subtask(2, 20, long, long)], "here")
    assert [len(task.training_batch(step).input) for step in range(4)] == [14, 17, 14, 17]
    assert task.story is not None
    assert task.story[0] == 5
    once = BabiTask(BabiConfig(batch_size=3), [subtask(1)], "here")
    words = [[task.vocabulary[i] for i in column] for column in task.training_batch(2).input.t()]
    alone = [[once.vocabulary[i] for i in column] for column in once.training_batch(1).input.t()]
    assert words == alone
    counted = [(b.part, b.target.numel()) for b in task.evaluation_batches("validation")]
    assert counted == [("qa1", 2), ("qa2", 2)]
    assert task.corpus == "joint2-en-10k"


def test_a_joint_model_is_also_scored_on_each_subtask() -> None:
    """A model that always says the first subtask's answers."""
    other = "1 Bo is in b.\n2 Where is Bo?\tb\n"
    task = BabiTask(
        BabiConfig(batch_size=3, joint=True), [subtask(1), subtask(2, 20, other, other)], "here"
    )
    answers = next(task.evaluation_batches("test")).target

    class Constant(torch.nn.Module):
        def forward(self, symbols: torch.Tensor, state: None) -> tuple[torch.Tensor, tuple[()]]:
            answer = torch.full((1, symbols.shape[1]), int(answers[0, 0]))
            return torch.nn.functional.one_hot(answer, task.num_classes).float(), ()

    metrics = evaluate(Constant(), task, "test", "cpu")
    first, second = metrics["accuracy_qa1"], metrics["accuracy_qa2"]
    assert (first > 0, second) == (True, 0.0)
    assert metrics["accuracy"] == pytest.approx((first + second) / 2)


def test_loss_metrics_and_baseline() -> None:
    task = BabiTask(BabiConfig(), [subtask(1)], "here")
    metrics = task.metrics(Totals(2.0, 3, 4, 3, 4))
    assert metrics == pytest.approx({"accuracy": 0.75, "cross_entropy": 0.5})
    logits = torch.zeros(1, 2, 15, dtype=torch.float64)
    logits[0, 0, 3] = math.log(16)
    expected = -(math.log(16 / 30) + math.log(1 / 15)) / 2
    assert task.loss(logits, torch.tensor([[3, 3]])).item() == pytest.approx(expected)
    assert task.baselines() == {"majority": 0.5}


def test_initial_values_are_those_released() -> None:
    torch.manual_seed(0)
    model = SequenceModel(
        RUMConfig(hidden_size=256),
        vocab_size=150,
        num_classes=150,
        embedding_size=64,
        initialization="normal",
        answers_last=True,
    )
    assert model.embedding is not None
    spread = math.sqrt(6 / 150)
    weight = model.embedding.weight.detach()
    assert weight.mean().item() == pytest.approx(-spread, rel=0.05)  # as released: mean -s
    assert weight.std().item() == pytest.approx(spread, rel=0.05)
    bound = math.sqrt(6 / (256 + 64))
    assert 0.99 * bound < model.readout.weight.detach().abs().max().item() <= bound
    assert torch.equal(model.readout.bias, torch.full((150,), 0.01))
    logits, _ = model(torch.zeros(7, 3, dtype=torch.long))
    assert logits.shape == (1, 3, 150)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subtask": 0}, "subtask must be an integer from 1 to 20, got 0"),
        ({"subtask": 21}, "subtask must be an integer from 1 to 20, got 21"),
        ({"subtask": 2.0}, "subtask must be an integer from 1 to 20, got 2.0"),
        ({"subtask": True}, "subtask must be an integer from 1 to 20, got True"),
        ({"edition": "fr"}, r"edition must be one of \['en', 'en-10k'\], got 'fr'"),
        ({"missing": "skip"}, "missing = skip belongs to joint runs"),
        ({"missing": "maybe", "joint": True}, "missing must be one of"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"embedding_size": 0}, "embedding_size must be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BabiConfig(**options)  # type: ignore[arg-type]


def test_a_real_subtask_against_a_reading_of_its_files_by_hand(data_dir: Path) -> None:
    task = BabiConfig(subtask=15, edition="en").load(seed=0, data_dir=data_dir)
    folder = data_dir / FOLDER / "en"
    words: set[str] = set()
    answers = []
    longest = 0
    for split in ("train", "test"):
        story: list[str] = []
        for line in (folder / file_name(15, split)).read_text().splitlines():
            number, rest = line.split(" ", 1)
            if number == "1":
                story = []
            parts = rest.split("\t")
            found = re.sub(r"([.?,])", r" \1 ", parts[0]).split()
            words |= set(found)
            if len(parts) == 1:
                story += found
            else:
                longest = max(longest, len(story))
                words.add(parts[1])
                if split == "train":
                    answers.append(parts[1])
    assert task.vocabulary == ["", *sorted(words)]
    assert len(task.training_batch(0).input) == longest + task.story[0]  # type: ignore[index]
    majority = Counter(answers[:900]).most_common(1)[0][0]
    share = sum(answer == majority for answer in answers[900:]) / 100
    assert task.baselines() == {"majority": pytest.approx(share)}


def test_joint_runs_report_the_absent_file_and_skip_only_when_told(data_dir: Path) -> None:
    config = BabiConfig(joint=True)
    with pytest.raises(DataError, match=r"qa3_three-supporting-facts_train\.txt"):
        config.load(seed=0, data_dir=data_dir)
    task = dataclasses.replace(config, missing="skip").load(seed=0, data_dir=data_dir)
    assert task.corpus == "joint19-en-10k"
    assert task.protocol.endswith("19 subtasks of en-10k, without 3")
    # 178 symbols in lower case, from the notes on the data, and the blank
    assert len({word.lower() for word in task.vocabulary}) == 179
    assert sum(b.target.numel() for b in task.evaluation_batches("test")) == 19_000


def test_the_small_edition_is_complete(data_dir: Path) -> None:
    task = BabiConfig(joint=True, edition="en").load(seed=0, data_dir=data_dir)
    assert task.corpus == "joint20-en"
    assert task.protocol.endswith("20 subtasks of en")
    assert len({word.lower() for word in task.vocabulary}) == 177  # 176 and the blank
    assert sum(b.target.numel() for b in task.evaluation_batches("validation")) == 20 * 100
    assert sum(b.target.numel() for b in task.evaluation_batches("test")) == 20 * 1000
    steps = [len(task.training_batch(step).input) for step in range(40)]
    assert steps[:20] == steps[20:]
    assert len(set(steps)) > 10  # each padded to its own longest story


def test_a_missing_single_subtask_is_an_error(data_dir: Path) -> None:
    with pytest.raises(DataError, match=r"qa3_three-supporting-facts_train\.txt"):
        BabiConfig(subtask=3).load(seed=0, data_dir=data_dir)
