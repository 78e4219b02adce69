"""Work that a call leaves behind: done in a thread of its own, while the caller has his answer and waits for nothing.

What is to be done stands in a short queue; what finds it full is left out, so that traffic never piles up here.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import dspy

from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.runtime.threads import begin

WAITING: Final = 64
"""Pieces of work that may wait."""

_IDLE: Final = 1.0
"""Seconds without work after which the thread ends; the next piece begins another one."""

_log = logging.getLogger("dspy_prod")
T = TypeVar("T")


class Aside(Generic[T]):
    """Does pieces of work one after another. Thread-safe; a forked child begins with an empty queue.

    Args:
        name: of the thread. body: does one piece. Whatever it raises is logged, and reaches nobody.

    Attributes:
        left_out: pieces that found the queue full.
    """

    _queue: queue.Queue[T]
    _lock: threading.Lock

    def __init__(self, name: str, body: Callable[[T], None]) -> None:
        self._name, self._body = name, body
        self.left_out = 0
        self._working: threading.Thread | None = None
        self._after_fork()
        reset_after_fork(self)

    def offer(self, piece: T) -> None:
        """Have it done, if there is room. Never waits."""
        try:
            self._queue.put_nowait(piece)
        except queue.Full:
            self.left_out += 1
            return
        with self._lock:
            if self._working is None:
                self._working = begin(self._name, self._work)  # None where none can be begun: the next offer tries

    def wait(self, timeout: float = 10.0) -> bool:
        """Wait until nothing is left to be done, for tests and for the end of a process."""
        ends = time.monotonic() + timeout
        while self._queue.unfinished_tasks and time.monotonic() < ends:
            time.sleep(0.005)
        return not self._queue.unfinished_tasks

    def _work(self) -> None:
        while True:
            try:
                piece = self._queue.get(timeout=_IDLE)
            except queue.Empty:
                with self._lock:  # nothing is put between the look and the end that nobody would begin a thread for
                    if self._queue.empty():
                        self._working = None
                        return
                continue
            try:
                self._body(piece)
            except BaseException:  # also a SystemExit: pieces run what users have written
                _log.exception("%s could not do a piece of its work; it goes on with the next one", self._name)
            finally:
                self._queue.task_done()

    def _after_fork(self) -> None:
        self._queue = queue.Queue(WAITING)
        self._working = None
        self._lock = threading.Lock()


def settings_here() -> dict[str, Any]:
    """DSPy's settings in force, for `dspy.context` in another thread, without what belongs to the caller alone."""
    return {**dspy.settings.copy(), "send_stream": None, "caller_modules": [], "trace": []}
