"""How long something took, by the clock, and on a machine that had nothing else to do."""

from __future__ import annotations

import threading
import time
from math import inf

_TICK = 0.002
_WAKES = 0.001
"""Seconds late that a thread wakes on an idle machine."""


class Stopwatch:
    """A context manager that times its block and, meanwhile, what this machine did to a thread that was due.

    Requests are sent and received by threads. On a busy machine they begin late, and later than each other, which is no
    fault of the code under test: what it may take is compared with `seconds`, what it must take with `wall`.

    Attributes:
        wall: seconds by the clock.
        lost: seconds of them for which a thread was due and neither it nor another one of this process was run.
        longest: seconds of the longest time that a thread was due and did not run.
    """

    def __init__(self) -> None:
        self.wall = self.lost = self.longest = 0.0
        self._end = inf
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def seconds(self) -> float:
        """What it would have taken if others had left the machine alone."""
        return self.wall - self.lost

    def surely(self, seconds: float) -> float:
        """The part of a window of so many seconds in which what was sent in the window must have arrived."""
        return max(0.001, seconds - self.longest)

    def _watch(self) -> None:
        now, used = time.monotonic(), time.process_time()
        ended = False
        while not ended:
            ended = self._ended.wait(_TICK)
            due, then = now + _TICK, used
            now, used = min(time.monotonic(), self._end), time.process_time()
            self.longest = max(self.longest, now - due)
            self.lost += max(0.0, now - due - _WAKES - (used - then))

    def __enter__(self) -> Stopwatch:
        self._thread.start()
        self._begin = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = time.monotonic()
        self.wall = self._end - self._begin
        self._ended.set()
        self._thread.join()
