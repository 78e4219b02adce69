"""What callers hand to the writer of a SQLite store: in order, gathered where nobody waits for it, and bounded.

A transaction costs as much as thirty records. Settlements, records and answers are awaited by nobody, so the writer
lets them gather for a moment; whatever somebody waits for (an admission, a question, `flush`) is done at once, with
all that came before it. Who posts faster than the disk takes it is slowed down: what waits here would be lost with
the process, and its money is held until it is written.
"""

from __future__ import annotations

import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import Final

from dspy_prod.compat.foreign import running_loop
from dspy_prod.stores.sqlite.transactions import Operation, Transactions

GATHER: Final = 0.008
"""Seconds for which operations that nobody waits for gather, at most."""
ENOUGH: Final = 128
"""Operations that are worth a transaction of their own."""
FULL: Final = 256
"""Operations posted and not yet durable from which on a caller is slowed down."""
PAUSE: Final = 0.0005
LONGEST: Final = 0.002
"""Seconds of the first pause, and of the longest: who slept on while nothing waited any more would only be late."""
PATIENCE: Final = 0.05
"""Seconds for which one operation may keep a thread; a task is kept for one `PAUSE`, for its loop has others."""

_UNHURRIED: Final = frozenset(
    (
        Transactions.append,
        Transactions.settle,
        Transactions.settle_drawn,
        Transactions.sent_late,
        Transactions.put_answer,
        Transactions.touch_answer,
    )
)


class Inbox:
    """Operations posted by any thread, taken by one.

    Attributes:
        hurried: somebody waits for what settlements free: they are done at once.
        writing: operations taken and not yet durable.
        open: the writer gets on, so that it is worth waiting for it.
    """

    def __init__(self) -> None:
        self._operations: deque[Operation] = deque()
        self._bell: SimpleQueue[None] = SimpleQueue()  # its `put` may be interrupted by another one of its thread
        self._resting = True  # the writer waits for anything at all
        self._urgent = False
        self.hurried = False
        self.writing = 0
        self.open = True

    def put(self, operation: Operation) -> None:
        """Post. Never waits."""
        operations = self._operations
        operations.append(operation)
        if operation[0] not in _UNHURRIED or self.hurried:
            self._urgent = True
            self._bell.put(None)
            return
        if self._resting or len(operations) == ENOUGH:
            self._bell.put(None)

    def ease(self) -> None:
        """Slow down who has just posted, where the writer is far behind. Not to be called with a lock in hand."""
        if self.behind() > FULL and self.open:
            self._slow_down()

    def _slow_down(self) -> None:
        asynchronous = running_loop() is not None
        until, pause = time.monotonic() + (0.0 if asynchronous else PATIENCE), PAUSE
        while True:
            time.sleep(pause)
            if not self.open or self.behind() <= FULL or time.monotonic() >= until:
                return
            pause = min(2 * pause, LONGEST)

    def behind(self) -> int:
        """Operations posted and not yet durable."""
        return len(self._operations) + self.writing

    def wait(self, seconds: float) -> None:
        """Until there is something to do, or so long; the writer's."""
        bell = self._bell
        if not self._operations:
            self._resting = True
            if not self._operations:
                self._ring(bell, seconds)
            self._resting = False
        if self._operations and not self._urgent and len(self._operations) < ENOUGH:
            self._ring(bell, min(seconds, GATHER))

    def _ring(self, bell: SimpleQueue[None], seconds: float) -> None:
        try:
            bell.get(timeout=seconds) if seconds > 0 else bell.get_nowait()
            while True:
                bell.get_nowait()
        except Empty:
            return

    def begin(self) -> None:
        """A batch is about to be taken: who posts from now on rings again."""
        self._urgent = False

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
        return not self._operations
