"""Checkpoints: complete or not there, checked, free of code."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pickle import PicklingError
from typing import Any

import pytest
import torch

from rum.errors import CheckpointError, SupersededError
from rum.training.checkpoint import (
    DESCRIPTION_FILE,
    STATE_FILE,
    CheckpointStore,
    load_state,
    read_checkpoint,
)


def save(store: CheckpointStore, step: int, best: int | None) -> Path:
    return store.save({"x": torch.full((3,), float(step))}, {"step": step, "best_step": best})


def contents(folder: Path) -> list[str]:
    """What is there but the mark of who writes."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".writer")


def test_best_and_last_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        save(store, step, best)

    assert contents(tmp_path) == ["step_000000002", "step_000000004"]
    last, best_one = store.last(), store.best()
    assert last is not None
    assert best_one is not None
    assert torch.equal(load_state(last, "cpu")["x"], torch.full((3,), 4.0))
    assert torch.equal(load_state(best_one, "cpu")["x"], torch.full((3,), 2.0))


def test_nothing_is_there_before_the_first_save(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none").last() is None
    assert CheckpointStore(tmp_path / "none").best() is None


def test_what_a_killed_writer_leaves_does_no_harm(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 1, 1)
    (tmp_path / ".partial-99").mkdir()
    (tmp_path / ".partial-99" / STATE_FILE).write_bytes(b"half")
    store = CheckpointStore(tmp_path)

    last = store.last()
    assert last is not None
    assert last.description["step"] == 1
    save(store, 1, 1)  # again, over what is there
    assert contents(tmp_path) == ["step_000000001"]


def test_a_save_that_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    before = save(store, 1, 1)
    with pytest.raises((AttributeError, PicklingError)):
        store.save({"x": lambda: None}, {"step": 2, "best_step": 1})  # cannot be written

    last = store.last()
    assert last is not None
    assert last.path == before
    save(store, 2, 2)
    assert contents(tmp_path) == ["step_000000002"]


def test_only_the_process_that_came_last_writes(tmp_path: Path) -> None:
    old, new = CheckpointStore(tmp_path), CheckpointStore(tmp_path)
    save(old, 1, 1)
    new.claim()

    with pytest.raises(SupersededError, match="another process"):
        save(old, 2, 2)
    assert contents(tmp_path) == ["step_000000001"]
    save(new, 3, 3)
    assert contents(tmp_path) == ["step_000000003"]


def test_a_process_that_is_superseded_while_it_writes_leaves_the_other_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = CheckpointStore(tmp_path), CheckpointStore(tmp_path)
    save(old, 1, 1)
    write = torch.save

    def write_slowly(state: object, path: Path) -> None:
        write(state, path)
        monkeypatch.setattr(torch, "save", write)
        save(new, 2, 2)  # claims the folder, which takes the half-written one away

    monkeypatch.setattr(torch, "save", write_slowly)
    with pytest.raises(SupersededError):
        save(old, 2, 1)
    assert contents(tmp_path) == ["step_000000002"]
    last = new.last()
    assert last is not None
    assert last.description["best_step"] == 2


def test_a_folder_that_was_removed_is_not_made_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    save(store, 1, 1)
    shutil.rmtree(tmp_path / "run")

    with pytest.raises(SupersededError):
        save(store, 2, 2)


def test_a_checkpoint_is_two_files_and_their_checksum(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 7, None)

    assert path == tmp_path / "step_000000007"
    assert sorted(file.name for file in path.iterdir()) == ["checkpoint.json", "state.pt"]
    description = json.loads((path / "checkpoint.json").read_text())
    assert description == {
        "format_version": 1,
        "sha256": hashlib.sha256((path / "state.pt").read_bytes()).hexdigest(),
        "step": 7,
        "best_step": None,
    }


def flip(path: Path) -> None:
    content = bytearray((path / STATE_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (path / STATE_FILE).write_bytes(bytes(content))


def truncate(path: Path) -> None:
    (path / STATE_FILE).write_bytes((path / STATE_FILE).read_bytes()[:-100])


def garble(path: Path) -> None:
    (path / DESCRIPTION_FILE).write_text("{not json")


def remove_description(path: Path) -> None:
    (path / DESCRIPTION_FILE).unlink()


def other_format(path: Path) -> None:
    description = json.loads((path / DESCRIPTION_FILE).read_text())
    (path / DESCRIPTION_FILE).write_text(json.dumps({**description, "format_version": 99}))


def foreign(path: Path) -> None:
    (path / DESCRIPTION_FILE).write_text(json.dumps(["something", "else"]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "damaged"),
        (truncate, "damaged"),
        (garble, "not a readable checkpoint"),
        (remove_description, "not a readable checkpoint"),
        (other_format, "format 99"),
        (foreign, "does not describe a checkpoint"),
    ],
)
def test_damage_is_an_error_that_names_the_path(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    store = CheckpointStore(tmp_path)
    path = save(store, 1, 1)
    damage(path)

    with pytest.raises(CheckpointError, match=message) as error:
        store.last()
    assert str(path) in str(error.value)


@pytest.mark.parametrize("damage", [flip, truncate, garble, remove_description])
def test_an_older_checkpoint_takes_the_place_of_a_damaged_one_with_a_warning(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    older = save(store, 1, 1)
    path = save(store, 2, 1)
    damage(path)

    last, best = store.last(), store.best()
    assert last is not None
    assert best is not None
    assert (last.path, best.path) == (older, older)
    assert str(path) in caplog.text
    save(store, 2, 1)  # trained again
    assert store.last() == read_checkpoint(path)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path / "run"), 1, 1)
    marker = tmp_path / "executed"
    torch.save({"model": Malicious(marker)}, path / STATE_FILE)
    description = json.loads((path / DESCRIPTION_FILE).read_text())
    description["sha256"] = hashlib.sha256((path / STATE_FILE).read_bytes()).hexdigest()
    (path / DESCRIPTION_FILE).write_text(json.dumps(description))

    with pytest.raises(CheckpointError, match="cannot load"):
        load_state(read_checkpoint(path), "cpu")
    assert not marker.exists()
