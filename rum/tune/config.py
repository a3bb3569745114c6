"""Typed options of a search, of continuing its best trials, and of an evaluation."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rum.checks import check_at_least, check_choice, check_file_name, check_positive
from rum.errors import ConfigError
from rum.experiment import ExperimentConfig
from rum.setting import PublishedConfig
from rum.train import TrackingConfig

SAMPLERS = ("random", "tpe", "cmaes", "gp", "qmc", "nsga2")
SCHEDULERS = ("none", "asha", "promotion", "hyperband", "median", "pbt")
AUTO = "auto"
METRIC, PARAMETERS, TRAINING_SECONDS = "metric", "parameters", "training_seconds"
OBJECTIVES = ([METRIC], [METRIC, PARAMETERS], [METRIC, TRAINING_SECONDS])


@dataclass(kw_only=True)
class Domain:
    """The values of one searched option, in Optuna's words; both ends inclusive."""

    type: str
    """"int", "float" or "categorical"."""
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    choices: list[Any] | None = None
    """Of "categorical"; a single choice fixes the option."""
    when: dict[str, Any] | None = None
    """Searched only while these other options, named above it, have these values (of a list, one
    of them) and are searched themselves."""
    parameters: int | None = None
    """Of "int": not sampled but solved, between low and high, after all other options, so that the
    model has as many trainable parameters, within 1 %."""


@dataclass(kw_only=True)
class SamplerConfig:
    """How new trials are chosen."""

    name: str = "tpe"
    """Optuna's own: "random", "tpe", "cmaes", "gp", "qmc" (a low-discrepancy sequence), "nsga2",
    or the name of another class of optuna.samplers that needs no options."""
    seed: int = 0
    """Each trial's randomness comes from this and the trial's number."""
    startup_trials: int = 10
    """Of "tpe", "gp" and "cmaes": random trials before the model takes over; of "nsga2": the
    population."""

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        check_at_least("sampler.seed", self.seed, 0)
        check_at_least("sampler.startup_trials", self.startup_trials, 1)


@dataclass(kw_only=True)
class SchedulerConfig:
    """Which trials are stopped early."""

    name: str = "asha"
    """"none"; "asha" (asynchronous successive halving, stopping); "promotion" (the same, but
    trials are paused at a rung and go on when they are among the best there); "hyperband" (several
    "asha" with later and later first rungs); "median"; "pbt" (population-based training)."""
    grace_epochs: int = 1
    """The first rung of "asha", "promotion" and "hyperband", before which no trial is stopped, nor
    by "median"; of "pbt" the epochs between two comparisons."""
    reduction_factor: int = 3
    """At each rung the best 1/factor go on; rungs are grace_epochs x factor^k."""
    plateau_band: float | None = 0.1
    """At rungs, trials that have not closed this share of the gap between the task's plateau (what
    is reached without memory) and a perfect value are not ranked among each other; null ranks
    all."""

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        check_choice("scheduler.name", self.name, SCHEDULERS)
        check_at_least("scheduler.grace_epochs", self.grace_epochs, 1)
        check_at_least("scheduler.reduction_factor", self.reduction_factor, 2)
        if self.plateau_band is not None and not 0.0 <= self.plateau_band < 1.0:
            raise ConfigError(f"scheduler.plateau_band must be in [0, 1), got {self.plateau_band}")


@dataclass(kw_only=True)
class SearchOptions:
    """How many trials, and what each may use."""

    num_trials: int = 32
    """Trials in all; an existing study is extended by as many."""
    max_concurrent: int | None = None
    """Trials at a time; null: as many as fit the CPUs (and GPUs) that are free."""
    cpus_per_trial: int = 1
    """CPU cores of a trial, and torch's threads (training.threads follows)."""
    gpus_per_trial: int | float | str = 0.0
    """Share of a GPU of a trial; with training.device=cuda 0 counts as 1. "auto": the smallest of
    1, 1/2, 1/3, 1/4, 1/6 and 1/8 in which the largest trial of the space fits, as predicted. A
    trial cannot allocate more than a share below 1; one that runs out of memory goes on with the
    next larger."""
    max_failures: int = 3
    """Times that a trial whose process died goes on from its last checkpoint."""
    replicas: int | str = 1
    """So many trials of one shape train side by side in a process, which takes the CPU and the
    share of a GPU of one trial; stacks of RUM cells only. "auto": 16 where that was measured to
    pay (on the CPU, units x batch x steps at most 40,000), else 1."""
    deterministic: bool = False
    """Decide in an order that does not depend on how fast the workers are: the same study every
    time, also after interruptions. Needs max_concurrent; trials may train beyond their end."""
    disk_reserve_gigabytes: float = 2.0
    """Start no search that would leave less than this free on the disk of `output_dir`."""
    max_parameters: int | None = None
    """A candidate with more is refused before it trains and does not count as a trial."""
    max_memory_gigabytes: float | None = None
    """The same for its predicted memory, in 1e9 bytes; null: on CUDA its share of the card, on
    the CPU no limit."""
    max_trial_epochs: int | None = None
    """Budget of the study: epochs of all trials together. When one of the budgets is used up, no
    trial starts and those that run end; resume=yes with a larger one goes on."""
    max_hours: float | None = None
    """The same in hours while a driver runs, over all of them."""
    max_gpu_hours: float | None = None
    """The same in hours of GPUs: share x time, summed over trials."""
    objectives: list[str] = field(default_factory=lambda: [METRIC])
    """What the sampler improves: [metric], [metric, parameters] (of the model) or
    [metric, training_seconds]. With two it looks for the whole Pareto front; the scheduler and the
    choice of the best trial go by the metric."""
    seeds: int = 1
    """Above 1: when the search is through, its best trials are trained anew to the end under so
    many other seeds (training.seed + 1 and on), ranked by their mean, and the best is registered;
    the alias `best` moves only beyond noise. Not part of the budgets above."""
    finalists: int = 3
    """How many trials that are; without effect where seeds is 1."""

    @property
    def num_repeats(self) -> int:
        """Runs of finalists, at most, which come on top of `num_trials`."""
        return 0 if self.seeds == 1 else self.seeds * self.finalists

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        check_at_least("search.num_trials", self.num_trials, 1)
        if self.max_concurrent is not None:
            check_at_least("search.max_concurrent", self.max_concurrent, 1)
        elif self.deterministic:
            raise ConfigError(
                "search.deterministic=true needs search.max_concurrent: which trial is decided on "
                "first depends on how many run at a time"
            )
        check_at_least("search.cpus_per_trial", self.cpus_per_trial, 1)
        share = self.gpus_per_trial
        if share != AUTO and (isinstance(share, str) or not 0.0 <= share):
            raise ConfigError(f"search.gpus_per_trial must be >= 0 or {AUTO!r}, got {share!r}")
        if list(self.objectives) not in OBJECTIVES:
            raise ConfigError(
                f"search.objectives must be one of {', '.join(map(_listed, OBJECTIVES))}, got "
                f"{_listed(self.objectives)}"
            )
        if self.deterministic and TRAINING_SECONDS in self.objectives:
            raise ConfigError(
                f"search.objectives={_listed(self.objectives)} cannot go with "
                "search.deterministic=true: no two runs take the same time"
            )
        check_at_least("search.seeds", self.seeds, 1)
        check_at_least("search.finalists", self.finalists, 1)
        check_at_least("search.max_failures", self.max_failures, 0)
        if self.replicas != AUTO:
            if isinstance(self.replicas, str):
                raise ConfigError(
                    f"search.replicas must be an integer >= 1 or {AUTO!r}, got {self.replicas!r}"
                )
            check_at_least("search.replicas", self.replicas, 1)
        if self.deterministic and self.replicas not in (1, AUTO):
            raise ConfigError(
                "search.replicas cannot go with search.deterministic=true: which trials share a "
                "process depends on how fast the workers are"
            )
        if not 0.0 <= self.disk_reserve_gigabytes:
            raise ConfigError(
                f"search.disk_reserve_gigabytes must be >= 0, got {self.disk_reserve_gigabytes}"
            )
        if self.max_parameters is not None:
            check_at_least("search.max_parameters", self.max_parameters, 1)
        if self.max_memory_gigabytes is not None:
            check_positive("search.max_memory_gigabytes", self.max_memory_gigabytes)
        if self.max_trial_epochs is not None:
            check_at_least("search.max_trial_epochs", self.max_trial_epochs, 1)
        if self.deterministic and self.max_memory_gigabytes is not None:
            raise ConfigError(
                "search.max_memory_gigabytes cannot go with search.deterministic=true: trials "
                "that have ended correct the prediction for the next driver, so which candidates "
                "are refused would depend on interruptions; give search.max_parameters"
            )
        for name in ("max_hours", "max_gpu_hours"):
            hours = getattr(self, name)
            if hours is None:
                continue
            check_positive(f"search.{name}", hours)
            if self.deterministic:
                raise ConfigError(
                    f"search.{name} cannot go with search.deterministic=true: how far a search "
                    "gets would depend on how fast it is; give search.max_trial_epochs"
                )


def _listed(names: list[str]) -> str:
    return f"[{','.join(map(str, names))}]"


@dataclass(kw_only=True)
class WarmStartConfig:
    """Configurations that a new study trains first; what they lack is sampled."""

    published: bool = True
    """With experiment=<a published setting> that setting itself, where the space has it."""
    csv: str | None = None
    """A file with a configuration in each line, under a line of dotted names of options."""
    study: str | None = None
    """An earlier study in MLflow; its own space may be another."""
    top: int = 5
    """Of `study`: so many of its best trials."""
    outside: str = "skip"
    """Configurations outside of the space: "skip" them, or "clip" their numbers into it."""

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        check_at_least("warm_start.top", self.top, 1)
        check_choice("warm_start.outside", self.outside, ("skip", "clip"))


@dataclass(kw_only=True)
class SearchConfig(ExperimentConfig, PublishedConfig):
    """Options of `pipelines/tune_*.py`: an experiment and what is searched around it."""

    space: dict[str, Domain] = field(default_factory=dict)
    """What is searched, by dotted name of the option."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    search: SearchOptions = field(default_factory=SearchOptions)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    study: str | None = None
    """Name of the study; null makes one from task, corpus and model."""
    study_exists: str = "extend"
    """What to do with an existing study of the same space: "extend" it by search.num_trials,
    make a "new" one beside it, or "error"."""
    resume: str = "no"
    """"yes": go on with an interrupted study (or extend a finished one); "from_mlflow": rebuild
    a study whose database was lost from MLflow, then go on with it."""
    preset: str = "full"
    """The `preset` option in force; part of the default name of the study."""
    dry_run: bool = False
    """Print parameter counts and the forecast, then stop."""
    data_dir: str | None = None
    """Where corpora are looked for first."""
    output_dir: str = "outputs"
    """Everything that is written goes below."""
    command: str = "python pipelines/tune_ptb.py"
    """How this pipeline was called; set by the pipeline, for the commands that it prints."""

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        if self.study is not None:
            check_file_name("study", self.study)
        check_choice("study_exists", self.study_exists, ("error", "extend", "new"))
        check_choice("resume", self.resume, ("no", "yes", "from_mlflow"))
        if self.scheduler.name == "pbt" and self.search.deterministic:
            raise ConfigError(
                "scheduler=pbt copies the checkpoints that are there, which depends on how fast "
                "the workers are: it does not go with search.deterministic=true"
            )
        if len(self.search.objectives) > 1:
            objectives = f"search.objectives={_listed(self.search.objectives)}"
            if self.sampler.name in ("cmaes", "CmaEsSampler"):
                raise ConfigError(f"{objectives}: sampler=cmaes knows one objective only")
            if self.scheduler.name == "pbt":
                raise ConfigError(
                    f"{objectives} does not go with scheduler=pbt, which samples nothing: it "
                    "improves the metric of its members"
                )
        if self.tracking.name != "mlflow":
            raise ConfigError(
                f"a search is recorded: tracking must be mlflow, got {self.tracking.name}"
            )


@dataclass(kw_only=True)
class ContinuedTrainingConfig:
    """What changes in the training of a continued trial."""

    max_epochs: int | None = None
    """Epochs in all; must be given, and more than the study had."""
    learning_rate: float | None = None
    """null keeps what it was; cannot change where it was searched."""
    device: str | None = None
    """"cpu" or "cuda"; null: where the study's best trial was trained."""

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        if self.max_epochs is not None:
            check_at_least("training.max_epochs", self.max_epochs, 1)


@dataclass(kw_only=True)
class ResumeConfig:
    """Options of `pipelines/resume.py`: continue the best trials of a study."""

    study: str
    """Name of the study whose trials continue."""
    top: int = 3
    """How many, best first."""
    training: ContinuedTrainingConfig = field(default_factory=ContinuedTrainingConfig)
    command: str = "python pipelines/resume.py"
    """How this pipeline was called; set by the pipeline."""
    search: SearchOptions = field(default_factory=SearchOptions)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    data_dir: str | None = None
    output_dir: str = "outputs"

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        check_at_least("top", self.top, 1)
        if len(self.search.objectives) > 1:
            raise ConfigError(
                f"search.objectives={_listed(self.search.objectives)} is for searches: here "
                "nothing is sampled"
            )
        if self.search.seeds != 1:
            raise ConfigError(
                f"search.seeds={self.search.seeds} is for searches: continued trials keep theirs"
            )
        if self.search.deterministic:
            raise ConfigError(
                "search.deterministic=true is for searches: continued trials do not depend on "
                "each other"
            )


@dataclass(kw_only=True)
class CheckConfig:
    """Options of `pipelines/check.py`: whether Optuna and MLflow say the same of a study."""

    study: str
    """Name of the study."""
    json: bool = False
    """Print the result as JSON, for programs."""
    output_dir: str = "outputs"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


ACTIONS = ("list", "show", "stop", "extend", "stop_trial", "enqueue", "free")


@dataclass(kw_only=True)
class StudyConfig:
    """Options of `pipelines/study.py`: looks at studies and changes them, running or not."""

    action: str = "list"
    """"list", "show", "stop", "extend", "stop_trial", "enqueue" or "free"."""
    study: str | None = None
    """Name of the study; with "list" and "free" null means all."""
    by: int | None = None
    """Of "extend": so many more trials."""
    to: int | None = None
    """Of "extend", instead of `by`: so many trials in all; repeated, it changes nothing."""
    trial: int | None = None
    """Of "stop_trial": its number."""
    parameters: Any = None  # a dict, to which Hydra would let nobody add
    """Of "enqueue": values by dotted name of the option; the rest of the space is sampled."""
    again: bool = False
    """Of "enqueue": also if the same was queued before."""
    keep_best: int = 0
    """Of "free": the best trials of each study whose checkpoints stay."""
    artifacts: bool = False
    """Of "free": checkpoints among the artifacts of the trials' MLflow runs, too."""
    confirm: bool = False
    """Of "free": delete; without it what would go is listed."""
    wait_seconds: float = 30.0
    """How long a running driver has to take an order; it takes it later all the same."""
    json: bool = False
    """Print the result as JSON, for programs."""
    output_dir: str = "outputs"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value, or one that the action does not take."""
        check_choice("action", self.action, ACTIONS)
        taken = {
            "extend": ("by", "to"),
            "stop_trial": ("trial",),
            "enqueue": ("parameters", "again"),
            "free": ("keep_best", "artifacts", "confirm"),
        }
        for action, names in taken.items():
            for name in names:
                if getattr(self, name) not in (None, False, 0) and action != self.action:
                    raise ConfigError(
                        f"{name} belongs to action={action}, but action is {self.action}"
                    )
        if self.study is None and self.action not in ("list", "free"):
            raise ConfigError(f"action={self.action} needs study=<name>")
        if self.action == "extend" and (self.by is None) == (self.to is None):
            raise ConfigError("action=extend needs by=<more trials> or to=<trials in all>")
        for name in ("by", "to"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        if self.action == "stop_trial" and self.trial is None:
            raise ConfigError("action=stop_trial needs trial=<number>")
        if self.trial is not None:
            check_at_least("trial", self.trial, 0)
        if self.action == "enqueue" and not (
            isinstance(self.parameters, dict) and self.parameters
        ):
            raise ConfigError(
                "action=enqueue needs at least one option: "
                f"'parameters={{model.hidden_size: 100}}', got {self.parameters!r}"
            )
        check_at_least("keep_best", self.keep_best, 0)


@dataclass(kw_only=True)
class EvaluateConfig:
    """Options of `pipelines/evaluate.py`."""

    checkpoint: str
    """A checkpoint folder, or `models:/<name>@best` (or `/<version>`) in MLflow."""
    splits: list[str] = field(default_factory=lambda: ["validation", "test"])
    corpus: str | None = None
    """Another corpus, of symbols that the model knows; null takes the one of the checkpoint."""
    device: str = "cpu"
    threads: int | None = None
    again: bool = False
    """Evaluate on test even if the run's test result is already recorded."""
    data_dir: str | None = None
    output_dir: str = "outputs"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Raises ConfigError on an invalid value."""
        for split in self.splits:
            check_choice("splits", split, ("validation", "test"))
        if self.threads is not None:
            check_positive("threads", self.threads)


def data_folder(data_dir: str | None) -> Path | None:
    """Where corpora are looked for first, also from a worker."""
    return Path(data_dir).absolute() if data_dir else None


def output_folder(output_dir: str) -> Path:
    """The option `output_dir` as an absolute path."""
    return Path(output_dir).expanduser().absolute()
