"""Hydra: registers the typed configurations, and runs a pipeline with clear errors."""

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rum.cells import MODELS
from rum.errors import ConfigError, RumError
from rum.parameters import flatten, nearest
from rum.plugins import load_plugins
from rum.tasks import TASKS
from rum.train import TrainConfig
from rum.tune.config import CheckConfig, EvaluateConfig, ResumeConfig, SearchConfig, StudyConfig

SCHEMAS = {
    "train_schema": TrainConfig,
    "search_schema": SearchConfig,
    "resume_schema": ResumeConfig,
    "evaluate_schema": EvaluateConfig,
    "check_schema": CheckConfig,
    "study_schema": StudyConfig,
}


def register_configs() -> None:
    """Makes every model and task an option of its group, and the schemas known by name."""
    load_plugins()
    store = ConfigStore.instance()
    for group, registry in (("model", MODELS), ("task", TASKS)):
        for name, node in registry.items():
            store.store(group=group, name=name, node=node)
    for name, schema in SCHEMAS.items():
        store.store(name=name, node=schema)


def to_config(cfg: DictConfig) -> Any:
    """Builds the typed configuration; every check of its dataclasses runs.

    Raises:
        ConfigError: If a value is missing or not valid.
    """
    if "command" in cfg:
        cfg.command = shlex.join(["python", *map(_without_secret, sys.argv)])
    _check_names(cfg, "")
    _check_not_searched(cfg)
    if cfg.get("from_run") is not None:
        _check_repeats_unchanged()
    if "profile" in cfg:
        _check_profile(cfg)
        cfg.setting.changes = _changes_of_setting(cfg)
    try:
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def _check_not_searched(cfg: DictConfig) -> None:
    """Refuses an override that the space would override in turn."""
    overrides = list(HydraConfig.get().overrides.task)
    for override in OverridesParser.create().parse_overrides(overrides):
        for name in flatten({override.key_or_group: override.value()}):
            if name in cfg.get("space", {}):
                is_categorical = cfg.space[name].type == "categorical"
                fixed = "choices: [...]" if is_categorical else "low: ..., high: ..."
                raise ConfigError(
                    f"{name} is searched, so {override.input_line} would have no effect. Fix it "
                    f"in the space: 'space={{{name}: {{{fixed}}}}}'"
                )


def _check_repeats_unchanged() -> None:
    """Refuses options of the experiment where a recorded run is to be repeated with its own."""
    overrides = list(HydraConfig.get().overrides.task)
    for override in OverridesParser.create().parse_overrides(overrides):
        section = re.split(r"[.@]", override.key_or_group)[0]
        if section in ("model", "task", "training", "experiment", "profile", "setting"):
            raise ConfigError(
                f"from_run repeats a recorded run with its own model, task and training, got "
                f"{override.input_line} beside it: leave one of the two out"
            )


def _experiment_options(cfg: DictConfig) -> dict[str, Any]:
    """Everything that decides a run's result, by dotted name."""
    sections = {name: cfg[name] for name in ("model", "task", "training")}
    return flatten(OmegaConf.to_container(OmegaConf.create(sections, parent=cfg), resolve=True))


def _check_profile(cfg: DictConfig) -> None:
    """Refuses a profile, or one of its options, that the other options do not refer to."""
    overrides = list(HydraConfig.get().overrides.task)
    chosen = [each for each in overrides if re.match(r"profile[.=]", each)]
    is_single = any(each.startswith("profile.") for each in chosen)
    if chosen in ([], ["profile=reference"]) or (cfg.setting.name is not None and not is_single):
        return
    rest = [each for each in overrides if each not in chosen]
    primary = str(HydraConfig.get().job.config_name)
    if _experiment_options(compose(primary, rest)) == _experiment_options(cfg):
        raise ConfigError(
            f"{' '.join(chosen)} changes nothing here: published settings refer to the profile "
            "(experiment=..., see search_spaces/experiment), and so does the training of recall "
            "and bAbI"
        )


NOT_PART_OF_A_SETTING = {
    "task.subtask",  # a column of Table 4 is one setting
    "training.seed",
    "training.device",
    "training.threads",
    "training.diagnostics",
    "training.checkpoint_seconds",
}


def _changes_of_setting(cfg: DictConfig) -> list[str]:
    """Options that are not those of the published setting, as `name=value (published value)`."""
    if cfg.setting.name is None:
        return []
    overrides = HydraConfig.get().overrides.task
    published = _experiment_options(
        compose("train", [each for each in overrides if re.match(r"(experiment|profile)\b", each)])
    )
    free = NOT_PART_OF_A_SETTING | {str(name) for name in cfg.get("space", {})}
    return [
        f"{name}={value} ({published.get(name, 'not there')})"
        for name, value in _experiment_options(cfg).items()
        if name not in free and published.get(name) != value
    ]


def _check_names(cfg: DictConfig, prefix: str) -> None:
    """Refuses what `+name=value` added: Hydra lets it through and nothing would read it."""
    schema = OmegaConf.get_type(cfg)
    known = None
    if schema is not None and dataclasses.is_dataclass(schema):
        known = [field.name for field in dataclasses.fields(schema)]
    for key in map(str, cfg):
        name = f"{prefix}{key}"
        if known is not None and key not in known:
            hint = nearest(key, known)
            raise ConfigError(f"unknown option {name!r}{hint}")
        value = cfg._get_node(key)
        if isinstance(value, DictConfig) and not (value._is_none() or value._is_missing()):
            _check_names(value, f"{name}.")


def _without_secret(argument: str) -> str:
    """A tracking URI may hold a password, and commands are printed and recorded."""
    return re.sub(r"//[^/@\s]+@", "//***@", argument)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Ends the program with the message of what the user can mend, without a traceback.

    Inside of `hydra.main`, since Hydra prints all overrides when an error gets through to it.
    """
    try:
        yield
    except RumError as error:
        sys.exit(f"error: {error}")


def run_pipeline(main: Callable[[], Any], config_name: str) -> None:
    """Runs a `hydra.main` function; options that Hydra refuses are answered with hints.

    Args:
        main: The decorated function.
        config_name: Its primary configuration, for hints at misspelt options.
    """
    with reported_errors():
        register_configs()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints tracebacks and exits by itself
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        sys.exit(
            "error: --multirun is not supported: a search samples, schedules and records its "
            "trials together (pipelines/tune_*.py); independent runs are separate commands"
        )
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
        lines = [line for line in text.splitlines() if "object_type" not in line]
        sys.exit("\n".join(["error: " + "\n".join(lines).strip(), *_hints(config_name)]))
    except KeyboardInterrupt:
        sys.exit(130)


def _unknown_files(root: Path, chosen: list[tuple[str, str]]) -> list[str]:
    """Names the nearest file for each choice of a group that has none of that name."""
    hints = []
    for group, name in chosen:
        folder = root / group
        known = sorted(
            path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")
        )
        if known and name not in known:
            hints.append(f"{group} has no {name!r}{nearest(name, known)}")
    return hints


def _hints(config_name: str) -> list[str]:
    """Names the nearest known option for each override that is not one."""
    root = Path(__file__).parents[1] / "search_spaces"
    overrides = []
    for argument in sys.argv[1:]:
        try:
            if not argument.startswith("-"):
                overrides += OverridesParser.create().parse_overrides([argument])
        except HydraException:
            return [f"in: {argument}"]
    groups = [
        o
        for o in overrides
        if not isinstance(o.value(), dict)
        and (o.key_or_group in ("model", "task") or (root / o.key_or_group).is_dir())
    ]
    hints = _unknown_files(root, [(o.key_or_group, str(o.value())) for o in groups])
    GlobalHydra.instance().clear()
    from hydra import initialize_config_dir

    with initialize_config_dir(str(root), version_base="1.3"):
        try:
            known_config = compose(config_name, [str(o.input_line) for o in groups])
        except HydraException:
            known_config = compose(config_name)
    known = flatten(OmegaConf.to_container(known_config, resolve=False))
    sections = {name.rsplit(".", depth)[0] for name in known for depth in range(1, 4)}
    for override in overrides:
        key = override.key_or_group
        if key not in known and key not in sections and override not in groups:
            hints.append(f"unknown option {key!r}{nearest(key, [*known, *sections])}")
        value = override.value()
        if key == "space" and isinstance(value, dict):
            searched = [str(name) for name in known_config.get("space", {})]
            hints += [
                f"the space has no option {name!r}{nearest(str(name), searched)}. "
                f"It has: {', '.join(searched)}. A new one goes into a file of search_spaces/space"
                for name in value
                if name not in searched
            ]
    return hints
