"""What SQLite stores do when their process forks or ends.

Fork: SQLite's locks stay with the parent while its bookkeeping of them is copied, so a child that opens the same file
believes it holds locks that it does not (seen: rows written by the child are lost when the parent closes). Hence every
connection is closed before a fork, and both sides open new ones when they need them.

End: what was posted is written before the process goes, also by stores that nobody uses any more.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from typing import Final, Protocol

from dspy_prod.stores.sqlite.transactions import Transactions
from dspy_prod.stores.sqlite.writer import Writer

EXIT_TIMEOUT: Final = 5.0
"""Seconds in which the writers may finish when the process ends."""


class Forkable(Protocol):
    """A store that is told of forks."""

    def before_fork(self) -> None: ...

    def after_fork_in_parent(self) -> None: ...

    def after_fork_in_child(self) -> None: ...


STORES: Final[weakref.WeakSet[Forkable]] = weakref.WeakSet()
_forking: Final[list[Forkable]] = []
_fork_lock = threading.Lock()
_running: Final[dict[threading.Thread, Writer]] = {}
_finalized_in = 0
_ended_in = 0


def start(writer: Writer) -> threading.Thread:
    """Start a writer's thread.

    Raises:
        RuntimeError: the process is ending.
    """
    if _ended_in == os.getpid():
        raise RuntimeError("the process is ending")
    thread = threading.Thread(target=_run, args=(writer,), name="dspy_prod-sqlite-writer", daemon=True)
    thread.start()
    _running[thread] = writer
    _end_with_worker_process()
    return thread


def _run(writer: Writer) -> None:
    try:
        writer.run()
    finally:
        _running.pop(threading.current_thread(), None)


def _finish() -> None:
    """Let every writer write what was posted and end."""
    global _ended_in
    _ended_in = os.getpid()
    deadline = time.monotonic() + EXIT_TIMEOUT
    running = list(_running.items())
    for _, writer in running:
        writer.inbox.put((Transactions.stop, None, None))
    for thread, _ in running:
        thread.join(max(0.0, deadline - time.monotonic()))


def _end_with_worker_process() -> None:
    """A forked worker of multiprocessing leaves by `os._exit`, without `atexit`; it has finalizers of its own."""
    global _finalized_in
    process = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None or _finalized_in == os.getpid():
        return
    from multiprocessing.util import Finalize

    _finalized_in = os.getpid()
    Finalize(None, _finish, exitpriority=0)


def _before_fork() -> None:
    _fork_lock.acquire()
    _forking.extend(STORES)
    for store in _forking:
        store.before_fork()


def _after_fork_in_parent() -> None:
    while _forking:
        _forking.pop().after_fork_in_parent()
    _fork_lock.release()


def _after_fork_in_child() -> None:
    global _fork_lock
    _fork_lock = threading.Lock()
    _running.clear()
    while _forking:
        _forking.pop().after_fork_in_child()


atexit.register(_finish)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
