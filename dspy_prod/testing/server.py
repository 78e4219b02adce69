"""An asyncio server on loopback that runs in a thread of its own, for tests written with threads or tasks."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from dspy_prod.testing.wire import Connection, Serve

T = TypeVar("T")

BACKLOG = 4096
JOIN_TIMEOUT = 10.0


class LoopbackServer:
    """Serves HTTP on 127.0.0.1 until `stop`. Listens as soon as it is made.

    Args:
        serve: answers one request.
        port: 0 takes a free one.
    """

    def __init__(self, serve: Serve, port: int = 0) -> None:
        self._serve = serve
        self._connections: set[Connection] = set()
        self._listener: asyncio.AbstractServer | None = None
        self._reserved: socket.socket | None = _bind(port)
        self.port: int = self._reserved.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dspy-prod-provider", daemon=True)
        self._thread.start()
        self.run(self.listen())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the server's loop and wait for its result; not to be called from that loop."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the provider is stopped")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(JOIN_TIMEOUT)

    def stop(self) -> None:
        """Cancel every request, close every socket, end the thread."""
        self.run(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(JOIN_TIMEOUT)
        self._loop.close()

    async def listen(self) -> None:
        """Accept connections (again)."""
        if self._listener is None:
            sock = self._reserved or _bind(self.port)
            self._reserved = None
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(
                lambda: Connection(self._serve, self._connections), sock=sock, backlog=BACKLOG
            )

    async def refuse(self) -> None:
        """Refuse new connections and break off those that are open. The port stays ours."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            # A bound socket that does not listen keeps the port and refuses connections.
            self._reserved = _bind(self.port)
        self._break_off()

    def _break_off(self) -> None:
        for connection in list(self._connections):
            connection.reset()

    async def _shut(self) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._reserved is not None:
            self._reserved.close()
        self._break_off()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._connections:  # noqa: ASYNC110 - the loop closes them in its next turns
            await asyncio.sleep(0)


def _bind(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock
