"""`lifespan`: a service ends without losing what its calls cost, or what is known about them."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final

import anyio

from dspy_prod import ConfigError, tracking
from dspy_prod.asgi.serving import Serving, serving
from dspy_prod.lm import close_all

_log = logging.getLogger("dspy_prod")

LEAST: Final = 0.2
"""Seconds that each part of the end is given, also when the ones before took all."""

Flush = Callable[[float], object]


@asynccontextmanager
async def lifespan(app: Any, *, timeout: float = 10.0, flush: Sequence[Flush] = ()) -> AsyncIterator[None]:
    """A lifespan for `Starlette(lifespan=...)` and `FastAPI(lifespan=...)`, or within your own.

    From SIGTERM on, `/readyz` says that the worker is draining. At the end it waits for requests in flight (which the
    server has cancelled by then, if it bounds its own end), closes every LM, and writes out ledger, traces and metrics:
    those of OpenTelemetry where its SDK is in use, others by `flush`. uvicorn kills itself by the same signal right
    after, which runs nothing that was registered with `atexit`.

    Args:
        app: the application; the server gives it.
        timeout: seconds for all of this. What could not be written in time is told in the log: costs by then are in the
            store's file, or in the process alone; traces are still delivered by their own process.
        flush: further functions to call at the end, each with the seconds left, in a thread.

    Raises:
        ConfigError: an impossible timeout, or a flush that is no function.

    Example:
        ```python
        @asynccontextmanager
        async def mine(app):
            async with dspy_prod.asgi.lifespan(app):
                yield
        ```
    """
    check_ending(timeout, flush)
    duty = serving(app)
    duty.draining = False
    with _noticing_sigterm(duty):
        try:
            yield
        finally:
            duty.draining = True
            with anyio.CancelScope(shield=True):
                await _end(duty, timeout, flush)


def check_ending(timeout: Any, flush: Any) -> None:
    """Look at the arguments of `lifespan`.

    Raises:
        ConfigError: see there.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < float("inf"):
        raise ConfigError(f"lifespan(timeout={timeout!r}): give a positive number of seconds")
    if not isinstance(flush, Sequence) or not all(callable(each) for each in flush):
        raise ConfigError(f"lifespan(flush={flush!r}): give a list of functions that take the seconds left")


async def _end(duty: Serving, timeout: float, flush: Sequence[Flush]) -> None:
    until = time.monotonic() + timeout

    def left() -> float:
        return max(LEAST, until - time.monotonic())

    if not await duty.idle(timeout / 4):
        _log.warning("%d requests are still in flight at the end of the service", duty.in_flight)
    unwritten = await close_all(left())
    if unwritten:
        _log.warning("About %d records of calls could not be written in %g s", unwritten, timeout)
    ends: list[tuple[str, Flush]] = [("traces", _traces), ("metrics", _metrics)]
    for name, end in [*ends, *[(getattr(one, "__qualname__", repr(one)), one) for one in flush]]:
        try:
            with anyio.move_on_after(left()) as limit:
                await anyio.to_thread.run_sync(partial(end, left()), abandon_on_cancel=True)
        except Exception as error:
            _log.warning("Writing out %s failed: %s", name, type(error).__name__, exc_info=error)
        else:
            if limit.cancelled_caught:
                _log.warning("Writing out %s took longer than was left of %g s", name, timeout)


def _traces(seconds: float) -> None:
    if tracking.status() is None or tracking.flush(seconds):
        return
    now = tracking.status()
    if now is not None:
        _log.warning("%d traces wait for MLflow at %s; %d were lost", now.waiting, now.uri, now.lost)


def _metrics(seconds: float) -> None:
    if "opentelemetry.sdk.metrics" not in sys.modules:
        return
    from opentelemetry import metrics

    force = getattr(metrics.get_meter_provider(), "force_flush", None)
    if force is not None:
        force(seconds * 1000)


@contextmanager
def _noticing_sigterm(duty: Serving) -> Iterator[None]:
    """Note SIGTERM, and pass it on to the server, which has set itself up before."""
    before = signal.getsignal(signal.SIGTERM) if threading.current_thread() is threading.main_thread() else None
    if not callable(before):
        yield  # not in the main thread, or nobody handles it: then the process ends at once
        return
    server: Callable[[int, Any], Any] = before

    def notice(number: int, frame: Any) -> None:
        duty.draining = True
        server(number, frame)

    signal.signal(signal.SIGTERM, notice)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is notice:
            signal.signal(signal.SIGTERM, before)
