"""Corpora: where they are looked for, what they must be, and what is said where they are not."""

import dataclasses
import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rum.data import corpora
from rum.data.corpora import Corpus, load_corpus
from rum.errors import DataError

# From the notes on the data, where they were compared with what others publish.
PTB_SIZES = {"train": 5101618, "validation": 399782, "test": 449945}
PTB_SHA256 = {
    "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "validation": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}
NAMES = ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")
CONTENTS = dict(
    zip(NAMES, (b"some text to train on\n" * 40, b" valid\n" * 9, b" test\n"), strict=True)
)


@pytest.fixture(autouse=True)
def fresh_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No data folder, an empty cache, nothing remembered, no proxy."""
    monkeypatch.delenv("RUM_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    load_corpus.cache_clear()
    yield
    load_corpus.cache_clear()


@pytest.fixture(scope="module")
def data_dir() -> Path:
    folder = os.environ.get("RUM_DATA_DIR")
    if not folder:
        pytest.skip("RUM_DATA_DIR is not set: no Penn Treebank here")
    assert (Path(folder) / "ptb").is_dir(), "RUM_DATA_DIR is set, but there is no Penn Treebank"
    return Path(folder)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The true files at an address where nobody answers: bound, so nobody else can take it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        files = tuple(
            dataclasses.replace(file, url=f"http://127.0.0.1:{port}/{file.name}")
            for file in corpora.PTB_FILES
        )
        monkeypatch.setattr(corpora, "PTB_FILES", files)
        yield


class Web:
    """A local web server: what it serves by path, and the paths that were asked for."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.promised_too_much = False
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.requests.append(self.path)
                content = web.contents.get(self.path.removeprefix("/"))
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                extra = 100 if web.promised_too_much else 0
                self.send_header("Content-Length", str(len(content) + extra))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """Serves three small files that stand for Penn Treebank's."""
    web = Web()
    web.contents = dict(CONTENTS)
    files = tuple(
        dataclasses.replace(
            file,
            url=f"{web.url}/{file.name}",
            size=len(CONTENTS[file.name]),
            sha256=hashlib.sha256(CONTENTS[file.name]).hexdigest(),
        )
        for file in corpora.PTB_FILES
    )
    monkeypatch.setattr(corpora, "PTB_FILES", files)
    thread = threading.Thread(target=web.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield web
    web.server.shutdown()
    web.server.server_close()
    thread.join()


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def parts(corpus: Corpus) -> dict[str, bytes]:
    return {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}


def put(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_penn_treebank_is_found_and_is_the_published_one(
    way: str, data_dir: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "environment":
        monkeypatch.setenv("RUM_DATA_DIR", str(data_dir))
    corpus = load_corpus("ptb", data_dir if way == "argument" else None)

    assert {split: len(text) for split, text in parts(corpus).items()} == PTB_SIZES
    assert {s: hashlib.sha256(t).hexdigest() for s, t in parts(corpus).items()} == PTB_SHA256
    assert corpus.name == "ptb"
    assert Path(corpus.source) == (data_dir / "ptb").resolve()


def test_penn_treebank_begins_as_it_does_everywhere(data_dir: Path) -> None:
    assert load_corpus("ptb", data_dir).train.startswith(
        b" aer banknote berlitz calloway centrust cluett fromstein gitano "
    )


@pytest.mark.parametrize("below", ["ptb", "simple-examples/data", "."])
def test_every_usual_folder_is_looked_at(below: str, web: Web, tmp_path: Path) -> None:
    root = tmp_path / "data"
    put(root / below, CONTENTS)

    assert parts(load_corpus("ptb", root)) == dict(zip(PTB_SIZES, CONTENTS.values(), strict=True))
    assert web.requests == []


def test_the_argument_goes_before_the_environment(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("argument", "environment"):
        put(tmp_path / name / "ptb", CONTENTS)
    monkeypatch.setenv("RUM_DATA_DIR", str(tmp_path / "environment"))

    assert Path(load_corpus("ptb", tmp_path / "argument").source) == tmp_path / "argument" / "ptb"
    assert Path(load_corpus("ptb").source) == tmp_path / "environment" / "ptb"


def test_missing_and_offline_says_where_it_looked_and_what_to_do(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUM_DATA_DIR", str(tmp_path / "from_environment"))
    (tmp_path / "from_argument").mkdir()

    with pytest.raises(DataError) as error:
        load_corpus("ptb", tmp_path / "from_argument")

    lines = [line.strip() for line in str(error.value).splitlines()]
    for root in ("from_argument", "from_environment"):
        for below in ("ptb", "simple-examples/data", "."):
            assert str(tmp_path / root / below) in lines
    assert str(tmp_path / "cache" / "rum" / "ptb") in lines
    for word in (*NAMES, "refused", "simple-examples.tgz", "data_dir", "RUM_DATA_DIR"):
        assert word in str(error.value)


def test_a_data_dir_that_is_no_folder_is_refused(offline: None, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_dir must be a folder, got .*/absent"):
        load_corpus("ptb", tmp_path / "absent")


def test_a_failed_download_leaves_no_file(offline: None, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        load_corpus("ptb")
    assert files_below(tmp_path) == {}


def test_a_download_lands_in_the_cache_complete(web: Web, tmp_path: Path) -> None:
    corpus = load_corpus("ptb")

    assert list(parts(corpus).values()) == list(CONTENTS.values())
    assert files_below(tmp_path) == {f"cache/rum/ptb/{n}": c for n, c in CONTENTS.items()}
    assert web.requests == [f"/{name}" for name in NAMES]


def test_a_second_load_reads_the_cache(web: Web) -> None:
    first = load_corpus("ptb")
    web.requests.clear()
    load_corpus.cache_clear()

    assert load_corpus("ptb") == first
    assert web.requests == []


def test_a_download_does_not_touch_the_users_folders(web: Web, tmp_path: Path) -> None:
    mine = put(tmp_path / "mine" / "ptb", {"notes.txt": b"mine"})
    load_corpus("ptb", tmp_path / "mine")
    assert files_below(mine) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("wrong", NAMES)
def test_a_wrong_download_is_an_error_and_is_not_kept(
    wrong: str, web: Web, tmp_path: Path
) -> None:
    web.contents[wrong] = CONTENTS[wrong][:-1] + b"?"

    with pytest.raises(DataError) as error:
        load_corpus("ptb")

    assert f"{web.url}/{wrong}" in str(error.value)
    assert hashlib.sha256(CONTENTS[wrong]).hexdigest() in str(error.value)
    assert hashlib.sha256(web.contents[wrong]).hexdigest() in str(error.value)
    assert f"cache/rum/ptb/{wrong}" not in files_below(tmp_path)


@pytest.mark.parametrize("wrong", NAMES)
def test_a_download_that_failed_half_way_is_completed_next_time(wrong: str, web: Web) -> None:
    content = web.contents.pop(wrong)
    with pytest.raises(DataError):
        load_corpus("ptb")

    web.contents[wrong] = content

    assert list(parts(load_corpus("ptb")).values()) == list(CONTENTS.values())


def test_a_connection_that_breaks_is_an_error_for_the_user(web: Web, tmp_path: Path) -> None:
    web.promised_too_much = True

    with pytest.raises(DataError, match="could not be downloaded"):
        load_corpus("ptb")
    assert files_below(tmp_path) == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_file_is_named_with_what_was_expected(
    damage: str, name: str, web: Web, tmp_path: Path
) -> None:
    folder = put(tmp_path / "data" / "ptb", CONTENTS)
    good = CONTENTS[name]
    bad = good[:-3] if damage == "truncated" else bytes([good[0] ^ 1]) + good[1:]
    (folder / name).write_bytes(bad)

    with pytest.raises(DataError) as error:
        load_corpus("ptb", tmp_path / "data")

    message = str(error.value)
    assert message.startswith(str(folder / name))
    for content in (good, bad):
        assert f"{len(content)} bytes" in message
        assert hashlib.sha256(content).hexdigest() in message
    assert message.index(hashlib.sha256(good).hexdigest()) < message.index(
        hashlib.sha256(bad).hexdigest()
    )
    assert web.requests == []


def test_a_truncated_penn_treebank_is_refused(
    data_dir: Path, offline: None, tmp_path: Path
) -> None:
    folder = tmp_path / "ptb"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(data_dir / "ptb" / name, folder)
    with (folder / "ptb.valid.txt").open("rb+") as file:
        file.truncate(PTB_SIZES["validation"] - 1)

    with pytest.raises(DataError, match=r"399782 bytes .* got 399781 bytes") as error:
        load_corpus("ptb", tmp_path)
    assert str(folder / "ptb.valid.txt") in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_one_missing_file_is_named(name: str, web: Web, tmp_path: Path) -> None:
    folder = put(tmp_path / "data" / "ptb", {n: c for n, c in CONTENTS.items() if n != name})

    with pytest.raises(DataError, match="missing") as error:
        load_corpus("ptb", tmp_path / "data")
    assert str(folder / name) in str(error.value)
    assert web.requests == []


def test_a_text_file_is_split_in_order_ninety_five_five(tmp_path: Path) -> None:
    text = bytes(range(256)) * 4 + b"tail\r\n\xff"  # bytes as they are, 1031 of them
    path = tmp_path / "my text.txt"
    path.write_bytes(text)

    corpus = load_corpus(str(path))

    assert corpus.name == "my text"
    assert corpus.source == str(path)
    assert corpus.train + corpus.validation + corpus.test == text
    # 1031 x 0.9 = 927.9 and 1031 x 0.95 = 979.45, rounded down
    assert [len(part) for part in parts(corpus).values()] == [927, 979 - 927, 1031 - 979]


def test_a_text_file_is_found_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "book.txt").write_bytes(b"0123456789" * 2)
    assert load_corpus("~/book.txt").train == b"012345678901234567"


@pytest.mark.parametrize("name", ["no_such_corpus", "/no/such/file.txt", "/"])
def test_an_unknown_corpus_is_an_error_that_names_the_choices(name: str) -> None:
    with pytest.raises(
        DataError, match="ptb, ptb_char, pydoc, enwik8, text8 or the path"
    ) as error:
        load_corpus(name)
    assert repr(name) in str(error.value)


def test_pydoc_is_this_pythons_reference_in_order() -> None:
    from pydoc_data.topics import topics

    corpus = load_corpus("pydoc")
    text = b"".join(parts(corpus).values())

    assert text == b"\n".join(topics[key].encode() for key in sorted(topics))
    assert all(len(part) > 10_000 for part in parts(corpus).values())
    assert len(corpus.train) == pytest.approx(0.9 * len(text), abs=1)


def test_a_checksum_is_that_of_the_parts() -> None:
    first = load_corpus("pydoc")
    load_corpus.cache_clear()
    second = load_corpus("pydoc")

    digest = hashlib.sha256()
    for part in parts(first).values():
        digest.update(hashlib.sha256(part).digest())
    assert first is not second
    assert first.checksum == second.checksum == digest.hexdigest()


def test_a_checksum_sees_one_byte_and_the_places_of_the_cuts() -> None:
    corpora_ = [
        Corpus("x", "here", b"abc", b"de", b"f"),
        Corpus("x", "here", b"abd", b"de", b"f"),
        Corpus("x", "here", b"ab", b"cde", b"f"),
        Corpus("x", "here", b"abc", b"d", b"ef"),
    ]
    assert len({corpus.checksum for corpus in corpora_}) == 4
    moved = Corpus("y", "there", b"abc", b"de", b"f")
    assert moved.checksum == corpora_[0].checksum


def test_ptb_char_is_ptb_without_the_blanks_around_lines(data_dir: Path) -> None:
    raw, char = load_corpus("ptb", data_dir), load_corpus("ptb_char", data_dir)

    # counted in another way: two blanks a line less, but for the lines there are
    lengths = {"train": 5_017_482, "validation": 393_042, "test": 442_423}
    for split, length in lengths.items():
        before, after = getattr(raw, split), getattr(char, split)
        assert len(after) == length == len(before) - 2 * before.count(b"\n")
        assert b" " + after.replace(b"\n", b" \n ") == before + b" "
    assert char.checksum != raw.checksum


def test_wikipedia_is_taken_where_it_is_and_split_90_5_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rum.data.corpora.WIKIPEDIA_BYTES", 1000)
    text = bytes(range(250)) * 4
    (tmp_path / "enwik8").mkdir()
    (tmp_path / "enwik8" / "enwik8").write_bytes(text)

    corpus = load_corpus("enwik8", tmp_path)

    assert (corpus.train, corpus.validation, corpus.test) == (
        text[:900],
        text[900:950],
        text[950:],
    )
    assert corpus.name == "enwik8"


def test_wikipedia_that_is_absent_or_cut_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="'text8' is not here") as error:
        load_corpus("text8", tmp_path)
    assert str(tmp_path / "text8") in str(error.value)
    assert "text8.zip" in str(error.value)

    (tmp_path / "text8").write_bytes(b"short")
    with pytest.raises(DataError, match="must have 100000000 bytes, got 5"):
        load_corpus("text8", tmp_path)
