"""The lead among processes: of those that share a cache, one asks upstream for what several want at the same time."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.effects import Wait
from dspy_prod.pipeline.refusals import too_late
from dspy_prod.policies.cache import ResponseCache
from dspy_prod.policies.entries import Entry, store_key
from dspy_prod.policies.singleflight import Home, gone

PAUSE: Final = 0.002
"""Seconds after which it is looked first whether another process has its answer; then each time half as long again."""
LONGEST: Final = 0.05
"""Seconds between two looks, at most."""


class Lead:
    """The part of one call, which leads those of its own process that ask the same.

    Args:
        own: where the call runs.

    Attributes:
        shared: other processes may ask the same.
    """

    __slots__ = ("_cache", "_key", "_led", "_name", "_own", "shared")

    def __init__(self, cache: ResponseCache, key: bytes, own: Home = None) -> None:
        self._own = own
        self.shared = cache.shared(key)
        self._cache = cache
        self._key = key
        self._name = store_key(key) if self.shared else b""
        self._led = False

    def wait(self, call: Call) -> Generator[Wait, Any, Entry | None]:
        """Wait while another process asks upstream; its answer, or None when it is this one's turn.

        Raises:
            DeadlineExceededError: the call's deadline came before.
        """
        monotonic = call.pipeline.clock.monotonic
        found = self._look()
        if found is False:
            began = now = monotonic()
            pause = PAUSE
            while found is False:
                if now >= call.deadline:
                    raise too_late(call, "while waiting for an identical call of another process")
                yield Wait(None, min(call.deadline, now + pause))
                pause = min(pause * 1.5, LONGEST)
                now = monotonic()
                found = self._look(waited=True)
            call.waited += now - began
        if isinstance(found, Entry):
            return found
        return None

    def _look(self, waited: bool = False) -> Entry | bool:
        self._led = True  # before it is known: who is interrupted just then leads, and must end it
        found = self._cache.lead(self._key, self._name, waited, self)
        self._led = found is True
        return found

    def gone(self) -> bool:
        """Whether the event loop of the call is closed beneath it."""
        return gone(self._own)

    def end(self, verdict: bool = False) -> None:
        """Ask upstream no more, see `stores.base.Flights.leave`. Posted."""
        if self._led:
            self._cache.leave(self._name, verdict, self)
            self._led = False  # last: should this be interrupted, it is done again
