"""A provider whose streams stop half-way and leave the connection open."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

_CHUNK = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def words(text: str, **beside: Any) -> dict[str, Any]:
    """A piece of the answer."""
    return {**_CHUNK, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **beside}


DONE = "data: [DONE]"
STOP = {**_CHUNK, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def usage(inputs: int, outputs: int) -> dict[str, Any]:
    """The tokens that an answer took."""
    return {"usage": {"prompt_tokens": inputs, "completion_tokens": outputs, "total_tokens": inputs + outputs}}


def told(inputs: int, outputs: int) -> dict[str, Any]:
    """The event that tells them, behind the answer."""
    return {**_CHUNK, "choices": [], **usage(inputs, outputs)}


class Halting:
    """Answers each request with these events, and then, unless the last of them is `DONE`, says nothing until it is
    closed.

    Args:
        events: as JSON, as lines that are no event, or seconds before the next one.

    Attributes:
        url: where it listens.
        said: all events of an answer have been sent.
    """

    def __init__(self, *events: dict[str, Any] | str | float) -> None:
        self._events: Sequence[dict[str, Any] | str | float] = events
        self._over = threading.Event()
        self._broken = threading.Event()
        self.said = threading.Event()
        self._listening = socket.socket()
        self._listening.bind(("127.0.0.1", 0))
        self._listening.listen(16)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def reset(self) -> None:
        """Break the connections off."""
        self._broken.set()
        self._over.set()

    def __enter__(self) -> Halting:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listening.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            _read(connection)
            connection.sendall(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            for event in self._events:
                if isinstance(event, float):
                    self._over.wait(event)
                    continue
                line = f"{event if isinstance(event, str) else f'data: {json.dumps(event)}'}\n\n".encode()
                connection.sendall(b"%x\r\n%s\r\n" % (len(line), line))
            self.said.set()
            if self._events[-1] == DONE:
                connection.sendall(b"0\r\n\r\n")
                return
            self._over.wait(60)
            if self._broken.is_set():
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _read(connection: socket.socket) -> None:
    """A whole request."""
    read = b""
    while b"\r\n\r\n" not in read:
        read += connection.recv(1 << 16)
    head, _, body = read.partition(b"\r\n\r\n")
    [length] = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < length:
        body += connection.recv(1 << 16)
