"""Noticing that a client leaves while its request is served, and ending what is done for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

AHEAD: Final = 16
"""Messages of a websocket that are read before the application asks for them."""

_GONE: Final = ("http.disconnect", "websocket.disconnect")


class Listening:
    """The connection of one request, read ahead so that its end is seen at once.

    Of a body at most one piece is read ahead, so that an upload stays as slow as its reader. Who waits for the next
    message, such as a streaming response or a websocket's loop, is told by that message, and ends by itself; any other
    application is cancelled.

    Attributes:
        begun: the answer has begun. gone: the client left before its end.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._inbox: deque[Message | Exception] = deque()
        self._changed = asyncio.Event()
        self._waiting = 0
        self._answered = False
        self.begun = False
        self.gone = False

    async def watch(self, leave: Callable[[], None]) -> None:
        """Read until the client has left; then `leave()`, unless the application is told or is done."""
        while True:
            try:
                message: Message | Exception = await self._receive()
            except Exception as error:  # the application's to hear, as if it had asked itself
                message = error
            self._inbox.append(message)
            told = self._waiting > 0
            self._wake()
            if isinstance(message, Exception):
                return
            if message["type"] in _GONE:
                self.gone = not self._answered
                if self.gone and not told:
                    leave()
                return
            while self._full():
                await self._changed.wait()

    def _full(self) -> bool:
        last = self._inbox[-1] if self._inbox else None
        if last is None or isinstance(last, Exception):
            return False
        return bool(last.get("more_body")) or len(self._inbox) >= AHEAD

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def receive(self) -> Message:
        """The next message, for the application. The end of the connection stays the next one for good."""
        self._waiting += 1
        try:
            while not self._inbox:
                await self._changed.wait()
        finally:
            self._waiting -= 1
        first = self._inbox[0]
        if isinstance(first, Exception):
            raise first
        if first["type"] not in _GONE:
            self._inbox.popleft()
            self._wake()
        return first

    async def send(self, message: Message) -> None:
        """What the application sends. After the last part of an answer everybody leaves, which then means nothing."""
        self.begun = True
        if message["type"] == "websocket.close" or (
            message["type"] == "http.response.body" and not message.get("more_body")
        ):
            self._answered = True
        await self._send(message)
