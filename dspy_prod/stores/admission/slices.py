"""How many requests may go in a slice of time, by a log of those that went.

Pure: no clock, bounded memory. Rules: docs/guide/limiter.md.
"""

from __future__ import annotations

from collections import deque
from math import ceil, inf
from typing import Any, Final

LATENESS: Final = 0.005
"""Seconds by which a call may be sent late without delaying the calls after it (timers and threads wake late)."""
PACE_GUARD: Final = 0.04
"""Share by which slices are stretched. Less `LATENESS`, that absorbs 35 ms of arrival jitter in every second."""
_GROUPS: Final = 64


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

    def room(self, now: float) -> int:
        """How many calls may go at once."""
        if self._passed > now:
            return 0
        free = self.burst - self._count
        for calls, _, last in self._log:
            if last + self.span > now:
                break
            free += int(calls)
        return free

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

    def push(self, now: float, paced: bool = True, at_least: float = -inf) -> float:
        """Record a call sent now; returns its nominal time, which `refund` and `move` want back.

        Args:
            paced: whether this bound held the call back.
            at_least: another pacer's nominal time for the same call.
        """
        log, burst = self._log, self.burst
        if self._count >= burst:
            oldest = self._pop()
            if paced:  # else calls that did not wait would put the bound further and further off
                self._passed = oldest + self.span
        nominal = now - LATENESS
        if nominal < at_least:
            nominal = at_least
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

    def refund(self, nominal: float) -> bool:
        """Forget a call that was not sent after all; False if it has left the log, or the slice."""
        log = self._log
        for at in range(len(log) - 1, -1, -1):
            group = log[at]
            if group[1] <= nominal:
                if nominal + self.span <= group[2]:  # it is not among those of the group that still count
                    return False
                group[0] -= 1
                self._count -= 1
                if not group[0]:
                    del log[at]
                return True
        return False

    def move(self, nominal: float, later: float) -> float:
        """Date a call later: it was sent after its time. Returns what it is dated now."""
        if later <= nominal or not self.refund(nominal):
            return nominal
        log = self._log
        self._count += 1
        at = len(log)
        while at and log[at - 1][2] >= later:
            at -= 1
        if at == len(log) and len(log) >= 2 * _GROUPS:
            log[-1][0] += 1
            log[-1][2] = later
        elif at < len(log) and self.burst > _GROUPS:  # among the calls of a group, which is dated by its last
            log[at][0] += 1
            log[at][1] = min(log[at][1], later)
        else:
            log.insert(at, [1, later, later])
        return later

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


def shaped(pacer: RequestPacer | None, burst: int, rate: float, factor: float, now: float) -> RequestPacer:
    """A pacer of `burst` calls per slice at a share of `rate` calls per second, keeping what was sent."""
    burst = max(1, ceil(burst * factor - 1e-9))  # rounded up, so that a slice is never shorter than configured
    span = burst / (rate * factor) * (1 + PACE_GUARD)
    if pacer is None:
        return RequestPacer(burst, span, now)
    pacer.reshape(burst, span)
    return pacer


def dumped(pacer: RequestPacer | None) -> list[object] | None:
    return None if pacer is None else [*pacer.dump(), pacer.burst, pacer.span]


def restored(pacer: RequestPacer | None, row: list[Any] | None) -> RequestPacer | None:
    if row is None:
        return pacer
    *sent, burst, span = row
    if pacer is None:
        pacer = RequestPacer(burst, span, 0.0)
    pacer.restore(*sent)
    return pacer
