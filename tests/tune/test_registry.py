"""The registry: whose checkpoint has the alias `best`, and getting it back byte by byte."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from scipy import stats

from rum.errors import TrackingError
from rum.tasks import CharacterLMConfig, CopyingConfig, Task
from rum.train import TrackingConfig
from rum.training.checkpoint import Checkpoint, CheckpointStore
from rum.tune.registry import Registered, fetch, model_name, register
from rum.tune.spread import Spread
from rum.tune.tracking import connect, tracking_uri

COPYING = CopyingConfig(delay=3, batch_size=8).load(seed=0)
NAME = "rum-copying-T3"


@pytest.fixture
def client(output_dir: Path) -> MlflowClient:
    return connect(TrackingConfig(), output_dir)[0]


@pytest.fixture
def offer(client: MlflowClient, tmp_path: Path) -> Callable[..., Registered]:
    """Registers a checkpoint of a run of its own; an earlier run with `run_id`."""

    def offer(
        value: float,
        task: Task = COPYING,
        name: str = "copying",
        run_id: str | None = None,
        spread: Spread | None = None,
    ) -> Registered:
        if run_id is None:
            experiment = client.get_experiment_by_name("rum")
            run_id = client.create_run(experiment.experiment_id).info.run_id
        return register(client, run_id, checkpoint(tmp_path, value), task, name, spread)

    return offer


def checkpoint(folder: Path, value: float) -> Checkpoint:
    store = CheckpointStore(folder / f"value_{value}")
    if store.last() is None:
        weights = torch.full((3,), value)
        store.save({"weights": weights}, {"step": 5, "best_step": 5, "best_value": value})
    best = store.best()
    assert best is not None
    return best


def versions(client: MlflowClient) -> list[str]:
    return sorted(str(v.version) for v in client.search_model_versions(f"name = '{NAME}'"))


def holder(client: MlflowClient, name: str = NAME) -> str:
    return str(client.get_model_version_by_alias(name, "best").version)


def test_the_first_model_gets_the_alias(
    client: MlflowClient, offer: Callable[..., Registered]
) -> None:
    registered = offer(2.0)
    assert (registered.name, registered.version) == (NAME, "1")
    assert holder(client) == "1"
    assert registered.message == (
        "models:/rum-copying-T3@best is now version 1 (cross_entropy 2.0000)"
    )


def test_a_version_says_what_it_is(client: MlflowClient, offer: Callable[..., Registered]) -> None:
    offer(2.0)
    version = client.get_model_version(NAME, "1")
    names = ("metric", "value", "protocol", "data_checksum")
    assert {name: version.tags[name] for name in names} == {
        "metric": "cross_entropy",
        "value": "2.0",
        "protocol": COPYING.protocol,
        "data_checksum": COPYING.checksum,
    }
    assert version.source.endswith("/artifacts/checkpoint")


def test_the_alias_moves_to_a_better_model(
    client: MlflowClient, offer: Callable[..., Registered]
) -> None:
    offer(2.0)
    registered = offer(1.5)
    assert holder(client) == registered.version == "2"
    assert "is now version 2" in registered.message


@pytest.mark.parametrize("value", [2.0, 2.5])
def test_the_alias_stays_where_it_is_not_beaten(
    client: MlflowClient, offer: Callable[..., Registered], value: float
) -> None:
    first = offer(2.0)
    run_id = client.get_model_version(NAME, first.version).run_id
    experiment = client.get_experiment_by_name("rum")
    other = client.create_run(experiment.experiment_id).info.run_id
    registered = offer(value, run_id=other)
    assert run_id != other
    assert holder(client) == "1"
    assert registered.version == "2"
    assert "stays at version 1 (cross_entropy 2.0000)" in registered.message


def test_the_alias_stays_under_another_protocol(
    client: MlflowClient, offer: Callable[..., Registered]
) -> None:
    offer(2.0)
    other = CopyingConfig(delay=3, batch_size=8, evaluation_batches=2).load(seed=0)
    assert other.checksum == COPYING.checksum
    registered = offer(1.0, other)
    assert holder(client) == "1"
    assert "stays at version 1, which was measured under another protocol" in registered.message


def test_the_alias_stays_on_other_data(
    client: MlflowClient, offer: Callable[..., Registered], tmp_path: Path
) -> None:
    tasks = []
    for folder, text in (("a", "to be or not to be " * 50), ("b", "not to be or to be " * 50)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "words.txt").write_text(text)
        config = CharacterLMConfig(
            corpus=str(tmp_path / folder / "words.txt"), batch_size=2, bptt_length=5
        )
        tasks.append(config.load(seed=0))
    assert tasks[0].protocol == tasks[1].protocol
    assert offer(2.0, tasks[0], "character_lm").name == "rum-character_lm-words"
    registered = offer(1.0, tasks[1], "character_lm")
    assert holder(client, "rum-character_lm-words") == "1"
    assert "on other data; this one is version 2" in registered.message


@pytest.mark.parametrize(
    ("held", "offered", "moves"),
    [
        (Spread(0.50, 0.01, 3), Spread(0.40, 0.01, 3), True),
        (Spread(0.50, 0.05, 3), Spread(0.45, 0.05, 3), False),  # better, not beyond noise
        (Spread(0.40, 0.01, 3), Spread(0.50, 0.01, 3), False),  # worse
        (None, Spread(0.40, 0.001, 3), True),
        (None, Spread(0.49, 0.05, 3), False),
        (Spread(0.50, 0.01, 3), None, True),  # 0.3 lies outside of 0.5 ± 4.3 x 0.01 x 1.15
        (Spread(0.50, 0.10, 3), None, False),
    ],
)
def test_the_alias_moves_only_beyond_noise(
    client: MlflowClient,
    offer: Callable[..., Registered],
    held: Spread | None,
    offered: Spread | None,
    moves: bool,
) -> None:
    offer(0.5, spread=held)
    registered = offer(0.3, spread=offered)
    assert holder(client) == ("2" if moves else "1")
    worse = held is not None and offered is not None and offered.mean > held.mean
    assert ("not beyond noise" in registered.message) == (not moves and not worse)
    if moves:
        offer(0.31, spread=offered)  # the tags say of the new holder what it was registered with
        assert holder(client) == "2"


def test_registering_again_adds_no_version_and_moves_nothing(
    client: MlflowClient, offer: Callable[..., Registered]
) -> None:
    first = offer(2.0)
    run_id = client.get_model_version(NAME, first.version).run_id
    offer(1.5)
    again = offer(2.0, run_id=run_id)
    assert again.version == first.version
    assert versions(client) == ["1", "2"]
    assert holder(client) == "2"
    assert "stays at version 2" in again.message


def test_registering_again_under_more_seeds_says_those(
    client: MlflowClient, offer: Callable[..., Registered]
) -> None:
    first = offer(0.3, spread=Spread(0.40, 0.02, 2))
    run_id = client.get_model_version(NAME, first.version).run_id
    spread = Spread(0.45, 0.05, 3)
    assert offer(0.3, run_id=run_id, spread=spread).version == first.version
    tags = client.get_model_version(NAME, first.version).tags
    assert (tags["mean"], tags["std"], tags["seeds"]) == ("0.45", "0.05", "3")
    half = stats.t.ppf(0.975, 2) * 0.05 / math.sqrt(3)
    assert json.loads(tags["interval"]) == pytest.approx([0.45 - half, 0.45 + half])
    assert versions(client) == ["1"]


def test_registering_the_holder_again_says_that_it_is_the_best(
    client: MlflowClient, offer: Callable[..., Registered]
) -> None:
    first = offer(2.0)
    again = offer(2.0, run_id=client.get_model_version(NAME, first.version).run_id)
    assert again.message == "models:/rum-copying-T3@best is version 1 (cross_entropy 2.0000)"


def test_registering_again_gives_the_alias_that_a_dead_driver_did_not_set(
    client: MlflowClient, offer: Callable[..., Registered]
) -> None:
    first = offer(2.0)
    run_id = client.get_model_version(NAME, first.version).run_id
    client.delete_registered_model_alias(NAME, "best")
    offer(2.0, run_id=run_id)
    assert holder(client) == "1"
    assert versions(client) == ["1"]


def test_tasks_and_corpora_have_models_of_their_own() -> None:
    longer = CopyingConfig(delay=30).load(seed=0)
    assert model_name(COPYING, "copying") == "rum-copying-T3"
    assert model_name(longer, "copying") == "rum-copying-T30"


@pytest.mark.parametrize("reference", ["@best", "/1"])
def test_fetch_gives_the_same_bytes_and_the_run(
    client: MlflowClient,
    offer: Callable[..., Registered],
    output_dir: Path,
    tmp_path: Path,
    reference: str,
) -> None:
    offer(2.0)
    uri = tracking_uri(TrackingConfig(), output_dir)
    fetched = fetch(client, f"models:/{NAME}{reference}", uri, tmp_path / "here")
    original = checkpoint(tmp_path, 2.0).path
    assert fetched.path.is_relative_to(tmp_path / "here")
    assert sums(fetched.path) == sums(original)
    assert fetched.run_id == client.get_model_version(NAME, "1").run_id


def sums(folder: Path) -> dict[str, str]:
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert set(files) == {"state.pt", "checkpoint.json"}
    return files


@pytest.mark.parametrize(
    "uri", ["models:/rum-copying-T4@best", f"models:/{NAME}/7", f"models:/{NAME}", "models:/"]
)
def test_fetching_what_is_not_there_is_an_error_that_names_it(
    client: MlflowClient,
    offer: Callable[..., Registered],
    output_dir: Path,
    tmp_path: Path,
    uri: str,
) -> None:
    offer(2.0)
    with pytest.raises(TrackingError, match=f"cannot get {uri}: "):
        fetch(client, uri, tracking_uri(TrackingConfig(), output_dir), tmp_path)
