"""Time, injected everywhere so that policies never read a clock of their own."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from math import inf
from typing import Any, Final, Protocol, TypeVar

T = TypeVar("T")


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


SYSTEM_CLOCK: Final = SystemClock()


class Moment(float):
    """A moment of another monotonic clock than the machine's, which it remembers."""

    __slots__ = ("clock",)

    clock: Clock

    @classmethod
    def of(cls, clock: Clock, seconds: float) -> float:
        """What `clock` shows at that moment."""
        if clock is SYSTEM_CLOCK or seconds == inf:
            return seconds
        moment = cls(seconds)
        moment.clock = clock
        return moment


def moment_on(clock: Clock, moment: float) -> float:
    """What `clock` shows at a moment that may be another clock's: as many seconds from now."""
    other: Clock = moment.clock if isinstance(moment, Moment) else SYSTEM_CLOCK
    if other is clock or moment == inf:
        return moment
    return clock.monotonic() + (moment - other.monotonic())


def earlier(moment: float, clock: Clock, seconds: float) -> float:
    """Of a moment and so many seconds from now on `clock`, what comes first."""
    mine = Moment.of(clock, clock.monotonic() + seconds)
    return moment if moment_on(clock, moment) < mine else mine


def on_advance(clock: Clock, told: Callable[[], None]) -> Callable[[], None] | None:
    """Have `told` called each time somebody moves the clock; what ends that, None for a clock that moves by itself."""
    subscribe: Callable[[Callable[[], None]], Callable[[], None]] | None = getattr(clock, "on_advance", None)
    return None if subscribe is None else subscribe(told)


def follow(clock: Clock, owner: T, moved: Callable[[T], Any]) -> None:
    """Have `moved(owner)` called each time somebody moves the clock, for as long as there is an owner."""
    known = weakref.ref(owner)

    def told() -> None:
        living = known()
        if living is not None:
            moved(living)

    end = on_advance(clock, told)
    if end is not None:
        weakref.finalize(owner, end).atexit = False
