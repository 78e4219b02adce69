"""Time, injected everywhere so that policies never read a clock of their own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two clocks: one for durations, one for the calendar."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary origin; never goes back. For durations and deadlines."""
        ...

    def time(self) -> float:
        """Seconds since the epoch, UTC. For calendar windows and for state shared between processes."""
        ...


class SystemClock:
    """The machine's clocks."""

    __slots__ = ()

    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)

    def __reduce__(self) -> str:
        return "SYSTEM_CLOCK"  # another process's is the one that it has: stores are told apart by their clocks

    def __repr__(self) -> str:
        return "SystemClock()"


SYSTEM_CLOCK = SystemClock()
