"""Models and tasks of other packages: modules named by the entry-point group `rum.plugins`.

Such a module registers its own with `rum.cells.register_model` and `rum.tasks.register_task`. In
the other package's pyproject.toml:

    [project.entry-points."rum.plugins"]
    irnn = "rum_irnn"
"""

from functools import lru_cache
from importlib.metadata import entry_points

from rum.errors import ConfigError

GROUP = "rum.plugins"


@lru_cache(maxsize=1)
def load_plugins() -> tuple[str, ...]:
    """Imports all installed plugins, once in a process.

    Returns:
        Their names.

    Raises:
        ConfigError: If one cannot be imported, naming it.
    """
    names = []
    for entry_point in entry_points(group=GROUP):
        try:
            entry_point.load()
        except Exception as error:
            raise ConfigError(
                f"plugin {entry_point.name!r} ({entry_point.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        names.append(entry_point.name)
    return tuple(names)
