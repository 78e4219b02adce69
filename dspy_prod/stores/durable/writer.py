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
from collections.abc import Callable
from typing import Any, Final

from dspy_prod.records import CallRecord
from dspy_prod.runtime.clock import Clock
from dspy_prod.runtime.forking import Stage, hold_while_forking
from dspy_prod.stores.admission.line import wake
from dspy_prod.stores.base import GRANTED, PENDING, REFUSED, Refusal, Terms
from dspy_prod.stores.durable.alone import Outage
from dspy_prod.stores.durable.drawn import Drawn
from dspy_prod.stores.durable.failing import QUIET, RECORDING, Failing, size_of
from dspy_prod.stores.durable.inbox import Inbox
from dspy_prod.stores.durable.operations import Look, Operation, Report
from dspy_prod.stores.durable.tables import Copying, DoubtError, Tables
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.lane import Lane

_log = logging.getLogger("dspy_prod")

MAX_BATCH: Final = 512
"""Operations per transaction, so that other processes get their turn."""
POLL: Final = 0.025
"""Seconds between looks for changes by other processes while reservations wait."""
POLL_TIMED: Final = 0.1
"""The same where all wait for a moment that is known: others make it earlier only if they do not send after all."""
FORK_PATIENCE: Final = 5.0
"""Seconds a fork waits for a transaction to end."""
_IDLE: Final = 5.0


class Writer(Failing):
    """State and body of the writer thread. Other threads use `inbox`, `local` and the attributes below.

    Attributes:
        drawn: what calls are admitted from without a transaction for each.
        publishing: held while a reservation's state changes, so that a withdrawal and a grant cannot both win.
        io: held while the file is in use; `fork` waits for it.
        failing: why nothing can be written at the moment, or None.
        outage: what was known when the store began to fail, while it cannot be used.
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
        self.inbox = Inbox(self._lost)
        self.local = Lane(clock.time, self._keep_record, self._nudge)
        self.publishing = threading.Lock()
        self.io = threading.Lock()
        self.failing: Refusal | None = None
        self.outage: Outage | None = None
        self._outages = 0
        self.begun = self.ended = False
        self.tables = tables
        self.drawn = Drawn(clock.time)
        self._transactions = Transactions(tables, clock, lease, report, on_terms, self.drawn)
        self._core = self._transactions.core
        self._checkpoints = checkpoints
        self._now = clock.time
        self._report = report
        self._kept: deque[Operation] = deque()
        self._looks: list[Look] = []  # flushes that wait for it to be written to again
        self._doing: list[Operation] = []
        self._unsure: list[Operation] = []  # of a transaction that may have been written
        self._suspect: Operation | None = None
        self._retry_at = 0.0
        self._back_off = 0.0
        self._dropped = 0
        self._alone = 0  # how many operations to run one by one
        hold_while_forking(self, Stage.FILES)  # also when nobody has its store any more, and it writes the rest

    def problems(self) -> dict[str, Any]:
        """Why nothing can be written, how much waits for it, and how much was given up."""
        failing = self.failing
        found = {} if failing is None else {"failing": failing.detail, "kept": len(self._kept)}
        dropped = self._dropped + self.inbox.dropped
        return {**found, "dropped": dropped} if dropped else found

    def unwritten(self) -> int:
        """About how many records are posted and not in the file: all that waits, and what is kept or being written."""
        taken = size_of(
            operation for operation in (*self._kept, *self._doing, *self._unsure) if operation[0] in RECORDING
        )
        return self.inbox.waiting() + taken

    # -- the loop ------------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Body of the thread; returns when stopped, with everything written that can be."""
        while not self._transactions.stopping or not self.inbox.empty():
            try:
                self._cycle(self._collect())
                self.inbox.written()
                self.inbox.tell()
            except Exception:
                _log.exception("The writer of %s met an error; it goes on", self.tables.path)
                time.sleep(0.05)
        self._finish()

    def _collect(self) -> list[Operation]:
        inbox = self.inbox
        inbox.hurried = bool(self._core.waiting())
        inbox.open = self.failing is None
        inbox.wait(self._wait())
        most = self._room()
        inbox.begin(most)
        operations = inbox.take(most)
        self._take_served(operations)
        return operations

    def _room(self) -> int:
        """How many operations may be taken: what is kept comes before them, but while it only waits for its next try
        they are kept or refused at once."""
        if self._retry_at > time.monotonic():
            return MAX_BATCH
        return 0 if self._alone else max(0, MAX_BATCH - len(self._kept))

    def _take_more(self, operations: list[Operation]) -> None:
        if not self._kept and not self._alone:
            operations += self.inbox.take(MAX_BATCH - len(operations))
        self._take_served(operations)

    def _take_served(self, operations: list[Operation]) -> None:
        operations += self.inbox.take_served()
        self.inbox.writing = size_of(operations)

    def _wait(self) -> float:
        wait = min(self._transactions.due_in(), self.local.tick() - self._now(), _IDLE)
        retry_in = self._retry_at - time.monotonic()
        if self._kept or self._transactions.in_doubt or self.outage is not None:
            wait = min(wait, retry_in)
        elif self._core.waiting():
            wait = min(wait, POLL_TIMED if self._core.timed else POLL)
        return max(wait, retry_in) if retry_in > 0 else wait

    def _cycle(self, operations: list[Operation]) -> None:
        if self._retry_at > time.monotonic():
            self._refuse_or_keep(operations)
            return
        if self._transactions.in_doubt and not self._find_out(operations):
            return
        if self._kept:
            self._kept.extend(operations)
            pop, most = self._kept.popleft, 1 if self._alone else MAX_BATCH
            operations = [pop() for _ in range(min(most, len(self._kept)))]
            self._alone = max(0, self._alone - 1)
        else:
            self._alone = 0
        self._doing = operations
        try:
            with self.io:
                writes = self.outage is not None or any(
                    operation[0] not in QUIET or self.failing is not None for operation in operations
                )
                if writes or self._anything_due():
                    # Beginning and ending a transaction succeeds on a full disk: what failed has to write again.
                    self._transactions.run(operations, self._take_more, probing=self.failing is not None)
                    if self._checkpoints is not None:
                        self._checkpoints.committed()
                else:
                    for operation, one, other in operations:
                        operation(self._transactions, one, other, 0.0)
        except DoubtError as error:
            self._doing = []
            if self._transactions.carrying_over:  # before any of these was done
                self._doubt(error)
                self._put_back(operations)
            else:
                self._unsure = operations
                self._doubt(error)
        except Exception as error:
            self._failed(operations, error)
            self._doing = []
        else:
            self._doing = []
            self._publish()
            if self.failing is not None and (operations or self.outage is not None):
                self._recovered()

    def _anything_due(self) -> bool:
        return self._transactions.due_in() <= 0 or (self._core.waiting() > 0 and self.tables.stale())

    # -- telling -------------------------------------------------------------------------------------------------------
    def _publish(self) -> None:
        """Tell what is durable now: reservations, flushes, answers. While that is not known, it stays untold."""
        if self._transactions.in_doubt:
            return
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

    def _keep_record(self, record: CallRecord, is_new: bool) -> None:
        self.inbox.put((Transactions.append, record, is_new))

    def _nudge(self) -> None:
        self.inbox.put((Transactions.nudge, None, None))

    # -- the end -------------------------------------------------------------------------------------------------------
    def _finish(self) -> None:
        """Last try for what is kept, then refuse who still waits and close."""
        if self.drawn.shares:
            self._kept.append((Transactions.give_up_shares, None, None))
        while self._kept or self._transactions.in_doubt:
            self._retry_at = 0.0
            self._cycle([])
            if self._retry_at:  # nothing can be written; one that can never be keeps no other from it
                break
        if self.failing is not None:
            self._let_go()
        refusal = Refusal("store_unavailable", detail=f"The store {self.tables.path} was closed")
        self._core.fail_waiting(refusal)
        if self._transactions.in_doubt:
            self._tell_undecided(refusal)
            for kind, subject, detail in self._unsure:
                if kind is Transactions.answer and not subject.done():
                    subject.set_exception(OSError(refusal.detail))
                elif kind is Transactions.put_answer:
                    detail.written()
        self._publish()
        self.local.fail_waiting(refusal)
        lost = size_of(operation for operation in (*self._kept, *self._unsure) if operation[0] in RECORDING)
        if lost:
            _log.error("%d settlements and records could not be written to %s", lost, self.tables.path)
        why = "the store was closed while its file could not be written"
        for kind, _, fate in (*self._kept, *self._unsure):
            if kind is Transactions.note and fate is not None:
                lost += fate.lost(why)
        if lost:
            self._dropping("close", why, lost)
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
                changes.verdicts.append((subject, REFUSED, refusal))
        for reservation, _, _ in changes.verdicts:
            if reservation.state == PENDING:
                reservation.refusal = refusal
                reservation.state = REFUSED
