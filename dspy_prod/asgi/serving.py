"""What an application is doing: requests in flight, and whether it is about to end."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final


class Serving:
    """One application in one process.

    Attributes:
        in_flight: requests and websockets being served.
        draining: it was told to end; what is in flight is finished, and nothing new should be sent here.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.draining = False
        self._idle: asyncio.Event | None = None

    @contextmanager
    def one(self) -> Iterator[None]:
        """One more in flight, for as long as this lasts."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            if self._idle is not None and not self.in_flight:
                self._idle.set()

    async def idle(self, timeout: float) -> bool:
        """Wait until nothing is in flight; False when that takes longer."""
        if self.in_flight:
            self._idle = asyncio.Event()
            try:
                await asyncio.wait_for(self._idle.wait(), timeout)
            except asyncio.TimeoutError:
                return False
        return True


_SERVING: Final[weakref.WeakKeyDictionary[Any, Serving]] = weakref.WeakKeyDictionary()


def serving(app: Any) -> Serving:
    """What an application is doing; always the same object for one application."""
    return _SERVING.setdefault(app, Serving())
