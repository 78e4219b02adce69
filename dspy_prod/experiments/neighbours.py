"""Amounts that only some units have, for reasons of their own: units of both arms are compared in pairs.

An answer from a cache took no time, and a new variant's cache is cold. So of latencies nearly all that are left are the
candidate's, whatever share of the users it has, and the known probability of an arm holds no longer: any change in the
provider's pace would seem to be the candidate's. From the first unit without an amount on, each unit is therefore
compared with the latest one of the other arm. If the arms are alike, which of two neighbours has the larger amount is a
fair coin, however often each arm has one; and the pace of the hour is the same for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

Told = tuple[bool, float, float]
"""(whether it is the candidate's, how probable that was, the amount)."""


class Neighbours:
    """Tells a comparison of one candidate with control what it may bet on."""

    __slots__ = ("_latest", "_pairs", "_some")

    def __init__(self) -> None:
        self._some = False  # a unit without an amount was seen
        self._pairs = 0
        self._latest: list[float | None] = [None, None]  # of control and of the candidate, not compared yet

    def of(self, candidate: bool, propensity: float, value: float | None) -> Sequence[Told]:
        """What a unit, in order of exposure, gives to bet on.

        Args:
            candidate: whether it had the candidate. propensity: how probable that was. value: None if it has none.
        """
        if value is None:
            self._some = True
            return ()
        if not self._some:
            return ((candidate, propensity, value),)
        self._latest[candidate] = value
        control, ours = self._latest
        if control is None or ours is None:
            return ()
        self._latest = [None, None]
        self._pairs += 1
        # Which of the two comes first is drawn, so that its arm is a fair coin; that of the other is certain then.
        if blake2b(str(self._pairs).encode(), digest_size=1).digest()[0] & 1:
            return (True, 0.5, ours), (False, 0.0, control)
        return (False, 0.5, control), (True, 1.0, ours)

    def state(self) -> list[Any]:
        """As JSON has it."""
        return [self._some, self._pairs, *self._latest]

    def restore(self, state: Sequence[Any]) -> None:
        """Go on from `state`."""
        self._some, self._pairs, *self._latest = state
