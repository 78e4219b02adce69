"""Work that a finaliser may not do itself.

The garbage collector closes an abandoned stream or coroutine at any allocation, perhaps while this very thread holds
one of our locks. Such a path only puts its work here (`SimpleQueue.put` is reentrant); one daemon thread does it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from dspy_prod.runtime.forking import Stage, reset_after_fork
from dspy_prod.runtime.threads import begin

_log = logging.getLogger("dspy_prod")


class Reaper:
    """One queue, one daemon thread."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Make sure the thread runs; called when a pipeline is built, and as a call begins that may post. Never from a
        finaliser."""
        if self._runs():
            return
        with self._lock:
            if not self._runs():
                self._thread = begin("dspy_prod-reaper", self._run)

    def _runs(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def post(self, work: Callable[[], object]) -> None:
        """Have `work` done soon, in order, on the reaper's thread."""
        self._work.put(work)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until everything posted before is done."""
        if self._thread is None and not self._work.empty():
            self.start()  # there was none to be had when the pipeline was built
        if self._thread is None or threading.current_thread() is self._thread:
            return self._work.empty()
        done = threading.Event()
        self._work.put(done.set)
        return done.wait(timeout)

    def _run(self) -> None:
        while True:
            work = self._work.get()
            try:
                work()
            except BaseException:  # it would end the thread, and nothing posted later were ever done
                _log.exception("Settling an abandoned call failed; its hold is charged when the lease ends")

    def _after_fork(self) -> None:
        running = self._thread is not None
        self.__init__()  # type: ignore[misc]
        if running:
            self.start()


REAPER = Reaper()
reset_after_fork(REAPER, Stage.THREADS)
