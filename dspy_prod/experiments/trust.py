"""Whether an experiment may be believed at all: units arrive in the shares they were drawn with, each in one arm.

The sample ratio is tested at every unit by a Dirichlet-multinomial e-value (Lindon and Malek, "Anytime-valid inference
for multinomial count data", 2022), a product over everything that has probabilities of its own: the stages of a ramp,
and what follows when a stage is full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

CONCENTRATION: Final = 1_000.0
"""How close to the declared shares other ones are expected: as after so many units."""
RATIO_ALPHA: Final = 0.01
"""A sound experiment raises the alarm with this probability at most, at all looks together."""
CONTAMINATED: Final = 0.01
"""More than this share of units in two arms within a stage, and the arms no longer tell what they seem to."""
FEWEST_CROSSED: Final = 3
"""So many at least: one unit of the first fifty is no share."""
STRATA: Final = 1_000
"""So many sets of probabilities are tested; units under further ones are counted, not tested."""


def contaminated(crossed: int, units: int) -> bool:
    """Whether too many of so many units were seen in two arms."""
    return crossed >= FEWEST_CROSSED and crossed > CONTAMINATED * units


class SampleRatio:
    """The e-value of "units were not drawn as declared", unit by unit.

    Attributes:
        units: exposed so far.
        crossed: of these, seen in two arms within one stage, or in one that their draw ruled out.
        peak: the logarithm of the largest e-value so far.
    """

    __slots__ = ("_log", "_strata", "crossed", "peak", "units")

    def __init__(self) -> None:
        self.units, self.crossed, self.peak, self._log = 0, 0, 0.0, 0.0
        self._strata: dict[str, dict[str, int]] = {}

    def see(self, arm: str, propensities: Mapping[str, float], stage: str = "") -> None:
        """A unit was exposed.

        Args:
            arm: which it had.
            propensities: how probable each arm was for it.
            stage: of the rollout.
        """
        self.units += 1
        own = propensities.get(arm, 0.0)
        if own <= 0.0:
            self.crossed += 1
            return
        if own >= 1.0:
            return
        key = "|".join([stage, *(f"{name}={propensities[name]!r}" for name in sorted(propensities))])
        counts = self._strata.get(key)
        if counts is None:
            if len(self._strata) >= STRATA:
                return
            counts = self._strata[key] = {}
        seen = sum(counts.values())
        foretold = (CONCENTRATION * own + counts.get(arm, 0)) / (CONCENTRATION + seen)
        self._log += math.log(foretold / own)
        self.peak = max(self.peak, self._log)
        counts[arm] = counts.get(arm, 0) + 1

    def cross(self) -> None:
        """A unit that was exposed before was now seen in another arm within its stage; tell each once."""
        self.crossed += 1

    @property
    def e_value(self) -> float:
        """What the alarm goes by: the largest so far, at most 1e300."""
        return math.exp(min(self.peak, 690.0))

    @property
    def mismatch(self) -> bool:
        """Whether units do not arrive in the declared shares."""
        return self.peak >= -math.log(RATIO_ALPHA)

    @property
    def contaminated(self) -> bool:
        """Whether too many units were seen in two arms."""
        return contaminated(self.crossed, self.units)

    @property
    def counts(self) -> dict[str, int]:
        """Tested units of each arm."""
        found: dict[str, int] = {}
        for counts in self._strata.values():
            for arm, count in counts.items():
                found[arm] = found.get(arm, 0) + count
        return found

    def state(self) -> dict[str, Any]:
        """As JSON has it."""
        strata = {key: dict(counts) for key, counts in self._strata.items()}
        return {"units": self.units, "crossed": self.crossed, "peak": self.peak, "log": self._log, "strata": strata}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.units, self.crossed = int(state["units"]), int(state["crossed"])
        self.peak, self._log = float(state["peak"]), float(state["log"])
        self._strata = {key: {arm: int(n) for arm, n in counts.items()} for key, counts in state["strata"].items()}
