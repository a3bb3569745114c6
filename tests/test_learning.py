"""What is learned: the recorded curves, and (marker `learning`, minutes) made again.

The curves are results/learning.json, made by `python benchmarks/learning.py`.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rum.parameters import flatten

ROOT = Path(__file__).parents[1]


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("learning", ROOT / "benchmarks" / "learning.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded(name: str) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads((ROOT / "results" / "learning.json").read_text())[name]
    assert {run["seed"] for run in runs} == {0, 1, 2}
    experiment = benchmark().EXPERIMENTS[name][0]
    for run in runs:  # a curve of other options proves nothing
        experiment.training.seed = run["seed"]
        now = json.loads(json.dumps(flatten(experiment)))
        known = {name: value for name, value in now.items() if value is not None}
        assert {k: v for k, v in run["experiment"].items() if v is not None} == known
    return runs


def last(run: dict[str, Any], metric: str) -> float:
    values: list[float] = run["curves"][f"validation/{metric}"]
    return values[-1]


def best(run: dict[str, Any], metric: str) -> float:
    return max(run["curves"][f"validation/{metric}"])


def solves_recall(run: dict[str, Any]) -> bool:
    return best(run, "accuracy") > 0.99 and run["baselines"] == {"memoryless": 0.1}


def solves_copying(run: dict[str, Any]) -> bool:
    is_small = last(run, "cross_entropy") < 0.1 * run["baselines"]["memoryless"]
    return best(run, "answer_accuracy") > 0.99 and is_small


def stays_at_the_baseline(run: dict[str, Any]) -> bool:
    baseline = 10 * math.log(8) / 120
    is_named = run["baselines"]["memoryless"] == pytest.approx(baseline)
    is_there = min(run["curves"]["validation/cross_entropy"]) > 0.95 * baseline
    return is_named and is_there and best(run, "answer_accuracy") < 0.25  # one in eight is chance


def leaves_the_baseline(run: dict[str, Any]) -> bool:
    return last(run, "cross_entropy") < 0.7 * run["baselines"]["memoryless"]


CLAIMS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "recall_rum_lambda1_T10": solves_recall,
    "copying_rum_lambda1_T30": solves_copying,
    "copying_lstm_T100": stays_at_the_baseline,
    "copying_rum_T100": leaves_the_baseline,
}


@pytest.mark.parametrize("name", CLAIMS)
def test_every_seed_of_the_recorded_curves_shows_the_claim(name: str) -> None:
    for run in recorded(name):
        assert CLAIMS[name](run), run["curves"]


def test_recall_needs_the_associative_memory() -> None:
    without = max(best(run, "accuracy") for run in recorded("recall_rum_lambda0_T10"))
    assert without < 0.6 < min(best(run, "accuracy") for run in recorded("recall_rum_lambda1_T10"))


def test_the_recorded_text_models_have_equal_size_and_steps() -> None:
    """Their bits per character are stated in the README, whichever is lower."""
    fast_slow, lstm = recorded("ptb_fs_rum_2_small"), recorded("ptb_lstm_small")
    assert fast_slow[0]["parameters"] == pytest.approx(lstm[0]["parameters"], rel=0.01)
    assert fast_slow[0]["curves"]["step"] == lstm[0]["curves"]["step"]
    for run in (*fast_slow, *lstm):
        assert last(run, "bits_per_character") < run["baselines"]["bigram"] - 1.0


@pytest.mark.learning
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CLAIMS)
def test_another_seed_shows_the_claim(name: str) -> None:
    module = benchmark()
    run = module.curve(module.EXPERIMENTS[name][0], 3)
    assert CLAIMS[name](run), run["curves"]
