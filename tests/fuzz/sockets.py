"""Connections without sockets: the real transports of lm15 and httpx read what a script says.

Only the operating system is left out. Each new connection takes the next exchange of the script; what it holds is read
in the pieces it was cut into, and then it ends as the exchange says.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
from dspy._vendor.lm15.transports import ConnectError, _async, _sync
from httpcore._backends.auto import AutoBackend
from httpcore._backends.sync import SyncBackend

from dspy_prod.pipeline.upstream import deadline, upstream
from tests.fuzz.exchange import Exchange, healthy

HOME = ("fuzz.invalid", 80)
"""Host and port of the provider."""
URL = f"http://{HOME[0]}/v1"


class Wire:
    """What the next connections will hear.

    Attributes:
        told: the exchanges that were begun, oldest first.
        reached: where the connections went.
    """

    def __init__(self) -> None:
        self._script: deque[Exchange] = deque()
        self.told: list[Exchange] = []
        self.reached: list[tuple[str, int]] = []
        self.healthy = healthy("chat", False, 0)

    def load(self, script: list[Exchange], healthy: Exchange) -> None:
        """Begin an example: these exchanges in turn, and then healthy ones."""
        self._script = deque(script)
        self.told, self.reached = [], []
        self.healthy = healthy

    def take(self, host: str, port: int) -> Exchange:
        self.reached.append((host, port))
        exchange = self._script.popleft() if self._script else self.healthy
        self.told.append(exchange)
        return exchange


WIRE = Wire()


class Line:
    """One connection, as a socket and as httpcore's stream for threads and for tasks."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._parts = deque(exchange.parts)

    def settimeout(self, timeout: float | None) -> None:
        pass

    def fileno(self) -> int:
        raise ValueError("no socket")  # so that no connection is used twice: each attempt is one exchange

    def sendall(self, data: bytes) -> None:
        pass

    def recv(self, size: int) -> bytes:
        if self._parts:
            part = self._parts.popleft()
            if len(part) > size:
                self._parts.appendleft(part[size:])
                part = part[:size]
            return part
        if self.exchange.end == "reset":
            raise ConnectionResetError("reset by the script")
        if self.exchange.end == "hang":
            raise TimeoutError("the script hangs")
        return b""

    def close(self) -> None:
        self._parts.clear()


# -- lm15 ------------------------------------------------------------------------------------------------------------
def _opened(host: str, port: int) -> Line:
    exchange = WIRE.take(host, port)
    if exchange.end == "refused":
        raise ConnectError("failed to connect: refused by the script")
    return Line(exchange)


class Transport(deadline.BoundedTransport):
    """The synchronous transport of the product, but for the socket."""

    def _open(self, parsed: Any, *, origin: Any, **_: Any) -> Any:
        return _sync._SyncConnection(origin, self.wrapped(_opened(*origin[1:])))  # type: ignore[arg-type]


class AsyncTransport(deadline.PacedAsyncTransport):
    """The asynchronous one."""

    async def _open(self, parsed: Any, *, origin: Any, **_: Any) -> Any:
        line = _opened(*origin[1:])
        return _async._AsyncConnection(origin, _Reader(line), _Writer())  # type: ignore[arg-type]


class _Reader:
    def __init__(self, line: Line) -> None:
        self._line = line

    async def read(self, size: int) -> bytes:
        try:
            return self._line.recv(size)
        except TimeoutError:
            raise asyncio.TimeoutError from None


class _Writer:
    def write(self, data: bytes) -> None:
        pass

    async def drain(self) -> None:
        pass

    def get_extra_info(self, name: str) -> Any:
        return None

    def close(self) -> None:
        pass


# -- httpx -----------------------------------------------------------------------------------------------------------
class _Stream(httpcore.NetworkStream):
    def __init__(self, line: Line) -> None:
        self._line = line

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return _heard(self._line, max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        pass

    def close(self) -> None:
        self._line.close()

    def get_extra_info(self, info: str) -> Any:
        return info == "is_readable" or None  # so that no connection is used twice


class _AsyncStream(httpcore.AsyncNetworkStream):
    def __init__(self, line: Line) -> None:
        self._line = line

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return _heard(self._line, max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        pass

    async def aclose(self) -> None:
        self._line.close()

    def get_extra_info(self, info: str) -> Any:
        return info == "is_readable" or None


def _heard(line: Line, size: int) -> bytes:
    try:
        return line.recv(size)
    except TimeoutError as error:
        raise httpcore.ReadTimeout(str(error)) from error
    except OSError as error:
        raise httpcore.ReadError(str(error)) from error


def _reached(host: str, port: int) -> Line:
    exchange = WIRE.take(host, port)
    if exchange.end == "refused":
        raise httpcore.ConnectError("failed to connect: refused by the script")
    return Line(exchange)


def _connect(_: Any, host: str, port: int, **__: Any) -> httpcore.NetworkStream:
    return _Stream(_reached(host, port))


async def _aconnect(_: Any, host: str, port: int, **__: Any) -> httpcore.AsyncNetworkStream:
    return _AsyncStream(_reached(host, port))


@contextmanager
def instead_of_sockets() -> Iterator[Wire]:
    """Have the native engines, and every client of this process that sends by httpx, speak to `WIRE`."""
    import litellm

    places: list[tuple[Any, str, Any]] = [
        (upstream, "BoundedTransport", Transport),
        (upstream, "PacedAsyncTransport", AsyncTransport),
        (SyncBackend, "connect_tcp", _connect),
        (AutoBackend, "connect_tcp", _aconnect),
        (litellm, "disable_aiohttp_transport", True),
    ]
    before = [getattr(place, name) for place, name, _ in places]
    for place, name, instead in places:
        setattr(place, name, instead)
    _forget_clients()
    try:
        yield WIRE
    finally:
        for (place, name, _), found in zip(places, before, strict=True):
            setattr(place, name, found)
        _forget_clients()


def _forget_clients() -> None:
    """LiteLLM makes its clients anew: one made here would stay in use, with connections of loops that are over."""
    import litellm

    litellm.in_memory_llm_clients_cache.flush_cache()
    for name in ("module_level_client", "module_level_aclient"):
        vars(litellm).pop(name, None)
