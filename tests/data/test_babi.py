"""bAbI files: parsing, checksums, and what is said where they are absent or altered."""

import hashlib
import io
import os
import shutil
import subprocess
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

# Different answers and longest story with question, training and test file of subtasks 1 to 20,
# from the notes on the data; the test files of both editions are the same.
NOTES = {
    "en": (
        ((6, 70), (6, 69)),
        ((6, 348), (6, 557)),
        ((6, 1341), (6, 1356)),
        ((6, 23), (6, 23)),
        ((7, 632), (7, 589)),
        ((2, 162), (2, 92)),
        ((4, 223), (4, 220)),
        ((13, 286), (12, 363)),
        ((2, 80), (2, 79)),
        ((3, 92), (3, 90)),
        ((6, 78), (6, 80)),
        ((6, 90), (6, 90)),
        ((6, 89), (6, 88)),
        ((6, 121), (6, 120)),
        ((4, 50), (4, 50)),
        ((4, 46), (4, 46)),
        ((2, 36), (2, 36)),
        ((2, 129), (2, 139)),
        ((12, 51), (12, 51)),
        ((7, 76), (7, 75)),
    ),
    "en-10k": (
        ((6, 72), (6, 69)),
        ((6, 427), (6, 557)),
        (None, (6, 1356)),
        ((6, 23), (6, 23)),
        ((7, 789), (7, 589)),
        ((2, 162), (2, 92)),
        ((4, 328), (4, 220)),
        ((16, 314), (12, 363)),
        ((2, 80), (2, 79)),
        ((3, 95), (3, 90)),
        ((6, 79), (6, 80)),
        ((6, 91), (6, 90)),
        ((6, 90), (6, 88)),
        ((6, 123), (6, 120)),
        ((4, 50), (4, 50)),
        ((4, 46), (4, 46)),
        ((2, 36), (2, 36)),
        ((2, 179), (2, 139)),
        ((12, 51), (12, 51)),
        ((7, 76), (7, 75)),
    ),
}


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


@pytest.mark.parametrize(("edition", "count"), [("en", 1000), ("en-10k", 10_000)])
def test_every_real_file_is_as_the_notes_on_the_data_say(
    data_dir: Path, edition: str, count: int
) -> None:
    subtasks, folder = load_subtasks(tuple(range(1, 21)), edition, data_dir, skip_missing=True)
    missing = {3} if edition == "en-10k" else set()
    assert folder.name == edition
    assert {s.number for s in subtasks} == set(range(1, 21)) - missing
    assert len({s.sha256 for s in subtasks}) == len(subtasks)
    for each in subtasks:
        assert (len(each.train), len(each.test)) == (count, 1000)
        found = tuple(
            (
                len({question.answer for question in questions}),
                max(len(question.story) + len(question.question) for question in questions),
            )
            for questions in (each.train, each.test)
        )
        assert found == NOTES[edition][each.number - 1], each.number


def test_the_file_known_by_its_id_in_git_is_taken(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"en/{file_name(15, 'train')}"
    command = ["git", "hash-object", "--no-filters", str(data_dir / babi.FOLDER / name)]
    id = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setattr(babi, "_GIT_IDS", {name: id})
    assert id.startswith("262658e38742")  # from the notes on the data
    load_subtasks((15,), "en", data_dir, skip_missing=False)


@pytest.mark.parametrize("numbers", [(3,), (1, 2, 3, 4)])
def test_an_absent_file_is_named_exactly(data_dir: Path, numbers: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="these files are absent") as error:
        load_subtasks(numbers, "en-10k", data_dir, skip_missing=False)
    listed = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    assert len(listed) == 1
    assert listed[0].endswith("en-10k/qa3_three-supporting-facts_train.txt")
    assert ("task.missing=skip" in str(error.value)) == (len(numbers) > 1)  # joint runs only


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


def pack(path: Path, *editions: str) -> None:
    with tarfile.open(path, mode="w:gz") as tar:
        for edition in editions:
            for split in ("train", "test"):
                member = tarfile.TarInfo(f"{babi.FOLDER}/{edition}/{file_name(1, split)}")
                member.size = len(TEXT)
                tar.addfile(member, io.BytesIO(TEXT.encode()))


def test_a_cache_that_another_process_filled_meanwhile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "rum" / babi.FOLDER

    def others_are_faster(file: RemoteFile, path: Path) -> None:
        for edition in babi.EDITIONS:
            (cache / edition).mkdir(parents=True)
            for split in ("train", "test"):
                (cache / edition / file_name(1, split)).write_text(TEXT)
        pack(path, *babi.EDITIONS)

    sha256 = hashlib.sha256(TEXT.encode()).hexdigest()
    known = {f"en/{file_name(1, split)}": sha256 for split in ("train", "test")}
    monkeypatch.setattr(babi, "download", others_are_faster)
    monkeypatch.setattr(babi, "_checksums", lambda: known)
    (subtask,), folder = load_subtasks((1,), "en", None, skip_missing=False)
    assert subtask.test == parse(TEXT, "")
    assert folder == (cache / "en").resolve()
    assert sorted(path.name for path in cache.parent.iterdir()) == [babi.FOLDER]  # nothing left


def test_an_edition_that_is_gone_from_the_cache_is_had_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "rum" / babi.FOLDER
    (cache / "en-10k").mkdir(parents=True)
    mine = cache / "en-10k" / file_name(1, "train")
    mine.write_text("1 Untouched.\n")
    sha256 = hashlib.sha256(TEXT.encode()).hexdigest()
    known = {f"en/{file_name(1, split)}": sha256 for split in ("train", "test")}
    monkeypatch.setattr(babi, "download", lambda file, path: pack(path, *babi.EDITIONS))
    monkeypatch.setattr(babi, "_checksums", lambda: known)
    (subtask,), _ = load_subtasks((1,), "en", None, skip_missing=False)
    assert subtask.train == parse(TEXT, "")
    assert mine.read_text() == "1 Untouched.\n"


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
