"""Optuna's samplers by name, made anew for each trial.

A sampler's randomness comes from the study's seed and the trial's number, and what it knows from
the study, so that none has a state of its own to save and a resumed study asks the same questions.
"""

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import optuna.samplers
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from rum.errors import ConfigError
from rum.parameters import nearest
from rum.seeding import derive_seed
from rum.tune.config import SAMPLERS, SamplerConfig

_Space = dict[str, BaseDistribution]
_Values = dict[str, Any]
_PACKAGES = {"cmaes": ("cmaes",), "gp": ("scipy", "greenlet"), "qmc": ("scipy",)}


def build_sampler(config: SamplerConfig, number: int) -> BaseSampler:
    """The sampler for trial `number`.

    Raises:
        ConfigError: If there is none of that name, or a package that it needs is missing.
    """
    return _SeedByOption(config, number)


class _SeedByOption(BaseSampler):
    """A sampler whose options have seeds of their own where they are drawn one by one.

    What a driver had drawn of a trial when it died then does not matter to the rest.
    """

    def __init__(self, config: SamplerConfig, number: int) -> None:
        self._config = config
        self._number = number
        self._joint = _build(config, number)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> _Space:
        """What is drawn jointly."""
        return self._joint.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: _Space) -> _Values:
        """Draws it."""
        return self._joint.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draws one option."""
        alone = _build(self._config, self._number, param_name)
        return alone.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """As the sampler does."""
        self._joint.before_trial(study, trial)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """As the sampler does."""
        self._joint.after_trial(study, trial, state, values)


def _build(config: SamplerConfig, number: int, option: str = "") -> BaseSampler:
    """Optuna's sampler for trial `number`, or for one of its options.

    Raises:
        ConfigError: If there is none of that name, or a package that it needs is missing.
    """
    missing = [
        name for name in _PACKAGES.get(config.name, ()) if not importlib.util.find_spec(name)
    ]
    if missing:
        raise ConfigError(
            f"sampler.name={config.name} needs the packages {', '.join(missing)}: "
            "pip install 'rum-torch[samplers]'"
        )
    seed = derive_seed(config.seed, "sampler", number, option) % 2**32
    startup = config.startup_trials
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna's word for "may change"
        match config.name:
            case "random":
                return optuna.samplers.RandomSampler(seed=seed)
            case "tpe":
                return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
            case "gp":
                return optuna.samplers.GPSampler(
                    seed=seed, n_startup_trials=startup, warn_independent_sampling=False
                )
            case "cmaes":
                return optuna.samplers.CmaEsSampler(
                    seed=seed, n_startup_trials=startup, warn_independent_sampling=False
                )
            case "nsga2":
                return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, startup))
            case "qmc":
                # One sequence for the whole study; what it cannot lay out is drawn at random.
                return optuna.samplers.QMCSampler(
                    seed=config.seed,
                    scramble=True,
                    independent_sampler=optuna.samplers.RandomSampler(seed=seed),
                    warn_independent_sampling=False,
                    warn_asynchronous_seeding=False,
                )
            case _:
                return _by_class(config.name, seed)


def _by_class(name: str, seed: int) -> BaseSampler:
    """Another of Optuna's samplers, if its seed is all that it must be given."""
    kind: Any = getattr(optuna.samplers, name, None)
    known = (*SAMPLERS, *(each for each in optuna.samplers.__all__ if each.endswith("Sampler")))
    if not (inspect.isclass(kind) and issubclass(kind, BaseSampler)):
        raise ConfigError(
            f"sampler.name must be one of {', '.join(SAMPLERS)} or a class of optuna.samplers, "
            f"got {name!r}{nearest(name, known)}"
        )
    options = inspect.signature(kind).parameters
    required = [o.name for o in options.values() if o.default is o.empty]
    if "seed" not in options or required:
        raise ConfigError(
            f"sampler.name={name}: a sampler by class name must take a seed and need nothing "
            f"else, this one needs {', '.join(required) or 'no seed'}"
        )
    make: Callable[..., BaseSampler] = kind
    return make(seed=seed)
