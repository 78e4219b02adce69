"""The one thread that writes a SQLite store: it decides, commits in groups, and only then tells.

Callers post operations to `inbox` and never wait for the disk. The writer takes everything that is there, runs it on
the admission core inside one transaction, writes what changed, commits, and wakes the tickets it decided. It is also
the timer: for lines whose moment has come, for leases, and for changes made by other processes.
"""

from __future__ import annotations

import logging
import random
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from math import inf
from queue import Empty, SimpleQueue
from typing import Any, Final

from dspy_prod.clock import Clock
from dspy_prod.records import CallRecord
from dspy_prod.stores.base import GRANTED, PENDING, REFUSED, Refusal, Settlement, Ticket
from dspy_prod.stores.core import AdmissionCore
from dspy_prod.stores.line import wake
from dspy_prod.stores.sqlite_local import LocalLane
from dspy_prod.stores.sqlite_schema import is_environment, is_locked, unavailable
from dspy_prod.stores.sqlite_tables import Tables

_log = logging.getLogger("dspy_prod")

MAX_BATCH: Final = 512
"""Operations per transaction, so that other processes get their turn."""
MAX_KEPT: Final = 100_000
"""Operations kept while the file cannot be written; more are dropped, and said to be."""
BUSY_LIMIT: Final = 5.0
"""Seconds to wait for another process's transaction before the store counts as unavailable."""
POLL: Final = 0.025
"""Seconds between looks for changes by other processes while tickets wait."""
REAP_BATCH: Final = 1000
SWEEP_EVERY: Final = 3600.0
_IDLE: Final = 5.0
_BACK_OFF: Final = (0.05, 1.0)

Operation = tuple[Callable[["Writer", Any, Any, float], None], Any, Any]
"""What to do, and two arguments; the third argument is the store's time."""


class Request:
    """A question that the writer answers inside a transaction."""

    __slots__ = ("ask", "done", "error", "result")

    def __init__(self, ask: Callable[[AdmissionCore, Tables, float], Any]) -> None:
        self.ask = ask
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None


class Writer:
    """State and body of the writer thread. Only `inbox`, `publishing`, `io` and `failing` are used by other threads.

    Attributes:
        publishing: held while a ticket's state changes, so that a withdrawal and a grant cannot both win.
        io: held while the file is in use; `fork` waits for it.
        failing: why nothing can be written at the moment, or None.
    """

    def __init__(
        self, tables: Tables, clock: Clock, lease: float, report: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self.inbox: SimpleQueue[Operation] = SimpleQueue()
        self.publishing = threading.Lock()
        self.io = threading.Lock()
        self.failing: Refusal | None = None
        self.tables = tables
        self.core = AdmissionCore(tables)
        self.local = LocalLane(clock.time, self._keep_record)
        self._now = clock.time
        self._lease = lease
        self._report = report
        self._kept: deque[Operation] = deque()
        self._after: list[Callable[[], None]] = []
        self._leased_until = -inf
        self._reap_at = -inf
        self._sweep_at = time.monotonic() + SWEEP_EVERY
        self._retry_at = -inf
        self._back_off = 0.0
        self._stopping = False
        self._dropped = 0

    # -- operations: run inside a transaction --------------------------------------------------------------------------
    def admit(self, ticket: Ticket, _: Any, now: float) -> None:
        if ticket.state == PENDING:
            self.core.enter(ticket, now)

    def settle(self, done: Settlement, _: Any, now: float) -> None:
        self.core.settle(done, now)

    def withdraw(self, ticket: Ticket, _: Any, now: float) -> None:
        if ticket.ask.id in self.core.holds:  # granted before the withdrawal was known here
            self.core.settle(Settlement(ticket.ask.id, 0, 0, False, False, None), now)
        else:
            self.core.remove(ticket, now)

    def append(self, record: CallRecord, is_new: bool, now: float) -> None:
        (self.core.appended if is_new else self.core.replaced).append(record)

    def throttled(self, limit: Any, retry_after: float | None, now: float) -> None:
        key, options = limit
        self.core.throttled(key, options, retry_after, now)

    def resync(self, limit: Any, remaining: dict[str, tuple[float, float]], now: float) -> None:
        key, options = limit
        self.core.resync(key, options, remaining, now)

    def put_answer(self, key: bytes, put: Any, now: float) -> None:
        answer, max_entries, max_bytes, written = put
        self.tables.cache.put(key, answer, max_entries, max_bytes, now)
        self._after.append(written)

    def touch_answer(self, key: bytes, _: Any, now: float) -> None:
        self.tables.cache.touch(key, now)

    def clear_answers(self, _: Any, __: Any, now: float) -> None:
        self.tables.cache.clear()

    def flush(self, done: threading.Event, _: Any, now: float) -> None:
        self._after.append(done.set)

    def answer(self, request: Request, _: Any, now: float) -> None:
        request.result = request.ask(self.core, self.tables, now)
        self._after.append(request.done.set)

    def settle_local(self, done: Settlement, _: Any, now: float) -> None:
        self.local.settle(done)

    def nudge(self, _: Any, __: Any, now: float) -> None:
        """Look at the timers again."""

    def stop(self, _: Any, __: Any, now: float) -> None:
        self._stopping = True

    # -- the loop ------------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Body of the thread; returns when stopped, with everything written that can be."""
        while not self._stopping or not self.inbox.empty():
            try:
                self._cycle(self._collect())
            except Exception:
                _log.exception("The writer of %s met an error; it goes on", self.tables.path)
                time.sleep(0.05)
        self._finish()

    def _collect(self) -> list[Operation]:
        operations: list[Operation] = []
        wait = self._wait()
        try:
            operations.append(self.inbox.get(timeout=wait) if wait > 0 else self.inbox.get_nowait())
        except Empty:
            return operations
        self._take_more(operations)
        return operations

    def _take_more(self, operations: list[Operation]) -> None:
        for _ in range(min(self.inbox.qsize(), MAX_BATCH - len(operations))):
            operations.append(self.inbox.get_nowait())

    def _wait(self) -> float:
        now, tick = self._now(), time.monotonic()
        wait = min(min(self.core.next_due(), self.local.tick()) - now, self._reap_at - tick, _IDLE)
        if self._kept:
            wait = min(wait, self._retry_at - tick)
        elif self.core.waiting():
            wait = min(wait, POLL)
        if self.core.holds:
            wait = min(wait, self._leased_until - self._lease * 2 / 3 - now)
        if self._retry_at > tick:
            wait = max(wait, self._retry_at - tick)
        return wait

    def _cycle(self, operations: list[Operation]) -> None:
        if self._retry_at > time.monotonic():
            self._refuse_or_keep(operations)
            return
        if self._kept:
            operations = [*self._kept, *operations]
            self._kept.clear()
            for later in operations[MAX_BATCH:]:
                self._kept.append(later)
            del operations[MAX_BATCH:]
        if not operations and not self._anything_due():
            return
        with self.io:
            try:
                if not self._is_quiet(operations):
                    self._transact(operations)
            except Exception as error:
                self._failed(operations, error)
                return
        self._succeeded()

    def _anything_due(self) -> bool:
        now, tick = self._now(), time.monotonic()
        if self.core.next_due() <= now or self._reap_at <= tick or self._lease_due(now):
            return True
        return bool(self.core.waiting()) and self.tables.stale()

    def _is_quiet(self, operations: list[Operation]) -> bool:
        """Nothing to write: no transaction, unless time has brought something."""
        quiet = (Writer.flush, Writer.nudge, Writer.stop)
        if not operations or any(operation[0] not in quiet for operation in operations) or self._anything_due():
            return False
        for kind, one, other in operations:
            kind(self, one, other, 0.0)
        return True

    def _transact(self, operations: list[Operation]) -> None:
        tables, core = self.tables, self.core
        lost = tables.connection is not None and tables.replaced()
        if lost:
            tables.lose()
        connection = tables.open()
        self._begin(connection)
        self._take_more(operations)
        index = -1
        try:
            now = self._now()
            if tables.changed():
                if lost:
                    core.carry_over()
                    self._leased_until = -inf
                else:
                    core.forget()
                    if self._leased_until > 0 and not tables.owned():
                        core.holds.clear()  # another process thought this one dead, and charged them
                        self._leased_until = -inf
                core.serve(now)
            core.tick(now)
            if self._reap_at <= time.monotonic():
                self._reap(now)
            for index, (kind, one, other) in enumerate(operations):  # noqa: B007  (read when one fails)
                kind(self, one, other, now)
            index = -1
            renewed = self._lease_due(now)
            if renewed:
                tables.renew(now + self._lease)
            unwritable = tables.write(core, now)
            connection.execute("COMMIT")
        except BaseException as error:
            if index >= 0 and not is_environment(error):
                self._drop(operations.pop(index), error)
            raise
        if renewed:
            self._leased_until = now + self._lease
        core.appended.clear()
        core.replaced.clear()
        core.accounts.dirty.clear()
        if lost:
            self._report("store_degraded", {"path": tables.path, "error": "the file was deleted; a new one was made"})
        for record in unwritable:
            self._report("record_dropped", {"path": tables.path, "id": repr(record.id)})

    def _begin(self, connection: sqlite3.Connection) -> None:
        deadline = time.monotonic() + BUSY_LIMIT
        pause = 0.0002
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if not is_locked(error) or time.monotonic() > deadline:
                    raise
            time.sleep(pause * (0.5 + random.random()))
            pause = min(pause * 1.5, 0.002)

    def _lease_due(self, now: float) -> bool:
        return bool(self.core.holds) and now >= self._leased_until - self._lease * 2 / 3

    def _reap(self, now: float) -> None:
        """Charge the holds of processes that are gone."""
        tick = time.monotonic()
        self._reap_at = tick + self._lease / 3
        if self.core.holds and self._leased_until < now:
            self._reap_at = tick + self._lease  # this machine slept: let the others renew their leases first
            return
        found = self.tables.expired(now, REAP_BATCH)
        for hold in found:
            self.core.abandon(hold, now)
        if len(found) >= REAP_BATCH:
            self._reap_at = tick
        if tick >= self._sweep_at:
            self._sweep_at = tick + SWEEP_EVERY
            self.tables.sweep(now)

    # -- telling -------------------------------------------------------------------------------------------------------
    def _publish(self) -> None:
        """Tell what is durable now: tickets, flushes, answers."""
        changes = self.core.changes
        assert changes is not None
        told = []
        if changes.verdicts:
            with self.publishing:
                for ticket, state, refusal in changes.verdicts:
                    if ticket.state == PENDING:
                        ticket.refusal = refusal
                        ticket.state = state
                        told.append(ticket)
                    elif state == GRANTED and ticket.ask.id in self.core.holds:
                        self._kept.append((Writer.withdraw, ticket, None))
        abandoned = [hold.amount for hold in changes.abandoned.values()]
        changes.clear()
        if told:
            wake(told)
        if abandoned:
            self._report("hold_abandoned", {"holds": len(abandoned), "cost_nano": sum(abandoned)})
        after = self._after
        if after:
            self._after = []
            for callback in after:
                callback()

    def _succeeded(self) -> None:
        self._publish()
        if self.failing is not None:
            self.failing = None
            self._back_off = 0.0
            self._report("store_recovered", {"path": self.tables.path})

    # -- when the file cannot be written -------------------------------------------------------------------------------
    def _failed(self, operations: list[Operation], error: BaseException) -> None:
        self._after.clear()
        self.tables.rollback()
        undecided = self.core.undo()
        if is_environment(error):
            if not is_locked(error) and "full" not in str(error):
                self.tables.close()
            first, most = _BACK_OFF
            self._back_off = min(max(first, self._back_off * 2), most)
            self._retry_at = time.monotonic() + self._back_off
        else:
            _log.error("An operation failed in %s and was dropped", self.tables.path, exc_info=error)
        text = str(unavailable(self.tables.path, error))
        refusal = Refusal("store_unavailable", self._back_off or None, detail=text)
        self.core.fail_waiting(refusal)
        changes = self.core.changes
        assert changes is not None
        changes.verdicts.extend((ticket, REFUSED, refusal) for ticket in undecided)
        first_time = self.failing is None
        self.failing = refusal
        self._refuse_or_keep(operations)
        if first_time:
            _log.warning("%s. Settlements are kept and written later.", text)
            self._report("store_degraded", {"path": self.tables.path, "error": text})

    def _refuse_or_keep(self, operations: list[Operation]) -> None:
        """While nothing can be written: questions get an error, admissions a refusal; the rest waits, in order."""
        refusal = self.failing
        assert refusal is not None
        changes = self.core.changes
        assert changes is not None
        for operation in operations:
            kind, subject, detail = operation
            if kind is Writer.admit:
                changes.verdicts.append((subject, REFUSED, refusal))
            elif kind is Writer.answer:
                subject.error = OSError(refusal.detail)
                self._after.append(subject.done.set)
            elif kind is Writer.put_answer:
                self._after.append(detail[3])
            elif kind in (Writer.settle_local, Writer.stop):
                kind(self, subject, detail, 0.0)
            elif kind in (Writer.nudge, Writer.touch_answer):
                pass
            elif len(self._kept) < MAX_KEPT:
                self._kept.append(operation)
            else:
                self._report_dropped(kind.__name__, OSError("too many settlements and records are waiting"))
        self._publish()

    def _drop(self, operation: Operation, error: BaseException) -> None:
        """Give up an operation that fails whatever the file's state; the money of a settlement is kept."""
        kind, subject, _ = operation
        if kind is Writer.admit:
            refusal = Refusal("store_unavailable", detail=f"The admission failed: {type(error).__name__}")
            assert self.core.changes is not None
            self.core.changes.verdicts.append((subject, REFUSED, refusal))
        elif kind is Writer.answer:
            subject.error = error
            self._after.append(subject.done.set)
        elif kind is Writer.settle and subject.record is not None:
            self._kept.append((Writer.settle, subject._replace(record=None), None))
        self._report_dropped(kind.__name__, error)

    def _report_dropped(self, kind: str, error: BaseException) -> None:
        self._dropped += 1
        details = {"path": self.tables.path, "kind": kind, "error": repr(error), "dropped": self._dropped}
        self._report("operation_dropped", details)

    def _keep_record(self, record: CallRecord, is_new: bool) -> None:
        self.inbox.put((Writer.append, record, is_new))

    def abort(self, refusal: Refusal) -> None:
        """In a forked child, where this writer's thread does not exist: refuse everybody, without waking."""
        self.core.fail_waiting(refusal)
        changes = self.core.changes
        assert changes is not None
        tickets = [ticket for ticket, _, _ in changes.verdicts]
        while self.inbox.qsize():
            kind, subject, _ = self.inbox.get_nowait()
            if kind is Writer.admit:
                tickets.append(subject)
        for ticket in tickets:
            if ticket.state == PENDING:
                ticket.refusal = refusal
                ticket.state = REFUSED

    def _finish(self) -> None:
        """Last try for what is kept, then refuse who still waits and close."""
        while self._kept:
            self._retry_at = -inf
            self._cycle([])
            if self.failing is not None:
                break
        refusal = Refusal("store_unavailable", detail=f"The store {self.tables.path} was closed")
        self.core.fail_waiting(refusal)
        self._publish()
        self.local.fail(refusal)
        lost = sum(1 for operation in self._kept if operation[0] in (Writer.settle, Writer.append))
        if lost:
            self._dropped += lost - 1
            self._report_dropped("close", OSError("the store was closed while its file could not be written"))
            _log.error("%d settlements and records could not be written to %s", lost, self.tables.path)
        with self.io:
            try:
                if self.tables.connection is not None and not self.core.holds:
                    self.tables.resign()
            except Exception:
                _log.debug("The lease could not be given back", exc_info=True)
            self.tables.close()
