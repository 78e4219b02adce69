"""How fast a minute's limit may be used: providers enforce it in slices smaller than a minute.

`RequestPacer` (`slices.py`) bounds requests per slice strictly, `TokenPacer` spreads tokens softly, `Pacing` puts them
together as one limit asks for it. Pure: no clock, bounded memory. Rules: docs/guide/limiter.md.
"""

from __future__ import annotations

from math import floor, inf
from typing import Any, Final

from dspy_prod.options import RateLimit
from dspy_prod.stores.admission.slices import LATENESS, PACE_GUARD, RequestPacer, dumped, restored, shaped
from dspy_prod.stores.admission.window import MINUTE

MANY: Final = 2**31
_LEARNING: Final = 0.1
_MEASURED_SLICE: Final = 0.1  # seconds' worth of a measured rate that may go at once: it was too fast for somebody


class TokenPacer:
    """Tokens per second by GCRA (ITU-T I.371), soft: charged with the usage to be expected and corrected when known.

    The expectation is the reservation times the learned share of reservations that is really used, so estimates far
    above usage do not slow calls down. Calls may be early by `slack` seconds; a larger one goes once nothing is due.

    Attributes:
        per_token: seconds that one token takes.
        slack: seconds' worth of tokens that may go at once.
        due: GCRA's theoretical arrival time.
        share: learned real tokens per reserved token.
    """

    __slots__ = ("due", "per_token", "share", "slack")

    def __init__(self, now: float) -> None:
        self.per_token = 0.0
        self.slack = 0.0
        self.due = now
        self.share = 1.0

    def ready_at(self, tokens: int) -> float:
        """When a call that reserves `tokens` may go; possibly in the past."""
        early = self.slack - tokens * self.share * self.per_token
        return self.due - early if early > 0 else self.due

    def room(self, now: float, tokens: int) -> int:
        """How many calls that reserve `tokens` each may go at once without using up a quarter of the slack."""
        charge = tokens * self.share * self.per_token
        early = self.slack / 4 - max(0.0, self.due - now)
        return max(0, floor(early / charge)) if charge > 0 else MANY

    def push(self, now: float, tokens: int) -> float:
        """Charge a call sent now; returns the charge in seconds."""
        charge = tokens * self.share * self.per_token
        start = now - LATENESS
        self.due = (self.due if self.due > start else start) + charge
        return charge

    def correct(self, now: float, charge: float, reserved: int, used: int) -> None:
        """Replace a charge by real usage, and learn from it. Usage beyond a minute's worth is the window's business."""
        self.due = min(self.due + used * self.per_token - charge, now + MINUTE)
        if reserved and used:
            self.share += _LEARNING * (min(used / reserved, 4.0) - self.share)


class Pacing:
    """Requests and tokens paced as a `RateLimit` and a rate factor ask for.

    LMs with different settings may share a key, so a pacer that the settings of one do not ask for goes on counting.
    """

    __slots__ = ("_paces_requests", "_paces_tokens", "_requests", "_second", "_slice", "_tokens", "by_tokens")

    def __init__(self) -> None:
        self._slice = 1, 0.0  # burst and span at the full rate
        self._requests: RequestPacer | None = None
        self._second: RequestPacer | None = None  # bounds about a second, should calls of smaller bursts bunch up
        self._tokens: TokenPacer | None = None
        self._paces_requests = self._paces_tokens = False
        self.by_tokens = False

    def tune(self, limit: RateLimit, factor: float, measured: float | None, now: float) -> None:
        """Follow new settings, keeping what was sent.

        Args:
            factor: share of the configured rate that is allowed.
            measured: requests per second that stand in for `rpm`.
        """
        rate = measured if limit.rpm is None else limit.rpm / MINUTE
        seconds = 1.0
        self._paces_requests, self._paces_tokens = rate is not None, limit.tpm is not None
        if rate is not None:
            burst = limit.burst or max(1, floor(rate if limit.rpm is not None else rate * _MEASURED_SLICE))
            seconds = burst / rate
            self._slice = burst, seconds * (1 + PACE_GUARD)
            self._requests = shaped(self._requests, burst, rate, factor, now)
            if burst < floor(rate):
                self._second = shaped(self._second, floor(rate), rate, factor, now)
            else:
                self._second = None
        if limit.tpm is not None:
            if self._tokens is None:
                self._tokens = TokenPacer(now)
            self._tokens.per_token, self._tokens.slack = MINUTE / (limit.tpm * factor), seconds

    def ready_at(self, tokens: int) -> float:
        """When a call that reserves `tokens` may go; possibly in the past."""
        at = -inf
        self.by_tokens = False
        if self._paces_requests and self._requests is not None:
            at = self._requests.ready_at()
            if self._second is not None:
                at = max(at, self._second.ready_at())
        if self._paces_tokens and self._tokens is not None:
            then = self._tokens.ready_at(tokens)
            if then > at:
                self.by_tokens = True
                return then
        return at

    def earliest(self, now: float, ahead: int) -> float:
        """When a call behind `ahead` others may go at best, should the full rate return. Tokens do not bind."""
        if self._requests is None or not self._paces_requests:
            return now
        return self._requests.earliest(now, ahead, *self._slice)

    def push(self, now: float, tokens: int) -> tuple[float, float]:
        """Record a call sent now; returns its nominal time and its charge, which `give_back` wants."""
        return self._push_request(now), 0.0 if self._tokens is None else self._tokens.push(now, tokens)

    def _push_request(self, now: float) -> float:
        if self._requests is None:
            return 0.0
        least = -inf if self._second is None else self._second.push(now, self._paces_requests)
        return self._requests.push(now, self._paces_requests, least)

    def room(self, now: float, tokens: int) -> float:
        """How many calls that reserve `tokens` each may go at once, by less than half of what may go in a slice."""
        room = inf
        if self._paces_requests and self._requests is not None:
            room = min(self._requests.room(now), self._requests.burst // 4)
            if self._second is not None:
                room = min(room, self._second.room(now))
        if self._paces_tokens and self._tokens is not None and tokens:
            room = min(room, self._tokens.room(now, tokens))
        return room

    def draw(self, at: float, requests: int, tokens: int) -> tuple[float, float]:
        """Record so many calls as sent at `at`; returns their nominal time, and the charge of one token."""
        nominal, charge = self.push(at, tokens)
        for _ in range(requests - 1):
            nominal = self._push_request(at)
        return nominal, charge / tokens if tokens else 0.0

    def move(self, nominal: float, now: float) -> float:
        """Date a call from now: it was sent after its time. Returns its new nominal time."""
        later = max(nominal, now - LATENESS)
        if self._second is not None:
            self._second.move(nominal, later)
        if self._requests is not None:
            self._requests.move(nominal, later)
        return later

    def give_back(self, now: float, nominal: float, charge: float, reserved: int, used: int | None, sent: bool) -> None:
        """Correct a call: `used` tokens really, or nothing `sent`."""
        if not sent and self._requests is not None:
            self._requests.refund(nominal)
            if self._second is not None:
                self._second.refund(nominal)
        if used is not None and self._tokens is not None:
            self._tokens.correct(now, charge, reserved, used)

    def idle(self, now: float) -> bool:
        """Nothing sent before delays a call."""
        return (self._requests is None or self._requests.idle(now)) and (
            self._tokens is None or self._tokens.due <= now
        )

    def dump(self) -> list[object]:
        """Everything but the settings, as JSON values."""
        tokens = self._tokens
        return [
            dumped(self._requests),
            dumped(self._second),
            None if tokens is None else [tokens.due, tokens.share, tokens.per_token],
        ]

    def restore(self, requests: list[Any] | None, second: list[Any] | None, tokens: list[float] | None) -> None:
        """Take over what another dumped, under the settings that `tune` gave."""
        self._requests = restored(self._requests, requests)
        if self._second is not None or not self._paces_requests:  # else these settings pace without it
            self._second = restored(self._second, second)
        if tokens is not None:
            due, share, per_token = tokens
            if self._tokens is None:
                self._tokens = TokenPacer(due)
                self._tokens.per_token = per_token
            self._tokens.due, self._tokens.share = due, share
