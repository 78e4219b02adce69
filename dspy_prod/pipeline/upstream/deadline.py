"""Bounding one attempt in time, also against a server that hangs or sends a byte now and then.

The native route reads the limit from a `ContextVar` in every socket operation, so it needs no extra thread. Other
synchronous engines run in a worker thread that the caller stops waiting for; the abandoned attempt keeps its hold
until it ends: at once for a stream by way of LiteLLM, whose connection can be shut. Asynchronous engines are
cancelled by `timeout_at`.
"""

from __future__ import annotations

import contextvars
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from math import inf
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

from dspy.lm15 import TransportError

from dspy_prod.compat import bounds
from dspy_prod.compat.lm15_transports import HookedAsyncTransport, HookedTransport
from dspy_prod.pipeline.upstream.ends import EARLY, AttemptTimeoutError
from dspy_prod.pipeline.upstream.headers import note_refusal
from dspy_prod.pipeline.upstream.pages import without_secrets
from dspy_prod.pipeline.upstream.workers import WORKERS, Job

T = TypeVar("T")

ATTEMPT_UNTIL: contextvars.ContextVar[float] = contextvars.ContextVar("dspy_prod_attempt_until", default=inf)
"""Monotonic time at which the attempt running here must end."""

LEAVING: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("dspy_prod_leaving", default=None)
"""What wants to hear when the attempt running here puts its request on the wire. It hears of every part of it."""

MAX_CONNECTIONS: Final = 4096
"""Connections per upstream; concurrency is limited by `RateLimit`, not by the pool."""


class _BoundedSocket:
    """A socket whose every operation also respects `ATTEMPT_UNTIL`."""

    __slots__ = ("_sock", "_timeout")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._timeout: float | None = None

    def settimeout(self, timeout: float | None) -> None:
        self._timeout = timeout

    def recv(self, size: int) -> bytes:
        self._bound()
        return self._sock.recv(size)

    def sendall(self, data: bytes) -> None:
        self._bound()
        _leave()
        self._sock.sendall(data)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def _bound(self) -> None:
        until = ATTEMPT_UNTIL.get()
        timeout = self._timeout
        if until != inf:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError("the attempt's time limit has passed")
            timeout = left if timeout is None else min(timeout, left)
        self._sock.settimeout(timeout)


def _leave() -> None:
    leaving = LEAVING.get()
    if leaving is not None:
        leaving()


def _time_left() -> float | None:
    until = ATTEMPT_UNTIL.get()
    if until == inf:
        return None
    left = until - time.monotonic()
    if left <= 0:
        raise AttemptTimeoutError
    return left


class BoundedTransport(HookedTransport):
    """lm15's transport with sockets that respect `ATTEMPT_UNTIL`."""

    time_left = staticmethod(_time_left)
    wrapped = _BoundedSocket
    refused = staticmethod(note_refusal)
    cleaned = staticmethod(without_secrets)


class PacedAsyncTransport(HookedAsyncTransport):
    """lm15's asynchronous transport; it tells `LEAVING`."""

    leaves = staticmethod(_leave)
    refused = staticmethod(note_refusal)
    cleaned = staticmethod(without_secrets)


# -- engines that cannot be bounded from inside ------------------------------------------------------------------------
def bounded(function: Callable[[], T], until: float, job: Job[T] | None = None) -> T:
    """Run `function` in a worker and return its result, or raise `AttemptTimeoutError` at `until`.

    Args:
        job: what tells its end when its caller has left, whatever it left for; None where nobody asks.
    """
    job = WORKERS.submit(function, job)
    if not job.wait(until):
        raise AttemptTimeoutError
    job.heard = True
    if job.error is not None:
        raise job.error
    return job.value  # type: ignore[return-value]


_END: Final = object()


class StalledError(AttemptTimeoutError):
    """A stream showed no event for as long as `timeout` allows."""


def bounded_stream(
    open_stream: Callable[[], Iterator[T]],
    until: float,
    pause: float | None = None,
    job: Job[None] | None = None,
    leave: Callable[[], None] | None = None,
) -> Iterator[T]:
    """The items of a stream that runs in a worker; raises `AttemptTimeoutError` at `until`.

    The worker closes the stream when the consumer has gone, and is at most `bounds.AHEAD` items ahead of it. Waiting
    longer than `pause` seconds for one item raises `StalledError`.

    Args:
        job: see `bounded`.
        leave: called when the consumer has gone before the end, perhaps by the garbage collector: it interrupts the
            worker, which may be waiting for an item. None where nothing can; then the worker ends with its next item.
    """
    items: SimpleQueue[Any] = SimpleQueue()
    room = threading.Semaphore(bounds.AHEAD)
    gone = threading.Event()

    def pump() -> None:
        stream: Any = None
        try:
            stream = open_stream()
            for item in stream:
                room.acquire()
                if gone.is_set():
                    return
                items.put((item, None))
            items.put((_END, None))
        except BaseException as error:
            items.put((_END, error))
            raise  # for who hears of it when its consumer has gone
        finally:
            close = getattr(stream, "close", None)
            if close is not None:
                close()

    try:
        job = WORKERS.submit(pump, job)
        while True:
            left = inf if until == inf else until - time.monotonic()
            if left <= 0:  # also where there is always an item: the stream may have no end
                raise AttemptTimeoutError
            stalls = pause is not None and pause < left
            wait = pause if stalls else left
            try:
                item, error = items.get(timeout=None if wait == inf else wait)
            except Empty:
                raise (StalledError if stalls else AttemptTimeoutError) from None
            job.heard = item is _END
            if error is not None:
                raise error
            if job.heard:
                return
            room.release()
            yield item
    finally:
        gone.set()
        room.release()
        if leave is not None and job is not None and not job.heard:
            leave()


def within(source: Any, until: float, leaving: Callable[[], None], pause: float | None = None) -> Iterator[Any]:
    """The items of a stream that reads `ATTEMPT_UNTIL` itself, each awaited no longer than `until`.

    Where connecting takes longer than `pause` seconds, it raises `StalledError`; the transport bounds its reads by the
    same itself, so that a server is no sooner given up that says something, though no item comes of it.

    Args:
        leaving: called when its request goes out.
    """
    limit = until if pause is None else min(until, time.monotonic() + pause)

    def left() -> None:
        nonlocal limit
        leaving()
        limit = until
        ATTEMPT_UNTIL.set(until)

    with closing(source) as items:
        iterator = iter(items)
        while True:
            if time.monotonic() >= until:  # what one read brought may be many items
                raise AttemptTimeoutError
            ends, leaves = ATTEMPT_UNTIL.set(limit), LEAVING.set(left)
            try:
                item = next(iterator)
            except StopIteration:
                return
            except (AttemptTimeoutError, TransportError):
                if limit < until and time.monotonic() >= limit - EARLY:
                    raise StalledError from None
                raise
            finally:
                ATTEMPT_UNTIL.reset(ends)
                LEAVING.reset(leaves)
            yield item
