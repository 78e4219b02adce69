"""What these end-to-end tests share beyond `tests/e2e/support.py`: callers whose outcome can be awaited, and loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from tests.e2e.support import until


class Caller(threading.Thread):
    """A call made on a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._answer: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._answer = self._call()
        except BaseException as error:
            self._error = error

    def outcome(self, timeout: float = 30.0) -> Any:
        """The answer, or the error itself."""
        self.join(timeout)
        assert not self.is_alive(), f"the call did not end within {timeout} s"
        return self._answer if self._error is None else self._error


class Loop:
    """An event loop on a thread of its own; a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Loop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._loop.close()

    def start(self, call: Coroutine[Any, Any, Any]) -> Task:
        """Begin a task on the loop."""
        return Task(self._loop, call)


class Task:
    """A call made in a task of a loop, with the outcome of a `Caller`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Coroutine[Any, Any, Any]) -> None:
        self._loop = loop
        self._task: asyncio.Task[Any] | None = None
        self._future = asyncio.run_coroutine_threadsafe(self._guarded(call), loop)

    async def _guarded(self, call: Coroutine[Any, Any, Any]) -> Any:
        self._task = asyncio.ensure_future(call)
        try:
            return await self._task
        except BaseException as error:  # an outcome, like any other
            return error

    def cancel(self) -> None:
        """Cancel the call; its outcome is then an `asyncio.CancelledError`."""
        until(lambda: self._task is not None)
        assert self._task is not None
        self._loop.call_soon_threadsafe(self._task.cancel)

    def outcome(self, timeout: float = 30.0) -> Any:
        """The answer, or the error itself."""
        return self._future.result(timeout)


def following(lm: Any) -> int:
    """Calls that wait for an identical one."""
    waiting: int = lm.pipeline.flights.following()
    return waiting


def breaker(lm: Any) -> Any:
    """The primary's breaker now."""
    return lm.pipeline.primary.breaker.snapshot()


def quiet(lm: Any) -> bool:
    """Nothing is held, nobody waits, no probe is out and no flight is open."""
    store = lm.pipeline.store
    probes = sum(route.breaker.snapshot().probes_in_flight for route in lm.pipeline.every_route() if route.breaker)
    return (store.holds(), store.waiting(), probes, len(lm.pipeline.flights)) == (0, 0, 0, 0)
