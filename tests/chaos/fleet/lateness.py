"""How long a process was kept from running: what a call is late by is its own only where the process could run."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from typing import Final

_TICK: Final = 0.01
_KEPT: Final = 20_000
"""Ticks that are remembered, which is minutes."""


class Lateness:
    """A thread that is due every hundredth of a second, and how late it was in all."""

    def __init__(self) -> None:
        self._times = [time.monotonic()]
        self._lost = [0.0]
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        due = time.monotonic() + _TICK
        while True:
            time.sleep(max(0.0, due - time.monotonic()))
            now = time.monotonic()
            if len(self._times) > _KEPT:
                self._times, self._lost = self._times[_KEPT // 2 :], self._lost[_KEPT // 2 :]
            self._lost.append(self._lost[-1] + now - due)
            self._times.append(now)
            due = now + _TICK

    def beyond(self, deadline: float, now: float) -> float:
        """Seconds that `now` is after `deadline`, without those for which nobody here was run."""
        if now <= deadline:
            return 0.0
        times, lost = self._times, self._lost
        first = min(bisect_left(times, deadline), len(lost) - 1)
        last = len(lost) - 1
        pending = max(0.0, now - times[-1] - _TICK)  # its thread is due just now
        return max(0.0, now - deadline - (lost[last] - lost[max(0, first - 1)]) - pending)
