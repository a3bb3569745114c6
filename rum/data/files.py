"""Data files: where they are looked for, how they are downloaded, the checks they must pass."""

import hashlib
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rum.errors import DataError

DOWNLOAD_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class RemoteFile:
    """A file that can be downloaded, and what it must be."""

    name: str
    url: str
    size: int
    sha256: str


def data_roots(data_dir: Path | None) -> list[Path]:
    """Where files that the user has are looked for, in order.

    Raises:
        DataError: If `data_dir` is no folder.
    """
    roots = [data_dir] if data_dir else []
    if data_dir is not None and not data_dir.expanduser().is_dir():
        raise DataError(f"data_dir must be a folder, got {data_dir}")
    if os.environ.get("RUM_DATA_DIR"):
        roots.append(Path(os.environ["RUM_DATA_DIR"]))
    return [root.expanduser() for root in roots]


def cache_folder() -> Path:
    """Where downloads go: `XDG_CACHE_HOME`, else `~/.cache`, plus `rum`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "rum"


def download(file: RemoteFile, path: Path) -> None:
    """Downloads, checks and moves a file into place.

    Raises:
        OSError, http.client.HTTPException: If it cannot be had.
        DataError: If it is not the file it should be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(file.url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
        content = response.read()
    check_content(content, file, file.url)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def read_checked(path: Path, file: RemoteFile) -> bytes:
    """Reads a file.

    Raises:
        DataError: If it is missing or not the file it should be.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing, though other files of the corpus are there")
    content = path.read_bytes()
    check_content(content, file, str(path))
    return content


def check_content(content: bytes, file: RemoteFile, where: str) -> None:
    """Raises DataError unless `content` has the checksum of `file`."""
    got = hashlib.sha256(content).hexdigest()
    if got != file.sha256:
        raise DataError(
            f"{where} is not the file it should be: expected {file.size} bytes with SHA-256 "
            f"{file.sha256}, got {len(content)} bytes with {got}"
        )
