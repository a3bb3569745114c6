"""bAbI files: parsing, checksums, and what is said where they are absent or altered."""

import hashlib
import io
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rum.data import babi
from rum.data.babi import Question, file_name, load_subtasks, parse, tokenize
from rum.data.files import RemoteFile
from rum.errors import DataError

TEXT = """\
1 Mary got the football there.
2 Is Mary in the hall? \tno\t1
3 John went away.
4 What is Mary carrying? \tfootball,milk\t1 3
1 Sam is Bernhard's dog.
2 What is Sam?\tdog\t1
"""


@pytest.fixture(autouse=True)
def fresh_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No data folder, an empty cache, nothing remembered, no proxy."""
    monkeypatch.delenv("RUM_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    babi._load_subtask.cache_clear()
    yield
    babi._load_subtask.cache_clear()


@pytest.fixture(scope="module")
def data_dir() -> Path:
    folder = os.environ.get("RUM_DATA_DIR")
    if not folder:
        pytest.skip("RUM_DATA_DIR is not set: no bAbI here")
    assert (Path(folder) / babi.FOLDER).is_dir(), "RUM_DATA_DIR is set, but there is no bAbI"
    return Path(folder)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Bob went to the hall.", ("Bob", "went", "to", "the", "hall", ".")),
        ("Where is Bob? ", ("Where", "is", "Bob", "?")),
        ("a,b", ("a", ",", "b")),
        ("  two   blanks ", ("two", "blanks")),
        ("", ()),
    ],
)
def test_a_sentence_is_split_into_words_and_marks(
    sentence: str, expected: tuple[str, ...]
) -> None:
    assert tokenize(sentence) == expected


def test_stories_are_read_without_earlier_questions_and_without_facts() -> None:
    first = ("Mary", "got", "the", "football", "there", ".")
    away = ("John", "went", "away", ".")
    assert parse(TEXT, "file") == [
        Question(first, ("Is", "Mary", "in", "the", "hall", "?"), "no"),
        Question(first + away, ("What", "is", "Mary", "carrying", "?"), "football,milk"),
        Question(
            ("Sam", "is", "Bernhard", "'", "s", "dog", "."), ("What", "is", "Sam", "?"), "dog"
        ),
    ]


@pytest.mark.parametrize(
    "line", ["no number", "1", "", "2 What? \t\t1", "3 What?\tanswer\tone two", "x1 A."]
)
def test_a_malformed_line_is_named(line: str) -> None:
    with pytest.raises(DataError, match=r"somewhere\.txt, line 2 must be") as error:
        parse(f"1 Fine.\n{line}\n3 Fine.\n", "somewhere.txt")
    assert repr(line) in str(error.value)


def test_real_files_have_the_published_numbers_of_questions(data_dir: Path) -> None:
    for edition, count in (("en", 1000), ("en-10k", 10_000)):
        subtasks, folder = load_subtasks((1, 8, 19), edition, data_dir, skip_missing=False)
        assert folder.name == edition
        assert [len(s.train) for s in subtasks] == [count] * 3
        assert [len(s.test) for s in subtasks] == [1000] * 3
        # answers of the training files, from the notes on the data
        answers = [len({question.answer for question in s.train}) for s in subtasks]
        assert answers == ([6, 16, 12] if edition == "en-10k" else [6, answers[1], 12])
    longest = max(len(q.story) + len(q.question) for q in subtasks[0].train)
    assert longest == 72


def test_every_file_that_is_there_has_its_published_checksum(data_dir: Path) -> None:
    for edition in babi.EDITIONS:
        subtasks, _ = load_subtasks(tuple(range(1, 21)), edition, data_dir, skip_missing=True)
        missing = {3} if edition == "en-10k" else set()
        assert {s.number for s in subtasks} == set(range(1, 21)) - missing
        assert len({s.sha256 for s in subtasks}) == len(subtasks)


@pytest.mark.parametrize("numbers", [(3,), (1, 2, 3, 4)])
def test_an_absent_file_is_named_exactly(data_dir: Path, numbers: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="these files are absent") as error:
        load_subtasks(numbers, "en-10k", data_dir, skip_missing=False)
    listed = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    assert len(listed) == 1
    assert listed[0].endswith("en-10k/qa3_three-supporting-facts_train.txt")
    assert "task.missing=skip" in str(error.value)


def test_nothing_left_is_an_error_even_when_skipping(data_dir: Path) -> None:
    with pytest.raises(DataError, match="no subtask is left"):
        load_subtasks((3,), "en-10k", data_dir, skip_missing=True)


def test_an_altered_file_is_refused(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / babi.FOLDER / "en"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        name = file_name(1, split)
        shutil.copy(data_dir / babi.FOLDER / "en" / name, folder / name)
    with (folder / file_name(1, "test")).open("a") as file:
        file.write("1 One line more.\n")
    with pytest.raises(DataError, match=r"qa1_.*_test.txt is not the file it should be"):
        load_subtasks((1,), "en", tmp_path, skip_missing=False)


def test_a_wrong_file_in_the_place_of_the_unknown_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / babi.FOLDER / "en-10k"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / file_name(3, split)).write_text(TEXT)
    with pytest.raises(DataError, match="expected git id 9b2b35ca4357ea8e"):
        load_subtasks((3,), "en-10k", tmp_path, skip_missing=False)


def test_without_files_and_network_the_error_says_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = RemoteFile("a.tar.gz", "http://127.0.0.1:9/a.tar.gz", 1, "0")
    monkeypatch.setattr(babi, "ARCHIVE", nobody)
    with pytest.raises(DataError, match="could not be downloaded") as error:
        load_subtasks((1,), "en", tmp_path, skip_missing=False)
    for place in (tmp_path / babi.FOLDER / "en", tmp_path / "cache" / "rum" / babi.FOLDER / "en"):
        assert str(place) in str(error.value)


def test_the_archive_is_downloaded_once_and_only_stories_are_taken_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name in (
            f"{babi.FOLDER}/en/{file_name(1, 'train')}",
            f"{babi.FOLDER}/en/{file_name(1, 'test')}",
            f"{babi.FOLDER}/en/other.txt",
            "../outside.txt",
        ):
            member = tarfile.TarInfo(name)
            member.size = len(TEXT)
            tar.addfile(member, io.BytesIO(TEXT.encode()))
    content = packed.getvalue()
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/a.tar.gz"
        archive = RemoteFile("a.tar.gz", url, len(content), hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(babi, "ARCHIVE", archive)
        known = dict.fromkeys(
            (f"en/{file_name(1, split)}" for split in ("train", "test")),
            hashlib.sha256(TEXT.encode()).hexdigest(),
        )
        monkeypatch.setattr(babi, "_checksums", lambda: known)
        for _ in range(2):
            (subtask,), folder = load_subtasks((1,), "en", None, skip_missing=False)
            assert subtask.train == parse(TEXT, "")
        assert folder == (tmp_path / "cache" / "rum" / babi.FOLDER / "en").resolve()
        assert sorted(path.name for path in folder.iterdir()) == [
            file_name(1, "test"),
            file_name(1, "train"),
        ]
        assert asked == ["/a.tar.gz"]
    finally:
        server.shutdown()
        server.server_close()
