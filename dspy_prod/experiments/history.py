"""How the evidence grew: a few points of each metric, to be drawn. They decide nothing.

A point is taken at every so-many-th unit, in the order of exposure; when there are too many of them, every other one is
dropped and the gap doubles. So the points depend on the units alone, not on who looked when: whoever reads all again
after a crash has the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from dspy_prod.experiments.decisions import MetricEvidence
from dspy_prod.experiments.evidence import Evidence

MOST: Final = 200
"""Points of a metric; they are never fewer than half of these once there were so many."""
FEWEST: Final = 50
TOGETHER: Final = 2_000
"""Points of all metrics and candidates together, as long as each has `FEWEST`."""


class Look(NamedTuple):
    """What was known of a candidate on a metric, once so many units had been exposed and their windows were over.

    Attributes:
        candidate, metric: of which.
        units: of all variants, in the order of exposure. at: when the last of them was exposed, in seconds since the
            epoch.
        difference, low, high: as of `Interval`; the bounds are None for few units.
        better, worse, no_worse: e-values, the largest so far; None where there is no such claim.
    """

    candidate: str
    metric: str
    units: int
    at: float
    difference: float
    low: float | None
    high: float | None
    better: float | None
    worse: float
    no_worse: float | None


class History:
    """The points of one experiment.

    Args:
        metrics, candidates: how many there are of each.
        state: of a checkpoint, as `state()` gave it; None for a history that begins.
    """

    def __init__(self, metrics: int, candidates: int, state: Mapping[str, Any] | None = None) -> None:
        self._most = min(MOST, max(FEWEST, TOGETHER // max(1, metrics * candidates)))
        state = state or {}
        self._gaps: dict[str, int] = {name: int(gap) for name, gap in state.get("gaps", {}).items()}
        self._points: dict[str, list[_Point]] = {
            name: [_Point(units, at, known, json.dumps([units, at, known])) for units, at, known in points]
            for name, points in state.get("points", {}).items()
        }
        self._last: dict[str, list[float]] = {name: list(last) for name, last in state.get("last", {}).items()}

    def see(self, evidence: Evidence, metric: str, number: int, at: float) -> None:
        """A unit's outcome was taken in.

        Args:
            evidence: with it. metric: whose. number: the unit's, in the order of exposure. at: when it was exposed.
        """
        self._last[metric] = [number, at]
        if number % self._gaps.setdefault(metric, 1):
            return
        points = self._points.setdefault(metric, [])
        points.append(_point(evidence, metric, number, at))
        while len(points) > self._most:
            gap = self._gaps[metric] = 2 * self._gaps[metric]
            points[:] = [each for each in points if not each.units % gap]

    def looks(self, evidence: Evidence) -> tuple[Look, ...]:
        """All points by metric and candidate, oldest first, and what is known now."""
        return tuple(self._looks(evidence))

    def _looks(self, evidence: Evidence) -> Iterator[Look]:
        for metric in evidence.metrics:
            points = list(self._points.get(metric.name, ()))
            last = self._last.get(metric.name)
            if last is not None and (not points or points[-1].units != last[0]):
                points.append(_point(evidence, metric.name, int(last[0]), last[1]))
            for candidate in evidence.candidates:
                for point in points:
                    if candidate in point.known:
                        yield Look(candidate, metric.name, point.units, point.at, *point.known[candidate])

    def state(self) -> str:
        """As JSON. It is written at every look that has read something, and a point never changes."""
        told = [
            f"{json.dumps(name)}: [{', '.join([each.text for each in some])}]" for name, some in self._points.items()
        ]
        return (
            f'{{"gaps": {json.dumps(self._gaps)}, "points": {{{", ".join(told)}}}, "last": {json.dumps(self._last)}}}'
        )


class _Point(NamedTuple):
    """What was known of each candidate; `text`: all of it as JSON."""

    units: int
    at: float
    known: Mapping[str, Sequence[Any]]
    text: str


def _point(evidence: Evidence, metric: str, number: int, at: float) -> _Point:
    """A point as it is kept: numbers of six digits, which is what can be drawn."""
    all_ = {name: _numbers(evidence.weighed(metric, name)) for name in evidence.candidates}
    known, at = {name: numbers for name, numbers in all_.items() if numbers}, round(at, 3)
    return _Point(number, at, known, json.dumps([number, at, known]))


def _numbers(found: MetricEvidence) -> list[float | None]:
    shown = found.interval
    if shown is None:
        return []
    numbers = shown.difference, shown.low, shown.high, found.better, found.worse, found.no_worse
    return [None if each is None else float(f"{each:.6g}") for each in numbers]
