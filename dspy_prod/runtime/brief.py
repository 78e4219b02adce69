"""A lock for what takes microseconds, between threads that are many and busy."""

from __future__ import annotations

import threading
import time
from typing import Final

_TRIES: Final = 1_000


class BriefLock:
    """Whoever finds it taken lets the others run and tries again, where `threading.Lock` would queue.

    Who is woken in such a queue has the lock before it has the interpreter's, for which it queues again; meanwhile all
    others meet the lock, and each hand-over takes as long as the interpreter lets a busy thread go on: 5 ms instead
    of nothing.
    """

    __slots__ = ("_lock", "_release", "_take")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._take, self._release = self._lock.acquire, self._lock.release

    def __enter__(self) -> None:
        take = self._take
        if take(False):
            return
        for _ in range(_TRIES):
            time.sleep(0)
            if take(False):
                return
        take()

    def __exit__(self, *_: object) -> None:
        self._release()
