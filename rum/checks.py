"""Checks of single option values: what must hold, then what came."""

import math
import re
from collections.abc import Collection

from rum.errors import ConfigError


def check_positive(name: str, value: float) -> None:
    """Raises ConfigError unless `value` is finite and > 0."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} must be a finite number > 0, got {value}")


def check_at_least(name: str, value: int, low: int) -> None:
    """Raises ConfigError unless `value` is an integer >= `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be an integer >= {low}, got {value!r}")


def check_probability(name: str, value: float) -> None:
    """Raises ConfigError unless `value` is in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{name} must be in [0, 1), got {value}")


def check_file_name(name: str, value: str) -> None:
    """Raises ConfigError unless `value` can be the name of a folder everywhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ConfigError(f"{name} must be letters, digits, '.', '_' and '-', got {value!r}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raises ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {sorted(map(str, choices))}, got {value!r}")
