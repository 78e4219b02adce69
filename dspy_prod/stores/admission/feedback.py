"""What the provider says about its limit: 429, Retry-After and rate-limit headers.

Pure: no clock, bounded memory. Rules: docs/guide/limiter.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Final

DECREASE: Final = 0.7
"""A round of throttles multiplies the rate by this."""
INCREASE: Final = 0.05
"""Share of the configured rate by which a limit in use grows back per second."""
ROUND: Final = 1.0
"""Seconds for which further throttles belong to the same burst of calls, at least."""
LONGEST: Final = 300.0
"""Longest pause in seconds that one answer of a provider can bring about; after it, it is asked again."""
_LONGEST_GUESS: Final = 60.0
_QUIET: Final = 60.0
_DOUBLE: Final = 2.0
_SLOWEST: Final = 0.2


class Feedback:
    """A pause, a rate factor (AIMD: additive increase, multiplicative decrease), and what headers left us.

    Attributes:
        paused: time until which nothing goes.
        factor: share of the configured rate that is allowed.
        measured: without a configured rate, requests per second measured at the first throttle: what `factor` scales.
        slowed: the rate is lowered or measured.
        told: dimension → [left, until, last lease id before], where headers left less than we believed.
    """

    __slots__ = (
        "_delayed",
        "_grown",
        "_pressed",
        "_round",
        "_strikes",
        "factor",
        "measured",
        "paused",
        "slowed",
        "told",
    )

    def __init__(self, now: float) -> None:
        self.paused = now
        self.factor = 1.0
        self.measured: float | None = None
        self.slowed = False
        self.told: dict[str, list[float]] = {}
        self._round = now  # until then, throttles belong to the decrease already made
        self._strikes = 0  # rounds of throttles since the last success
        self._grown = now  # when the factor was last looked at
        self._pressed = now  # when the lowered rate last delayed a call
        self._delayed = False  # it did so since `_grown`

    # -- throttles ---------------------------------------------------------------------------------------------------
    def throttled(self, now: float, retry_after: float | None) -> bool:
        """Pause; True if this throttle begins a new round, for which the rate is to be lowered."""
        fresh = now >= self._round
        if fresh:
            self._strikes = min(self._strikes + 1, 7)
        if retry_after is not None and retry_after > 0:
            self.paused = max(self.paused, now + min(retry_after, LONGEST))
        elif fresh:
            self.paused = max(self.paused, now + min(2.0 ** (self._strikes - 1), _LONGEST_GUESS))
        self._round = max(self._round, self.paused, now + ROUND if fresh else now)
        return fresh

    def lift(self, now: float) -> bool:
        """Forget the pause and what headers told; a lowered rate grows back in use. Whether there was any."""
        found = self.paused > now or any(until > now for _, until, _ in self.told.values())
        self.paused = self._round = now
        self._strikes = 0
        self.told.clear()
        return found

    def succeeded(self) -> None:
        """The provider served a call: the next pause that has to be guessed is short again."""
        self._strikes = 0

    def lower(self, now: float, floor: float, measured: float | None) -> None:
        """Multiplicative decrease, not below the share `floor`; of the `measured` rate when none is configured."""
        if self.measured is None and measured is not None:
            self.measured = max(measured, 1.0)
        if self.measured is not None:
            floor = max(floor, _SLOWEST / self.measured)
        self.factor = max(min(floor, self.factor), self.factor * DECREASE)
        self.slowed = True
        self._grown = self._pressed = now
        self._delayed = False

    def delay(self, now: float) -> None:
        """The lowered rate makes a call wait: it is really used."""
        self._pressed = now
        self._delayed = True

    def recover(self, now: float, used: bool) -> None:
        """A call goes: additive increase, counting at most a second per call, if the rate is `used` or delays calls."""
        if used or self._delayed:
            self.factor += INCREASE * min(now - self._grown, 1.0)
        self._grown = now
        self._delayed = False
        if self.factor >= (1.0 if self.measured is None else _DOUBLE) or self._forgotten(now):
            self.restore_rate()

    def _forgotten(self, now: float) -> bool:
        """A measured rate that has not delayed any call for a while says nothing any more."""
        return self.measured is not None and now - self._pressed > _QUIET

    def restore_rate(self) -> None:
        """Forget that the rate was lowered."""
        self.measured, self.factor, self.slowed = None, 1.0, False

    # -- headers -----------------------------------------------------------------------------------------------------
    def resync(self, now: float, dimension: str, left: float, reset: float, own: float, lease: int) -> None:
        """Believe `left` for `reset` seconds if it is less than our `own` belief, or if nothing is left; the latest
        headers count. Our own window may have room again before the provider's has."""
        if isfinite(left) and (left < max(own, 0.0) or left < 1) and reset > 0:
            self.told[dimension] = [max(left, 0.0), now + min(reset, LONGEST), lease]
        else:
            self.told.pop(dimension, None)

    def left_at(self, now: float, tokens: int) -> tuple[float, str]:
        """When headers allow a call of `tokens`, and which dimension they name."""
        at, on = now, ""
        for dimension, (left, until, _) in self.told.copy().items():
            if until <= now:
                del self.told[dimension]
            elif until > at and left < (tokens if dimension == "tokens" else 1):
                at, on = until, dimension
        return at, on

    def spend(self, tokens: int) -> None:
        """A call goes and takes from what was left."""
        for dimension, row in self.told.items():
            row[0] -= tokens if dimension == "tokens" else 1

    def refund(self, lease: int, requests: int, tokens: int) -> None:
        """A call that went after the headers came took less than it reserved."""
        for dimension, row in self.told.items():
            if lease > row[2]:
                row[0] += tokens if dimension == "tokens" else requests

    # -- reading and keeping -----------------------------------------------------------------------------------------
    def idle(self, now: float) -> bool:
        """Nothing of what was said still counts."""
        told = any(until > now for _, until, _ in self.told.values())
        return self.paused <= now and not told and (not self.slowed or self._forgotten(now))

    def dump(self) -> list[object]:
        """Everything, as JSON values."""
        times = [self._round, self._strikes, self._grown, self._pressed, self._delayed]
        return [self.paused, self.factor, self.measured, self.told, *times]

    def restore(
        self,
        paused: float,
        factor: float,
        measured: float | None,
        told: Mapping[str, list[float]],
        round: float,
        strikes: int,
        grown: float,
        pressed: float,
        delayed: bool,
    ) -> None:
        """Take over what another dumped."""
        self.paused, self.factor, self.measured, self.told = paused, factor, measured, dict(told)
        self.slowed = factor != 1.0 or measured is not None
        self._round, self._strikes, self._grown, self._pressed, self._delayed = round, strikes, grown, pressed, delayed
