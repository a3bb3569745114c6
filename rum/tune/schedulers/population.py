"""Population-based training (Jaderberg et al. 2017).

The population trains side by side, `interval` epochs at a time, whatever the number of trials that
fit the machine at once. Before a member goes on it is compared with those that have come as far:
one among the worst quarter ends, and a new trial begins from the last checkpoint of one among the
best quarter, with its options changed a little. Every member so stays a trial of its own, with
options that do not change under way; the new one names the trial that it comes from.
"""

import random
from collections.abc import Mapping
from typing import Any

from rum.errors import ConfigError
from rum.experiment import WEIGHTLESS
from rum.seeding import derive_seed
from rum.tune.config import Domain
from rum.tune.schedulers.base import Verdict

MUTABLE = ("learning_rate", *WEIGHTLESS)
"""Options that fit any weights; a copy could not take the others over."""
FACTORS = (0.8, 1.2)
SHARE = 4  # the worst quarter is replaced by the best
SMALLEST = 4  # members that must have come as far


def check_mutable(names: Mapping[str, Domain]) -> None:
    """Raises ConfigError if a searched option belongs to the weights' shapes or the course."""
    fixed = [name for name in names if name.rpartition(".")[2] not in MUTABLE]
    if fixed:
        raise ConfigError(
            f"scheduler=pbt copies weights between trials, so that only {', '.join(MUTABLE)} can "
            f"be searched, got {', '.join(fixed)}: use scheduler=promotion or asha, or take them "
            "out of the space"
        )


class Population:
    """Who is replaced, by whom, and with which options."""

    def __init__(self, mode: str, interval: int, seed: int, space: Mapping[str, Domain]) -> None:
        """Makes an empty population.

        Args:
            mode: "min" or "max".
            interval: Epochs between two comparisons.
            seed: Of the choices.
            space: Where the options may go.
        """
        check_mutable(space)
        self._mode = mode
        self._interval = interval
        self._seed = seed
        self._space = space
        self._curves: dict[int, dict[int, float]] = {}

    def file(self, number: int, curve: Mapping[int, float]) -> None:
        """Keeps the curve."""
        self._curves[number] = dict(curve)

    def forget(self, number: int) -> None:
        """Drops the curve."""
        self._curves.pop(number, None)

    def judge(self, number: int, epoch: int, value: float) -> Verdict:
        """Every `interval` epochs pauses a member, until the others have come as far."""
        self._curves.setdefault(number, {})[epoch] = value
        return Verdict.GO_ON if epoch % self._interval else Verdict.PAUSE

    def is_beaten(self, number: int, epoch: int) -> bool:
        """Whether a member is among the worst of those that have come as far."""
        ranked = self._ranked(epoch)
        return len(ranked) >= SMALLEST and number in ranked[-(len(ranked) // SHARE) :]

    def promoted(self, paused: Mapping[int, int], *, is_idle: bool) -> int | None:
        """The one that is furthest behind, once the whole population has begun."""
        if not (is_idle and paused):
            return None
        return min(paused, key=lambda number: (paused[number], number))

    def mean_epochs(self, max_epochs: int) -> float:
        """The one that takes a member's place goes on with its epochs."""
        return max_epochs

    def source_for(self, number: int, epoch: int) -> int:
        """The trial whose copy takes the place of `number`."""
        best = self._ranked(epoch)
        return self._random(number, "source").choice(best[: max(1, len(best) // SHARE)])

    def mutated(self, number: int, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The source's options, changed, for the successor of `number`.

        Numbers are multiplied by 0.8 or 1.2 and kept within their domain; of choices the next or
        the one before is taken.
        """
        generator = self._random(number, "mutation")
        return {
            name: self._neighbour(self._space[name], value, generator)
            for name, value in parameters.items()
        }

    def _neighbour(self, domain: Domain, value: Any, generator: random.Random) -> Any:
        if domain.choices is not None:
            index = domain.choices.index(value) + generator.choice((-1, 1))
            return domain.choices[min(max(index, 0), len(domain.choices) - 1)]
        assert domain.low is not None
        assert domain.high is not None
        changed = value * generator.choice(FACTORS)
        if domain.step is not None:
            changed = domain.low + round((changed - domain.low) / domain.step) * domain.step
        changed = min(max(changed, domain.low), domain.high)
        return round(changed) if domain.type == "int" else changed

    def _ranked(self, epoch: int) -> list[int]:
        """Those that have come as far, best first."""
        sign = 1.0 if self._mode == "min" else -1.0
        values = {n: sign * curve[epoch] for n, curve in self._curves.items() if epoch in curve}
        return sorted(values, key=lambda number: (values[number], number))

    def _random(self, number: int, purpose: str) -> random.Random:
        return random.Random(derive_seed(self._seed, purpose, number))
