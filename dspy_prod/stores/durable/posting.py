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
"""Things kept while the file cannot be written; more are dropped, and counted."""

T = TypeVar("T")


class Posting(Generic[T]):
    """Takes things from any thread, and gives them to `write` in their order, in batches, inside a transaction.

    Whoever flushes the store, or asks it, finds written what he posted before.

    Args:
        mailbox: how the writer is reached.
        write: takes the tables, the things, the number of the batch (from 1 on, each larger than the one before), and
            the store's time. A batch whose transaction fails is given again under the same number.
        what: what the things are, for a log.
        most: how many are kept while nothing can be written; None: `MOST`.

    Attributes:
        posted: how many were taken. dropped: how many there was no room for.
    """

    def __init__(
        self, mailbox: Mailbox, write: Callable[[Any, list[T], int, float], None], what: str, most: int | None = None
    ) -> None:
        self.posted = self.dropped = 0
        self._mailbox = mailbox
        self._inbox = mailbox.writer.inbox
        self._path = mailbox.writer.tables.path
        self._write = write
        self._what = what
        self._most = most
        self._waiting: deque[T] = deque()
        self._listed = False  # an operation that takes them is on its way
        self._batches = 0
        self._lock = threading.Lock()

    def __call__(self, thing: T) -> None:
        """Post. Never raises; waits only where the writer is far behind, and then not long."""
        waiting = self._waiting
        if not self._mailbox.alive():
            self._drop("the store is closed")
        elif len(waiting) >= (self._most or MOST):
            self._drop("too many wait to be written")
        else:
            with self._lock:  # who flushes after this has an operation before his own that takes it
                waiting.append(thing)
                if not self._listed:
                    self._list()
                self.posted += 1  # last: who has seen it and flushes has an operation before his own, too
            if len(waiting) > BEHIND and self._inbox.open:
                self._slow_down()

    def _list(self) -> None:
        self._listed = True
        batch = _Batch(self)
        try:
            posted = self._mailbox.post((Transactions.note, batch.write, batch.unfit))
        except BaseException:  # interrupted: perhaps there is none
            self._listed = False
            raise
        if not posted:
            for _ in self.take():
                self._drop("the store is closed")

    def take(self) -> list[T]:
        """What waits; the writer's."""
        self._listed = False  # before it is looked how many there are: whoever adds one from now on lists it again
        pop = self._waiting.popleft
        return [pop() for _ in range(len(self._waiting))]

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

    def unfit(self, batch: _Batch[T]) -> None:
        """It can never be written. Where it was not even tried, the next one has what was to be in it."""
        if batch.things is None:
            self._listed = False
        for _ in batch.things or ():
            self._drop("they cannot be written")

    def _drop(self, why: str) -> None:
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
            _log.warning("%s: %s; %d %s were not written", self._path, why, self.dropped, self._what)

    def _slow_down(self) -> None:
        if running_loop() is not None:
            time.sleep(PAUSE)
            return
        deadline = time.monotonic() + PATIENCE
        while len(self._waiting) > BEHIND and self._inbox.open and time.monotonic() < deadline:
            time.sleep(PAUSE)


class _Batch(Generic[T]):
    """What one operation writes; known once it was tried first."""

    def __init__(self, posting: Posting[T]) -> None:
        self.things: list[T] | None = None
        self.number = 0
        self._posting = posting

    def write(self, tables: Any, now: float) -> None:
        self._posting.write(tables, self, now)

    def unfit(self) -> None:
        self._posting.unfit(self)
