"""A wire between the workers and their server: it can be cut, be slow, and lose answers to what was done."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import suppress


class Proxy:
    """Forwards connections on loopback to a port, from a thread of its own.

    Attributes:
        port: where it listens.
        delay: seconds by which whatever passes is delayed, at most.
        lose: the probability that an answer is lost, with its connection.
        lost: answers that were.
    """

    def __init__(self, target: int, seed: int) -> None:
        self.delay = self.lose = 0.0
        self.lost = self.port = 0
        self._target = target
        self._dice = random.Random(seed)
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._listening.wait(10)

    def cut(self) -> None:
        """Cut every connection that there is."""
        self._loop.call_soon_threadsafe(self._cut)

    def close(self) -> None:
        """Cut everything, and listen no more."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._carry, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        self._loop.run_forever()
        server.close()
        self._cut()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    def _cut(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        self._open |= ends
        asking = asyncio.ensure_future(self._pass(reader, far_writer, answers=False))
        answering = asyncio.ensure_future(self._pass(far_reader, writer, answers=True))
        await asyncio.wait({asking, answering}, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.transport.abort()
        self._open -= ends
        await asyncio.wait({asking, answering})

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.delay:
                    await asyncio.sleep(self._dice.uniform(0.0, self.delay))
                if answers and self._dice.random() < self.lose:
                    self.lost += 1
                    return
                writer.write(data)
                await writer.drain()
