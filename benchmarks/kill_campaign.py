"""Kills workers, drivers and everything at random moments, and checks that nothing is lost.

python benchmarks/kill_campaign.py --kills 200       about an hour; results/kill_campaign.json

One search with `search.deterministic` runs undisturbed. Then the same search runs again and again,
each time killed (SIGKILL) at moments that a seed chooses, and resumed, until so many kills have
been done. After every kill: no trial is lost or has other parameters, and no recorded value
changed. After every search: Optuna and MLflow agree (`pipelines/check.py`), no point is there
twice, and the study equals the undisturbed one bit for bit.
"""

import argparse
import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient
from optuna.trial import FrozenTrial

from rum.tune.config import SamplerConfig
from rum.tune.database import open_storage
from rum.tune.study import Study, study_names

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "kill_campaign.json"
STUDY = "killed"
OPTIONS = (
    "preset=quick",
    "task.delay=3",
    "task.batch_size=8",
    "task.steps_per_epoch=40",
    "training.max_epochs=9",
    "scheduler=promotion",
    "sampler.startup_trials=4",
    "search.num_trials=8",
    "search.max_concurrent=2",
    "search.deterministic=true",
    "search.max_failures=1000",
    "space={model.hidden_size: {low: 8, high: 24, step: 8}}",
    f"study={STUDY}",
)
TARGETS = ("worker", "worker", "driver", "everything")
LONGEST_WAIT = 6.0  # seconds from a driver's start, or from its first epoch, to a kill
DEADLINE = 300.0


class CampaignError(Exception):
    """An invariant does not hold."""


class Search:
    """One search, from the first driver to the last."""

    def __init__(self, folder: Path) -> None:
        """In an empty folder."""
        self.folder = folder
        self.driver: subprocess.Popen[bytes] | None = None
        self.log = (folder / "log.txt").open("ab")

    def start(self) -> None:
        """Starts a driver, which goes on where the last one was killed."""
        exists = self.study() is not None
        command = [sys.executable, str(ROOT / "pipelines" / "tune_copying.py"), *OPTIONS]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        self.driver = subprocess.Popen(
            [*command, *(["resume=yes"] if exists else [])],
            cwd=self.folder,
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def study(self) -> Study | None:
        """The study as another process sees it; None before it is made."""
        output = self.folder / "outputs"
        if not (output / "optuna.db").exists():
            return None
        storage = open_storage(output)
        return (
            Study(storage, STUDY, {}, SamplerConfig()) if STUDY in study_names(storage) else None
        )

    def trials(self) -> list[FrozenTrial]:
        """What the study holds now."""
        study = self.study()
        return study.trials() if study is not None else []

    def processes(self) -> list[psutil.Process]:
        """All of the driver's session that live."""
        assert self.driver is not None
        found = []
        for process in psutil.process_iter():
            try:
                own = os.getsid(process.pid) == self.driver.pid
                if own and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def wait_for_progress(self, before: list[FrozenTrial]) -> None:
        """Until the driver has recorded an epoch, or ended."""
        assert self.driver is not None
        driver, known = self.driver, _num_epochs(before)
        _wait_until(
            lambda: driver.poll() is not None or _num_epochs(self.trials()) > known,
            "an epoch is recorded",
        )

    def kill(self, target: str, generator: random.Random) -> str | None:
        """Kills; returns what was killed, None if there was no such process."""
        assert self.driver is not None
        if target == "worker":
            workers = [p for p in self.processes() if _is_worker(p)]
            if not workers:
                return None
            generator.choice(workers).kill()
            return target
        if target == "everything":
            for process in self.processes():
                process.kill()
        self.driver.kill()
        self.driver.wait()
        _wait_until(lambda: not self.processes(), "the driver's processes end")
        return target


def _num_epochs(trials: list[FrozenTrial]) -> int:
    return sum(len(trial.intermediate_values) for trial in trials)


def _is_worker(process: psutil.Process) -> bool:
    try:
        title = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    return title.startswith("ray::ImplicitFunc")


def _wait_until(holds: Any, what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not holds():
        if time.monotonic() > deadline:
            raise CampaignError(f"waited {DEADLINE:.0f} s in vain until {what}")
        time.sleep(0.05)


def content(trials: list[FrozenTrial]) -> list[list[Any]]:
    """Everything that was decided and computed, nothing of when."""
    return [
        [t.number, t.state.name, t.params, t.intermediate_values, t.value, t.user_attrs]
        for t in trials
    ]


def check_kept(before: list[FrozenTrial], after: list[FrozenTrial]) -> None:
    """Raises CampaignError if something recorded is gone or has changed."""
    if len(after) < len(before):
        raise CampaignError(f"{len(before)} trials before, {len(after)} after")
    for old, new in zip(before, after, strict=False):
        for kind in ("params", "intermediate_values"):
            was, now = getattr(old, kind), getattr(new, kind)
            if {key: now.get(key) for key in was} != was:
                raise CampaignError(f"trial {old.number}: {kind} were {was}, are {now}")
        if old.state.is_finished() and old.state != new.state:
            raise CampaignError(f"trial {old.number} was {old.state.name}, is {new.state.name}")


def check_ended(folder: Path, undisturbed: list[list[Any]] | None) -> list[list[Any]]:
    """Raises CampaignError unless the books agree, without double points, and equal the others."""
    checked = subprocess.run(
        [sys.executable, str(ROOT / "pipelines" / "check.py"), f"study={STUDY}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if checked.returncode:
        raise CampaignError(checked.stdout + checked.stderr)
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("rum")
    for run in client.search_runs([experiment.experiment_id]):
        points = client.get_metric_history(run.info.run_id, "step")
        steps = [point.step for point in points]
        if len(set(steps)) != len(steps):
            raise CampaignError(f"run {run.info.run_name} has points twice: {sorted(steps)}")
    search = Search(folder)
    found = content(search.trials())
    search.log.close()
    if undisturbed is not None and found != undisturbed:
        different = [(a, b) for a, b in zip(found, undisturbed, strict=False) if a != b]
        raise CampaignError(f"not as undisturbed: {different or (len(found), len(undisturbed))}")
    return found


def run_to_end(search: Search, kills: int, generator: random.Random) -> Counter[str]:
    """Runs a search with up to so many kills; returns what was killed, how often."""
    killed: Counter[str] = Counter()
    search.start()
    assert search.driver is not None
    before: list[FrozenTrial] = []
    while True:
        moment = generator.uniform(0.0, LONGEST_WAIT)
        target = generator.choice(TARGETS)
        if generator.random() < 0.5 or target == "worker":
            search.wait_for_progress(before)
        try:
            done = search.driver.wait(DEADLINE if killed.total() >= kills else moment)
        except subprocess.TimeoutExpired:
            if killed.total() >= kills:
                raise CampaignError("the undisturbed rest did not end") from None
            what = search.kill(target, generator)
            if what is None:
                continue
            killed[what] += 1
            after = search.trials()
            check_kept(before, after)
            before = after
            if what == "worker":
                continue
            study = search.study()
            if study is not None and study.is_concluded:  # resumed, it would be extended
                return killed
            search.start()
            continue
        if done:
            raise CampaignError(f"a driver ended with {done}: {search.folder / 'log.txt'}")
        check_kept(before, search.trials())
        return killed


def main() -> None:
    """Runs the campaign, prints and keeps its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    killed: Counter[str] = Counter()
    searches = 0
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="rum-kills-"))
    undisturbed: list[list[Any]] | None = None
    while undisturbed is None or killed.total() < arguments.kills:
        folder = root / f"{searches:03d}"
        folder.mkdir()
        search = Search(folder)
        wanted = 0 if undisturbed is None else arguments.kills - killed.total()
        killed += run_to_end(search, wanted, generator)
        search.log.close()
        found = check_ended(folder, undisturbed)
        undisturbed = undisturbed or found
        shutil.rmtree(folder)
        searches += 1
        print(f"{searches} searches, {killed.total()} kills: {dict(killed)}", flush=True)
        if searches > 1:
            result = {
                "date": datetime.date.today().isoformat(),
                "seed": arguments.seed,
                "kills": dict(killed),
                "searches": searches - 1,
                "trials_each": len(undisturbed),
                "violations": 0,
                "minutes": round((time.monotonic() - began) / 60, 1),
            }
            arguments.out.write_text(json.dumps(result, indent=1))
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
