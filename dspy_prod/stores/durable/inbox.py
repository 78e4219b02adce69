"""What callers hand to the writer of a durable store: in order, gathered where nobody waits for it, and bounded.

A transaction costs as much as thirty records. Settlements, records and answers are awaited by nobody, so the writer
lets them gather for a moment, and longer where no money is in them; whatever somebody waits for (an admission, a
question, `flush`) is done at once, with all that came before it. Who posts faster than the disk takes it is slowed
down: what waits here would be lost with the process, and its money is held until it is written.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final

from dspy_prod.compat.foreign import running_loop
from dspy_prod.stores.durable.operations import Operation
from dspy_prod.stores.durable.served import Given, Kind, Served
from dspy_prod.stores.durable.transactions import Transactions

GATHER: Final = 0.025
"""Seconds for which operations that nobody waits for gather, at most.

Each transaction takes the interpreter's lock from the callers a few dozen times; with 128 of them at work, 8 ms here
cost a fifth more CPU in all and a quarter more at the 99th percentile.
"""
GATHER_FREE: Final = 1.0
"""Seconds for which records of what cost nothing gather, at most: no money is lost with them, and no more than `FULL`.

On a busy machine few come in a tenth of that, and a transaction for a few costs as much as one for all.
"""
ENOUGH: Final = 128
"""Operations that are worth a transaction of their own."""
ENOUGH_FREE: Final = 240
"""The same of those that cost nothing: about a page of them, with those that come until the writer looks."""
_AGAIN: Final = 16
"""Every so many it is rung for enough of them: one alone may fall just between two looks of the writer."""
FULL: Final = 256
"""Operations posted and not yet durable from which on a caller is slowed down."""
PAUSE: Final = 0.0005
MOST: Final = 100_000
"""Operations that nobody waits for, and as many cached answers, that wait for a transaction which does not end. More
are dropped, and said to be, as while nothing can be written: a settlement's money stays held."""
TELL: Final = 1.0
"""Seconds between two words about what was dropped."""
PATIENCE: Final = 0.05
"""Seconds for which one operation may keep a thread; a task is kept for one `PAUSE`, for its loop has others."""

_UNHURRIED: Final = frozenset(
    (
        Transactions.append,
        Transactions.append_program,
        Transactions.settle,
        Transactions.settle_drawn,
        Transactions.settle_alone,
        Transactions.sent_late,
        Transactions.put_answer,
        Transactions.touch_answer,
        Transactions.note,
    )
)
_LOSABLE: Final = _UNHURRIED - {Transactions.note}
"""A note is one for many things, which are bounded themselves."""
_APPEND: Final = Transactions.append
_APPEND_PROGRAM: Final = Transactions.append_program


class Inbox:
    """Operations posted by any thread, taken by one.

    Attributes:
        hurried: somebody waits for what settlements free: they are done at once.
        writing: operations taken and not yet durable.
        open: the writer gets on, so that it is worth waiting for it.
        dropped: operations for which there was no room.

    Args:
        on_dropped: is told, now and then, that there are more of these, by a thread that has no lock in hand.
    """

    def __init__(self, on_dropped: Callable[[], None] = lambda: None) -> None:
        self._operations: deque[Operation] = deque()
        self._bell: SimpleQueue[None] = SimpleQueue()  # its `put` may be interrupted by another one of its thread
        self._resting = True  # the writer waits for anything at all
        self._kinds: deque[Kind] = deque()  # of which there are some, see `serve`
        self._count = itertools.count(1).__next__
        self._served = self._taken = 0
        self._room = threading.Condition()
        self._slowed = 0  # threads that wait for room
        self._urgent = False
        self._costly = False  # one of the operations is not free
        self.hurried = False
        self.writing = 0
        self.open = True
        self.dropped = self._told = 0
        self._tell_at = 0.0
        self._on_dropped = on_dropped
        self._dropping = threading.Lock()

    def put(self, operation: Operation) -> None:
        """Post. Never waits."""
        operations, kind = self._operations, operation[0]
        if len(operations) >= MOST and kind in _LOSABLE:
            self._drop()
            if kind is Transactions.put_answer:
                operation[2].written()
            return
        operations.append(operation)
        ring = self._resting or len(operations) == (ENOUGH if self._costly else ENOUGH_FREE)
        free = kind is _APPEND_PROGRAM or (kind is _APPEND and operation[1].cost_nano == 0)
        if not (free or self._costly):
            self._costly = ring = True
        if kind not in _UNHURRIED or self.hurried:
            self._urgent = ring = True
        if ring:
            self._resting = False  # it wakes once: others that come before it does would only ring again
            self._bell.put(None)

    def serve(self, kind: Kind, given: Given) -> None:
        """Post that a cached answer of this kind was given; slows down who does so as `ease` does."""
        if self._served - self._taken >= MOST:
            self._drop()
            self.ease()
            return
        kind.given.append(given)
        if not kind.listed:
            try:
                kind.listed = True
                self._kinds.append(kind)
            except BaseException:  # interrupted: perhaps nobody knows of it, and else it is listed twice
                kind.listed = False
                raise
        self._served = number = self._count()
        wait = number - self._taken
        if self._resting:
            self._resting = False  # as in `put`
            self._bell.put(None)
        elif wait >= ENOUGH_FREE and not number % _AGAIN:
            self._bell.put(None)
        if wait + self.writing > FULL and self.open:
            self._slow_down()

    def take_served(self) -> list[Operation]:
        """The cached answers so far, by kind."""
        found: list[Operation] = []
        while self._kinds:
            kind = self._kinds.popleft()
            given = kind.take()
            if given:
                self._taken += len(given)
                found.append((Transactions.append_served, Served(kind.like, given), None))
        return found

    def ease(self) -> None:
        """Slow down who has just posted, where the writer is far behind. Not to be called with a lock in hand."""
        if self.behind() > FULL and self.open:
            self._slow_down()
        if self.dropped > self._told:
            self.tell()

    def tell(self) -> None:
        """Say what was dropped since it was last said. Not to be called with a lock in hand either."""
        now = time.monotonic()
        with self._dropping:
            if self.dropped == self._told or now < self._tell_at:
                return
            self._told, self._tell_at = self.dropped, now + TELL
        self._on_dropped()

    def _drop(self) -> None:
        with self._dropping:
            self.dropped += 1

    def _slow_down(self) -> None:
        if running_loop() is not None:
            time.sleep(PAUSE)
            return
        with self._room:
            self._slowed += 1
            try:
                self._room.wait_for(lambda: self.behind() <= FULL or not self.open, PATIENCE)
            finally:
                self._slowed -= 1

    def written(self) -> None:
        """What was taken is durable; the writer's."""
        self.writing = 0
        if self._slowed:
            with self._room:
                self._room.notify_all()

    def behind(self) -> int:
        """Operations posted and not yet durable."""
        return self.waiting() + self.writing

    def waiting(self) -> int:
        """Operations that wait, about."""
        return len(self._operations) + max(0, self._served - self._taken)

    def wait(self, seconds: float) -> None:
        """Until there is something to do, or so long; the writer's."""
        self._ring(0.0)  # what was rung for is seen below
        if self.empty():
            self._resting = True
            if self.empty():
                self._ring(seconds)
        self._resting = False
        if not (self._urgent or self._costly or self.empty()) and self.waiting() < ENOUGH_FREE:
            self._ring(min(seconds, GATHER_FREE))
        if self._costly and not self._urgent and 0 < len(self._operations) < ENOUGH:
            self._ring(min(seconds, GATHER))

    def _ring(self, seconds: float) -> None:
        bell = self._bell
        try:
            bell.get(timeout=seconds) if seconds > 0 else bell.get_nowait()
            while True:
                bell.get_nowait()
        except Empty:
            return

    def begin(self, most: int) -> None:
        """A batch of at most so many is about to be taken: who posts from now on rings again."""
        if len(self._operations) <= most:
            self._urgent = self._costly = False

    def take(self, most: int) -> list[Operation]:
        """The oldest operations, at most so many."""
        pop = self._operations.popleft  # nobody else takes any, so that there are no fewer than are counted
        return [pop() for _ in range(min(len(self._operations), most))]

    def get_nowait(self) -> Operation:
        """The oldest operation.

        Raises:
            Empty: there is none.
        """
        try:
            return self._operations.popleft()
        except IndexError:
            raise Empty from None

    def qsize(self) -> int:
        """Operations that wait."""
        return len(self._operations)

    def empty(self) -> bool:
        """Whether none waits."""
        return not self._operations and not self._kinds
