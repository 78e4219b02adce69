"""Small things that are posted from the path of a request, gathered so that many of them are one operation.

One by one they would each cost the caller an operation, and the writer several statements.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from dspy_prod.compat.foreign import running_loop
from dspy_prod.stores.durable.inbox import PATIENCE, PAUSE
from dspy_prod.stores.durable.mailbox import Mailbox
from dspy_prod.stores.durable.transactions import Transactions

_log = logging.getLogger("dspy_prod")

BEHIND: Final = 2_048
"""Things not yet taken from which on who posts is slowed down: admissions wait while a batch is written."""
MOST: Final = 50_000
"""Things kept while the file cannot be written, in batches or not; more are dropped, and counted."""

T = TypeVar("T")


class Posting(Generic[T]):
    """Takes things from any thread, and gives them to `write` in their order, in batches, inside a transaction.

    Whoever flushes the store, or asks it, finds written what he posted before.

    Args:
        mailbox: how the writer is reached.
        write: takes the tables, the things, the number of the batch (from 1 on, each larger than the one before), and
            the store's time. A batch whose transaction fails is given again under the same number.
        what: what the things are, for a log.
        taken: those of some things that were not posted before; asked once of each, in their order, by the writer.
        most: how many are kept while nothing can be written, those of batches that failed included; None: `MOST`.

    Attributes:
        posted: how many were taken. dropped: how many there was no room for.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        write: Callable[[Any, list[T], int, float], None],
        what: str,
        taken: Callable[[list[T]], list[T]],
        most: int | None = None,
    ) -> None:
        self.posted = self.dropped = 0
        self._mailbox = mailbox
        self._inbox = mailbox.writer.inbox
        self._path = mailbox.writer.tables.path
        self._write = write
        self._what = what
        self._new = taken
        self._most = most
        self._waiting: deque[T] = deque()
        self._taken = 0  # things of batches that are not durable: a full disk fails each at its end, and takes another
        self._listed = False  # an operation that takes them is on its way
        self._batches = 0
        self._lock = threading.Lock()
        self._counting = threading.Lock()  # who has it takes no other lock

    def __call__(self, thing: T) -> None:
        """Post. Never raises; waits only where the writer is far behind, and then not long."""
        waiting = self._waiting
        if not self._mailbox.alive():
            self._drop("the store is closed")
            return
        with self._lock:  # who flushes after this has an operation before his own that takes it
            full = len(waiting) + self._taken >= (self._most or MOST)
            if not full:
                waiting.append(thing)
                if not self._listed:
                    self._list()
                self.posted += 1  # last: who has seen it and flushes has an operation before his own, too
        if full:
            self._drop("too many wait to be written")
        elif len(waiting) > BEHIND and self._inbox.open:
            self._slow_down()

    def _list(self) -> None:
        batch = _Batch(self)
        try:
            self._listed = True
            posted = self._mailbox.post((Transactions.note, batch.write, batch))
        except BaseException:  # interrupted: perhaps there is none
            self._listed = False
            raise
        if not posted:
            batch.lost("the store is closed")

    def take(self) -> list[T]:
        """What waits, for a batch; the writer's."""
        self._listed = False  # before it is looked how many there are: whoever adds one from now on lists it again
        count, pop = len(self._waiting), self._waiting.popleft
        self._count(count)  # before they are gone from there: else others find room for as many
        things = self._new([pop() for _ in range(count)])
        self._count(len(things) - count)
        return things

    def number(self) -> int:
        """The next batch's; the writer's."""
        self._batches += 1
        return self._batches

    def write(self, tables: Any, batch: _Batch[T], now: float) -> None:
        """Inside a transaction."""
        if batch.things is None:
            batch.things, batch.number = self.take(), self.number()
        if batch.things:
            self._write(tables, batch.things, batch.number, now)

    def written(self, count: int) -> None:
        """So many things of a batch are durable."""
        self._count(-count)

    def lose(self, count: int, why: str) -> None:
        """So many things of a batch never will be."""
        self._count(-count)
        self._drop(why, count)

    def _count(self, more: int) -> None:
        with self._counting:
            self._taken += more

    def _drop(self, why: str, count: int = 1) -> None:
        with self._counting:
            before = self.dropped
            self.dropped = after = before + count
        if after.bit_length() > before.bit_length():  # the 1st, 2nd, 4th, 8th, ... is among them
            _log.warning("%s: %s; %d %s were not written", self._path, why, after, self._what)

    def _slow_down(self) -> None:
        if running_loop() is not None:
            time.sleep(PAUSE)
            return
        deadline = time.monotonic() + PATIENCE
        while len(self._waiting) > BEHIND and self._inbox.open and time.monotonic() < deadline:
            time.sleep(PAUSE)


class _Batch(Generic[T]):
    """What one operation writes, known once it was tried first; and the `Fate` of that operation."""

    def __init__(self, posting: Posting[T]) -> None:
        self.things: list[T] | None = None
        self.number = 0
        self._posting = posting

    def write(self, tables: Any, now: float) -> None:
        self._posting.write(tables, self, now)

    def written(self) -> None:
        things, self.things = self.things or [], []
        self._posting.written(len(things))

    def lost(self, why: str) -> int:
        things, self.things = self._posting.take() if self.things is None else self.things, []
        self._posting.lose(len(things), why)
        return len(things)
