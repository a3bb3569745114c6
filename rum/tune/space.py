"""Search spaces: checked against the typed configuration before anything starts, then sampled."""

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import optuna

from rum.errors import ConfigError
from rum.experiment import ExperimentConfig
from rum.parameters import flatten, nearest, replace
from rum.tune.config import Domain

Space = Mapping[str, Domain]

Fit = Callable[[Mapping[str, Any], str, Domain], int]
"""Solves a domain with `parameters`: from a trial's other values, its name and itself."""

_Config = TypeVar("_Config", bound=ExperimentConfig)

MAX_CHECKED = 1000
"""Values of an int domain that are checked one by one before a search."""

NOT_SEARCHABLE = {
    "model.name": "it decides which options there are",
    "task.name": "trials of different tasks do not compare",
    "task.corpus": "trials on different data do not compare",
    "training.max_epochs": "it is the budget that the scheduler hands out",
    "training.device": "it does not change what is computed",
    "training.threads": "it follows from search.cpus_per_trial",
    "training.diagnostics": "it does not change what is computed",
    "training.checkpoint_seconds": "it does not change what is computed",
}


def check_space(base: ExperimentConfig, space: Space) -> None:
    """Checks that every value of every domain fits the configuration it will be put into.

    Raises:
        ConfigError: Naming the option and the value; an unknown option with the nearest known.
    """
    if not space:
        raise ConfigError("space must name at least one option to search, got none")
    known = flatten(ExperimentConfig(model=base.model, task=base.task, training=base.training))
    seen: dict[str, Domain] = {}
    for name, domain in space.items():
        where = f"space: {name}"
        if name not in known:
            raise ConfigError(f"space: unknown option {name!r}{nearest(name, known)}")
        if name in NOT_SEARCHABLE:
            raise ConfigError(f"{where} cannot be searched: {NOT_SEARCHABLE[name]}")
        _check_domain(where, domain)
        for branch, value in itertools.product(_branches(where, domain, seen), _values(domain)):
            try:
                replace(base, {**branch, name: value})
            except ConfigError as error:
                under = "".join(f", {key} = {held!r}" for key, held in branch.items())
                raise ConfigError(f"{where} = {value!r}{under} is not valid: {error}") from error
        seen[name] = domain
    solved = [name for name, domain in space.items() if domain.parameters is not None]
    if len(solved) > 1:
        raise ConfigError(f"space: one option can be solved for parameters, got {solved}")


def _check_domain(where: str, domain: Domain) -> None:
    if domain.parameters is not None and (
        domain.parameters < 1
        or domain.type != "int"
        or domain.step is not None
        or domain.log
        or domain.when
    ):
        raise ConfigError(
            f"{where}: parameters must be >= 1 and belong to an int domain with low and high only"
        )
    if domain.type == "categorical":
        if not domain.choices:
            raise ConfigError(f"{where}: a categorical domain must have choices, got none")
        if any(x is not None for x in (domain.low, domain.high, domain.step)) or domain.log:
            raise ConfigError(f"{where}: a categorical domain takes choices only")
        return
    if domain.type not in ("int", "float"):
        raise ConfigError(
            f"{where}: type must be 'int', 'float' or 'categorical', got {domain.type!r}"
        )
    if domain.choices is not None:
        raise ConfigError(
            f"{where}: choices belong to a categorical domain, type is {domain.type}"
        )
    if domain.low is None or domain.high is None:
        raise ConfigError(f"{where}: low and high must be given, got {domain.low}, {domain.high}")
    if not domain.low <= domain.high:
        raise ConfigError(f"{where}: low must be <= high, got {domain.low} > {domain.high}")
    if domain.log and domain.low <= 0:
        raise ConfigError(f"{where}: log needs low > 0, got {domain.low}")
    if domain.step is not None and (domain.step <= 0 or domain.log):
        raise ConfigError(f"{where}: step must be > 0 and not with log, got {domain.step}")
    if domain.type == "int":
        for bound in (domain.low, domain.high, domain.step or 1.0):
            if not float(bound).is_integer():
                raise ConfigError(f"{where}: an int domain has whole bounds and step, got {bound}")


def _extremes(domain: Domain) -> list[Any]:
    if domain.choices is not None:
        return list(domain.choices)
    assert domain.low is not None
    assert domain.high is not None
    convert = int if domain.type == "int" else float
    return [convert(domain.low), convert(domain.high)]


def _values(domain: Domain) -> list[Any]:
    """All values, of a float domain the ends, of a very long int domain some."""
    ends = _extremes(domain)
    if domain.type != "int":
        return ends
    low, high = ends
    values = range(low, high + 1, int(domain.step or 1))
    return [*values[:: -(-len(values) // MAX_CHECKED)], high]


def _branches(where: str, domain: Domain, seen: Space) -> list[dict[str, Any]]:
    """Every way to meet a domain's conditions, those of the options in them included."""
    branches: list[dict[str, Any]] = [{}]
    for name, wanted in (domain.when or {}).items():
        if name not in seen:
            raise ConfigError(
                f"{where}: when must name options that stand above it in the space, "
                f"got {name!r}{nearest(name, seen)}"
            )
        choices = seen[name].choices
        for value in _alternatives(wanted):
            if choices is None or value not in choices:
                raise ConfigError(f"{where}: when {name} = {value!r}, which is none of {choices}")
        branches = [
            {**branch, **above, name: value}
            for branch in branches
            for value in _alternatives(wanted)
            for above in _branches(where, seen[name], seen)
            if all(branch.get(k, v) == v for k, v in {**above, name: value}.items())
        ]
    if not branches:
        raise ConfigError(
            f"{where}: its conditions and those of the options in them never hold together"
        )
    return branches


def _alternatives(wanted: Any) -> list[Any]:
    """The values of a condition: a list means any of them."""
    return list(wanted) if isinstance(wanted, list) else [wanted]


def suggest(trial: optuna.Trial, space: Space, fit: Fit | None = None) -> dict[str, Any]:
    """Samples all options whose condition holds; for a trial that has some already, the rest.

    Args:
        trial: Optuna's.
        space: What is searched.
        fit: Must be given where a domain has `parameters`. Optuna records what it solves as an
            option with one value, which no sampler sees.
    """
    values: dict[str, Any] = {}
    for name, domain in space.items():
        if domain.parameters is not None or not applies(domain, values):
            continue
        if domain.choices is not None:
            values[name] = trial.suggest_categorical(name, domain.choices)
        elif domain.type == "int":
            low, high = _extremes(domain)
            values[name] = trial.suggest_int(
                name, low, high, step=int(domain.step or 1), log=domain.log
            )
        else:
            low, high = _extremes(domain)
            values[name] = trial.suggest_float(name, low, high, step=domain.step, log=domain.log)
    for name, size in _solved(space, values, fit).items():
        values[name] = trial.suggest_int(name, size, size)
    return values


def distribution(domain: Domain, value: Any) -> optuna.distributions.BaseDistribution:
    """Optuna's distribution of a trial's value of a domain, as `suggest` leaves it."""
    if domain.parameters is not None:
        return optuna.distributions.IntDistribution(value, value)
    if domain.choices is not None:
        return optuna.distributions.CategoricalDistribution(domain.choices)
    low, high = _extremes(domain)
    if domain.type == "int":
        return optuna.distributions.IntDistribution(
            low, high, log=domain.log, step=int(domain.step or 1)
        )
    return optuna.distributions.FloatDistribution(low, high, log=domain.log, step=domain.step)


def _solved(space: Space, values: Mapping[str, Any], fit: Fit | None) -> dict[str, int]:
    solved = {}
    for name, domain in space.items():
        if domain.parameters is not None:
            assert fit is not None, f"{name} is to be solved"
            solved[name] = fit(values, name, domain)
    return solved


def applies(domain: Domain, values: Mapping[str, Any]) -> bool:
    """Whether an option is searched beside these values of those above it."""
    return all(
        key in values and values[key] in _alternatives(wanted)
        for key, wanted in (domain.when or {}).items()
    )


def extreme(
    base: _Config,
    space: Space,
    cost: Callable[[_Config], float],
    *,
    largest: bool = False,
    fit: Fit | None = None,
) -> _Config:
    """The cheapest experiment of a space, or the dearest.

    One option after the other goes to the end of its domain that costs least (most): that is the
    extreme of a cost in which each option has its own direction, as memory and size have.

    Args:
        base: The experiment around the searched options.
        space: What is searched.
        cost: Of an experiment; those that it raises ConfigError for are left out.
        largest: The dearest instead.
        fit: As in `suggest`.
    """
    values: dict[str, Any] = {}
    for name, domain in space.items():
        costs: list[tuple[float, Any]] = []
        is_free = domain.parameters is None and applies(domain, values)
        for value in _extremes(domain) if is_free else []:
            try:
                costs.append((cost(apply(base, {**values, name: value})), value))
            except ConfigError:
                continue
        if costs:
            choose = max if largest else min
            values[name] = choose(costs, key=lambda pair: pair[0])[1]
    return apply(base, {**values, **_solved(space, values, fit)})


def check_values(values: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Checks a configuration, whole or in part, against a space.

    Returns:
        The values as the space has them: 1 of a float domain as 1.0.

    Raises:
        ConfigError: Listing all values that the space does not have.
    """
    checked: dict[str, Any] = {}
    wrong = []
    for name, value in values.items():
        domain = space.get(name)
        if domain is None:
            wrong.append(f"{name} is not searched{nearest(name, space)}")
        elif domain.parameters is not None:
            wrong.append(f"{name} is solved for {domain.parameters:,} parameters")
        elif not applies(domain, values):
            wrong.append(f"{name} is searched only when {domain.when}: give these, too")
        elif not (same := same_value(domain, value)):
            wrong.append(f"{name} must be {described(domain)}, got {value!r}")
        else:
            checked[name] = same[0]
    if wrong:
        raise ConfigError("the space does not have these values:\n  " + "\n  ".join(wrong))
    return checked


def same_value(domain: Domain, value: Any) -> list[Any]:
    """The value of a domain that equals `value`; none if it has none."""
    if domain.choices is not None:
        is_bool = isinstance(value, bool)
        return [c for c in domain.choices if c == value and isinstance(c, bool) == is_bool][:1]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    low, high = _extremes(domain)
    step = domain.step or (1.0 if domain.type == "int" else None)
    steps = (value - low) / step if step else 0.0
    is_on_grid = abs(steps - round(steps)) < 1e-8
    return [type(low)(value)] if low <= value <= high and is_on_grid else []


def described(domain: Domain) -> str:
    """The values of a domain, for people."""
    if domain.choices is not None:
        return f"one of {domain.choices}"
    low, high = _extremes(domain)
    step = "" if domain.step is None else f" in steps of {domain.step:g}"
    return f"{'an int' if domain.type == 'int' else 'a number'} from {low:g} to {high:g}{step}"


def apply(base: _Config, parameters: Mapping[str, Any]) -> _Config:
    """The experiment of a trial."""
    return replace(base, parameters)


def space_to_plain(space: Space) -> dict[str, Any]:
    """A space as plain values without what is unset, in its own order."""
    return {
        name: {
            key: value
            for key, value in vars(domain).items()
            if value is not None and value is not False
        }
        for name, domain in space.items()
    }


def differences(ours: Any, theirs: Any) -> list[str]:
    """One line for each leaf that differs between two nested plain values.

    An option that is null is as good as absent: it may be newer than the study.
    """
    a, b = flatten(ours), flatten(theirs)
    absent = "(absent)"
    return [
        f"{name}: {_shown(b.get(name, absent))} in the study, {_shown(a.get(name, absent))} now"
        for name in sorted(set(a) | set(b))
        if a.get(name) != b.get(name)
    ]


def _shown(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value
