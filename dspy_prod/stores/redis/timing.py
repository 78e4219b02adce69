"""The time of a Redis store: its server's, whatever the clocks of its clients say."""

from __future__ import annotations

from collections import deque
from typing import Final

from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock

SAMPLES: Final = 16
"""Answers that are compared: the one that took least time tells best what the server's clock said."""
FAR: Final = 1.0
"""Seconds from which on the time steps back: a clock that was wrong by so much was not the server's."""
KEPT: Final = 60.0
"""Seconds after which an answer counts no more: no two clocks run alike."""


class RedisTime:
    """Seconds since the epoch as the server counts them, between its answers by this process's monotonic clock.

    So a client whose clock is wrong, or is set, goes by the same minute as all others. A clock of one's own, such as a
    test's, is gone by instead of the server's.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset = clock.time() - clock.monotonic()
        self._heard: deque[tuple[float, float, float]] = deque(maxlen=SAMPLES)  # how long it took, offset, when
        self._follows = clock is SYSTEM_CLOCK
        self._floor = 0.0  # it does not go back where an answer tells that it was too far

    def time(self) -> float:
        """Store time."""
        return max(self._clock.monotonic() + self._offset, self._floor)

    def monotonic(self) -> float:
        """The clock for durations."""
        return self._clock.monotonic()

    def heard(self, seconds: bytes, micros: bytes, sent: float) -> None:
        """The server told its time in an answer to what was sent at `sent`, by `monotonic`."""
        if not self._follows:
            return
        now = self._clock.monotonic()
        self._heard.append((now - sent, int(seconds) + int(micros) / 1e6 - (sent + now) / 2, now))
        offset = min(each for each in self._heard if each[2] >= now - KEPT)[1]
        if self._offset - FAR < offset < self._offset:
            self._floor = self.time()
        self._offset = offset
