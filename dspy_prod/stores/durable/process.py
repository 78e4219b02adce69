"""What durable stores do when their process forks or ends.

Fork: every connection is closed before it, and both sides open new ones when they need them. SQLite's locks stay with
the parent while its bookkeeping of them is copied, so a child that opens the same file believes it holds locks that it
does not (seen: rows written by the child are lost when the parent closes); two processes that speak on one socket to
a server get each other's answers.

End: what was posted is written before the process goes, also by stores that nobody uses any more.
"""

from __future__ import annotations

import atexit
import threading
import time
from typing import Final

from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.runtime.threads import begin
from dspy_prod.runtime.worker_processes import finish_with_worker
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.durable.writer import Writer

EXIT_TIMEOUT: Final = 5.0
"""Seconds in which the writers may finish when the process ends."""


class Threads:
    """The threads of this process's writers.

    Attributes:
        ended: the process is ending.
    """

    def __init__(self) -> None:
        self._after_fork()
        reset_after_fork(self)

    def _after_fork(self) -> None:
        self._running: dict[threading.Thread, Writer] = {}
        self._waiting: dict[Writer, None] = {}  # there was no thread to be had for them
        self._finalized = False
        self.ended = False

    def start(self, writer: Writer) -> threading.Thread | None:
        """Start a writer's thread; None when none can be started, see `ended`."""
        thread = None if self.ended else begin(f"dspy_prod-{writer.tables.kind}-writer", self._run, writer)
        if thread is not None:
            self._running[thread] = writer
            self._waiting.pop(writer, None)
            self._end_with_worker_process()
        elif not self.ended:
            self._waiting[writer] = None
        return thread

    def forget(self, writer: Writer) -> None:
        """A writer that had no thread has ended."""
        self._waiting.pop(writer, None)

    def _run(self, writer: Writer) -> None:
        try:
            writer.run()
        finally:
            self._running.pop(threading.current_thread(), None)

    def finish(self) -> None:
        """Let every writer write what was posted and end."""
        self.ended = True
        deadline = time.monotonic() + EXIT_TIMEOUT
        running = self._running.copy().items()
        for _, writer in running:
            writer.inbox.put((Transactions.stop, None, None))
        for thread, _ in running:
            thread.join(max(0.0, deadline - time.monotonic()))
        for writer in list(self._waiting):
            writer.inbox.put((Transactions.stop, None, None))
            writer.run()

    def _end_with_worker_process(self) -> None:
        if not self._finalized:
            self._finalized = finish_with_worker(self.finish, priority=0)


THREADS: Final = Threads()
atexit.register(THREADS.finish)
atexit.register(REAPER.flush, 2.0)  # registered later, so it comes before: what it has to do is still written
