"""HTTP/1.1 on an asyncio transport: reads requests one after another from a connection, writes raw bytes back.

Only what the provider needs, and cheap. A connection serves one request at a time; what a client pipelines waits.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, cast

MAX_HEAD = 256 * 1024
MAX_BODY = 64 * 1024 * 1024
DRIP_INTERVAL = 0.02

_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Content Too Large",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    529: "Overloaded",
}


class BadRequest(Exception):
    """The bytes received are not a request this server reads; `status` says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class HttpRequest:
    """One request: header names in lower case, path without the query."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


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
        self._buffer = bytearray()
        self._pending: tuple[HttpRequest, int] | None = None
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
        self._buffer += data
        if self._task is None:
            self._next()

    # -- reading

    def _next(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        try:
            request = self._take()
        except BadRequest as error:
            self.write(response(error.status, {"error": {"message": str(error)}}, {"connection": "close"}))
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
        elif self._buffer:
            self._next()

    def _take(self) -> HttpRequest | None:
        """The next whole request in the buffer, or None until more has arrived."""
        if self._pending is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD:
                    raise BadRequest(413, "request head too large")
                return None
            request = parse_head(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
            if "chunked" in request.headers.get("transfer-encoding", "").lower():
                length = -1
            else:
                length = _length(request.headers.get("content-length", "0"))
            if length > MAX_BODY:
                raise BadRequest(413, f"request body over {MAX_BODY} bytes")
            if length and request.headers.get("expect", "").lower() == "100-continue":
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._pending = request, length
        request, length = self._pending
        if length >= 0:
            if len(self._buffer) < length:
                return None
            request.body = bytes(self._buffer[:length])
            del self._buffer[:length]
        else:
            found = unchunk(self._buffer)
            if found is None:
                return None
            request.body, used = found
            del self._buffer[:used]
        self._pending = None
        return request


def parse_head(head: bytes) -> HttpRequest:
    """Request line and headers."""
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise BadRequest(400, "not an HTTP/1.1 request")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise BadRequest(400, "a header without a colon")
        headers[name.strip().lower()] = value.strip()
    if parts[2] == "HTTP/1.0":
        headers.setdefault("connection", "close")
    return HttpRequest(parts[0], parts[1].partition("?")[0], headers)


def unchunk(buffer: bytearray) -> tuple[bytes, int] | None:
    """Decode a chunked body at the start of `buffer`: (body, bytes used), or None while it is not whole."""
    body = bytearray()
    position = 0
    while True:
        line = buffer.find(b"\r\n", position)
        if line < 0:
            return None
        size = _length(bytes(buffer[position:line]).split(b";")[0].decode("latin-1"), 16)
        start = line + 2
        if size == 0:
            end = buffer.find(b"\r\n", start)
            while 0 <= end != start:  # trailers, up to an empty line
                start = end + 2
                end = buffer.find(b"\r\n", start)
            return None if end < 0 else (bytes(body), end + 2)
        if len(body) + size > MAX_BODY:
            raise BadRequest(413, f"request body over {MAX_BODY} bytes")
        if len(buffer) < start + size + 2:
            return None
        body += buffer[start : start + size]
        position = start + size + 2


def _length(text: str, base: int = 10) -> int:
    try:
        length = int(text, base)
    except ValueError:
        length = -1
    if length < 0:
        raise BadRequest(400, f"bad length {text!r}")
    return length


def head(status: int, headers: Mapping[str, str], *, length: int | None) -> bytes:
    """A status line and headers; `length` None announces a chunked body of server-sent events."""
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}"]
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
