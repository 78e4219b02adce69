"""One batch of operations on the admission core, as one transaction of the tables."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.records import CallRecord
from dspy_prod.runtime.clock import Clock
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.base import Reservation, Terms
from dspy_prod.stores.durable.drawing import Drawing
from dspy_prod.stores.durable.drawn import Drawn
from dspy_prod.stores.durable.operations import Operation, Operations, Report
from dspy_prod.stores.durable.tables import ChangedError, DoubtError, Reading, Tables

REAP_BATCH: Final = 1000
SWEEP_EVERY: Final = 3600.0
SWEEP_BATCH: Final = 100
"""Rows of a table that are swept in one transaction: who calls meanwhile waits for them."""
SWEEP_PAUSE: Final = 0.05
TRIES: Final = 50
"""How often one transaction is decided at most, where others change what it was decided on."""
MAX_ACCOUNTS: Final = 50_000
"""Accounts kept in memory; beyond that they are read from the file again."""


class UnfitError(Exception):
    """An operation fails whatever the file's state: that at `index`, or -1; `untried`: what comes before them."""

    def __init__(self, index: int, cause: BaseException, untried: bool) -> None:
        super().__init__(repr(cause))
        self.index, self.untried = index, untried


class Transactions(Operations):
    """The core, its tables, and this process's lease. Used by the writer thread only.

    Attributes:
        after: what to do once the current transaction is durable.
        stopping: `stop` was posted.
        workers: how many processes held something when it was last looked.
        on_terms: is told the terms of budgets that changed, here or in another process.
    """

    def __init__(
        self,
        tables: Tables,
        clock: Clock,
        lease: float,
        report: Report,
        on_terms: Callable[[Terms], None],
        shares: Drawn,
    ) -> None:
        self.tables = tables
        self.core = AdmissionCore(tables)
        self.report = report
        self.after: list[Callable[[], None]] = []
        self.workers = 1
        self.drawing = Drawing(self.core, shares, tables.cells, lease, self._later)
        self.stopping = False
        self._readers: tuple[Reading, ...] = ()
        self.on_terms = on_terms
        self._now = clock.time
        self._lease = lease
        self._leased_until = -inf
        self._reap_at = -inf
        self._reaped_at = inf  # before the transaction under way, if it reaps
        self._then: Callable[[], None] | None = None
        self._sweep_at = time.monotonic() + SWEEP_EVERY
        self._begun = False
        self._lost = self._untold = False

    # -- time ----------------------------------------------------------------------------------------------------------
    def due_in(self) -> float:
        """Seconds until a transaction has to be made even if nothing is posted."""
        now = self._now()
        wait = min(self.core.next_due() - now, self._reap_at - time.monotonic())
        if self.core.holds:
            wait = min(wait, self._leased_until - self._lease * 2 / 3 - now, self.drawing.due_in(now))
        return wait

    def _lease_due(self, now: float) -> bool:
        return bool(self.core.holds) and now >= self._leased_until - self._lease * 2 / 3

    # -- one transaction -----------------------------------------------------------------------------------------------
    def run(
        self, operations: list[Operation], take_more: Callable[[list[Operation]], None], *, probing: bool = False
    ) -> None:
        """Do everything and commit, or raise; then `undo` must follow.

        Args:
            take_more: called when the file is ours, to add what was posted while waiting for it.
            probing: write something in any case, to know whether the file takes it.

        Raises:
            UnfitError: one operation cannot be done whatever the file's state.
            Exception: the file cannot be used.
        """
        tables = self.tables
        for _ in range(TRIES):
            self._lost = tables.lost() or self._lost
            if self._lost:
                self._carry_over()
            try:
                tables.begin()
                take_more(operations)
                tables.foresee(self.core, operations)
                self._decide(operations, probing)
                return
            except ChangedError:
                self._again(operations)
        raise StoreUnavailableError(f"The store {tables.path} is written to by others without end")

    def _decide(self, operations: list[Operation], probing: bool) -> None:
        tables, core, untried, index = self.tables, self.core, True, -1
        self._begun = True
        try:
            now = self._now()
            changed = tables.changed()
            if changed:
                core.forget()
                if self._leased_until > 0 and not tables.owned():
                    core.holds.clear()  # another process thought this one dead, and charged them
                    self.drawing.lose()
                    self._leased_until = -inf
            self.drawing.keep_seats(now)
            if changed or self._untold:  # what was waited for may be lost with the data
                core.serve(now)
            core.tick(now)
            self._reaped_at = inf
            if self._reap_at <= time.monotonic():
                self._reap(now)
            self.drawing.return_unused(now)
            untried = False
            for index, (operation, one, other) in enumerate(operations):  # noqa: B007  (read when one fails)
                operation(self, one, other, now)
            index = -1
            self.drawing.balance(now, self.stopping)
            core.take_turns(now)
            if probing:
                tables.probe(now)
            self._write(now)
        except Exception as error:
            if isinstance(error, ChangedError | DoubtError) or tables.is_environment(error):
                raise
            raise UnfitError(index, error, untried) from error

    def _again(self, operations: list[Operation]) -> None:
        """Others changed what was decided on: as before it, but for what the tables know of it now."""
        self.after.clear()
        self._reap_at = min(self._reap_at, self._reaped_at)
        self.tables.rollback()
        self._begun = False
        self.core.again({one for kind, one, _ in operations if kind is Transactions.admit})

    def known(self) -> tuple[dict[str, int], dict[str, int]]:
        """(nano-USD spent and held by account, limits by budget), as far as they are in memory."""
        entries = self.core.accounts.entries.items()
        return {key: entry.spent + entry.held for key, entry in entries}, dict(self.core.terms.limits)

    def undo(self) -> list[Reservation]:
        """Return to what was last committed; the reservations that the lost transaction had decided."""
        self.after.clear()
        self.drawing.close()
        self.tables.rollback()
        if not self._begun:
            return []
        self._begun = False
        return self.core.undo()

    @property
    def in_doubt(self) -> bool:
        """Whether it is not known if the last transaction was written; then `find_out` comes next."""
        return self._then is not None

    @property
    def carrying_over(self) -> bool:
        """Whether what comes first, before any operation, is to write again what is known here."""
        return self._lost

    def find_out(self) -> None:
        """Commit once more what may have been written already.

        Raises:
            DoubtError: it is still not known.
            Exception: it was not; then `undo` must follow.
        """
        try:
            self._commit(self._then)
        except DoubtError:
            raise
        except BaseException:
            self._then = None
            raise

    def _commit(self, then: Callable[[], None] | None) -> None:
        assert then is not None
        try:
            self.tables.commit()
        except DoubtError:
            self._then = then
            raise
        self._then = None
        then()

    def _write(self, now: float, then: Callable[[], None] | None = None) -> None:
        renewed = self._lease_due(now)
        if renewed:
            self.tables.renew(now + self._lease)
        unwritable = self.tables.write(self.core, now)
        self._commit(partial(self._written, now, renewed, unwritable, then))

    def _written(
        self, now: float, renewed: bool, unwritable: list[CallRecord], then: Callable[[], None] | None
    ) -> None:
        self._begun = False
        if renewed:
            self._leased_until = now + self._lease
        self.core.written()
        self.tables.served.clear()
        if self._untold:
            self._untold = False
            lost = f"the {self.tables.noun} was deleted or replaced; what is known here was kept"
            self.tell_later("store_degraded", error=lost)
        # Before whoever said them is answered: his next call goes by them.
        self.after[:0] = [partial(self.on_terms, terms) for terms in self.core.terms.take_news()]
        if len(self.core.accounts.entries) > MAX_ACCOUNTS:
            self.core.forget()
            self.tables.forget()
        for record in unwritable:
            self.tell_later("operation_dropped", kind="append", error=f"the record {record.id!r} cannot be written")
        if then is not None:
            then()

    def _carry_over(self) -> None:
        """What the store kept is gone: write what this process knows, before anything else happens."""
        for _ in range(TRIES):
            self.tables.lost()  # perhaps once more: what there is now is carried over onto
            try:
                self.tables.begin()
                self._leased_until = -inf
                self._reap_at = time.monotonic() + self._lease  # let the others renew their leases first
                self._reaped_at = inf
                self.tables.changed()
                self.core.carry_over(self.tables.remembered())
                self.drawing.moved()
                self._write(self._now(), self._carried)
                return
            except ChangedError:  # others do the same
                self.tables.rollback()
        raise StoreUnavailableError(f"The store {self.tables.path} is written to by others without end")

    def _carried(self) -> None:
        self._lost = False
        changes = self.core.changes
        assert changes is not None
        changes.added.clear()  # should what follows be undone, these are not
        changes.stray = None
        self._untold = True  # until the next transaction is durable: what is to be told goes with one that is not

    def _reap(self, now: float) -> None:
        """Charge the holds of processes that are gone."""
        tick = time.monotonic()
        self._reaped_at = self._reap_at
        self._reap_at = tick + self._lease / 3
        if self.core.holds and self._leased_until < now:
            self._reap_at = tick + self._lease  # this machine slept: let the others renew their leases first
            return
        self.workers = 1 + self.tables.owners(now)
        found = self.tables.expired(now, REAP_BATCH)
        for hold in found:
            self.core.abandon(hold, now)
        if len(found) >= REAP_BATCH:
            self._reap_at = tick
        if tick >= self._sweep_at:
            more = self.tables.sweep(now, SWEEP_BATCH)
            self._sweep_at = tick + (SWEEP_PAUSE if more else SWEEP_EVERY)
            self._reap_at = min(self._reap_at, self._sweep_at)

    def resign(self) -> None:
        """Give the lease back when nothing is held, and close the file."""
        if not self.core.holds:
            self.tables.resign()
        self.drawing.end(delete=not self.core.holds)
        self.tables.close()
        for reader in self._readers:
            reader.close()

    def _later(self, what: Callable[[], None]) -> None:
        self.after.append(what)

    def tell_later(self, name: str, **details: Any) -> None:
        """Report something once the current transaction is durable."""
        self.after.append(lambda: self.report(name, {"path": self.tables.path, **details}))
