"""Units that a new stage may move into another arm before they count.

Of a unit that comes into a candidate within its window, what comes later is the candidate's doing, and what came before
is less than others have; to leave out those who came back would leave out the most active users of control, and of
control alone. So whoever is in control, and whom a stage that began within the window reaches, is left out, whether it
came back or not: that is decided by the hash. Of the others it is known how probable each arm was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dspy_prod.experiments.assignment import Design
from dspy_prod.experiments.declaration import source_of
from dspy_prod.experiments.evidence import Exposure
from dspy_prod.options.metrics import Metric
from dspy_prod.stores.trials import GRACE, Decision, Matured

STAGE = "stage"
"""Begins a line of the audit that says a new stage has begun."""


def begun(audit: Iterable[Decision]) -> list[float]:
    """When the stages after the first one began, in seconds since the epoch."""
    return [each.at for each in audit if each.what == STAGE]


def exposure_of(design: Design, unit: Matured) -> Exposure:
    """A unit's exposure, with the probabilities of that moment."""
    shares = design.propensities(unit.stage, unit.full)
    return Exposure(unit.arm, dict(zip(design.variants, shares, strict=True)), str(unit.stage))


class Moving:
    """Of the units of one source of outcomes, whether they stayed where they were until they count.

    Args:
        design: who gets what. metrics: what is read from the source: all have the same window.
    """

    def __init__(self, design: Design, metrics: Sequence[Metric]) -> None:
        self._design = design
        self._window = metrics[0].window if metrics else 0.0
        # Without a window a unit's first call counts, which its first arm answers.
        self._moves = bool(metrics) and (self._window > 0 or source_of(metrics[0]) is not None)

    def concerns(self, units: Iterable[Matured]) -> bool:
        """Whether any of them may have been moved, so that it matters when stages began."""
        last = len(self._design.shares) - 1
        return self._moves and any(unit.stage < last for unit in units)

    def exposure(self, unit: Matured, began: Sequence[float]) -> Exposure | None:
        """The unit's exposure, among those that were not moved; None of one that is left out.

        Args:
            began: as `begun` tells it.
        """
        found = exposure_of(self._design, unit)
        if not self._moves:
            return found
        until = self._until(unit)
        reached = max(unit.stage, sum(at <= until for at in began))
        if reached == unit.stage:
            return found
        control = self._design.variants[0]
        if unit.arm == control and self._design.reaches(unit.unit, reached):
            return None
        return Exposure(unit.arm, {**found.propensities, control: 1.0 - self._design.shares[reached]}, found.stage)

    def _until(self, unit: Matured) -> float:
        """Until when what becomes of it counts."""
        if self._window or not unit.values.size:
            return unit.at + (self._window or GRACE)
        return unit.values.at
