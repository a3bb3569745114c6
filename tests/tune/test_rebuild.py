"""A study whose database was lost is rebuilt from MLflow, with every trial, and goes on."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from optuna.trial import FrozenTrial, TrialState

from rum.cells import RUMConfig
from rum.errors import StudyError
from rum.experiment import ExperimentConfig, parameter_count
from rum.tasks import CopyingConfig
from rum.train import TrackingConfig
from rum.training.config import TrainingConfig
from rum.tune.audit import check_study
from rum.tune.conductor import Conductor
from rum.tune.config import (
    CheckConfig,
    Domain,
    SamplerConfig,
    SchedulerConfig,
    SearchConfig,
    SearchOptions,
)
from rum.tune.database import open_storage
from rum.tune.limits import Limits
from rum.tune.messages import CRASHED, DIVERGED, FINISHED, RUNNING, Workplace
from rum.tune.prediction import Predictor
from rum.tune.rebuild import RecordedStudy, read_study, rebuild
from rum.tune.schedulers.halving import Halving
from rum.tune.search import run_search
from rum.tune.space import Space, space_to_plain
from rum.tune.study import Study, ensure_study, study_names
from rum.tune.tracking import (
    DEFINITION_FILE,
    INTERRUPTED,
    STUDY_ID_TAG,
    TARGET_TAG,
    TRIAL_TAG,
    Tracker,
    connect,
)

SPACE = {
    "model.hidden_size": Domain(type="int", low=4, high=12, step=2),
    "model.eta": Domain(type="categorical", choices=[None, 0.5, 1.0]),
    "training.learning_rate": Domain(type="float", low=1e-4, high=1e-1, log=True),
    "training.schedule.name": Domain(type="categorical", choices=["constant", "drop"]),
    "training.schedule.drop_at": Domain(
        type="float", low=0.3, high=0.8, when={"training.schedule.name": "drop"}
    ),
}
BASE = ExperimentConfig(
    model=RUMConfig(hidden_size=6),
    task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
    training=TrainingConfig(max_epochs=4),
)
TASK = BASE.task.load(seed=0)
TPE = SamplerConfig(name="tpe")
DEFINITION = {"space": space_to_plain(SPACE), "mode": "min", "experiment": {"a": 1}}
BEST = "validation/best_cross_entropy"
WORKER = {"host": "elsewhere", "device": "cpu", "pid": 123}


class Driver:
    """A conductor with its books, told by hand what its trials do."""

    def __init__(
        self,
        output_dir: Path,
        sampler: SamplerConfig = TPE,
        space: Space = SPACE,
        max_parameters: int | None = None,
    ) -> None:
        self.definition = {**DEFINITION, "space": space_to_plain(space)}
        self.storage = open_storage(output_dir)
        ensure_study(self.storage, "mine", self.definition)
        self.study = Study(self.storage, "mine", space, sampler)
        self.study.target = 8
        client, experiment_id = connect(TrackingConfig(), output_dir)
        tags = {"rum.metric": TASK.metric}
        self.tracker = Tracker(
            client, experiment_id, "mine", TASK, tags, {"a": 1}, study_id=self.study.id
        )
        self.tracker.log_text(json.dumps(self.definition), DEFINITION_FILE)
        self.tracker.tag_study(TARGET_TAG, str(self.study.target))
        workplace = Workplace(dataclasses.asdict(BASE), str(output_dir / "mine"), None)
        rungs = Halving([2], 2, "min")
        limits = Limits(Predictor(BASE, TASK), max_parameters)
        self.conductor = Conductor(self.study, BASE, TASK, rungs, self.tracker, workplace, limits)

    def start(self) -> int:
        spec = self.conductor.next_trial()
        assert spec is not None
        return spec.number

    def tell(self, number: int, *values: float) -> None:
        for epoch, value in enumerate(values, 1):
            report = {
                "epoch": epoch,
                "step": 5 * epoch,
                "validation/cross_entropy": value,
                BEST: min(values[:epoch]),
            }
            status = FINISHED if epoch == BASE.training.max_epochs else RUNNING
            self.conductor.on_message(
                {"number": number, "status": status, "report": report, "worker": WORKER}
            )

    def end(self, number: int, status: str, reason: str) -> None:
        self.conductor.on_message(
            {"number": number, "status": status, "reason": reason, "worker": WORKER}
        )


@pytest.fixture
def driver(output_dir: Path) -> Iterator[Driver]:
    """A study with a trial of each kind; 2 and 6 are running, 7 of 8 have begun."""
    driver = Driver(output_dir)
    for expected in range(7):
        assert driver.start() == expected
    driver.tell(0, 0.1 + 0.2, 0.25, 1 / 3, 0.2)
    driver.tell(1, 0.9, 0.9)  # stopped at the rung
    driver.tell(2, 0.3, 0.2)
    driver.tell(3, 0.4)
    driver.end(3, DIVERGED, "diverged: loss is not finite at update 7")
    driver.end(4, CRASHED, "crashed: ValueError: no\nwith a trace")
    driver.end(5, DIVERGED, "diverged: loss is not finite at update 2")
    yield driver
    driver.tracker.close(INTERRUPTED)


def read(output_dir: Path, definition: dict[str, Any] = DEFINITION) -> RecordedStudy:
    client, experiment_id = connect(TrackingConfig(), output_dir)
    return read_study(client, experiment_id, "mine", definition, output_dir / "mine")


def lose_database(output_dir: Path) -> None:
    for path in output_dir.glob("optuna.*"):
        path.unlink()


def plain(trial: FrozenTrial) -> dict[str, Any]:
    """All of a trial but its times."""
    kept = ("state", "params", "distributions", "user_attrs", "intermediate_values", "number")
    return {name: getattr(trial, name) for name in kept} | {"value": trial.value}


def assert_same_trials(before: list[FrozenTrial], after: list[FrozenTrial]) -> None:
    assert list(map(plain, after)) == list(map(plain, before))
    for old, new in zip(before, after, strict=True):
        for name in ("datetime_start", "datetime_complete"):
            began, begins = getattr(old, name), getattr(new, name)
            assert (began is None) == (begins is None)
            if began is not None:
                assert abs(began - begins) <= timedelta(milliseconds=1)


def test_every_kind_of_trial_is_rebuilt(driver: Driver, output_dir: Path) -> None:
    driver.tracker.flush()
    before = driver.study.trials()
    states = [trial.state.name for trial in before]
    assert states == ["COMPLETE", "PRUNED", "RUNNING", "PRUNED", "FAIL", "PRUNED", "RUNNING"]
    study_id = driver.study.id
    lose_database(output_dir)

    storage = open_storage(output_dir)
    said = rebuild(storage, read(output_dir))
    after = Study(storage, "mine", SPACE, SamplerConfig(name="tpe"))
    assert_same_trials(before, after.trials())
    assert (after.id, after.target, after.definition) == (study_id, 8, DEFINITION)
    assert after.mode == "min"
    assert said == (
        "Study mine is rebuilt from MLflow: 7 trials (1 COMPLETE, 1 FAIL, 3 PRUNED, 2 RUNNING)"
    )
    text, agrees = check_study(CheckConfig(study="mine", output_dir=str(output_dir)))
    assert agrees, text


@pytest.mark.parametrize("name", ["random", "tpe", "qmc"])
def test_the_rebuilt_study_asks_what_the_lost_one_would_have(
    name: str, output_dir: Path, tmp_path: Path
) -> None:
    sampler = SamplerConfig(name=name, startup_trials=1)
    space = {"training.learning_rate": SPACE["training.learning_rate"]}
    driver = Driver(output_dir, sampler, space)
    for number in range(4):
        driver.start()
        driver.tell(number, 0.4, 0.3, 0.3, 0.2 + number / 100)
    driver.tracker.close(INTERRUPTED)
    storage = open_storage(tmp_path / "elsewhere")
    rebuild(storage, read(output_dir, driver.definition))
    studies = [Study(each, "mine", space, sampler) for each in (storage, driver.storage)]
    rebuilt, lost = ([study.ask().parameters for _ in range(2)] for study in studies)
    assert rebuilt == lost
    earlier = [trial.params for trial in studies[0].trials()[:4]]
    assert all(parameters not in earlier for parameters in rebuilt)


def test_what_the_sampler_was_told_of_limits_is_rebuilt(output_dir: Path, tmp_path: Path) -> None:
    sampler = SamplerConfig(name="nsga2", startup_trials=4)
    space = {"model.hidden_size": Domain(type="int", low=4, high=40)}
    limit = parameter_count(RUMConfig(hidden_size=20), TASK)
    driver = Driver(output_dir, sampler, space, limit)
    for value in range(6):
        driver.tell(driver.start(), *[1.0 + value] * 4)
    driver.tracker.close(INTERRUPTED)
    storage = open_storage(tmp_path / "elsewhere")
    rebuild(storage, read(output_dir, driver.definition))
    rebuilt, lost = (
        [trial.constraints for trial in Study(each, "mine", space, sampler).trials()]
        for each in (storage, driver.storage)
    )
    assert rebuilt == lost
    assert any(each["parameters"] > 0 for each in lost)
    assert any(each["parameters"] <= 0 for each in lost)


def test_what_was_running_goes_on_and_the_rest_follows(driver: Driver, output_dir: Path) -> None:
    driver.tracker.flush()
    lose_database(output_dir)
    rebuild(open_storage(output_dir), read(output_dir))

    second = Driver(output_dir)
    numbers = [second.start() for _ in range(3)]
    assert numbers == [2, 6, 7]
    assert second.conductor.next_trial() is None
    second.tell(2, 0.3, 0.2, 0.1, 0.05)  # its checkpoint is lost: from the start again
    for number in (6, 7):
        second.end(number, CRASHED, "crashed")
    assert second.study.trial(2).intermediate_values == {1: 0.3, 2: 0.2, 3: 0.1, 4: 0.05}
    second.tracker.close(INTERRUPTED)
    text, agrees = check_study(CheckConfig(study="mine", output_dir=str(output_dir)))
    assert agrees, text


def test_a_trial_that_mlflow_does_not_have_is_run_anew(driver: Driver, output_dir: Path) -> None:
    driver.tracker.flush()
    before = driver.study.trials()
    driver.tracker.client.delete_run(driver.tracker.run_id(1))
    lose_database(output_dir)
    storage = open_storage(output_dir)
    assert "of trials [1] MLflow has no run: they are run anew" in rebuild(
        storage, read(output_dir)
    )
    trials = Study(storage, "mine", SPACE, SamplerConfig()).trials()
    assert [trial.number for trial in trials] == list(range(7))
    assert trials[1].state == TrialState.WAITING
    assert_same_trials([before[0], *before[2:]], [trials[0], *trials[2:]])
    second = Driver(output_dir)
    assert [second.start() for _ in range(4)] == [2, 6, 1, 7]
    second.tracker.close(INTERRUPTED)


def test_of_two_studies_of_a_name_the_later_or_that_of_the_folder_is_rebuilt(
    driver: Driver, output_dir: Path
) -> None:
    driver.tracker.flush()
    first = driver.study.id
    lose_database(output_dir)
    second = Driver(output_dir)
    second.start()
    second.tracker.close(INTERRUPTED)
    assert second.study.id != first
    assert (read(output_dir).id, len(read(output_dir).trials)) == (second.study.id, 1)
    (output_dir / "mine").mkdir()
    (output_dir / "mine" / "study_id").write_text(first)
    assert (read(output_dir).id, len(read(output_dir).trials)) == (first, 7)


def test_what_cannot_be_rebuilt_is_refused(driver: Driver, output_dir: Path) -> None:
    driver.tracker.flush()
    with pytest.raises(StudyError, match=r"experiment\.a: 1 in the study, 2 now"):
        read(output_dir, {**DEFINITION, "experiment": {"a": 2}})
    client = driver.tracker.client
    client.delete_tag(driver.tracker.run_id(3), "rum.parameters")
    with pytest.raises(StudyError, match=r"trial 3 cannot be rebuilt .* rum\.parameters"):
        read(output_dir)
    client.set_tag(driver.tracker.parent_id, "rum.study", "mime")
    with pytest.raises(StudyError, match=r"no study 'mine'; did you mean 'mime'\?"):
        read(output_dir)


def test_a_rebuilding_that_was_cut_short_begins_again(driver: Driver, output_dir: Path) -> None:
    driver.tracker.flush()
    lose_database(output_dir)
    storage = open_storage(output_dir)
    recorded = read(output_dir)
    half = optuna.create_study(study_name="mine", storage=storage)
    half.add_trials(recorded.trials[:3])
    assert study_names(storage) == []
    with pytest.raises(StudyError, match=r"only half rebuilt.*resume=from_mlflow"):
        ensure_study(storage, "mine", DEFINITION)
    rebuild(storage, recorded)
    assert len(Study(storage, "mine", SPACE, SamplerConfig()).trials()) == 7


@pytest.mark.usefixtures("ray_session")
def test_a_search_goes_on_after_its_database_and_folder_were_deleted(output_dir: Path) -> None:
    config = SearchConfig(
        model=BASE.model,
        task=BASE.task,
        training=BASE.training,
        space=SPACE,
        scheduler=SchedulerConfig(grace_epochs=1, reduction_factor=2),
        search=SearchOptions(num_trials=4),
        study="mine",
        output_dir=str(output_dir),
    )
    run_search(config)
    before = Study(open_storage(output_dir), "mine", SPACE, config.sampler).trials()
    with pytest.raises(StudyError, match=r"study 'mine' is there.*resume=yes"):
        run_search(dataclasses.replace(config, resume="from_mlflow"))

    # As if the driver had died when a finished trial had not yet been recorded as such.
    complete = next(trial for trial in before if trial.state == TrialState.COMPLETE)
    client = MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rum")
    where = f"tags.`{TRIAL_TAG}` = '{complete.number}'"
    [run] = client.search_runs([experiment.experiment_id], where)
    client.update_run(run.info.run_id, status="RUNNING")
    lose_database(output_dir)
    shutil.rmtree(output_dir / "studies")

    again = dataclasses.replace(config, resume="from_mlflow")
    with pytest.raises(StudyError, match="other settings"):
        run_search(dataclasses.replace(again, training=TrainingConfig(max_epochs=5)))
    run_search(again)
    trials = Study(open_storage(output_dir), "mine", SPACE, config.sampler).trials()
    assert list(map(plain, trials)) == list(map(plain, before))
    check = CheckConfig(study="mine", output_dir=str(output_dir))
    assert check_study(check) == ("study mine: 4 trials, Optuna and MLflow agree", True)

    more = SearchOptions(num_trials=1)
    run_search(dataclasses.replace(config, resume="yes", search=more))
    assert check_study(check) == ("study mine: 5 trials, Optuna and MLflow agree", True)
    parents = {
        run.data.tags[STUDY_ID_TAG] for run in client.search_runs([experiment.experiment_id])
    }
    assert len(parents) == 1
