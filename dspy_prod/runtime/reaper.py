"""Work that a finaliser may not do itself, and work for the end of the process.

The garbage collector closes an abandoned stream or coroutine at any allocation, perhaps while this very thread holds
one of our locks. Such a path only puts its work here (`SimpleQueue.put` is reentrant); one daemon thread does it.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from dspy_prod.runtime.forking import Stage, reset_after_fork
from dspy_prod.runtime.threads import begin
from dspy_prod.runtime.worker_processes import finish_with_worker

_log = logging.getLogger("dspy_prod")


class Reaper:
    """One queue, one daemon thread."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._kept: dict[object, Callable[[], object]] = {}
        self._before: set[object] = set()
        self._finalized = False

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

    def keep(self, key: object, work: Callable[[], object]) -> None:
        """Have `work` done when the process ends, unless it is taken back before. A forked child keeps none of it."""
        self._kept[key] = work
        self._end_with_worker_process()

    def take(self, key: object) -> bool:
        """Take back what is kept under this key, once: False when it is done already, or was taken by another."""
        return self._kept.pop(key, None) is not None

    def finish_before(self, what: object) -> None:
        """Have this process `finish` before what it has registered with `atexit` by now; once for each `what`."""
        self._end_with_worker_process()
        if what not in self._before:
            self._before.add(what)
            atexit.register(self.finish)

    def finish(self, timeout: float = 2.0) -> bool:
        """The process ends: wait as `flush` does, then do what is kept."""
        flushed = self.flush(timeout)
        for key, work in self._kept.copy().items():
            if self.take(key):
                _do(work)
        return flushed

    def _end_with_worker_process(self) -> None:
        if not self._finalized:
            self._finalized = finish_with_worker(self.finish, priority=1)  # before stores end

    def _run(self) -> None:
        while True:
            _do(self._work.get())

    def _after_fork(self) -> None:
        running = self._thread is not None
        self.__init__()  # type: ignore[misc]
        if running:
            self.start()


def _do(work: Callable[[], object]) -> None:
    try:
        work()
    except BaseException:  # it would end the thread, and nothing that comes after were ever done
        _log.exception("Settling an abandoned call failed; its hold is charged when the lease ends")


REAPER = Reaper()
reset_after_fork(REAPER, Stage.THREADS)
