"""How long calls take, by variant: counts in buckets 5 % wide, so that any quantile is known to 2.5 %, for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

_WIDTH: Final = math.log(1.05)
_LEAST: Final = 1e-4


class Spread:
    """Seconds of units, the mean of a unit's calls each.

    Example:
        >>> spread = Spread()
        >>> for number in range(1, 101):
        ...     spread.see("control", number / 100)
        >>> round(spread.quantile("control", 0.5), 1)
        0.5
    """

    def __init__(self) -> None:
        self._counts: dict[str, dict[int, int]] = {}

    def see(self, arm: str, seconds: float) -> None:
        """One more unit."""
        bucket, counts = math.floor(math.log(max(seconds, _LEAST)) / _WIDTH), self._counts.setdefault(arm, {})
        counts[bucket] = counts.get(bucket, 0) + 1

    def quantile(self, arm: str, share: float) -> float | None:
        """Seconds that this share of the units stays below; None where there are none."""
        counts = self._counts.get(arm, {})
        left = share * sum(counts.values())
        for bucket in sorted(counts):
            left -= counts[bucket]
            if left <= 0:
                return math.exp((bucket + 0.5) * _WIDTH)
        return None

    def state(self) -> dict[str, dict[str, int]]:
        """As JSON has it."""
        return {arm: {str(bucket): n for bucket, n in counts.items()} for arm, counts in self._counts.items()}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Spread:
        """From `state`."""
        spread = cls()
        spread._counts = {arm: {int(each): int(n) for each, n in counts.items()} for arm, counts in state.items()}
        return spread
