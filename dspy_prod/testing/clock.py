"""A clock that stands still until it is told to move."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable


class FakeClock:
    """Both clocks of `dspy_prod.runtime.clock.Clock`, moved by hand.

    `advance` wakes whoever waits for the moment that it reaches: a pause before a retry, a place in the line of a rate
    limit. What happens on the machine takes the machine's time: `timeout=5` ends an attempt five seconds after it was
    sent, and a pause that nobody ends by `advance` ends after as many seconds. A `call_context(deadline=...)` is so
    many seconds of this clock to an LM that goes by it.

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
        self._told: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count()

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
            told = list(self._told.values())
        for each in told:
            each()

    def on_advance(self, told: Callable[[], None]) -> Callable[[], None]:
        """Have `told` called after each `advance`, on its thread.

        Returns:
            To be called when that shall end.
        """
        number = next(self._numbers)
        with self._lock:
            self._told[number] = told
        return lambda: self._forget(number)

    def _forget(self, number: int) -> None:
        self._told.pop(number, None)  # perhaps inside the garbage collector, so without the lock

    def __repr__(self) -> str:
        return f"FakeClock(monotonic={self._monotonic:g})"
