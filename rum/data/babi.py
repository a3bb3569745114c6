"""bAbI tasks, version 1.2 (Weston et al. 2015): files, checksums, and the stories in them."""

import hashlib
import http.client
import os
import re
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

from rum.data.files import RemoteFile, cache_folder, data_roots, download
from rum.errors import DataError

EDITIONS = ("en", "en-10k")
FOLDER = "tasks_1-20_v1-2"
SUBTASKS = (
    "single-supporting-fact",
    "two-supporting-facts",
    "three-supporting-facts",
    "two-arg-relations",
    "three-arg-relations",
    "yes-no-questions",
    "counting",
    "lists-sets",
    "simple-negation",
    "indefinite-knowledge",
    "basic-coreference",
    "conjunction",
    "compound-coreference",
    "time-reasoning",
    "basic-deduction",
    "basic-induction",
    "positional-reasoning",
    "size-reasoning",
    "path-finding",
    "agents-motivations",
)
# Creative Commons Attribution 3.0, Facebook 2015. Size and checksum as published with datasets.
ARCHIVE = RemoteFile(
    "tasks_1-20_v1-2.tar.gz",
    "http://www.thespermwhale.com/jaseweston/babi/tasks_1-20_v1-2.tar.gz",
    15719851,
    "0364ebde659f14d11bc21744516c5ec49d3d06cb692733f66680771244998898",
)
# The one file whose SHA-256 is not known, by its id in git: SHA-1 of "blob <length>\0" + content.
_GIT_IDS = {
    "en-10k/qa3_three-supporting-facts_train.txt": "9b2b35ca4357ea8ee44692c71ec71892edf51399"
}


@dataclass(frozen=True)
class Question:
    """One question about what was told so far."""

    story: tuple[str, ...]
    """All words and marks of the sentences before it, earlier questions left out."""
    question: tuple[str, ...]
    answer: str
    """One word, or several joined by commas: a class of its own."""


@dataclass(frozen=True)
class Subtask:
    """Training and test questions of one of the twenty tasks."""

    number: int
    train: list[Question]
    test: list[Question]
    sha256: str
    """Over the checksums of both files, in hexadecimal."""


def tokenize(sentence: str) -> tuple[str, ...]:
    """Splits into words and punctuation marks; case is kept, blanks are dropped."""
    # One string for each different word: twenty tasks would take hundreds of megabytes otherwise.
    return tuple(map(sys.intern, re.findall(r"\w+|[^\w\s]", sentence)))


def file_name(number: int, split: str) -> str:
    """The name of a subtask's file; `split` is "train" or "test"."""
    return f"qa{number}_{SUBTASKS[number - 1]}_{split}.txt"


def load_subtasks(
    numbers: tuple[int, ...], edition: str, data_dir: Path | None, *, skip_missing: bool
) -> tuple[list[Subtask], Path]:
    """Reads subtasks.

    Args:
        numbers: Which, 1 to 20.
        edition: "en" (1,000 training questions each) or "en-10k" (10,000).
        data_dir: Where to look first; then `RUM_DATA_DIR`, then the cache.
        skip_missing: Leave out subtasks of which a file is absent.

    Returns:
        The subtasks that are there, and the folder they came from.

    Raises:
        DataError: If a file is absent (unless skipped), altered or malformed.
    """
    folder = _locate(edition, data_dir)
    absent = [
        path
        for number in numbers
        for path in (folder / file_name(number, split) for split in ("train", "test"))
        if not path.is_file()
    ]
    if absent and not skip_missing:
        listed = "\n".join(f"  {path}" for path in absent)
        raise DataError(
            f"bAbI is in {folder}, but these files are absent:\n{listed}\n"
            f"They are members of {ARCHIVE.url}."
            + (
                " A joint run goes on without them with task.missing=skip"
                if len(numbers) > 1
                else ""
            )
        )
    there = [
        number
        for number in numbers
        if not any(folder / file_name(number, split) in absent for split in ("train", "test"))
    ]
    if not there:
        raise DataError(f"no subtask is left: all files of {list(numbers)} are absent in {folder}")
    return [_load_subtask(folder, edition, number) for number in there], folder


@lru_cache(maxsize=40)
def _load_subtask(folder: Path, edition: str, number: int) -> Subtask:
    parts = {}
    digests = []
    for split in ("train", "test"):
        name = file_name(number, split)
        content = (folder / name).read_bytes()
        _check(content, f"{edition}/{name}", folder / name)
        digests.append(hashlib.sha256(content).digest())
        parts[split] = parse(content.decode(), str(folder / name))
    checksum = hashlib.sha256(b"".join(digests)).hexdigest()
    return Subtask(number, parts["train"], parts["test"], checksum)


def parse(text: str, where: str) -> list[Question]:
    """Reads the questions of a file.

    Each line is a number, from 1 for a new story, and a sentence; a question is followed by a tab,
    the answer, and the numbers of the supporting facts, which are not read.

    Raises:
        DataError: Naming the line that is none of these.
    """
    questions = []
    story: tuple[str, ...] = ()
    for line_number, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r"(\d+) ([^\t]+?) *(?:\t([^\t]+?) *(?:\t[\d ]*)?)?", line)
        if match is None:
            raise DataError(
                f"{where}, line {line_number} must be a number and a sentence, or a question with "
                f"its answer after a tab, got {line!r}"
            )
        number, sentence, answer = match.groups()
        if int(number) == 1:
            story = ()
        if answer is None:
            story += tokenize(sentence)
        else:
            questions.append(Question(story, tokenize(sentence), answer))
    return questions


def _checksums() -> dict[str, str]:
    lines = resources.files("rum.data").joinpath("babi.sha256").read_text().splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def _check(content: bytes, name: str, path: Path) -> None:
    if name in _GIT_IDS:
        got = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        expected, kind = _GIT_IDS[name], "git id"
    else:
        got = hashlib.sha256(content).hexdigest()
        expected, kind = _checksums()[name], "SHA-256"
    if got != expected:
        raise DataError(
            f"{path} is not the file it should be: expected {kind} {expected}, got {got} "
            f"({len(content)} bytes)"
        )


def _locate(edition: str, data_dir: Path | None) -> Path:
    """The first folder that has any of the edition's files, else the cache, filled."""
    candidates = [
        root / folder / edition for root in data_roots(data_dir) for folder in (FOLDER, ".")
    ]
    cache = cache_folder() / FOLDER / edition
    for folder in [*candidates, cache]:
        if _has_stories(folder):
            return folder.resolve()
    try:
        _download_archive(cache.parent)
    except (OSError, http.client.HTTPException, tarfile.TarError) as error:
        looked = "\n".join(f"  {folder}" for folder in [*candidates, cache])
        raise DataError(
            "bAbI is not here and could not be downloaded.\n"
            f"Looked for {file_name(1, 'train')} and the others in:\n{looked}\n"
            f"Tried {ARCHIVE.url}: {error}\n"
            f"Unpack that archive and name the folder that holds {FOLDER} with data_dir=... or "
            "RUM_DATA_DIR."
        ) from error
    return cache.resolve()


def _has_stories(folder: Path) -> bool:
    return any(folder.glob("qa*_*.txt"))


def _download_archive(target: Path) -> None:
    """Downloads the archive and moves the stories of both editions to `target`.

    An edition is moved as a whole, so that nobody sees half of it; where another process was
    faster, its files stay.
    """
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archive = Path(scratch) / ARCHIVE.name
        download(ARCHIVE, archive)
        with tarfile.open(archive) as tar:
            story = re.compile(rf"{FOLDER}/(en|en-10k)/qa\d+_[a-z-]+_(train|test)\.txt")
            wanted = [member for member in tar.getmembers() if story.fullmatch(member.name)]
            tar.extractall(scratch, members=wanted, filter="data")
        for edition in (Path(scratch) / FOLDER).iterdir():
            try:
                os.replace(edition, target / edition.name)
            except OSError:
                if not _has_stories(target / edition.name):
                    raise
