"""A clock that stands still until it is told to move."""

from __future__ import annotations

import threading


class FakeClock:
    """Both clocks of `dspy_prod.runtime.clock.Clock`, moved by hand.

    Args:
        start: seconds since the epoch at which it begins; the monotonic clock begins at 1,000.

    Example:
        ```python
        clock = testing.FakeClock()
        lm = dspy_prod.LM("any/model", engine=testing.ScriptedEngine(), store="memory://", clock=clock)
        clock.advance(60)
        ```
    """

    def __init__(self, start: float = 1_800_000_000.0) -> None:
        self._lock = threading.Lock()
        self._wall = start
        self._monotonic = 1_000.0

    def monotonic(self) -> float:
        return self._monotonic

    def time(self) -> float:
        return self._wall

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks."""
        if seconds < 0:
            raise ValueError("time does not go back; set a new FakeClock instead")
        with self._lock:
            self._monotonic += seconds
            self._wall += seconds

    def __repr__(self) -> str:
        return f"FakeClock(monotonic={self._monotonic:g})"
