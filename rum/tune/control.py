"""Looks at studies and changes them from another process, while a search runs or not."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from rum.errors import ConfigError, StudyError
from rum.parameters import nearest
from rum.tune.budget import usage
from rum.tune.config import Domain, SamplerConfig, StudyConfig, output_folder
from rum.tune.database import open_storage
from rum.tune.freeing import free
from rum.tune.orders import ENQUEUE, EXTEND, STOP, STOP_TRIAL, Order, Orders, obey
from rum.tune.provenance import option_text
from rum.tune.results import columns, how_ended, resume_command
from rum.tune.space import check_values
from rum.tune.study import COMMAND, Study, is_paused, queued_parameters, study_names
from rum.tune.study_folder import LockedStudyError, driver_of, locked

LOOK_SECONDS = 0.1


def control(config: StudyConfig) -> str:
    """Carries out one action on studies; repeated, it does no harm.

    Returns:
        What was found or done, for people; JSON where `config.json` is set.

    Raises:
        ConfigError: If an option is not valid for the study.
        StudyError: If there is no such study or trial.
        TrackingError: If MLflow is needed and cannot be used.
    """
    everything = _open(config)
    studies = [study for study in everything if config.study in (None, study.name)]
    match config.action:
        case "list":
            plain: dict[str, Any] = {"studies": [_outline(s, config) for s in studies]}
            text = _table(plain["studies"])
        case "show":
            plain = _details(studies[0], config)
            text = _page(plain)
        case "free":
            plain, text = free(config, studies, everything)
        case _:
            plain = {"study": config.study, **_change(studies[0], config)}
            text = f"study {config.study}: {plain['message']}"
    return json.dumps(plain, indent=1) if config.json else text


def _open(config: StudyConfig) -> list[Study]:
    """All studies, after checking that the one that is asked for is there."""
    output_dir = output_folder(config.output_dir)
    names: list[str] = []
    if (output_dir / "optuna.db").is_file():
        storage = open_storage(output_dir)
        names = study_names(storage)
    if config.study is not None and config.study not in names:
        raise StudyError(
            f"there is no study {config.study!r}{nearest(config.study, names)}. "
            f"Studies in {output_dir}: {', '.join(names) or 'none'}"
        )
    sampler = SamplerConfig(name="random")
    bare = [Study(storage, name, {}, sampler) for name in names]
    return [Study(storage, study.name, _space(study), sampler) for study in bare]


def _space(study: Study) -> dict[str, Domain]:
    return {name: Domain(**domain) for name, domain in study.definition["space"].items()}


def _folder(study: str | None, config: StudyConfig) -> Path:
    return output_folder(config.output_dir) / "studies" / str(study)


# Looking


def _outline(study: Study, config: StudyConfig) -> dict[str, Any]:
    ranked = study.ranked()
    return {
        "study": study.name,
        "driver": driver_of(_folder(study.name, config)),
        "target": study.target,
        "ended": len(study.ended()),
        "states": dict(Counter(_state(trial) for trial in study.trials())),
        "mode": study.mode,
        "best": {"trial": ranked[0].number, "value": ranked[0].value} if ranked else None,
    }


def _state(trial: FrozenTrial) -> str:
    return "PAUSED" if is_paused(trial) else trial.state.name


def _details(study: Study, config: StudyConfig) -> dict[str, Any]:
    outline = _outline(study, config)
    waiting = {order.action for order in Orders(_folder(study.name, config)).waiting()}
    budget = {name: {"used": used, "budget": most} for name, (used, most) in usage(study).items()}
    return {
        **outline,
        "budget": budget,
        "orders": sorted(waiting),
        "go_on": _go_on(study),
        "trials": [
            {
                "trial": trial.number,
                "state": _state(trial),
                "value": trial.value if trial.state.is_finished() else _last(trial),
                "epochs": max(trial.intermediate_values, default=0),
                "how": _how(trial, has_driver=outline["driver"] is not None),
                "parameters": trial.params or queued_parameters(trial) or {},
            }
            for trial in study.trials()
        ],
    }


def _how(trial: FrozenTrial, *, has_driver: bool) -> str:
    how = how_ended(trial)
    return "interrupted" if how == "running" and not has_driver else how


def _last(trial: FrozenTrial) -> float | None:
    values = trial.intermediate_values
    return values[max(values)] if values else None


def _go_on(study: Study) -> str:
    command = study.attribute(COMMAND)
    if command is None:
        return f"the command that it was started with, study={study.name} resume=yes"
    return resume_command(command, study.name)


def _table(outlines: list[dict[str, Any]]) -> str:
    if not outlines:
        return "no studies"
    header = ["study", "trials", "states", "best", "driver"]
    rows = [header, *([each["study"], *_cells(each)] for each in outlines)]
    return "\n".join(columns(rows))


def _cells(outline: dict[str, Any]) -> list[str]:
    best, driver = outline["best"], outline["driver"]
    states = (f"{count} {state.lower()}" for state, count in sorted(outline["states"].items()))
    return [
        f"{outline['ended']}/{outline['target']}",
        ", ".join(states) or "-",
        f"{best['value']:.4f} (trial {best['trial']})" if best else "-",
        "none" if driver is None else f"{driver.get('host')}, process {driver.get('pid')}",
    ]


def _page(details: dict[str, Any]) -> str:
    trials, states, best, driver = _cells(details)
    lines = [
        f"study {details['study']}: {trials} trials ({states})",
        f"  best    {best}",
        f"  driver  {driver}",
    ]
    for name, each in details["budget"].items():
        of = "" if each["budget"] is None else f" of {each['budget']:g}"
        lines.append(f"  search.{name}: {each['used']:.4g}{of} used")
    if details["orders"]:
        lines.append(f"  orders that wait for the driver: {', '.join(details['orders'])}")
    names = sorted({name for trial in details["trials"] for name in trial["parameters"]})
    rows = [["trial", "value", "epochs", "how", *names]]
    for trial in details["trials"]:
        value = "-" if trial["value"] is None else f"{trial['value']:.4f}"
        options = [option_text(trial["parameters"].get(name, "-")) for name in names]
        rows.append([str(trial["trial"]), value, str(trial["epochs"]), trial["how"], *options])
    if len(rows) > 1:
        lines += columns(rows)
    return "\n".join([*lines, f"  go on  {details['go_on']}"])


# Changing


def _change(study: Study, config: StudyConfig) -> dict[str, Any]:
    """Gives the order that an action stands for, unless there is nothing to do."""
    folder = _folder(study.name, config)
    driver = driver_of(folder)
    parameters = check_values(config.parameters or {}, _space(study))
    order = Order(config.action, driver, config.by, config.to, config.trial, parameters)
    nothing = {
        STOP: _nothing_to_stop,
        EXTEND: _nothing_to_extend,
        STOP_TRIAL: _nothing_to_end,
        ENQUEUE: _nothing_to_enqueue,
    }[config.action](study, config, order)
    if nothing is not None:
        return {"changed": False, "message": nothing}
    taken = _deliver(order, study, folder, config.wait_seconds)
    if not taken:
        message = (
            f"asked its driver ({driver}), which has not taken the order within "
            f"{config.wait_seconds:g} s: it, or the next one, will"
        )
    else:
        message = _done(study, config, driver is not None)
    return {"changed": True, "taken": taken, "target": study.target, "message": message}


def _deliver(order: Order, study: Study, folder: Path, seconds: float) -> bool:
    """Carries an order out if no driver runs, else has the driver do it.

    Returns:
        Whether it is done; if not, the driver did not get to it in time.
    """
    orders = Orders(folder)
    orders.give(order)
    deadline = time.monotonic() + seconds
    while any(each.id == order.id for each in orders.waiting()):
        try:
            with locked(folder, seconds=0.0):
                study.read_again()
                obey(orders, study)
        except LockedStudyError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOOK_SECONDS)
    study.read_again()
    return True


def _done(study: Study, config: StudyConfig, has_driver: bool) -> str:
    go_on = "" if has_driver else f"; no driver runs, to go on:\n  {_go_on(study)}"
    match config.action:
        case "stop":
            return f"its driver ends the search; to go on:\n  {_go_on(study)}"
        case "extend":
            return f"extended to {study.target} trials{go_on}"
        case "enqueue":
            return f"{config.parameters} runs next{go_on}"
        case _:
            at_once = study.trial(config.trial or 0).state.is_finished()
            when = "has ended" if at_once else "ends at its next report"
            return f"trial {config.trial} {when}"


def _nothing_to_stop(study: Study, config: StudyConfig, order: Order) -> str | None:
    if order.driver is None:
        return "no driver runs: there is nothing to stop"
    waiting = Orders(_folder(study.name, config)).waiting()
    if any(each.action == STOP and each.driver == order.driver for each in waiting):
        return "its driver has been asked to stop"
    return None


def _nothing_to_extend(study: Study, config: StudyConfig, order: Order) -> str | None:
    if order.to is not None and study.target >= order.to:
        return f"it has a target of {study.target} trials already"
    return None


def _nothing_to_end(study: Study, config: StudyConfig, order: Order) -> str | None:
    number, count = config.trial or 0, len(study.trials())
    if number >= count:
        raise ConfigError(f"study {study.name} has no trial {number}: it has {count}, from 0 on")
    trial = study.trial(number)
    if trial.state.is_finished():
        return f"trial {number} has ended before ({how_ended(trial)}): nothing changes"
    return None


def _nothing_to_enqueue(study: Study, config: StudyConfig, order: Order) -> str | None:
    if config.again:
        return None
    for trial in study.trials():
        if order.parameters in (trial.params, queued_parameters(trial)):
            return f"trial {trial.number} is that configuration ({how_ended(trial)}); again=true"
    for each in Orders(_folder(study.name, config)).waiting():
        if each.action == ENQUEUE and each.parameters == order.parameters:
            return "that configuration waits for the driver already; again=true"
    return None
