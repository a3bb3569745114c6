"""Candidates beyond a limit: refused before they train, in all books, and no lesson in quality."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from rum.cells import RUMConfig
from rum.errors import ConfigError, StudyError
from rum.experiment import ExperimentConfig, parameter_count
from rum.tasks import CopyingConfig
from rum.train import TrackingConfig
from rum.training.config import TrainingConfig
from rum.tune.conductor import REFUSALS_PER_TRIAL, Conductor
from rum.tune.config import (
    ContinuedTrainingConfig,
    Domain,
    ResumeConfig,
    SamplerConfig,
    SearchConfig,
    SearchOptions,
)
from rum.tune.continuation import continue_best
from rum.tune.database import open_storage
from rum.tune.limits import Limits, check_feasible, limits_of, with_share
from rum.tune.messages import FINISHED, Workplace
from rum.tune.prediction import Predictor
from rum.tune.results import best_trials, failures, refusals
from rum.tune.schedulers.halving import Halving
from rum.tune.search import run_search
from rum.tune.study import FINALIST, ORIGIN, Study, ensure_study
from rum.tune.tracking import INTERRUPTED, Tracker, connect

TASK_CONFIG = CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5)
BASE = ExperimentConfig(
    model=RUMConfig(hidden_size=8), task=TASK_CONFIG, training=TrainingConfig(max_epochs=1)
)
TASK = TASK_CONFIG.load(seed=0)
SPACE = {
    "model.hidden_size": Domain(type="int", low=4, high=40),
    "training.learning_rate": Domain(type="float", low=1e-4, high=1e-1, log=True),
}


def count(size: int) -> int:
    return parameter_count(RUMConfig(hidden_size=size), TASK)


def limits(max_parameters: int | None = None, max_bytes: float | None = None) -> Limits:
    return Limits(Predictor(BASE, TASK), max_parameters, max_bytes)


def with_size(size: int) -> ExperimentConfig:
    return dataclasses.replace(BASE, model=RUMConfig(hidden_size=size))


# The limits by themselves


def test_a_candidate_at_the_limit_is_feasible_and_one_above_is_not() -> None:
    at, above = limits(count(20)).judge(with_size(20)), limits(count(20)).judge(with_size(21))
    assert (at.excess, at.reason) == ({"parameters": 0.0}, None)
    assert above.excess == {"parameters": pytest.approx(count(21) / count(20) - 1)}
    assert above.reason == f"infeasible: {count(21):,} parameters, at most {count(20):,}"


def test_memory_is_limited_by_its_prediction() -> None:
    memory = Predictor(BASE, TASK).predict(with_size(20)).memory_bytes
    assert limits(None, memory).judge(with_size(20)).reason is None
    verdict = limits(count(4), memory - 1).judge(with_size(20))
    assert set(verdict.excess) == {"parameters", "memory"}
    assert verdict.reason is not None
    assert f"; {memory / 1e9:.2f} GB of memory, at most" in verdict.reason
    assert limits().judge(with_size(10_000)).reason is None


def search_config(**options: Any) -> SearchConfig:
    return SearchConfig(
        model=BASE.model,
        task=BASE.task,
        training=BASE.training,
        space=SPACE,
        search=SearchOptions(**options),
    )


def test_the_limits_of_a_search_are_its_options() -> None:
    config = search_config(max_parameters=1000, max_memory_gigabytes=2.5)
    found = limits_of(config, Predictor(BASE, TASK))
    assert (found.max_parameters, found.max_memory_bytes) == (1000, 2.5e9)
    found = limits_of(search_config(), Predictor(BASE, TASK))
    assert (found.max_parameters, found.max_memory_bytes) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_parameters": 0}, r"search\.max_parameters must be an integer >= 1"),
        ({"max_memory_gigabytes": -1.0}, r"search\.max_memory_gigabytes must be a finite"),
        ({"gpus_per_trial": "half"}, r"must be >= 0 or 'auto', got 'half'"),
        ({"gpus_per_trial": -0.5}, r"must be >= 0 or 'auto', got -0\.5"),
    ],
)
def test_limits_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchOptions(**options)


def test_a_space_that_is_infeasible_down_to_its_smallest_end_is_refused_with_the_number() -> None:
    config = search_config(max_parameters=count(4) - 1)
    with pytest.raises(
        ConfigError, match=f"even the smallest .* {count(4):,} parameters, at most"
    ):
        check_feasible(config, limits_of(config, Predictor(BASE, TASK)))
    config = search_config(max_parameters=count(4))
    check_feasible(config, limits_of(config, Predictor(BASE, TASK)))


def test_on_the_cpu_no_share_of_a_gpu_is_chosen_and_numbers_stay() -> None:
    predictor = Predictor(BASE, TASK)
    assert with_share(search_config(gpus_per_trial="auto"), predictor).search.gpus_per_trial == 0
    for given in (0.3, 2):
        config = search_config(gpus_per_trial=given)
        assert with_share(config, predictor) == config


# In the books


@dataclasses.dataclass
class Driver:
    study: Study
    conductor: Conductor
    tracker: Tracker

    def finish(self, number: int, value: float) -> None:
        best = "validation/best_cross_entropy"
        report = {"epoch": 1, "step": 5, "validation/cross_entropy": value, best: value}
        message = {"number": number, "status": FINISHED, "report": report, "worker": {}}
        self.conductor.on_message(message)


@pytest.fixture
def driver(output_dir: Path) -> Any:
    """Opens the study as a new driver."""
    opened: list[Driver] = []

    def driver(
        target: int,
        max_parameters: int | None,
        space: dict[str, Domain] = SPACE,
        sampler: str = "random",
    ) -> Driver:
        for dead in opened:
            dead.tracker.flush()
        storage = open_storage(output_dir)
        ensure_study(storage, "study", {"mode": "min"})
        study = Study(storage, "study", space, SamplerConfig(name=sampler, startup_trials=4))
        study.target = target
        workplace = Workplace(
            dataclasses.asdict(BASE), str(output_dir / "studies" / "study"), None
        )
        client, experiment_id = connect(TrackingConfig(), output_dir)
        tags = {"rum.metric": TASK.metric}
        tracker = Tracker(client, experiment_id, "study", TASK, tags, {"a": 1}, study_id=study.id)
        conductor = Conductor(
            study, BASE, TASK, Halving([], 2, "min"), tracker, workplace, limits(max_parameters)
        )
        opened.append(Driver(study, conductor, tracker))
        return opened[-1]

    yield driver
    for each in opened:
        each.tracker.close(INTERRUPTED)


def test_a_finalist_is_not_refused_by_what_its_search_has_learnt_since(
    driver: Callable[..., Driver],
) -> None:
    search = driver(1, count(20))
    search.study.enqueue({"model.hidden_size": 30}, {FINALIST: {"trial": 3, "seed": 8}})
    spec = search.conductor.next_trial()
    assert spec is not None
    assert (spec.number, spec.parameters["model.hidden_size"]) == (0, 30)
    assert search.study.refused() == []


def test_infeasible_candidates_are_recorded_and_do_not_count(
    driver: Callable[..., Driver],
    output_dir: Path,
    runs_of: Callable[..., Any],
    check_books: Callable[..., None],
) -> None:
    search = driver(5, count(20))
    started = []
    while (spec := search.conductor.next_trial()) is not None:
        assert spec.parameters["model.hidden_size"] <= 20
        started.append(spec.number)
        search.finish(spec.number, 1.0)
    assert len(started) == 5, "refused candidates took the place of trials"
    refused = [trial for trial in search.study.trials() if trial.number not in started]
    assert refused, "no candidate was beyond the limit: nothing is tested"
    search.tracker.flush()
    check_books(output_dir, "study", "cross_entropy")
    runs = runs_of(output_dir, "study")
    for trial in refused:
        size = trial.params["model.hidden_size"]
        assert size > 20
        assert trial.state == TrialState.PRUNED
        assert trial.constraints["parameters"] == pytest.approx(count(size) / count(20) - 1)
        run = runs[trial.number]
        reason = f"infeasible: {count(size):,} parameters, at most {count(20):,}"
        assert (run.info.status, run.data.tags["rum.state"]) == ("KILLED", "infeasible")
        assert run.data.tags["rum.reason"] == reason
        assert run.data.params["model.hidden_size"] == str(size)
    assert all(search.study.trial(number).constraints["parameters"] <= 0 for number in started)

    assert search.conductor.progress() == (
        f"5/5 trials | 5 finished | {len(refused)} infeasible | best 1.0000 cross_entropy"
    )
    assert {trial.number for trial in search.study.ranked()} == set(started)
    assert failures(search.study) == []
    (line,) = refusals(search.study)
    assert line.startswith(
        f"{len(refused)} candidates were not trained, the first: trial {refused[0].number} infeas"
    )
    assert "infeasible" not in best_trials(search.study, TASK)


def test_values_that_are_not_valid_together_are_refused_as_infeasible(
    driver: Callable[..., Driver],
    output_dir: Path,
    runs_of: Callable[..., Any],
    check_books: Callable[..., None],
) -> None:
    pair = ("model.lambda_", "model.lambda_trainable")
    space = {
        pair[0]: Domain(type="categorical", choices=[0.0, 0.5]),
        pair[1]: Domain(type="categorical", choices=[False, True]),
    }
    search = driver(6, None, space)
    for _ in range(3):
        spec = search.conductor.next_trial()
        assert spec is not None
        search.finish(spec.number, 1.0)
    search = driver(6, None, space)  # a later driver meets them among the trials that ended
    while (spec := search.conductor.next_trial()) is not None:
        search.finish(spec.number, 1.0)
    trials = search.study.trials()
    asked = [tuple(trial.params[name] for name in pair) for trial in trials]
    refused = {trial.number for trial in search.study.refused()}
    assert refused == {number for number, values in enumerate(asked) if values == (0.0, True)}
    assert refused, "no two values contradicted each other: nothing is tested"
    assert len(trials) == 6 + len(refused)
    search.tracker.flush()
    check_books(output_dir, "study", "cross_entropy")
    runs = runs_of(output_dir, "study")
    for number in refused:
        assert runs[number].data.tags["rum.reason"].startswith("infeasible: model.lambda_")
        values = [runs[number].data.params[name] for name in pair]
        assert values == ["0.0", "true"]


def test_a_later_driver_counts_as_the_first_did(
    driver: Callable[..., Driver], output_dir: Path, check_books: Callable[..., None]
) -> None:
    first = driver(4, count(20))
    done = first.conductor.next_trial()
    left = first.conductor.next_trial()
    assert done is not None
    assert left is not None
    first.finish(done.number, 2.0)
    second = driver(4, count(20))
    assert (second.conductor.num_ended, second.conductor.num_open) == (1, 3)
    numbers = []
    while (spec := second.conductor.next_trial()) is not None:
        numbers.append(spec.number)
        second.finish(spec.number, 1.0)
    assert numbers[0] == left.number
    assert len(numbers) == 3
    assert len(second.study.ended()) == 4
    second.tracker.flush()
    check_books(output_dir, "study", "cross_entropy")


def test_mlflow_gets_a_refusal_that_was_not_written(
    driver: Callable[..., Driver], output_dir: Path, check_books: Callable[..., None]
) -> None:
    first = driver(2, None, {"model.hidden_size": Domain(type="int", low=30, high=40)})
    spec = first.study.ask()  # past the tracker: MLflow hears of nothing
    first.study.note(spec.number, "rum.reason", "infeasible: 9 parameters, at most 8")
    first.study.finish(spec.number, TrialState.PRUNED)
    second = driver(2, None)
    second.tracker.flush()
    check_books(output_dir, "study", "cross_entropy")
    assert second.conductor.num_open == 2


def test_a_candidate_whose_driver_died_before_it_was_refused_is_judged_anew(
    driver: Callable[..., Driver],
) -> None:
    space = {"model.hidden_size": Domain(type="int", low=4, high=40)}
    first = driver(2, None, space)
    specs = [first.study.ask() for _ in range(2)]
    large = max(specs, key=lambda spec: spec.parameters["model.hidden_size"])
    small = min(specs, key=lambda spec: spec.parameters["model.hidden_size"])
    first.study.note(large.number, "rum.reason", "infeasible: noted, not ended")
    limit = count(small.parameters["model.hidden_size"])
    second = driver(2, limit, space)
    spec = second.conductor.next_trial()
    assert spec is not None
    assert spec.number == small.number
    second.conductor.next_trial()
    assert next(trial.number for trial in second.study.refused()) == large.number


def test_a_trial_that_has_begun_to_train_goes_on_under_a_new_limit(
    driver: Callable[..., Driver],
) -> None:
    first = driver(1, None)
    spec = first.conductor.next_trial()
    assert spec is not None
    first.study.report(spec.number, 1, 2.0)
    second = driver(1, 1)
    adopted = second.conductor.next_trial()
    assert adopted is not None
    assert adopted.number == spec.number


def test_trials_that_are_continued_are_not_judged(driver: Callable[..., Driver]) -> None:
    search = driver(1, 1)
    search.study.enqueue(
        {"model.hidden_size": 40, "training.learning_rate": 0.01}, {ORIGIN: {"run_id": "0"}}
    )
    spec = search.conductor.next_trial()
    assert spec is not None
    assert spec.parameters["model.hidden_size"] == 40


def test_limits_of_a_continuation_are_refused_since_they_have_no_effect() -> None:
    config = ResumeConfig(
        study="x",
        training=ContinuedTrainingConfig(max_epochs=2),
        search=SearchOptions(max_parameters=5),
    )
    with pytest.raises(ConfigError, match=r"search\.max_parameters has no effect here"):
        continue_best(config)


def test_a_space_that_is_nearly_all_infeasible_ends_the_search(
    driver: Callable[..., Driver],
) -> None:
    search = driver(1, 1)
    with pytest.raises(
        StudyError, match=rf"{REFUSALS_PER_TRIAL} candidates in a row .* parameters"
    ):
        search.conductor.next_trial()
    assert len(search.study.refused()) == REFUSALS_PER_TRIAL


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", "gp", "qmc", "nsga2"])
def test_no_sampler_takes_refusals_for_good_or_gets_stuck_on_them(
    driver: Callable[..., Driver], sampler: str
) -> None:
    """Larger is better here, and all above the middle is infeasible."""
    pytest.importorskip({"cmaes": "cmaes", "gp": "scipy", "qmc": "scipy"}.get(sampler, "optuna"))
    space = {"model.hidden_size": Domain(type="int", low=4, high=40)}
    search = driver(14, count(20), space, sampler)
    sizes = []
    while (spec := search.conductor.next_trial()) is not None:
        sizes.append(spec.parameters["model.hidden_size"])
        search.finish(spec.number, 1.0 - sizes[-1] / 40)
    assert len(sizes) == 14
    assert max(sizes) <= 20
    assert len(search.study.refused()) < 5 * 14


def test_tpe_keeps_away_from_what_was_refused(driver: Callable[..., Driver]) -> None:
    search = driver(25, count(20), {"model.hidden_size": SPACE["model.hidden_size"]}, "tpe")
    while (spec := search.conductor.next_trial()) is not None:
        search.finish(spec.number, 1.0)  # nothing else to learn
    trials = search.study.trials()
    refused = {trial.number for trial in search.study.refused()}
    late = [trial.number in refused for trial in trials[len(trials) // 2 :]]
    assert sum(late) / len(late) < 20 / 37, "a random choice would be refused as often"


def test_optuna_itself_counts_them_as_infeasible(driver: Callable[..., Driver]) -> None:
    search = driver(3, count(20))
    while (spec := search.conductor.next_trial()) is not None:
        search.finish(spec.number, 1.0)
    refused = search.study.refused()
    assert refused
    for trial in refused:
        assert isinstance(trial, optuna.trial.FrozenTrial)
        assert any(value > 0 for value in trial.constraints.values())
        assert trial.value is None


# The whole search


@pytest.mark.usefixtures("ray_session")
def test_a_search_with_a_limit_end_to_end(
    output_dir: Path, check_books: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(
        search_config(num_trials=3, max_parameters=count(12), gpus_per_trial="auto"),
        study="limited",
        output_dir=str(output_dir),
    )
    summary = run_search(config)
    study = Study(open_storage(output_dir), "limited", SPACE, SamplerConfig())
    assert len(study.ended()) == 3
    assert all(trial.params["model.hidden_size"] <= 12 for trial in study.ended())
    assert f"{len(study.refused())} candidates were not trained" in summary
    check_books(output_dir, "limited", "cross_entropy")
    assert "Calibrated" not in capsys.readouterr().err

    run_search(dataclasses.replace(config, search=SearchOptions(num_trials=1), resume="yes"))
    study.read_again()
    assert len(study.ended()) == 4
    assert "Calibrated by 3 ended trials: memory x " in capsys.readouterr().err

    nearly = dataclasses.replace(
        config,
        study="nearly",
        space={"model.hidden_size": Domain(type="int", low=4, high=100_000_000, log=True)},
        search=SearchOptions(num_trials=1, max_parameters=count(4)),
    )
    with pytest.raises(StudyError, match="candidates in a row were infeasible"):
        run_search(nearly)
    refused = dataclasses.replace(config, search=SearchOptions(max_parameters=count(4) - 1))
    with pytest.raises(ConfigError, match="even the smallest"):
        run_search(refused)
