"""Dotted names of options: reading, changing and rebuilding nested dataclasses by name.

The same flat names (`model.slow.hidden_size`) stand in Hydra overrides, search spaces, Optuna,
Ray, MLflow and the command that repeats a run.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from rum.errors import ConfigError

_T = TypeVar("_T")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint naming the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Leaf values of a nested dataclass (or of nested dicts) by dotted name."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        items: Iterable[tuple[str, Any]] = (
            (f.name, getattr(config, f.name)) for f in dataclasses.fields(config)
        )
    elif isinstance(config, Mapping):
        items = config.items()
    else:
        return {prefix.removesuffix("."): config}
    flat: dict[str, Any] = {}
    for name, value in items:
        flat.update(flatten(value, f"{prefix}{name}."))
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from dotted names, the inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        section = nested
        for part in path:
            section = section.setdefault(part, {})
        section[leaf] = value
    return nested


def replace(config: _T, parameters: Mapping[str, Any]) -> _T:
    """Returns a copy of a nested dataclass with some leaves changed; every check runs again.

    Args:
        config: Any dataclass instance.
        parameters: Values by dotted name.

    Raises:
        ConfigError: If a name is unknown (the nearest is named) or a value does not fit.
    """
    known = flatten(config)
    for name in parameters:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}{nearest(name, known)}")
    return _replace(config, parameters, "")


def _replace(config: _T, parameters: Mapping[str, Any], prefix: str) -> _T:
    changes: dict[str, Any] = {}
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):  # type: ignore[arg-type]  # a dataclass by contract
        value = getattr(config, f.name)
        name = f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            if any(key.startswith(f"{name}.") for key in parameters):
                changes[f.name] = _replace(value, parameters, f"{name}.")
        elif name in parameters:
            changes[f.name] = convert(parameters[name], hints[f.name], name)
    return _construct(dataclasses.replace, config, changes, prefix)  # type: ignore[no-any-return]


def from_plain(cls: type[_T], plain: Mapping[str, Any], name: str) -> _T:
    """Rebuilds a dataclass from `dataclasses.asdict` of it.

    Raises:
        ConfigError: If a field is unknown or a value does not fit.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in plain.items():
        if key not in fields:
            raise ConfigError(f"unknown option {name}.{key}{nearest(key, fields)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            values[key] = from_plain(typing.cast(type, hint), value, f"{name}.{key}")
        else:
            values[key] = convert(value, hint, f"{name}.{key}")
    return _construct(cls, None, values, f"{name}.")  # type: ignore[no-any-return]


def _construct(make: Any, config: Any, values: dict[str, Any], prefix: str) -> Any:
    try:
        return make(**values) if config is None else make(config, **values)
    except ConfigError as error:
        where = f"{prefix}" if prefix and not str(error).startswith(prefix) else ""
        raise ConfigError(f"{where}{error}") from error


def convert(value: Any, hint: Any, name: str) -> Any:
    """Returns `value` as an option of type `hint`: an int may stand for a float, no more.

    Raises:
        ConfigError: If it does not fit.
    """
    options = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and isinstance(value, option):
            if option is int and isinstance(value, bool):
                continue
            return value
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ConfigError(f"{name} must be {expected.replace('NoneType', 'null')}, got {value!r}")
