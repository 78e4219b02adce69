"""A clock that stands still until a test moves it, and LMs in front of a provider."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dspy_prod.testing import Provider
from tests.e2e.support import make_lm


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


@pytest.fixture
def connect(provider: Provider) -> Iterator[Callable[..., Any]]:
    """Make an LM in front of a module's provider, with a store of its own, in memory."""
    made: list[Any] = []

    def make(**options: Any) -> Any:
        made.append(make_lm(provider.url, **options))
        return made[-1]

    yield make
    for lm in made:
        lm.close()
