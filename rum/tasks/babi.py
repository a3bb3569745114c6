"""bAbI question answering (Weston et al. 2015): read a story and a question, say one answer.

`Mary moved to the bathroom . John went to the hallway . Where is Mary ?` is answered `bathroom`.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rum.checks import check_at_least, check_choice
from rum.data.babi import EDITIONS, SUBTASKS, Question, Subtask, load_subtasks
from rum.errors import ConfigError
from rum.tasks.base import Batch, Task, TaskConfig, register_task

BLANK = 0
SENTENCE_END = "."
VALIDATION_SHARE = 10  # the last tenth of the training questions


@dataclass(frozen=True)
class _Split:
    """Questions of one subtask as numbers: sequences `(count, length)`, answers `(count,)`."""

    sequences: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.answers)

    def part(self, first: int, last: int) -> "_Split":
        return _Split(self.sequences[first:last], self.answers[first:last])


class BabiTask(Task):
    """Story and question as one sequence of words and marks; the answer is due at its end.

    The story (every sentence before the question; earlier questions left out) is padded on the
    left with blanks to the longest of the subtask, the question on the right to the longest
    question; blanks are inputs like others, nothing is masked. Symbols and classes are the words
    and marks of training and test, in alphabetical order after the blank (0); an answer of several
    words ("apple,milk") is one class. The last tenth of the training questions is the validation
    set; training goes round the others in order, never shuffled. (The released code's 282nd batch
    of an epoch has 8 questions; here every batch is full.)

    Joint training: one set of symbols for all subtasks, which take turns batch by batch, so that
    a story is padded to the longest of its own subtask; questions to the longest of all. All have
    equally many questions: the accuracy over all is the mean over subtasks.

    Loss: mean cross-entropy in nats. Metric `accuracy`: share of questions answered right; of a
    joint model also of each subtask, `accuracy_qa1` and so on.

    Source: paper section 4.3 and RUM-Tensorflow/babi_task.py.
    """

    metric = "accuracy"
    mode = "max"
    initialization = "normal"
    answers_last = True
    answer_steps = 1

    def __init__(self, config: "BabiConfig", subtasks: list[Subtask], source: str) -> None:
        self._config = config
        name = f"joint{len(subtasks)}" if config.joint else f"qa{config.subtask}"
        self.corpus = f"{name}-{config.edition}"
        self.source = source
        self.checksum = hashlib.sha256("".join(s.sha256 for s in subtasks).encode()).hexdigest()
        self.embedding_size = config.embedding_size
        self.steps_per_epoch = config.steps_per_epoch
        self.vocabulary = _vocabulary(subtasks)
        self.vocab_size = self.num_classes = len(self.vocabulary)
        number = {word: index for index, word in enumerate(self.vocabulary)}
        questions = [question for s in subtasks for question in (*s.train, *s.test)]
        question_length = max(len(question.question) for question in questions)
        self.story = (question_length, (number[SENTENCE_END],))
        self._parts = [f"qa{subtask.number}" if config.joint else "" for subtask in subtasks]
        self._splits: dict[str, list[_Split]] = {"train": [], "validation": [], "test": []}
        for subtask in subtasks:
            length = max(len(q.story) for q in (*subtask.train, *subtask.test))
            train = _encode(subtask.train, length, question_length, number)
            held_out = len(train) // VALIDATION_SHARE
            self._splits["train"].append(train.part(0, len(train) - held_out))
            self._splits["validation"].append(train.part(len(train) - held_out, len(train)))
            self._splits["test"].append(_encode(subtask.test, length, question_length, number))
        self.protocol = (
            f"accuracy of the answer; last tenth of the training questions; {len(subtasks)} "
            f"subtask{'s' if len(subtasks) > 1 else ''} of {config.edition}"
        )
        absent = set(range(1, len(SUBTASKS) + 1)) - {subtask.number for subtask in subtasks}
        if config.joint and absent:
            self.protocol += f", without {', '.join(map(str, sorted(absent)))}"

    def training_batch(self, step: int) -> Batch:
        """The questions of update `step`: subtasks take turns, each goes round its own."""
        turn, index = divmod(step, len(self._splits["train"]))
        split = self._splits["train"][index]
        size = self._config.batch_size
        return _batch(split, torch.arange(turn * size, (turn + 1) * size) % len(split))

    def evaluation_batches(self, split: str, batch_size: int | None = None) -> Iterator[Batch]:
        """All questions of a split; the last batch of a subtask may be smaller."""
        for name, part in zip(self._parts, self._splits[split], strict=True):
            for indices in torch.arange(len(part)).split(batch_size or self._config.batch_size):
                yield _batch(part, indices, name)

    def baselines(self) -> dict[str, float]:
        """Always a subtask's most frequent training answer, scored on validation."""
        hits = count = 0
        for train, validation in zip(
            self._splits["train"], self._splits["validation"], strict=True
        ):
            majority = torch.bincount(train.answers.long()).argmax()
            hits += int((validation.answers == majority).sum())
            count += len(validation)
        return {"majority": hits / count}


def _vocabulary(subtasks: list[Subtask]) -> list[str]:
    """The blank, then all words and marks in alphabetical order."""
    words: Counter[str] = Counter()
    for subtask in subtasks:
        for question in (*subtask.train, *subtask.test):
            words.update(question.story)
            words.update(question.question)
            words[question.answer] += 1
    return ["", *sorted(words)]


def _encode(
    questions: list[Question], story_length: int, question_length: int, number: dict[str, int]
) -> _Split:
    sequences = torch.full((len(questions), story_length + question_length), BLANK).short()
    for row, each in zip(sequences, questions, strict=True):
        story = torch.tensor([number[word] for word in each.story], dtype=torch.short)
        words = torch.tensor([number[word] for word in each.question], dtype=torch.short)
        row[story_length - len(story) : story_length] = story
        row[story_length : story_length + len(words)] = words
    answers = torch.tensor([number[question.answer] for question in questions])
    return _Split(sequences, answers)


def _batch(split: _Split, indices: Tensor, part: str = "") -> Batch:
    return Batch(
        split.sequences[indices].t().long().contiguous(),
        split.answers[indices].unsqueeze(0),
        carry_state=False,
        part=part,
    )


@register_task
@dataclass(kw_only=True)
class BabiConfig(TaskConfig):
    """bAbI question answering; the defaults are the released code's, for the first subtask.

    The released run ends after 4,000 updates (20 epochs of 200), the paper's after 20 passes
    (5,625 updates), both tested with the last weights. With `joint`, 4,000 updates are 200 for
    each of twenty subtasks: less than one pass (281.25).
    """

    name: str = "babi"
    batch_size: int = 32
    """Sequences in a batch."""
    subtask: int = 1
    """Which of the twenty, 1 to 20; not read with `joint`."""
    joint: bool = False
    """One model for all subtasks (the paper's words) instead of one for each (the code)."""
    missing: str = "error"
    """Of joint runs, where a subtask's file is absent: "error", or "skip" that subtask."""
    edition: str = "en-10k"
    """"en-10k" (10,000 training questions a subtask) or "en" (1,000)."""
    embedding_size: int = 64
    """Features of the word embedding."""
    steps_per_epoch: int = 200
    """Updates between two validations, as released."""

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that the task does not accept."""
        super().__post_init__()
        if type(self.subtask) is not int or not 1 <= self.subtask <= len(SUBTASKS):
            raise ConfigError(f"subtask must be an integer from 1 to 20, got {self.subtask!r}")
        check_choice("missing", self.missing, ("error", "skip"))
        if self.missing == "skip" and not self.joint:
            raise ConfigError("missing = skip belongs to joint runs, got joint = false")
        check_choice("edition", self.edition, EDITIONS)
        check_at_least("embedding_size", self.embedding_size, 1)
        check_at_least("steps_per_epoch", self.steps_per_epoch, 1)

    def load(self, *, seed: int, data_dir: Path | None = None) -> BabiTask:
        """Reads the stories; see `rum.data.babi.load_subtasks`."""
        numbers = tuple(range(1, len(SUBTASKS) + 1)) if self.joint else (self.subtask,)
        subtasks, folder = load_subtasks(
            numbers, self.edition, data_dir, skip_missing=self.missing == "skip"
        )
        return BabiTask(self, subtasks, str(folder))
