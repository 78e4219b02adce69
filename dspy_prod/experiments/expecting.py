"""What is expected of the next unit from those before it: a running mean and spread, per tenant where there are some.

A bet is fair whatever is expected, as long as nothing of the unit itself went into it. A better expectation only makes
bets win sooner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

TENANTS: Final = 1_000
"""So many tenants have a mean of their own; those that come later share the mean of all."""
LIKE_ALL: Final = 10.0
"""A tenant's mean counts its units, and so many that are as all are."""


class Expected:
    """A running mean and variance that begin with one imagined outcome.

    Args:
        mean: of the imagined outcome.
        variance: that it is worth.

    Attributes:
        count: how many outcomes were seen.
    """

    __slots__ = ("_mean", "_tenants", "_variance", "count", "squares", "total")

    def __init__(self, mean: float, variance: float) -> None:
        self._mean, self._variance = mean, variance
        self.count, self.total, self.squares = 0, 0.0, 0.0
        self._tenants: dict[str, list[float]] = {}

    def mean(self, tenant: str | None = None) -> float:
        """Of the next outcome."""
        mean = (self.total + self._mean) / (self.count + 1)
        own = self._tenants.get(tenant) if tenant is not None else None
        return mean if own is None else (own[1] + LIKE_ALL * mean) / (own[0] + LIKE_ALL)

    @property
    def variance(self) -> float:
        """Of all outcomes around their mean."""
        mean = (self.total + self._mean) / (self.count + 1)
        around = self.squares + self._mean * self._mean - (self.count + 1) * mean * mean
        return (max(around, 0.0) + self._variance) / (self.count + 1)

    def see(self, outcome: float, tenant: str | None = None) -> None:
        """An outcome that counts from the next unit on."""
        self.count += 1
        self.total += outcome
        self.squares += outcome * outcome
        if tenant is not None:
            own = self._tenants.get(tenant)
            if own is not None:
                own[0] += 1
                own[1] += outcome
            elif len(self._tenants) < TENANTS:
                self._tenants[tenant] = [1.0, outcome]

    def state(self) -> list[Any]:
        """As JSON has it."""
        return [self.count, self.total, self.squares, {name: list(own) for name, own in self._tenants.items()}]

    def restore(self, state: Sequence[Any]) -> None:
        """Go on from `state`."""
        self.count, self.total, self.squares = int(state[0]), float(state[1]), float(state[2])
        self._tenants = {name: [float(each) for each in own] for name, own in state[3].items()}
