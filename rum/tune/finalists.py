"""The best trials of a search under several seeds: which of them is better by more than luck."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from rum.errors import ConfigError
from rum.experiment import model_sizes
from rum.tasks import Task
from rum.tune.conducting import conduct, outside_errors_explained, register_best
from rum.tune.config import Domain, SchedulerConfig, SearchConfig, SearchOptions, output_folder
from rum.tune.opening import define
from rum.tune.rebuild import read_study, rebuild
from rum.tune.results import columns, resume_command
from rum.tune.sizing import fitting
from rum.tune.spread import Spread, is_beyond_noise
from rum.tune.study import FINALIST, Study, check_definition, ensure_study, study_names
from rum.tune.study_folder import claim_folder, locked
from rum.tune.terminal import say
from rum.tune.tracking import study_runs, trial_run

FILE = "finalists.json"
SEED = "training.seed"
LARGEST_SEED = 2**31 - 1
SEARCH_TAG, SEEDS_TAG = "rum.finalists_of", "rum.finalists"
"""Of the two studies' own runs: the name of the other."""


@dataclass(frozen=True)
class Finalist:
    """A trial of a search and its runs under several seeds."""

    number: int
    """In the search."""
    value: float
    """What it had in the search, where it was chosen for being good: too good on average."""
    numbers: Mapping[int, int]
    """Its trials in the study of the finalists, by seed."""
    runs: Mapping[int, float]
    """Best validation metric by seed, of those that finished."""
    failed: Sequence[int]
    """Seeds under which it crashed, diverged or was stopped by hand."""
    run_ids: Mapping[int, str]
    """MLflow's, by seed."""

    @property
    def spread(self) -> Spread:
        """Over the seeds."""
        return Spread.of(list(self.runs.values()))

    def lacks(self, seeds: int) -> int:
        """How many runs are missing to so many seeds, or failed: 0 makes its mean comparable."""
        return max(len(self.failed), seeds - len(self.runs))


def rank_finalists(
    config: SearchConfig,
    search: Study,
    task: Task,
    storage: RDBStorage,
    client: MlflowClient,
    experiment_id: str,
) -> str:
    """Trains the best trials anew under `search.seeds` seeds, to the end, and registers the best.

    They are trials of the study `<study>-seeds`, without a scheduler; what of them is there
    already is not repeated. The run of the search does not count: it was chosen for its value,
    which is biased by that. Those that have all seeds come first, by their mean; where none has,
    none is registered.

    The seed changes the initial weights, the masks and, of the task `copying`, the sequences to
    train on; validation and test sets, and the order of a corpus, are the same for all.

    Args:
        config: The search's; `study` is its name.
        search: Its study, no trial open.
        task: The task, loaded.
        storage: Of the studies.
        client: MLflow's.
        experiment_id: MLflow's.

    Returns:
        A table.

    Raises:
        InterruptedSearchError: After Ctrl-C, or when disk, database or cluster fail.
        TrackingError: If MLflow stops taking records.
    """
    config = _of_finalists(config)
    name = f"{search.name}-seeds"
    folder = output_folder(config.output_dir) / "studies" / name
    definition = define(config, task)
    with locked(folder), outside_errors_explained(resume_command(config.command, search.name)):
        if config.resume == "from_mlflow" and name not in study_names(storage):
            if any(study_runs(client, experiment_id, name)):
                say(rebuild(storage, read_study(client, experiment_id, name, definition, folder)))
        ensure_study(storage, name, definition)
        fit = fitting(config, model_sizes(task))
        study = Study(storage, name, config.space, config.sampler, fit)
        check_definition(study, definition)
        claim_folder(folder, study.id)
        ranked = search.ranked()[: config.search.finalists]
        _queue(config, search, study, ranked, client, experiment_id)
        study.target = len(study.trials()) - len(study.refused())
        if study.target == 0:
            return "No trial has a value: there are no finalists."
        seeds = config.search.seeds
        say(f"Finalists: {len(ranked)} trials under {seeds} seeds each, as study {name}.")
        conduct(config, study, task, client, experiment_id)
        study.conclude()
        finalists = _ranked(study, search, seeds, client, experiment_id)
        _record(finalists, study, search, client, experiment_id)
        best = finalists[0]
        if best.lacks(seeds):
            say("The best model is not registered: no finalist finished under all seeds")
        else:
            choose = min if task.mode == "min" else max
            seed = choose(best.runs, key=lambda seed: best.runs[seed])
            trial_folder = folder / "trials" / f"{best.numbers[seed]:04d}"
            register_best(config, task, client, best.run_ids[seed], trial_folder, best.spread)
        return _table(finalists, search, task)


def check_finalists(config: SearchConfig) -> None:
    """Raises ConfigError if the best trials of a search cannot be trained under several seeds."""
    if config.search.seeds == 1:
        return
    if SEED in config.space:
        raise ConfigError(f"search.seeds={config.search.seeds}, but {SEED} is searched itself")
    if config.training.seed + config.search.seeds > LARGEST_SEED:
        raise ConfigError(
            f"{SEED} + search.seeds must be at most {LARGEST_SEED}, got {config.training.seed} + "
            f"{config.search.seeds}"
        )
    if config.scheduler.name == "pbt":
        raise ConfigError(
            f"search.seeds={config.search.seeds} does not go with scheduler=pbt: its members "
            "change in mid-training, so that their last options do not say how they came about"
        )


def describe_finalists(config: SearchConfig) -> str | None:
    """What they cost beyond the search; None where there are none."""
    options = config.search
    if options.seeds == 1:
        return None
    return (
        f"Finalists: {options.finalists} trials x {options.seeds} seeds x "
        f"{config.training.max_epochs} epochs come on top"
    )


def _of_finalists(config: SearchConfig) -> SearchConfig:
    """The search that trains them: all epochs, no limits and budgets, each configuration given."""
    given = config.search
    options = SearchOptions(
        max_concurrent=given.max_concurrent,
        cpus_per_trial=given.cpus_per_trial,
        gpus_per_trial=given.gpus_per_trial,
        max_failures=given.max_failures,
        deterministic=given.deterministic,
        disk_reserve_gigabytes=given.disk_reserve_gigabytes,
        seeds=given.seeds,
        finalists=given.finalists,
    )
    seeds = Domain(type="int", low=0, high=LARGEST_SEED)
    return dataclasses.replace(
        config,
        space={**config.space, SEED: seeds},
        scheduler=SchedulerConfig(name="none"),
        search=options,
    )


def _queue(
    config: SearchConfig,
    search: Study,
    study: Study,
    ranked: Sequence[FrozenTrial],
    client: MlflowClient,
    experiment_id: str,
) -> None:
    """Queues what is not there yet; a driver may have died in the middle of it."""
    queued = {(note["trial"], note["seed"]) for _, note in _repeats(study)}
    first = config.training.seed + 1
    for trial in ranked:
        run = trial_run(client, experiment_id, search.name, trial.number, search.id)
        for seed in range(first, first + config.search.seeds):
            if (trial.number, seed) not in queued:
                note = {
                    "study": search.name,
                    "trial": trial.number,
                    "run_id": run.info.run_id,
                    "seed": seed,
                }
                study.enqueue({**trial.params, SEED: seed}, {FINALIST: note})


def _repeats(study: Study) -> Iterator[tuple[FrozenTrial, dict[str, Any]]]:
    """The finalists' runs and what they repeat; a trial that was queued by hand is none."""
    for trial in study.trials():
        if FINALIST in trial.user_attrs:
            yield trial, trial.user_attrs[FINALIST]


def _ranked(
    study: Study, search: Study, seeds: int, client: MlflowClient, experiment_id: str
) -> list[Finalist]:
    """Those with all their runs first, by mean; then the others."""
    run_ids = {
        number: str(run.info.run_id)
        for number, run in study_runs(client, experiment_id, study.name, study.id)
    }
    numbers: dict[int, dict[int, int]] = defaultdict(dict)
    for trial, note in _repeats(study):
        numbers[note["trial"]][note["seed"]] = trial.number
    finalists = []
    for number, by_seed in numbers.items():
        ended = {seed: study.trial(run) for seed, run in by_seed.items()}
        finished = {
            seed: trial.value
            for seed, trial in ended.items()
            if trial.state == TrialState.COMPLETE and trial.value is not None
        }
        value = search.trial(number).value
        assert value is not None
        failed = [seed for seed in by_seed if seed not in finished]
        recorded = {seed: run_ids[run] for seed, run in by_seed.items()}
        finalists.append(Finalist(number, value, by_seed, finished, failed, recorded))
    sign = 1 if study.mode == "min" else -1
    worst = float("inf")
    return sorted(
        finalists,
        key=lambda each: (each.lacks(seeds), sign * each.spread.mean if each.runs else worst),
    )


def _record(
    finalists: Sequence[Finalist],
    study: Study,
    search: Study,
    client: MlflowClient,
    experiment_id: str,
) -> None:
    """Writes the ranking to the search's run in MLflow, and to both studies' runs the other."""
    parent = _own_run(search, client, experiment_id)
    client.set_tag(parent, SEEDS_TAG, study.name)
    client.set_tag(_own_run(study, client, experiment_id), SEARCH_TAG, search.name)
    plain = [
        {
            "trial": each.number,
            "value_in_search": each.value,
            "values": {str(seed): value for seed, value in each.runs.items()},
            "run_ids": {str(seed): run_id for seed, run_id in each.run_ids.items()},
            "failed_seeds": list(each.failed),
            **(_statistics(each.spread) if each.runs else {}),
        }
        for each in finalists
    ]
    client.log_text(parent, json.dumps(plain, indent=1), FILE)
    step = len(study.ended())
    for name, value in (_statistics(finalists[0].spread) if finalists[0].runs else {}).items():
        key = f"finalists/best_{name}"
        if isinstance(value, float) and not _has_point(client, parent, key, step):
            client.log_metric(parent, key, value, step=step)


def _own_run(study: Study, client: MlflowClient, experiment_id: str) -> str:
    runs = study_runs(client, experiment_id, study.name, study.id)
    (run_id,) = (run.info.run_id for number, run in runs if number is None)
    return str(run_id)


def _has_point(client: MlflowClient, run_id: str, key: str, step: int) -> bool:
    """Whether an earlier driver wrote it: MLflow would keep both."""
    return any(point.step == step for point in client.get_metric_history(run_id, key))


def _statistics(spread: Spread) -> dict[str, Any]:
    known = spread.count > 1
    return {
        "mean": spread.mean,
        "std": spread.std,
        "half_width": spread.half_width if known else None,
        "interval": list(spread.interval) if known else None,
    }


def _table(finalists: Sequence[Finalist], search: Study, task: Task) -> str:
    rows = [["trial", f"mean {task.metric}", "± 95 %", "std", "seeds", "in the search"]]
    for each in finalists:
        seeds = f"{len(each.runs)}" + (f", {len(each.failed)} failed" if each.failed else "")
        spread = each.spread if each.runs else None
        numbers = ["-", "-", "-"]
        if spread is not None:
            width = f"{spread.half_width:.4f}" if spread.count > 1 else "-"
            numbers = [f"{spread.mean:.4f}", width, f"{spread.std:.4f}"]
        rows.append([str(each.number), *numbers, seeds, f"{each.value:.4f}"])
    lines = [f"Finalists of {search.name}:", *columns(rows)]
    if len(finalists) > 1 and all(len(each.runs) > 1 for each in finalists[:2]):
        first, second = finalists[:2]
        verdict = "is" if is_beyond_noise(first.spread, second.spread) else "is not"
        lines.append(
            f"  trial {first.number} {verdict} better than trial {second.number} beyond noise"
        )
    return "\n".join(lines)
