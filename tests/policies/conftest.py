"""A clock that stands still until a test moves it."""

from __future__ import annotations

import pytest


class FakeClock:
    """Both clocks of `dspy_prod.runtime.clock.Clock`; they move together, and only by `advance`."""

    def __init__(self, monotonic: float = 1000.0, time: float = 1_700_000_000.0) -> None:
        self._monotonic = monotonic
        self._time = time

    def monotonic(self) -> float:
        return self._monotonic

    def time(self) -> float:
        return self._time

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self._monotonic += seconds
        self._time += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()
