"""A wire between a store and its server that can be cut, at the moment that hurts."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class Wire:
    """Forwards connections to a server.

    Attributes:
        port: where it listens.
        swallow: how many answers to scripts are still to be lost, with the connection that they come on.
        lost: how many were.
    """

    def __init__(self, port: int) -> None:
        self.swallow = self.lost = 0
        self._server = port
        self._ears = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._ears.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._ears.accept()
                server = socket.create_connection(("127.0.0.1", self._server))
            except OSError:
                return
            self._open += (client, server)
            threading.Thread(target=self._carry, args=(client, server), daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        asked_for: list[bytes] = []  # scripts whose answers have not come yet
        answering = threading.Thread(target=self._answer, args=(client, server, asked_for), daemon=True)
        with contextlib.suppress(OSError):
            answering.start()
            while asked := client.recv(65536):
                if b"EVALSHA" in asked:
                    asked_for.append(asked)
                server.sendall(asked)
        self._cut(client, server)

    def _answer(self, client: socket.socket, server: socket.socket, asked_for: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            while told := server.recv(65536):
                script = asked_for.pop() if asked_for else None
                if self.swallow and script and not told.startswith(b"-NOSCRIPT"):
                    self.swallow -= 1
                    self.lost += 1
                    break
                client.sendall(told)
        self._cut(client, server)

    def _cut(self, *ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        """Cut everything."""
        self._ears.close()
        self._cut(*self._open)


@contextlib.contextmanager
def wire(port: int) -> Iterator[Wire]:
    """A wire to a server on this machine."""
    made = Wire(port)
    try:
        yield made
    finally:
        made.close()
