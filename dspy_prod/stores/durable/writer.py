"""The one thread that writes a durable store: it decides, commits in groups, and only then tells.

Callers post operations to `inbox` and never wait for the disk. The writer takes everything that is there, runs it on
the admission core inside one transaction, writes what changed, commits, and wakes the reservations it decided. It is
also the timer: for lines whose moment has come, for leases, and for changes made by other processes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from dspy_prod.records import CallRecord
from dspy_prod.runtime.clock import Clock
from dspy_prod.runtime.forking import Stage, hold_while_forking
from dspy_prod.stores.admission.line import wake
from dspy_prod.stores.base import GRANTED, PENDING, REFUSED, Refusal, Reservation, Terms
from dspy_prod.stores.durable.drawn import Drawn
from dspy_prod.stores.durable.inbox import Inbox
from dspy_prod.stores.durable.tables import ChangedError, Copying, DoubtError, Tables
from dspy_prod.stores.durable.transactions import Operation, Report, Transactions, UnfitError
from dspy_prod.stores.lane import Lane

_log = logging.getLogger("dspy_prod")

MAX_BATCH: Final = 512
"""Operations per transaction, so that other processes get their turn."""
MAX_KEPT: Final = 100_000
"""Operations kept while the file cannot be written; more are dropped, and said to be."""
POLL: Final = 0.025
"""Seconds between looks for changes by other processes while reservations wait."""
FORK_PATIENCE: Final = 5.0
"""Seconds a fork waits for a transaction to end."""
_IDLE: Final = 5.0
_BACK_OFF: Final = (0.05, 1.0)
_QUIET: Final = (Transactions.flush, Transactions.nudge, Transactions.stop)
"""Operations that need no transaction."""
_SETTLING: Final = (Transactions.settle, Transactions.settle_drawn)
_RECORDING: Final = (*_SETTLING, Transactions.append, Transactions.append_served, Transactions.append_program)


def _size(operations: Iterable[Operation]) -> int:
    """How many operations these are, each cached answer counted as one."""
    return sum([len(one) if kind is Transactions.append_served else 1 for kind, one, _ in operations])


class Writer:
    """State and body of the writer thread. Other threads use `inbox`, `local` and the attributes below.

    Attributes:
        drawn: what calls are admitted from without a transaction for each.
        publishing: held while a reservation's state changes, so that a withdrawal and a grant cannot both win.
        io: held while the file is in use; `fork` waits for it.
        failing: why nothing can be written at the moment, or None.
        begun: it has a thread, or had one.
        ended: nothing that is posted now will be done.
    """

    def __init__(
        self,
        tables: Tables,
        clock: Clock,
        lease: float,
        report: Report,
        on_terms: Callable[[Terms], None],
        checkpoints: Copying | None = None,
    ) -> None:
        self.inbox = Inbox()
        self.local = Lane(clock.time, self._keep_record, self._nudge)
        self.publishing = threading.Lock()
        self.io = threading.Lock()
        self.failing: Refusal | None = None
        self.begun = self.ended = False
        self.tables = tables
        self.drawn = Drawn(clock.time)
        self._transactions = Transactions(tables, clock, lease, report, on_terms, self.drawn)
        self._core = self._transactions.core
        self._checkpoints = checkpoints
        self._now = clock.time
        self._report = report
        self._kept: deque[Operation] = deque()
        self._doing: list[Operation] = []
        self._unsure: list[Operation] = []  # of a transaction that may have been written
        self._retry_at = 0.0
        self._back_off = 0.0
        self._dropped = 0
        self._alone = 0  # how many operations to run one by one
        hold_while_forking(self, Stage.FILES)  # also when nobody has its store any more, and it writes the rest

    def problems(self) -> dict[str, Any]:
        """Why nothing can be written, how much waits for it, and how much was given up."""
        failing = self.failing
        found = {} if failing is None else {"failing": failing.detail, "kept": len(self._kept)}
        return {**found, "dropped": self._dropped} if self._dropped else found

    def unwritten(self) -> int:
        """About how many records are posted and not in the file: all that waits, and what is kept or being written."""
        taken = _size(
            operation for operation in (*self._kept, *self._doing, *self._unsure) if operation[0] in _RECORDING
        )
        return self.inbox.waiting() + taken

    # -- the loop ------------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Body of the thread; returns when stopped, with everything written that can be."""
        while not self._transactions.stopping or not self.inbox.empty():
            try:
                self._cycle(self._collect())
                self.inbox.written()
            except Exception:
                _log.exception("The writer of %s met an error; it goes on", self.tables.path)
                time.sleep(0.05)
        self._finish()

    def _collect(self) -> list[Operation]:
        inbox = self.inbox
        inbox.hurried = bool(self._core.waiting())
        inbox.open = self.failing is None
        inbox.wait(self._wait())
        inbox.begin(MAX_BATCH)
        operations = inbox.take(1)
        if operations or not inbox.empty():
            self._take_more(operations)
        return operations

    def _take_more(self, operations: list[Operation]) -> None:
        if not self._kept and not self._alone:
            operations += self.inbox.take(MAX_BATCH - len(operations))
        operations += self.inbox.take_served()
        self.inbox.writing = _size(operations)

    def _wait(self) -> float:
        wait = min(self._transactions.due_in(), self.local.tick() - self._now(), _IDLE)
        retry_in = self._retry_at - time.monotonic()
        if self._kept:
            wait = min(wait, retry_in)
        elif self._core.waiting():
            wait = min(wait, POLL)
        return max(wait, retry_in) if retry_in > 0 else wait

    def _cycle(self, operations: list[Operation]) -> None:
        if self._retry_at > time.monotonic():
            self._refuse_or_keep(operations)
            return
        if self._transactions.in_doubt and not self._find_out(operations):
            return
        if self._kept:
            operations = [*self._kept, *operations]
            self._kept.clear()
            most = 1 if self._alone else MAX_BATCH
            self._kept.extend(operations[most:])
            del operations[most:]
            self._alone = max(0, self._alone - 1)
        self._doing = operations
        try:
            with self.io:
                writes = any(operation[0] not in _QUIET or self.failing is not None for operation in operations)
                if writes or self._anything_due():
                    # Beginning and ending a transaction succeeds on a full disk: what failed has to write again.
                    self._transactions.run(operations, self._take_more, probing=self.failing is not None)
                    if self._checkpoints is not None:
                        self._checkpoints.committed()
                else:
                    for operation, one, other in operations:
                        operation(self._transactions, one, other, 0.0)
        except DoubtError as error:
            self._doing, self._unsure = [], operations
            self._doubt(error)
        except Exception as error:
            self._failed(operations, error)
            self._doing = []
        else:
            self._doing = []
            self._publish()
            if self.failing is not None and operations:
                self._recovered()

    def _anything_due(self) -> bool:
        return self._transactions.due_in() <= 0 or (self._core.waiting() > 0 and self.tables.stale())

    # -- telling -------------------------------------------------------------------------------------------------------
    def _publish(self) -> None:
        """Tell what is durable now: reservations, flushes, answers."""
        changes = self._core.changes
        assert changes is not None
        told = []
        if changes.verdicts:
            with self.publishing:
                for reservation, state, refusal in changes.verdicts:
                    if reservation.state == PENDING:
                        reservation.refusal = refusal
                        reservation.state = state
                        told.append(reservation)
                    elif state == GRANTED and reservation.id in self._core.holds:
                        self._kept.append((Transactions.withdraw, reservation, None))
        abandoned = [hold.amount for hold in changes.abandoned.values()]
        changes.clear()
        wake(told)
        if abandoned:
            details = {"path": self.tables.path, "holds": len(abandoned), "cost_nano": sum(abandoned)}
            self._report("hold_abandoned", details)
        after, self._transactions.after = self._transactions.after, []
        for callback in after:
            callback()

    # -- when the file cannot be written -------------------------------------------------------------------------------
    def _failed(self, operations: list[Operation], error: Exception) -> None:
        with self.io:
            undecided = self._transactions.undo()
            if not isinstance(error, UnfitError):
                self.tables.failed(error)
        text = str(self.tables.unavailable(error))
        if isinstance(error, UnfitError):
            _log.error("An operation failed in %s", self.tables.path, exc_info=error)
            self._isolate(operations, error)
        refusal = self._degraded(text, wait=not isinstance(error, UnfitError) or not operations)
        self._core.fail_waiting(refusal)
        self._refuse(undecided, refusal)
        self._refuse_or_keep(operations)

    def _degraded(self, text: str, wait: bool = True) -> Refusal:
        """From now on nothing can be written; told when it is news."""
        if wait:
            first, most = _BACK_OFF
            self._back_off = min(max(first, self._back_off * 2), most)
            self._retry_at = time.monotonic() + self._back_off
        known, refusal = self.failing is not None, Refusal("store_unavailable", self._back_off or None, detail=text)
        self.failing = refusal
        if not known:
            _log.warning("%s. Settlements are kept and written later.", text)
            self._report("store_degraded", {"path": self.tables.path, "error": text})
        return refusal

    def _doubt(self, error: DoubtError) -> None:
        """The answer to a transaction is missing: nobody who waits for it is kept waiting; it stays as it is."""
        with self.io:
            self.tables.failed(error)
            self._transactions.drawing.close()
        refusal = self._degraded(str(self.tables.unavailable(error)))
        changes = self._core.changes
        assert changes is not None
        self._core.fail_waiting(refusal)
        told = []
        with self.publishing:
            for reservation, _, _ in changes.verdicts:
                if reservation.state == PENDING:
                    reservation.refusal, reservation.state = refusal, REFUSED
                    told.append(reservation)
        wake(told)

    def _find_out(self, operations: list[Operation]) -> bool:
        """Whether it is known now what became of the transaction whose answer was missing."""
        unsure = self._unsure
        try:
            with self.io:
                self._transactions.find_out()
        except DoubtError as error:
            self._doubt(error)
            self._refuse_or_keep(operations)
            return False
        except ChangedError:
            with self.io:
                self._transactions.undo()
            self._unsure = []
            self._kept.extendleft(reversed(unsure))
        except Exception as error:
            self._unsure = []
            self._failed(unsure, error)
            self._refuse_or_keep(operations)
            return False
        else:
            self._unsure = []
            self._publish()
            self._recovered()
        return True

    def _recovered(self) -> None:
        self.failing, self._back_off = None, 0.0
        self._report("store_recovered", {"path": self.tables.path})

    def _refuse_or_keep(self, operations: list[Operation]) -> None:
        """While nothing can be written: questions get an error, admissions a refusal; the rest waits, in order."""
        refusal = self.failing
        assert refusal is not None
        for operation in operations:
            kind, subject, detail = operation
            if kind is Transactions.admit:
                self._refuse([subject], refusal)
            elif kind is Transactions.answer:
                subject.set_exception(OSError(refusal.detail))
            elif kind is Transactions.put_answer:
                detail[3]()
            elif kind is Transactions.stop:
                kind(self._transactions, subject, detail, 0.0)
            elif kind in (Transactions.nudge, Transactions.touch_answer):
                pass
            elif len(self._kept) < MAX_KEPT:
                self._kept.append(operation)
            else:
                self._dropping(kind.__name__, "too many settlements and records wait to be written", _size([operation]))
        self._publish()

    def _refuse(self, reservations: list[Reservation], refusal: Refusal) -> None:
        assert self._core.changes is not None
        self._core.changes.verdicts.extend((reservation, REFUSED, refusal) for reservation in reservations)

    def _isolate(self, operations: list[Operation], error: UnfitError) -> None:
        """One of these can never be done: drop it, or find it by doing each alone. A settlement's money is kept."""
        if error.index < 0 and len(operations) > 1:
            self._alone = len(operations)
        elif operations:
            kind, subject, detail = operations.pop(error.index)
            self._dropping(kind.__name__, str(error), _size([(kind, subject, detail)]))
            if kind is Transactions.admit:
                self._refuse([subject], Refusal("store_unavailable", detail=f"The admission failed: {error}"))
            elif kind is Transactions.answer:
                subject.set_exception(error)
            elif kind in _SETTLING and subject.record is not None:
                self._kept.append((kind, subject._replace(record=None), detail))

    def _dropping(self, kind: str, error: str, count: int = 1) -> None:
        self._dropped += count
        details = {"path": self.tables.path, "kind": kind, "error": error, "dropped": self._dropped}
        self._report("operation_dropped", details)

    def _keep_record(self, record: CallRecord, is_new: bool) -> None:
        self.inbox.put((Transactions.append, record, is_new))

    def _nudge(self) -> None:
        self.inbox.put((Transactions.nudge, None, None))

    # -- the end -------------------------------------------------------------------------------------------------------
    def _finish(self) -> None:
        """Last try for what is kept, then refuse who still waits and close."""
        while self._kept or self._transactions.in_doubt:
            self._retry_at = 0.0
            self._cycle([])
            if self.failing is not None:
                break
        if self.drawn.shares and self.failing is None:
            self._cycle([(Transactions.give_up_shares, None, None)])
        refusal = Refusal("store_unavailable", detail=f"The store {self.tables.path} was closed")
        self._core.fail_waiting(refusal)
        self._publish()
        self.local.fail_waiting(refusal)
        lost = _size(operation for operation in (*self._kept, *self._unsure) if operation[0] in _RECORDING)
        if lost:
            _log.error("%d settlements and records could not be written to %s", lost, self.tables.path)
            self._dropping("close", "the store was closed while its file could not be written", lost)
        if self._checkpoints is not None:
            self._checkpoints.end()
        with self.io:
            self._transactions.resign()
        self.ended = True

    # -- fork --------------------------------------------------------------------------------------------------------
    def before_fork(self) -> None:
        """Close the connection and keep it closed: of what SQLite has locked, a child would wait for ever."""
        self._guarded = self.io.acquire(timeout=FORK_PATIENCE)
        if self._guarded:
            self.tables.close()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        if self._guarded:
            self.io.release()

    def _after_fork(self) -> None:
        self.io = threading.Lock()

    def abort(self, refusal: Refusal) -> None:
        """In a forked child, where this writer's thread does not exist: refuse everybody, without waking."""
        changes = self._core.changes
        assert changes is not None
        self._core.fail_waiting(refusal)
        while self.inbox.qsize():
            kind, subject, _ = self.inbox.get_nowait()
            if kind is Transactions.admit:
                self._refuse([subject], refusal)
        for reservation, _, _ in changes.verdicts:
            if reservation.state == PENDING:
                reservation.refusal = refusal
                reservation.state = REFUSED
