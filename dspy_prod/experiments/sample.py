"""Whom a judge looks at: a share of the units, drawn by a hash of its own, and so whatever variant they have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from math import inf

from dspy_prod.experiments.declaration import Declaration
from dspy_prod.stores.trials import Decision

SPENT = "judge_spent"
"""What the audit has once a judge's budget is used up."""
RESUMED = "judge_resumed"
"""And once it was raised."""


class Sample:
    """The units that judges look at, the same ones in every process.

    Args:
        salt: the experiment's. shares: of the units, by metric.

    Example:
        >>> sample = Sample("salt", {"quality": 0.5})
        >>> sum(sample.takes("quality", f"u{number}") for number in range(1000))
        517
    """

    def __init__(self, salt: str, shares: Mapping[str, float]) -> None:
        self.shares = dict(shares)
        self._salted = {metric: hashlib.sha256(json.dumps(["judge", salt, metric]).encode()) for metric in shares}

    @classmethod
    def of(cls, declaration: Declaration) -> Sample:
        """That of an experiment."""
        return cls(declaration.salt, declaration.judged)

    def takes(self, metric: str, unit: str) -> bool:
        """Whether the metric's judge looks at a unit; yes where it has none, and anybody may tell the metric."""
        if metric not in self.shares:
            return True
        digest = self._salted[metric].copy()
        digest.update(unit.encode("utf-8", "surrogatepass"))
        return int.from_bytes(digest.digest()[:8], "big") < self.shares[metric] * 2**64


def unjudged(metric: str, audit: Iterable[Decision]) -> list[tuple[float, float]]:
    """From when until when the budget of a metric's judge was used up; units exposed then are not its sample."""
    gaps: list[tuple[float, float]] = []
    for each in audit:
        if each.what not in (SPENT, RESUMED) or json.loads(each.evidence).get("metric") != metric:
            continue
        open_ = bool(gaps) and gaps[-1][1] == inf
        if each.what == SPENT and not open_:
            gaps.append((each.at, inf))
        elif each.what == RESUMED and open_:
            gaps[-1] = gaps[-1][0], each.at
    return gaps


def last_budget(metric: str, audit: Sequence[Decision]) -> tuple[str | None, float | None]:
    """What the audit says last of the budget of a metric's judge, `SPENT` or `RESUMED`, and of which cap in USD (None:
    of none); (None, None) where it says nothing."""
    for each in reversed(audit):
        said = json.loads(each.evidence) if each.what in (SPENT, RESUMED) else {}
        if said.get("metric") == metric:
            return each.what, said.get("usd", 0.0)
    return None, None
