"""Between a call and its metrics: a queue with a bound. All that a call pays for is putting its record there.

What was put there is taken by whoever reads the metrics, and when many have come, by a thread that ends when it has
taken them. So nobody who has metrics on and never looks at them fills the memory, and no thread runs for nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from dspy_prod.runtime.forking import PATIENCE, Stage, hold_while_forking
from dspy_prod.runtime.threads import begin

_log = logging.getLogger("dspy_prod")

MANY: Final = 512
"""Items at which a thread begins to take them."""
MOST: Final = 16_384
"""Items that may wait; further ones are counted as lost."""
LONGEST: Final = 1.0
"""Seconds that a reader takes items for; who waits for it gives up after ten. What is left is told the next time."""

_BATCH: Final = 8
_BREATH: Final = 0.0001
"""Seconds of rest after each batch: a busy thread would keep the interpreter's lock from callers, 5 ms at a time."""
_AGAIN: Final = 1.0
"""Seconds after which a thread that could not be started is tried again."""


class Inbox:
    """Safe in threads and in forked children: what waits when a process forks is its parent's.

    Args:
        take: is given one item after the other, by one thread at a time. Its errors are logged.

    Attributes:
        lost: items for which there was no room.
        taking: held by who takes.
    """

    def __init__(self, take: Callable[[Any], None]) -> None:
        self._take = take
        self.lost = self._failed = 0
        self._reset()
        hold_while_forking(self, Stage.STATE)

    def _reset(self) -> None:
        self._items: deque[Any] = deque()
        self.taking = threading.RLock()
        self._read: set[str] = set()
        self._begun_at = 0.0
        self._busy = self._held = False

    def put(self, item: Any) -> None:
        """Have it taken later. Never waits, never raises."""
        items = self._items
        waiting = len(items)
        if waiting >= MANY:
            if waiting >= MOST:
                self.lost += 1
                return
            if not self._busy:
                self._begin()
        items.append(item)

    def empty(self, reader: str = "") -> None:
        """Take what has come so far, for `LONGEST` at most: beside a thread that makes calls without a pause it takes
        longer than they do. Once for all readers of a round, which ends when one of them reads again.
        """
        with self.taking:
            if self._read and reader not in self._read:
                self._read.add(reader)
                return
            self._read = {reader}
            until = time.monotonic() + LONGEST
            for number in range(len(self._items)):
                self._next()
                if number % _BATCH == 0 and time.monotonic() > until:
                    break

    def _next(self) -> bool:
        try:
            item = self._items.popleft()
        except IndexError:
            return False
        try:
            self._take(item)
        except Exception:
            self._failed += 1
            if self._failed & (self._failed - 1) == 0:  # the first, the second, the fourth
                _log.exception("%d records could not be counted in the metrics; the others are", self._failed)
        return True

    def _begin(self) -> None:
        now = time.monotonic()
        if now - self._begun_at < _AGAIN:
            return  # one is just beginning, or none could be had a moment ago
        self._begun_at, self._busy = now, True
        if begin("dspy_prod-metrics", self._run) is None:
            self._busy = False

    def _run(self) -> None:
        try:
            more = True
            while more:
                with self.taking:
                    for _ in range(_BATCH):
                        more = self._next()
                        if not more:
                            break
                time.sleep(_BREATH)
        finally:
            self._busy = False
            self._begun_at = 0.0

    def before_fork(self) -> None:
        """No child finds what takes the items in the middle of it."""
        self._held = self.taking.acquire(timeout=PATIENCE)

    def after_fork_in_parent(self) -> None:
        """Go on."""
        if self._held:
            self.taking.release()

    def _after_fork(self) -> None:
        self.lost = self._failed = 0
        self._reset()
