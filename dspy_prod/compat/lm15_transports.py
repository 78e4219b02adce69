"""The transports of lm15, the client library inside DSPy, so that they can be hooked and let go while they are used."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final

from dspy.lm15 import ProviderError

from dspy_prod.compat.foreign import names
from dspy_prod.compat.lm15_reading import Sipped, bounded_head

_StdlibTransport: Any
_StdlibAsyncTransport: Any
_BrokenTransport: type[Exception]
[_StdlibTransport, _StdlibAsyncTransport, _BrokenTransport, *_] = names(
    "dspy._vendor.lm15.transports",
    "StdlibTransport",
    "StdlibAsyncTransport",
    "TransportError",
    "StdlibTransport._open",
    "StdlibTransport._read_head",
    "StdlibTransport._make_release",
    "StdlibTransport._iter_body",
    "StdlibAsyncTransport._read_head",
    "StdlibAsyncTransport._make_release",
    "StdlibAsyncTransport._send_request",
    "StdlibAsyncTransport._do_stream",
)
names("dspy._vendor.lm15.providers.openai_chat", "OpenAIChatLM.parse_stream_events")
_LONGEST: Final = 500


def _elsewhere(response: Any, body: bytes) -> ProviderError:
    """The error for a redirect, which is not followed: lm15 takes its page for an answer."""
    said = " ".join(body.decode(errors="replace").split())
    if len(said) > _LONGEST:
        said = said[:_LONGEST].rpartition(" ")[0]  # half a key that the page repeats would not be known for one
    return ProviderError(f"HTTP {response.status} {response.reason}: {said}", status=response.status)


def _page(chunks: Iterator[bytes]) -> bytes:
    """What can be read of an error's page. Its status says what counts, though the page may break off."""
    parts: list[bytes] = []
    try:
        parts.extend(chunks)
    except _BrokenTransport:
        pass
    return b"".join(parts)


async def _apage(chunks: AsyncIterator[bytes]) -> bytes:
    """The same for tasks."""
    parts: list[bytes] = []
    try:
        async for part in chunks:
            parts.append(part)
    except _BrokenTransport:
        pass
    return b"".join(parts)


def _with_slot(response: Any) -> None:
    """Have the answer give back its slot together with its connection, as the asynchronous transport does.

    lm15 leaves the slot to the generator that reads the body. Where an answer is given up half-way, such as one that
    cannot be read, the error's traceback holds that generator: until the garbage is collected, by an interpreter that
    may be in the middle of another deep answer then, with no stack left to give anything back.
    """
    release, give_back = response._release, response._chunks.give_back

    def released(whole: bool) -> None:
        try:
            release(whole)
        finally:
            give_back()

    response._release = released


class _Body:
    """The parts of a body, and how the slot of its connection is given back, which an answer is not told."""

    __slots__ = ("_parts", "give_back")

    def __init__(self, parts: Iterator[bytes], give_back: Callable[[], None]) -> None:
        self._parts = parts
        self.give_back = give_back

    def __iter__(self) -> Iterator[bytes]:
        return self._parts


class HookedTransport(_StdlibTransport):
    """The synchronous transport, each request bounded and each socket wrapped by what a subclass names."""

    retired = False
    time_left: Callable[[], float | None]
    """Seconds that a request which begins now may take to connect; None: as the transport was told."""
    wrapped: Callable[[socket.socket], Any]
    refused: Callable[[list[tuple[str, str]], int], None]
    """Hears the headers and the status of an HTTP error."""
    cleaned: Callable[[bytes], bytes]
    """An error's page without secrets. lm15 cuts it, and nobody knows half a key for one."""

    def retire(self) -> None:
        """Keep no connection any more: idle ones are closed now, each of the others by whoever uses it, after that.

        `close` closes them all, also beneath a thread that waits for an answer: it then waits on, for as long as a
        read may take, on a descriptor that may be another connection's by now.
        """
        self.retired = True
        self._close_idle()

    def _close_idle(self) -> None:
        for origin in list(self._pool._idle):
            while (connection := self._pool.checkout(origin)) is not None:
                self._pool.discard(connection)

    def _make_release(self, conn: Any, keep_alive: bool) -> Callable[[bool], None]:
        release = super()._make_release(conn, keep_alive)

        def released(whole: bool) -> None:
            release(whole)
            if self.retired:
                self._close_idle()

        return released

    def stream(self, request: Any) -> Any:
        left = self.time_left()
        if left is not None:
            request.connect_timeout = min(request.connect_timeout or self._connect_timeout, left)
        response = super().stream(request)
        _with_slot(response)
        if response.status >= 300:
            self.refused(response.headers, response.status)
            response.read = lambda: self.cleaned(_page(iter(response)))
            if response.status < 400:
                with response:
                    raise _elsewhere(response, response.read())
        return response

    def _iter_body(self, *args: Any, on_finish: Callable[[], None], **kwargs: Any) -> Any:
        return _Body(super()._iter_body(*args, on_finish=on_finish, **kwargs), on_finish)

    def _read_head(self, conn: Any, **kwargs: Any) -> Any:
        return bounded_head(super()._read_head(Sipped(conn), **kwargs), conn)

    def _open(self, *args: Any, **kwargs: Any) -> Any:
        try:
            connection = super()._open(*args, **kwargs)
        except BaseException:
            del args, kwargs  # an error reporter would show them, and the address may hold a password
            raise
        connection.sock = self.wrapped(connection.sock)
        return connection


class HookedAsyncTransport(_StdlibAsyncTransport):
    """The asynchronous transport, which calls what a subclass names when a request goes out and when it is refused."""

    retired = False
    leaves: Callable[[], None]
    refused: Callable[[list[tuple[str, str]], int], None]
    cleaned: Callable[[bytes], bytes]

    async def retire(self) -> None:
        """The same for the tasks of a loop."""
        self.retired = True
        await self._close_idle()

    async def _close_idle(self) -> None:
        for origin in list(self._pool._idle):
            while (connection := await self._pool.checkout(origin)) is not None:
                await self._pool.discard(connection)

    def _make_release(self, conn: Any, keep_alive: bool) -> Callable[[bool], Awaitable[None]]:
        release = super()._make_release(conn, keep_alive)

        async def released(whole: bool) -> None:
            await release(whole)
            if self.retired:
                await self._close_idle()

        return released

    async def _send_request(self, *args: Any, **kwargs: Any) -> None:
        self.leaves()
        await super()._send_request(*args, **kwargs)

    async def _read_head(self, conn: Any, **kwargs: Any) -> Any:
        return bounded_head(await super()._read_head(Sipped(conn), **kwargs), conn)

    async def _do_stream(self, request: Any) -> Any:
        response = await super()._do_stream(request)
        if response.status >= 300:
            self.refused(response.headers, response.status)

            async def read() -> bytes:
                return self.cleaned(await _apage(aiter(response)))

            response.read = read
            if response.status < 400:
                try:
                    raise _elsewhere(response, await response.read())
                finally:
                    await response.aclose()
        return response
