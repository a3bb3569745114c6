"""Which candidates are refused before they cost anything: too many parameters, too much memory."""

import dataclasses
from dataclasses import dataclass

import torch

from rum.errors import ConfigError
from rum.experiment import ExperimentConfig
from rum.tune.config import AUTO, SearchConfig
from rum.tune.crew_size import replicas
from rum.tune.prediction import Predictor, allocatable, share_for
from rum.tune.sizing import TOLERANCE
from rum.tune.space import extreme
from rum.tune.study import INFEASIBLE
from rum.tune.terminal import say

GIGABYTE = 1e9


@dataclass(frozen=True)
class Verdict:
    """What the limits say of a candidate."""

    excess: dict[str, float]
    """By limit, as a share of it: above 0 is infeasible. Optuna's constraints."""
    reason: str | None
    """Why the candidate is refused; None where it is feasible."""


@dataclass(frozen=True)
class Limits:
    """What a trial may take; None is no limit."""

    predictor: Predictor
    max_parameters: int | None = None
    max_memory_bytes: float | None = None
    budget: int | None = None
    """Parameters that an option is solved for."""

    def judge(self, experiment: ExperimentConfig) -> Verdict:
        """Whether a candidate is feasible, from its prediction."""
        excess: dict[str, float] = {}
        reasons = []
        if self.max_parameters is not None:
            parameters = self.predictor.predict(experiment).parameters
            excess["parameters"] = parameters / self.max_parameters - 1
            if parameters > self.max_parameters:
                reasons.append(f"{parameters:,} parameters, at most {self.max_parameters:,}")
        if self.max_memory_bytes is not None:
            memory = self.predictor.predict(experiment).memory_bytes
            excess["memory"] = memory / self.max_memory_bytes - 1
            if memory > self.max_memory_bytes:
                reasons.append(
                    f"{memory / GIGABYTE:.2f} GB of memory, at most "
                    f"{self.max_memory_bytes / GIGABYTE:.2f} GB"
                )
        if self.budget is not None:
            parameters = self.predictor.predict(experiment).parameters
            excess["budget"] = abs(parameters / self.budget - 1) - TOLERANCE
            if excess["budget"] > 0:
                reasons.append(
                    f"{parameters:,} parameters, not within {TOLERANCE:.0%} of {self.budget:,}"
                )
        reason = f"{INFEASIBLE}: {'; '.join(reasons)}" if reasons else None
        return Verdict(excess, reason)


def with_share(config: SearchConfig, predictor: Predictor) -> SearchConfig:
    """The search with the share of a GPU for `search.gpus_per_trial=auto`."""
    if config.search.gpus_per_trial != AUTO:
        return config
    share = 0.0
    if config.training.device.startswith("cuda"):
        largest = extreme(
            config,
            config.space,
            lambda e: predictor.predict(e).memory_bytes,
            largest=True,
            fit=predictor.fit,
        )
        memory = float(predictor.predict(largest).memory_bytes)
        if config.search.max_memory_gigabytes is not None:
            memory = min(memory, config.search.max_memory_gigabytes * GIGABYTE)
        memory *= replicas(config)
        # What does not fit at all is refused as infeasible when it comes up.
        share = share_for(memory, card_bytes(config.training.device)) or 1.0
        say(f"GPU: {share:.3g} of one for each trial; the largest needs {memory / 1e9:.2f} GB")
    search = dataclasses.replace(config.search, gpus_per_trial=share)
    return dataclasses.replace(config, search=search)


def limits_of(config: SearchConfig, predictor: Predictor) -> Limits:
    """The limits that a search sets; on CUDA no candidate may need more than its share of a card.

    Args:
        config: Its `search.gpus_per_trial` is a number.
        predictor: Of the search.
    """
    options = config.search
    memory = None
    if options.max_memory_gigabytes is not None:
        memory = options.max_memory_gigabytes * GIGABYTE
    elif config.training.device.startswith("cuda"):
        share = float(options.gpus_per_trial) or 1.0
        memory = allocatable(min(1.0, share), card_bytes(config.training.device))
        memory /= replicas(config)
    return Limits(predictor, options.max_parameters, memory, _budget(config))


def _budget(config: SearchConfig) -> int | None:
    budgets = [domain.parameters for domain in config.space.values()]
    return next(filter(None, budgets), None)


def card_bytes(device: str) -> int:
    """Memory of a CUDA device of this machine."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def check_feasible(config: SearchConfig, limits: Limits) -> None:
    """Raises ConfigError if nothing in the space can be within a limit."""
    predictor = limits.predictor

    def parameters(experiment: SearchConfig) -> float:
        return predictor.predict(experiment).parameters

    def memory(experiment: SearchConfig) -> float:
        return predictor.predict(experiment).memory_bytes

    for name, cost in (("parameters", parameters), ("memory", memory)):
        verdict = limits.judge(extreme(config, config.space, cost, fit=predictor.fit))
        if verdict.excess.get(name, 0.0) > 0:
            raise ConfigError(
                f"even the smallest experiment of the space is {verdict.reason}: widen the space "
                "downwards, or raise search.max_parameters or search.max_memory_gigabytes"
            )
    if limits.budget is not None:
        free = {
            name: dataclasses.replace(domain, parameters=None)
            for name, domain in config.space.items()
        }
        low, high = (
            predictor.predict(extreme(config, free, parameters, largest=end)).parameters
            for end in (False, True)
        )
        if not low * (1 - TOLERANCE) <= limits.budget <= high * (1 + TOLERANCE):
            raise ConfigError(
                f"no experiment of the space has {limits.budget:,} parameters: it has from "
                f"{low:,} to {high:,}"
            )
