"""What the drivers do before an attempt: wait for something, and build the engine that will send it."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from contextlib import suppress
from math import inf
from typing import Any, Final

from dspy_prod.pipeline.effects import Wait, Warm
from dspy_prod.pipeline.upstream.deadline import bounded
from dspy_prod.pipeline.upstream.ends import AttemptTimeoutError
from dspy_prod.pipeline.upstream.errors import public_error

if sys.version_info >= (3, 11):
    from asyncio import timeout_at
else:
    from async_timeout import timeout_at

LOOK_UP: Final = 0.5
"""Seconds that the main thread waits in one piece. A signal that comes just as a wait begins does not interrupt it, and
Python would run its handler (of Ctrl-C, too) only when the wait is over."""


def prepare(effect: Wait | Warm) -> Any:
    """Perform an effect that sends nothing, on this thread."""
    if isinstance(effect, Wait):
        _wait(effect)
        return
    upstream = effect.route.upstream
    outside = sys.exc_info()[1]
    try:
        if effect.until == inf:
            upstream.warm(effect.request, effect.beside)
        else:  # importing takes longer than some callers have
            bounded(lambda: upstream.warm(effect.request, effect.beside), effect.until)
    except AttemptTimeoutError:
        return  # the flow sees that the call is late
    except Exception as error:
        raise public_error(error, effect.route.upstream, effect.until, outside) from error


async def aprepare(effect: Wait | Warm) -> Any:
    """Perform an effect that sends nothing, in this task."""
    if isinstance(effect, Wait):
        await _await(effect)
        return
    upstream = effect.route.upstream
    outside = sys.exc_info()[1]
    try:
        async with limit_until(effect.until):
            await asyncio.to_thread(upstream.warm, effect.request, effect.beside)
        upstream.async_engine(effect.request, effect.beside)
    except (TimeoutError, asyncio.TimeoutError):
        return  # the flow sees that the call is late
    except Exception as error:
        raise public_error(error, effect.route.upstream, effect.until, outside) from error


def _wait(effect: Wait) -> None:
    decided = threading.Lock()  # which may be let go by a signal handler too, unlike an Event
    decided.acquire()

    def wake() -> None:
        with suppress(RuntimeError):  # somebody did already
            decided.release()

    if effect.what is not None and not effect.what.attach(wake):
        return
    longest = LOOK_UP if threading.current_thread() is threading.main_thread() else threading.TIMEOUT_MAX
    while not decided.acquire(timeout=min(max(0.0, effect.until - time.monotonic()), longest)):
        if time.monotonic() >= effect.until:
            return


async def _await(effect: Wait) -> None:
    left = inf if effect.until == inf else max(0.0, effect.until - time.monotonic())
    if effect.what is None:
        await asyncio.sleep(left)
        return
    loop = asyncio.get_running_loop()
    decided: asyncio.Future[None] = loop.create_future()

    def finish() -> None:
        if not decided.done():
            decided.set_result(None)

    def wake() -> None:
        try:
            loop.call_soon_threadsafe(finish)
        except RuntimeError:  # the loop is closed, so nobody waits; whoever decides has others to wake
            if not loop.is_closed():
                raise

    if not effect.what.attach(wake):
        return
    timer = None if left == inf else loop.call_later(left, finish)
    try:
        await decided
    finally:
        if timer is not None:
            timer.cancel()


def limit_until(until: float) -> Any:
    """An asynchronous context that ends with `TimeoutError` at monotonic time `until`."""
    if until == inf:
        return timeout_at(None)
    return timeout_at(asyncio.get_running_loop().time() + (until - time.monotonic()))
