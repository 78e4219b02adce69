"""How fast a minute's limit may be used: providers enforce it in slices smaller than a minute.

`RequestPacer` bounds requests per slice strictly, `TokenPacer` spreads tokens softly, `Pacing` is the pair as one limit
asks for it. Pure: no clock, bounded memory. Rules: SEMANTICS, "Rate limiter", Pacing.
"""

from __future__ import annotations

from collections import deque
from math import ceil, floor, inf
from typing import Any, Final

from dspy_prod.options import RateLimit
from dspy_prod.policies.window import MINUTE

LATENESS: Final = 0.005
"""Seconds by which a call may be sent late without delaying the calls after it (timers and threads wake late)."""
PACE_GUARD: Final = 0.04
"""Share by which slices are stretched. Less `LATENESS`, that absorbs 35 ms of arrival jitter in every second."""
_GROUPS: Final = 64
_LEARNING: Final = 0.1
_MEASURED_SLICE: Final = 0.1  # seconds' worth of a measured rate that may go at once: it was too fast for somebody


class RequestPacer:
    """At most `burst` requests in any slice of `span` seconds, by a log of the last `burst` nominal send times.

    The nominal time of a call is when it was allowed to go, or `LATENESS` before it went, whichever is later: a call
    that wakes a little late does not delay the rest, and real times stay within `LATENESS` of the bound. The log is
    exact up to 64 entries; a larger burst is kept in 64 groups, each dated by its last call, which is never too early.

    Attributes:
        burst: requests per slice.
        span: length of a slice in seconds.
    """

    __slots__ = ("_count", "_cut", "_log", "_passed", "_place", "burst", "span")

    def __init__(self, burst: int, span: float, now: float) -> None:
        self.burst = burst
        self.span = span
        self._log: deque[list[float]] = deque()  # [calls, first nominal time, last nominal time], oldest first
        self._count = 0
        self._place = 0  # of the next call, modulo the burst: groups begin at the same places in every round
        self._passed = now - LATENESS  # the newest bound that was waited for: refunds do not bring it back
        self._cut: float | None = None  # nominal time of the newest call that a smaller burst had no place for

    def reshape(self, burst: int, span: float) -> None:
        """Change the bound and keep what was sent."""
        self.span = span
        if burst == self.burst:
            return
        if self._cut is not None and burst > self.burst:
            self._log.appendleft([burst - self.burst, self._cut, self._cut])
            self._count += burst - self.burst
        self.burst = burst
        self._place = 0
        self._shorten()

    def _shorten(self) -> None:
        while self._count > self.burst:
            self._cut = self._pop()

    def _pop(self) -> float:
        head = self._log[0]
        self._count -= 1
        if head[0] > 1:
            head[0] -= 1
        else:
            self._log.popleft()
        return head[2]

    def ready_at(self) -> float:
        """When the next call may go; possibly in the past."""
        return self._log[0][2] + self.span if self._count >= self.burst else self._passed

    def earliest(self, now: float, ahead: int, burst: int, span: float) -> float:
        """When a call behind `ahead` others may go at best, should the bound become `burst` per `span` at once."""
        rounds, place = divmod(ahead, burst)
        place -= burst - self._count
        if place < 0:
            return max(now - LATENESS, self._passed) + rounds * span
        for calls, _, last in self._log:
            place -= int(calls)
            if place < 0:
                return max(now - LATENESS, last + span) + rounds * span
        raise AssertionError("the log holds fewer calls than it counts")

    def push(self, now: float, paced: bool = True) -> float:
        """Record a call sent now, `paced` by this bound or not; returns its nominal time, which `refund` wants back."""
        log, burst = self._log, self.burst
        if self._count >= burst:
            oldest = self._pop()
            if paced:  # else calls that did not wait would put the bound further and further off
                self._passed = oldest + self.span
        nominal = now - LATENESS
        if nominal < self._passed:
            nominal = self._passed
        self._count += 1
        if log:
            tail = log[-1]
            if nominal < tail[2]:
                nominal = tail[2]
            groups = _GROUPS if burst > _GROUPS else burst
            place = self._place
            self._place = place + 1 if place + 1 < burst else 0
            if place * groups % burst >= groups or len(log) >= 2 * groups:
                tail[0] += 1
                tail[2] = nominal
                return nominal
        log.append([1, nominal, nominal])
        return nominal

    def refund(self, nominal: float) -> None:
        """Forget a call that was not sent after all; nothing if it has left the log."""
        for at, group in enumerate(self._log):
            if group[1] <= nominal <= group[2]:
                group[0] -= 1
                self._count -= 1
                if not group[0]:
                    del self._log[at]
                return

    def idle(self, now: float) -> bool:
        """No call of the last slice is left."""
        return not self._log or self._log[-1][2] + self.span <= now

    def dump(self) -> list[object]:
        """What was sent, as JSON values."""
        return [list(self._log), self._place, self._passed, self._cut]

    def restore(self, log: list[list[float]], place: int, passed: float, cut: float | None) -> None:
        """Take over what another pacer dumped."""
        self._log = deque(log)
        self._count = int(sum(group[0] for group in log))
        self._place = place % self.burst
        self._passed = passed
        self._cut = cut
        self._shorten()


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

    __slots__ = ("_paces_requests", "_paces_tokens", "_requests", "_slice", "_tokens")

    def __init__(self) -> None:
        self._slice = 1, 0.0  # burst and span at the full rate
        self._requests: RequestPacer | None = None
        self._tokens: TokenPacer | None = None
        self._paces_requests = self._paces_tokens = False

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
            burst = max(1, ceil(burst * factor - 1e-9))  # rounded up, so that a slice is never shorter than configured
            span = burst / (rate * factor) * (1 + PACE_GUARD)
            if self._requests is None:
                self._requests = RequestPacer(burst, span, now)
            else:
                self._requests.reshape(burst, span)
        if limit.tpm is not None:
            if self._tokens is None:
                self._tokens = TokenPacer(now)
            self._tokens.per_token, self._tokens.slack = MINUTE / (limit.tpm * factor), seconds

    def ready_at(self, tokens: int) -> float:
        """When a call that reserves `tokens` may go; possibly in the past."""
        at = self._requests.ready_at() if self._paces_requests and self._requests is not None else -inf
        if self._paces_tokens and self._tokens is not None:
            then = self._tokens.ready_at(tokens)
            if then > at:
                return then
        return at

    def earliest(self, now: float, ahead: int) -> float:
        """When a call behind `ahead` others may go at best, should the full rate return. Tokens do not bind."""
        if self._requests is None or not self._paces_requests:
            return now
        return self._requests.earliest(now, ahead, *self._slice)

    def push(self, now: float, tokens: int) -> tuple[float, float]:
        """Record a call sent now; returns its nominal time and its charge, which `give_back` wants."""
        nominal = 0.0 if self._requests is None else self._requests.push(now, self._paces_requests)
        return nominal, 0.0 if self._tokens is None else self._tokens.push(now, tokens)

    def give_back(self, now: float, nominal: float, charge: float, reserved: int, used: int | None, sent: bool) -> None:
        """Correct a call: `used` tokens really, or nothing `sent`."""
        if not sent and self._requests is not None:
            self._requests.refund(nominal)
        if used is not None and self._tokens is not None:
            self._tokens.correct(now, charge, reserved, used)

    def idle(self, now: float) -> bool:
        """Nothing sent before delays a call."""
        return (self._requests is None or self._requests.idle(now)) and (
            self._tokens is None or self._tokens.due <= now
        )

    def dump(self) -> list[object]:
        """Everything but the settings, as JSON values."""
        requests, tokens = self._requests, self._tokens
        return [
            None if requests is None else [*requests.dump(), requests.burst, requests.span],
            None if tokens is None else [tokens.due, tokens.share, tokens.per_token],
        ]

    def restore(self, requests: list[Any] | None, tokens: list[float] | None) -> None:
        """Take over what another dumped, under the settings that `tune` gave."""
        if requests is not None:
            *sent, burst, span = requests
            if self._requests is None:
                self._requests = RequestPacer(burst, span, 0.0)
            self._requests.restore(*sent)
        if tokens is not None:
            due, share, per_token = tokens
            if self._tokens is None:
                self._tokens = TokenPacer(due)
                self._tokens.per_token = per_token
            self._tokens.due, self._tokens.share = due, share
