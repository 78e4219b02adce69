"""HTTP/1.1 on an asyncio transport: reads requests one after another from a connection, writes raw bytes back.

h11 reads what clients send; answers are raw bytes, so that they can be as wrong as a fault asks for. A connection
serves one request at a time; what a client pipelines waits.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from http.client import responses as REASONS
from typing import Any, cast

import h11

MAX_HEAD = 256 * 1024
MAX_BODY = 64 * 1024 * 1024
DRIP_INTERVAL = 0.02


@dataclass(slots=True)
class HttpRequest:
    """One request: header names in lower case, path without the query."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytearray = field(default_factory=bytearray)


Serve = Callable[["Connection", HttpRequest], Coroutine[Any, Any, None]]


class Connection(asyncio.Protocol):
    """A client's connection. Cancels the task that serves a request when the client leaves.

    Args:
        serve: answers one request through this connection.
        peers: the set of open connections, of which this is one while it is open.
    """

    def __init__(self, serve: Serve, peers: set[Connection]) -> None:
        self._serve = serve
        self._peers = peers
        self._transport: asyncio.Transport | None = None
        self._reader = h11.Connection(h11.SERVER, MAX_HEAD)
        self._arriving: HttpRequest | None = None
        self._task: asyncio.Task[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._keep_alive = True

    # -- what a server does with it

    def write(self, data: bytes) -> None:
        """Send bytes; see `drain`."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the operating system has taken everything written."""
        if self._writable is not None:
            await self._writable

    async def drip(self, data: bytes, bytes_per_second: float) -> None:
        """Send `data` at a rate, a few bytes at a time."""
        size = max(1, int(bytes_per_second * DRIP_INTERVAL))
        for start in range(0, len(data), size):
            part = data[start : start + size]
            self.write(part)
            await asyncio.sleep(len(part) / bytes_per_second)

    def close(self) -> None:
        """Close in good order, after what was written."""
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Close with a TCP RST, dropping what was not yet sent."""
        if self._transport is None:
            return
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._peers.discard(self)
        if self._task is not None:
            self._task.cancel()
        self.resume_writing()

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def data_received(self, data: bytes) -> None:
        self._reader.receive_data(data)
        if self._task is None:
            self._next()

    # -- reading

    def _next(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        try:
            request = self._take()
        except h11.RemoteProtocolError as error:
            refusal = {"error": {"message": str(error)}}
            self.write(response(error.error_status_hint, refusal, {"connection": "close"}))
            self.close()
            return
        if request is None:
            return
        self._keep_alive = request.headers.get("connection", "").lower() != "close"
        self._task = asyncio.get_running_loop().create_task(self._serve(self, request))
        self._task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self.reset()
            raise error
        if not self._keep_alive:
            self.close()
        else:
            self._next()

    def _take(self) -> HttpRequest | None:
        """The next whole request, or None until more has arrived."""
        while True:
            event = self._reader.next_event()
            if isinstance(event, h11.Request):
                headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
                if event.http_version == b"1.0":
                    headers.setdefault("connection", "close")
                path = event.target.decode().partition("?")[0]
                self._arriving = HttpRequest(event.method.decode(), path, headers)
                _check_size(int(headers.get("content-length", 0)))
                if self._reader.they_are_waiting_for_100_continue:
                    self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                continue
            request = self._arriving
            if request is not None and isinstance(event, h11.Data):
                request.body += event.data
                _check_size(len(request.body))
                continue
            if request is None or not isinstance(event, h11.EndOfMessage):
                return None
            # Answers are written past h11, faults and all, so each request has a reader of its own.
            left, _ = self._reader.trailing_data
            self._reader, self._arriving = h11.Connection(h11.SERVER, MAX_HEAD), None
            if left:
                self._reader.receive_data(left)
            return request


def _check_size(body: int) -> None:
    if body > MAX_BODY:
        raise h11.RemoteProtocolError(f"request body over {MAX_BODY} bytes", error_status_hint=413)


def head(status: int, headers: Mapping[str, str], *, length: int | None) -> bytes:
    """A status line and headers; `length` None announces a chunked body of server-sent events."""
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}"]
    given = {name.lower() for name in headers}
    if "content-type" not in given:
        lines.append(f"content-type: {'text/event-stream' if length is None else 'application/json'}")
    lines.append("transfer-encoding: chunked" if length is None else f"content-length: {length}")
    lines.extend(f"{name}: {value}" for name, value in headers.items())
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def response(status: int, data: Any, headers: Mapping[str, str] | None = None) -> bytes:
    """A whole JSON response."""
    body = data if isinstance(data, bytes) else json.dumps(data, separators=(",", ":")).encode()
    return head(status, headers or {}, length=len(body)) + body


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
