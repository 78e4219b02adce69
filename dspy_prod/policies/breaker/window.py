"""Sliding windows over outcomes of calls, O(1) per call: a ring with running sums (Resilience4j, "sliding window").

A window does not lock; its owner does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dspy_prod.options import CircuitBreaker

FAILED = 1
"""Bit of an outcome: the call failed."""
SLOW = 2
"""Bit of an outcome: the call took longer than `slow_call_duration`; failed calls can be slow too."""


class Window(Protocol):
    """The recent calls of one route, as sums.

    Attributes:
        calls: outcomes in the window.
        failures: those with the bit `FAILED`.
        slow: those with the bit `SLOW`.
    """

    calls: int
    failures: int
    slow: int

    def add(self, outcome: int) -> None:
        """Record one call: 0, `FAILED`, `SLOW` or both."""
        ...

    def expire(self) -> None:
        """Bring the sums up to date; only needed before reading them without having added anything."""
        ...


class CountWindow:
    """The last `size` calls."""

    __slots__ = ("_next", "_ring", "_size", "calls", "failures", "slow")

    def __init__(self, size: int) -> None:
        self._ring = bytearray(size)
        self._size = size
        self._next = 0
        self.calls = self.failures = self.slow = 0

    def add(self, outcome: int) -> None:
        """Record one call; in a full window it replaces the oldest."""
        place = self._next
        oldest = self._ring[place]  # 0, and so without effect, while the window fills up
        if oldest != outcome:
            self._ring[place] = outcome
            self.failures += (outcome & FAILED) - (oldest & FAILED)
            self.slow += (outcome >> 1) - (oldest >> 1)
        place += 1
        self._next = place if place < self._size else 0
        if self.calls < self._size:
            self.calls += 1

    def expire(self) -> None:
        """Nothing: calls leave this window only by being replaced."""


class TimeWindow:
    """The calls of the last `seconds`, in `BUCKETS` slices of equal width.

    A slice leaves as a whole, so the window reaches back at most `seconds` and at least `seconds * (1 - 1/BUCKETS)`.
    """

    BUCKETS = 60

    __slots__ = ("_calls", "_failures", "_head", "_now", "_slow", "_width", "calls", "failures", "slow")

    def __init__(self, seconds: float, now: Callable[[], float]) -> None:
        self._now = now
        self._width = seconds / self.BUCKETS
        self._head = int(now() // self._width)
        self._clear()

    def _clear(self) -> None:
        self._calls = [0] * self.BUCKETS
        self._failures = [0] * self.BUCKETS
        self._slow = [0] * self.BUCKETS
        self.calls = self.failures = self.slow = 0

    def add(self, outcome: int) -> None:
        """Record one call now."""
        self.expire()
        place = self._head % self.BUCKETS
        self._calls[place] += 1
        self.calls += 1
        if outcome:
            failed, slow = outcome & FAILED, outcome >> 1
            self._failures[place] += failed
            self.failures += failed
            self._slow[place] += slow
            self.slow += slow

    def expire(self) -> None:
        """Drop the slices that are too old; at most `BUCKETS` steps however long nothing happened."""
        head = int(self._now() // self._width)
        if head <= self._head:
            return
        if head - self._head >= self.BUCKETS:
            self._clear()
        else:
            for index in range(self._head + 1, head + 1):
                place = index % self.BUCKETS
                self.calls -= self._calls[place]
                self.failures -= self._failures[place]
                self.slow -= self._slow[place]
                self._calls[place] = self._failures[place] = self._slow[place] = 0
        self._head = head


def window_of(options: CircuitBreaker, now: Callable[[], float]) -> Window:
    """An empty window as the options describe it; `now` is a monotonic clock in seconds."""
    if options.window_type == "count":
        return CountWindow(options.window)
    return TimeWindow(options.window, now)
