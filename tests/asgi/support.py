"""What the tests of a service share: a client that speaks ASGI by hand, and can leave at any moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LIMIT = 30.0
"""Seconds until a request that does not end fails its test."""


@dataclass
class Answer:
    """What a client received."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    messages: list[Any] = field(default_factory=list)

    def json(self) -> Any:
        return json.loads(self.body)


async def exchange(
    app: Any,
    path: str,
    *,
    kind: str = "http",
    headers: Mapping[str, str] | None = None,
    pieces: tuple[bytes, ...] = (b"",),
    leave: Callable[[], Awaitable[object]] | None = None,
    taken: list[int] | None = None,
) -> Answer:
    """One request or websocket, as a server gives it to the application.

    Args:
        pieces: of the body, or a websocket's messages. leave: the client leaves once this has been awaited. taken: is
            told the number of each piece that the application's side has read.
    """
    scope = {
        "type": kind, "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
        "server": ("test", 80), "client": ("test", 1), "subprotocols": [], "state": {},
    }  # fmt: skip
    answer = Answer()
    left = list(pieces)
    connected = False
    ended = asyncio.Event()

    async def receive() -> Any:
        nonlocal connected
        if kind == "websocket" and not connected:
            connected = True
            return {"type": "websocket.connect"}
        if left:
            if taken is not None:
                taken.append(len(pieces) - len(left))
            piece = left.pop(0)
            if kind == "websocket":
                return {"type": "websocket.receive", "text": piece.decode()}
            return {"type": "http.request", "body": piece, "more_body": bool(left)}
        if leave is not None:
            await leave()
        else:
            await ended.wait()
        return {"type": f"{kind}.disconnect", "code": 1001}

    async def send(message: Any) -> None:
        answer.messages.append(message)
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            answer.body += message.get("body", b"")
            if not message.get("more_body"):
                ended.set()  # a server says so to whoever asks afterwards

    await asyncio.wait_for(app(scope, receive, send), LIMIT)
    return answer


async def until(condition: Callable[[], object], timeout: float = LIMIT) -> None:
    """Wait until something is so."""

    async def look() -> None:
        while not condition():  # noqa: ASYNC110  (what is looked at has no event)
            await asyncio.sleep(0.002)

    await asyncio.wait_for(look(), timeout)
