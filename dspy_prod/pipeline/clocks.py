"""A call by another clock than the machine's: a driver waits, and ends attempts, in the machine's time.

What the flow decides goes by the call's clock. Sockets, threads and event loops know only the machine's: a moment
becomes as many of its seconds from now. A clock that is moved by hand ends a wait when it shows the moment, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

from dspy_prod.pipeline.effects import Decidable, Wait, replacing
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock, Moment, moment_on, on_advance


def in_machine_time(steps: Any, clock: Clock) -> Any:
    """The same flow, whose effects end by the machine's clock."""
    return steps if clock is SYSTEM_CLOCK else replacing(steps, partial(_converted, clock))


def _converted(clock: Clock, effect: Any) -> Any:
    if isinstance(effect, Wait):
        return _wait(effect, clock)
    effect.until = moment_on(SYSTEM_CLOCK, Moment.of(clock, effect.until))
    return None


def _wait(effect: Wait, clock: Clock) -> Any:
    waiting = _OrMoved(effect.what, effect.until, clock)
    try:
        yield Wait(waiting, moment_on(SYSTEM_CLOCK, Moment.of(clock, effect.until)), effect.stops)
    finally:
        waiting.leave()


class _OrMoved:
    """Decided when `what` is, or when the clock was moved and shows `until`."""

    __slots__ = ("_clock", "_end", "_until", "_what")

    def __init__(self, what: Decidable | None, until: float, clock: Clock) -> None:
        self._what, self._until, self._clock = what, until, clock
        self._end: Callable[[], None] | None = None

    def attach(self, wake: Callable[[], None]) -> bool:
        """See `effects.Decidable`."""
        if self._until != inf:
            self._end = on_advance(self._clock, lambda: wake() if self._due() else None)
            if self._end is not None and self._due():
                return False
        return self._what is None or self._what.attach(wake)

    def leave(self) -> None:
        """Nobody waits any more."""
        if self._end is not None:
            self._end()

    def _due(self) -> bool:
        return self._clock.monotonic() >= self._until
