"""How callers reach the writer thread of a durable store: posting, asking, waiting, closing."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from math import inf
from queue import Empty
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.admission.line import wake
from dspy_prod.stores.base import PENDING, REFUSED, Refusal, Terms
from dspy_prod.stores.durable.operations import Look, Operation, Report
from dspy_prod.stores.durable.process import THREADS
from dspy_prod.stores.durable.tables import Reading
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.durable.writer import Writer

_log = logging.getLogger("dspy_prod")

READ_TIMEOUT: Final = 5.0
"""Seconds a read waits for what was posted before it."""

_STEP: Final = 0.1
_WRITING: Final = (
    *(Transactions.settle, Transactions.settle_drawn, Transactions.settle_alone),
    *(Transactions.append, Transactions.append_program),
)


class Mailbox:
    """Posts to a writer whose thread starts with the first operation, and ends when the mailbox is not used any more.

    Args:
        writer: who is posted to.
        readers: the store's other connections, which the writer closes when nobody has the store any more.

    Attributes:
        closed: `close` was called.
    """

    def __init__(self, writer: Writer, readers: tuple[Reading, ...] = ()) -> None:
        self.writer = writer
        self.closed = False
        self._path = writer.tables.path
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._leaving = weakref.finalize(self, _leave, writer, readers)
        self._leaving.atexit = False

    def post(self, operation: Operation) -> bool:
        """Hand an operation to the writer; False when that is too late."""
        if not self.alive():
            return False
        self.writer.inbox.put(operation)
        if self.writer.ended:  # just now
            self.refuse_stragglers()
        return True

    def why_not(self) -> str | None:
        """Why nothing can be decided now, None when something can."""
        if not self.alive():
            return f"The store {self._path} is closed"
        if self._thread is None:
            return f"The store {self._path} cannot write: this process has as many threads as it may"
        return None

    def alive(self) -> bool:
        """Whether operations are accepted; starts the writer when it is needed first."""
        if self._thread is None:
            self._start()
        return not (self.closed or self.writer.ended)

    def _start(self) -> None:
        with self._starting:
            if self._thread is not None or self.closed:
                return
            self._thread = THREADS.start(self.writer)
            if self._thread is not None:
                self.writer.begun = True
            elif THREADS.ended:
                self.writer.ended = True
            # else there is no thread to be had: what is posted waits, and the next operation tries again.

    def flush(self, timeout: float | None) -> bool:
        """Wait until everything posted before is applied; False, early, while the file cannot be written."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return self.writer.inbox.empty()
        look = Look()
        if not self.post((Transactions.flush, look, None)):
            return True
        deadline = inf if timeout is None else time.monotonic() + timeout
        while not look.wait(min(max(deadline - time.monotonic(), 0.0), _STEP)):
            if self.writer.failing is not None or time.monotonic() >= deadline or not thread.is_alive():
                look.given_up = True
                return look.is_set()
        return True

    def question(self, ask: Callable[..., Any]) -> Any:
        """What `ask(core, tables, now)` finds inside a transaction, after everything posted before.

        Raises:
            StoreUnavailableError: no answer.
        """
        if threading.current_thread() is self._thread:
            raise StoreUnavailableError("A listener or callback of the store may not wait for the store")
        told: Future[Any] = Future()
        why = self.why_not()
        if why is not None or not self.post((Transactions.answer, told, ask)):
            raise StoreUnavailableError(why or f"The store {self._path} is closed")
        try:
            return told.result(READ_TIMEOUT)
        except TimeoutError:
            raise StoreUnavailableError(f"The store {self._path} did not answer within {READ_TIMEOUT:g} s") from None
        except Exception as error:
            raise StoreUnavailableError(str(error)) from error

    def close(self) -> None:
        """Have everything written that was posted, and the thread and its connection ended."""
        with self._starting:
            already, self.closed = self.closed, True
            thread = self._thread
        if thread is None:
            THREADS.forget(self.writer)
            if not already and not self.writer.inbox.empty():  # there was no thread to be had: it is written here
                self.writer.inbox.put((Transactions.stop, None, None))
                self.writer.run()
            elif not already:
                with self.writer.io:
                    self.writer.tables.close()
        elif thread is not threading.current_thread():
            if not already:
                self.writer.inbox.put((Transactions.stop, None, None))
            thread.join()
        self.refuse_stragglers()

    def refuse_stragglers(self) -> None:
        """Refuse what was posted while the writer ended."""
        if self._thread is not None and self._thread.is_alive() and not self.writer.ended:
            return
        refusal = Refusal("store_unavailable", detail=f"The store {self._path} is closed")
        lost = sum(len(served) for _, served, _ in self.writer.inbox.take_served())
        if lost:
            _log.warning("%s: the records of %d cached answers came after close and were not written", self._path, lost)
        while True:
            try:
                kind, subject, detail = self.writer.inbox.get_nowait()
            except Empty:
                return
            if kind is Transactions.admit:
                with self.writer.publishing:
                    if subject.state == PENDING:
                        subject.refusal, subject.state = refusal, REFUSED
                wake([subject])
            elif kind is Transactions.answer:
                subject.set_exception(OSError(refusal.detail))
            elif kind is Transactions.flush:
                subject.set()
            elif kind is Transactions.put_answer:
                detail.written()
            elif kind is Transactions.note and detail is not None:
                detail.lost("the store is closed")
            elif kind in _WRITING:
                _log.warning("%s: a %s came after close and was not written", self._path, kind.__name__)

    # -- fork --------------------------------------------------------------------------------------------------------
    def before_fork(self) -> None:
        """Start no thread until `after_fork`."""
        self._starting.acquire()

    def after_fork(self) -> None:
        """In the parent."""
        self._starting.release()

    def forsake(self) -> None:
        """In a forked child, which has another mailbox: the writer of this one is the parent's."""
        self.closed = True
        self._leaving.detach()


def _leave(writer: Writer, readers: tuple[Reading, ...]) -> None:
    """Close what a store had open that nobody has any more: its writer does, once everything is written.

    If that never began, whoever collects garbage does, perhaps while the process forks: then all is closed already.
    """
    if writer.begun:
        writer.inbox.put((Transactions.stop, readers, None))
        return
    if writer.io.acquire(blocking=False):
        try:
            writer.tables.close()
        finally:
            writer.io.release()
    for reader in readers:
        reader.leave()


class Listeners:
    """Tells everybody who asked; their own errors are logged."""

    def __init__(self, first: Report | None) -> None:
        self._listeners = [] if first is None else [first]

    def add(self, listener: Report) -> None:
        if listener not in self._listeners:
            self._listeners = [*self._listeners, listener]

    def __call__(self, name: str, details: dict[str, Any]) -> None:
        for listener in self._listeners:
            try:
                listener(name, details)
            except Exception:
                _log.exception("A listener failed on %r of the store", name)


class KnownTerms:
    """The terms of budgets as this process heard of them last, and who else wants to hear."""

    def __init__(self) -> None:
        self.listener: Callable[[Terms], None] | None = None
        self._known: dict[str, Terms] = {}

    def find(self, title: str) -> Terms | None:
        """The terms of a budget, None when nobody in this process has used it."""
        return self._known.get(title)

    def __call__(self, terms: Terms) -> None:
        self._known[terms.in_force.title] = terms
        if self.listener is not None:
            try:
                self.listener(terms)
            except Exception:
                _log.exception("What a budget's settings are now could not be told")
