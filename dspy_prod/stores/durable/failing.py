"""What a writer does while nothing can be written: who waits is told, what was posted is kept, in order.

The lower half of `writer.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import Final

from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.line import wake
from dspy_prod.stores.base import PENDING, REFUSED, Refusal, Reservation
from dspy_prod.stores.durable.alone import Outage
from dspy_prod.stores.durable.inbox import Inbox
from dspy_prod.stores.durable.operations import Look, Operation, Report
from dspy_prod.stores.durable.tables import ChangedError, DoubtError, Tables
from dspy_prod.stores.durable.transactions import Transactions, UnfitError

_log = logging.getLogger("dspy_prod")

MAX_KEPT: Final = 100_000
"""Operations kept while nothing can be written; more are dropped, and said to be."""
_BACK_OFF: Final = (0.05, 1.0)
_SETTLING: Final = (Transactions.settle, Transactions.settle_drawn, Transactions.settle_alone)
_AWAITED: Final = frozenset((Transactions.admit, Transactions.answer, Transactions.put_answer, Transactions.flush))
QUIET: Final = (Transactions.flush, Transactions.nudge, Transactions.stop)
"""Operations that need no transaction."""
RECORDING: Final = (*_SETTLING, Transactions.append, Transactions.append_served, Transactions.append_program)
"""Operations that write records."""


def size_of(operations: Iterable[Operation]) -> int:
    """How many operations these are, each cached answer counted as one."""
    return sum([len(one) if kind is Transactions.append_served else 1 for kind, one, _ in operations])


class Failing(ABC):
    """See `Writer`, whose attributes these are."""

    inbox: Inbox
    failing: Refusal | None
    outage: Outage | None
    io: threading.Lock
    publishing: threading.Lock
    tables: Tables
    _transactions: Transactions
    _core: AdmissionCore
    _report: Report
    _kept: deque[Operation]
    _looks: list[Look]
    _unsure: list[Operation]  # of a transaction that may have been written
    _suspect: Operation | None  # failed alone, and is tried once more
    _alone: int
    _dropped: int
    _retry_at: float
    _back_off: float
    _outages: int

    @abstractmethod
    def _publish(self) -> None:
        """Tell what is durable now."""

    @property
    def workers(self) -> int:
        """How many processes held something when it was last looked."""
        return self._transactions.workers

    def _begin_outage(self) -> None:
        """Before anything is undone: what is known now is what calls go by that cannot wait for the store."""
        if self.outage is None:
            self._outages += 1
            self.outage = Outage(self._outages, *self._transactions.known())

    def _failed(self, operations: list[Operation], error: Exception) -> None:
        unusable = not isinstance(error, UnfitError) or self._blameless(operations, error)
        if unusable:
            self._begin_outage()
        with self.io:
            undecided = self._transactions.undo()
            if not isinstance(error, UnfitError):
                self.tables.failed(error)
        text = str(self.tables.unavailable(error))
        if isinstance(error, UnfitError):
            _log.error("An operation failed in %s", self.tables.path, exc_info=error)
            if unusable:
                self._hold_on(operations)
            else:
                self._isolate(operations, error)
        refusal = self._degraded(text, wait=unusable)
        self._core.fail_waiting(refusal)
        self._refuse(undecided, refusal)
        self._put_back(operations)

    def _blameless(self, operations: list[Operation], error: UnfitError) -> bool:
        """Whether none of these is unfit: they ask nothing of the file, or the only one was not even tried, twice."""
        if error.untried and len(operations) == 1 and operations[0] is self._suspect:
            return True
        return all(kind in QUIET for kind, _, _ in operations)

    def _hold_on(self, operations: list[Operation]) -> None:
        """None of these is unfit: what needs no transaction is done, as is all that came before it; else it waits."""
        if any(kind not in QUIET for kind, _, _ in operations):
            self._alone += 1
            return
        for kind, subject, detail in operations:
            kind(self._transactions, subject, detail, 0.0)
        operations.clear()

    def _put_back(self, operations: list[Operation]) -> None:
        """What could not be done comes before what is kept, as it did; nobody is left waiting for any of it."""
        rest, self._kept = self._kept, deque()
        self._refuse_or_keep(operations)
        self._kept.extend(rest)
        self._let_go(self.outage is not None)

    def _let_go(self, waiting: bool = True) -> None:
        """Tell those who wait for something that is kept, if there may be any."""
        if waiting and any(kind in _AWAITED for kind, _, _ in self._kept):
            kept, self._kept = self._kept, deque()
            self._refuse_or_keep(kept)
        self._alone = min(self._alone, len(self._kept))  # some of them are told, and not kept

    def _degraded(self, text: str, wait: bool = True) -> Refusal:
        """From now on nothing can be written; told when it is news."""
        if wait:
            self._looks = [look for look in self._looks if not look.given_up]
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
        self._begin_outage()
        with self.io:
            self.tables.failed(error)
            self._transactions.drawing.close()
        refusal = self._degraded(str(self.tables.unavailable(error)))
        self._core.fail_waiting(refusal)
        self._tell_undecided(refusal)
        self._let_go()

    def _tell_undecided(self, refusal: Refusal) -> None:
        """Refuse whom the transaction in doubt has decided on; if it was written, what they were granted goes back."""
        assert self._core.changes is not None
        self._tell([reservation for reservation, _, _ in self._core.changes.verdicts], refusal)

    def _tell(self, reservations: list[Reservation], refusal: Refusal) -> None:
        told = []
        with self.publishing:
            for reservation in reservations:
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
        self.failing, self.outage, self._back_off, self._suspect = None, None, 0.0, None
        self._kept.extend((Transactions.flush, look, None) for look in self._looks)  # told once all before is written
        self._looks.clear()
        self._report("store_recovered", {"path": self.tables.path})

    def _refuse_or_keep(self, operations: Iterable[Operation]) -> None:
        """While nothing can be written: questions get an error, admissions a refusal; the rest waits, in order."""
        refusal = self.failing
        assert refusal is not None
        for operation in operations:
            kind, subject, detail = operation
            if kind is Transactions.admit:
                self._refuse([subject], refusal)
            elif kind is Transactions.answer:
                if not subject.done():
                    subject.set_exception(OSError(refusal.detail))
            elif kind is Transactions.put_answer:
                detail.written()
            elif kind is Transactions.flush and self.outage is not None:
                self._looks.append(subject)  # not kept: there is no end of those who look, and settlements need room
            elif kind is Transactions.stop:
                kind(self._transactions, subject, detail, 0.0)
            elif kind in (Transactions.nudge, Transactions.touch_answer):
                pass
            elif len(self._kept) < MAX_KEPT or kind is Transactions.note:  # one for many things, bounded themselves
                self._kept.append(operation)
            else:
                self._dropping(
                    kind.__name__, "too many settlements and records wait to be written", size_of([operation])
                )
        self._publish()

    def _refuse(self, reservations: list[Reservation], refusal: Refusal) -> None:
        if self._transactions.in_doubt:  # what is to be told then is the transaction's own
            self._tell(reservations, refusal)
            return
        assert self._core.changes is not None
        self._core.changes.verdicts.extend((reservation, REFUSED, refusal) for reservation in reservations)

    def _isolate(self, operations: list[Operation], error: UnfitError) -> None:
        """One of these can never be done: drop it, or find it by doing each alone. A settlement's money is kept."""
        if error.index < 0 and len(operations) > 1:
            self._alone = len(operations)
            return
        operation = operations.pop(error.index)
        if error.index < 0 and self._once_more(operation, error.untried):
            self._alone += 1
            operations.append(operation)  # before those who wait for what is in it
            return
        kind, subject, detail = operation
        count = size_of([operation])
        if kind is Transactions.note and detail is not None:
            count = max(count, detail.lost("they cannot be written"))
        self._dropping(kind.__name__, str(error), count)
        if kind is Transactions.admit:
            self._refuse([subject], Refusal("store_unavailable", detail=f"The admission failed: {error}"))
        elif kind is Transactions.answer:
            subject.set_exception(error)
        elif kind is Transactions.put_answer:
            detail.written()
        elif kind in _SETTLING and subject.record is not None:
            operations.insert(error.index, (kind, subject._replace(record=None), detail))

    def _once_more(self, operation: Operation, untried: bool) -> bool:
        """Whether what failed alone is tried again, because what failed was perhaps not the operation."""
        kind, _, fate = operation
        if kind is Transactions.note and fate is not None and not untried:
            return False
        again, self._suspect = operation is not self._suspect, operation
        return again

    def _dropping(self, kind: str, error: str, count: int = 1) -> None:
        self._dropped += count
        self._tell_dropped(kind, error)

    def _lost(self) -> None:
        """There was no room for what was posted while a transaction does not end."""
        self._tell_dropped(
            "post", "its last transaction does not end, and too many settlements and records wait for it"
        )

    def _tell_dropped(self, kind: str, error: str) -> None:
        dropped = self._dropped + self.inbox.dropped
        self._report("operation_dropped", {"path": self.tables.path, "kind": kind, "error": error, "dropped": dropped})
