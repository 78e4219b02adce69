"""The SQLite store: durable state in one file, shared by the processes of one machine.

Decisions are made by one writer thread per store (`writer.py`) on the same core as the memory store's, in
group commits; readers have connections of their own and never block it. The waiting order is per process; limits and
budgets are strict across processes.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import uuid
from collections.abc import Callable
from math import inf
from typing import Any, Final, TypeVar

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.options import Budget, RateLimit
from dspy_prod.records import CallRecord, Totals
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.runtime.forking import Stage, hold_while_forking
from dspy_prod.stores.admission.granting import shared
from dspy_prod.stores.base import (
    GRANTED,
    PENDING,
    REFUSED,
    WITHDRAWN,
    AccountState,
    LimiterSnapshot,
    Refusal,
    Reservation,
    Settlement,
    Terms,
)
from dspy_prod.stores.durable.mailbox import READ_TIMEOUT, KnownTerms, Listeners, Mailbox
from dspy_prod.stores.durable.served import Kind
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.durable.writer import Writer
from dspy_prod.stores.lane import is_local, merged
from dspy_prod.stores.sqlite.answers import read_size
from dspy_prod.stores.sqlite.asked import (
    read_account,
    read_accounts,
    read_holds,
    read_sums,
    read_terms,
    read_totals,
)
from dspy_prod.stores.sqlite.checkpoints import Checkpoints
from dspy_prod.stores.sqlite.finding import read_records
from dspy_prod.stores.sqlite.kept import KeptAnswers
from dspy_prod.stores.sqlite.programs import KeptPrograms
from dspy_prod.stores.sqlite.reader import Reader
from dspy_prod.stores.sqlite.runs import KeptRuns
from dspy_prod.stores.sqlite.schema import unavailable
from dspy_prod.stores.sqlite.tables import Tables
from dspy_prod.stores.sqlite.timing import StoreTime
from dspy_prod.stores.sqlite.trials import KeptTrials

_log = logging.getLogger("dspy_prod")

DECLARE_TIMEOUT: Final = 1.0
"""Seconds that building an LM waits for the settings its budgets have in the file."""

OnProblem = Callable[[str, dict[str, Any]], None]
T = TypeVar("T")


class SqliteStore:
    """State in a SQLite file, for all processes of this machine that use the same path and namespace.

    Args:
        path: the file; made, with its directory, when missing, and readable by its owner only.
        namespace: keeps programs that share a file apart.
        clock: store time begins with `clock.time()` and goes on with `clock.monotonic()`, see `StoreTime`.
        lease: seconds after which the holds of a process that died are charged; a live one renews its lease.
        synchronous: SQLite's setting. `"NORMAL"` survives the death of a process, `"FULL"` also that of the machine.
        max_records: the ledger keeps about this many newest records, None all of them; sums are kept for all.
        on_problem: called with a name and details when something went wrong in the background.

    Raises:
        StoreUnavailableError: the file cannot be opened or is no store of this version.
    """

    def __init__(
        self,
        path: str,
        namespace: str = "default",
        *,
        clock: Clock = SYSTEM_CLOCK,
        lease: float = 30.0,
        synchronous: str = "NORMAL",
        max_records: int | None = None,
        on_problem: OnProblem | None = None,
    ) -> None:
        self._path = os.path.abspath(os.path.expanduser(path))
        self._namespace = namespace
        self._time = StoreTime(clock)
        self._lease = lease
        self._synchronous = synchronous
        self._max_records = max_records
        self.now: Callable[[], float] = self._time.time
        self._listeners = Listeners(on_problem)
        self._terms = KnownTerms()
        self._trials: KeptTrials | None = None
        self._start()
        try:
            with self._writer.io:
                self._writer.tables.open()
        except Exception as error:
            raise unavailable(self._path, error) from error
        hold_while_forking(self, Stage.FILES)

    def _start(self) -> None:
        """A fresh writer and reader: at construction, and in a forked child."""
        tables = Tables(
            self._path,
            self._namespace,
            uuid.uuid4().hex,
            synchronous=self._synchronous,
            max_records=self._max_records,
            timing=self._time,
        )
        copier = Reader(self._path, self._namespace)
        self._writer = Writer(tables, self._time, self._lease, self._listeners, self._terms, Checkpoints(copier))
        self._local = self._writer.local
        self._drawn = self._writer.drawn
        self._ledger_reader = Reader(self._path, self._namespace)
        self._cache_reader = Reader(self._path, self._namespace)
        trials_reader = Reader(self._path, self._namespace)
        self._readers = (self._ledger_reader, self._cache_reader, trials_reader, copier)
        self._mailbox = Mailbox(self._writer, self._readers)
        kept = KeptAnswers(self._mailbox, self._cache_reader, self.now)
        self.runs = KeptRuns(self._mailbox, self._cache_reader)
        if self._trials is None:
            self._trials = KeptTrials(self._mailbox, trials_reader, self.now)
        else:
            self._trials.begin(self._mailbox, trials_reader)
        self.programs = KeptPrograms(self._mailbox, self._ledger_reader)
        self.cache_get, self.cache_put, self.cache_clear = kept.get, kept.put, kept.clear

    @property
    def trials(self) -> KeptTrials:
        """What is kept of experiments; the same object in a forked child."""
        assert self._trials is not None
        return self._trials

    @property
    def url(self) -> str:
        return f"sqlite:///{self._path}"

    @property
    def namespace(self) -> str:
        return self._namespace

    @property
    def durable(self) -> bool:
        return True

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._mailbox.closed

    @property
    def problems(self) -> dict[str, Any]:
        """What goes wrong in the background: why nothing can be written at the moment, and what was dropped."""
        return self._writer.problems()

    def __repr__(self) -> str:
        return f"SqliteStore({self._path!r}, namespace={self._namespace!r})"

    def on_problem(self, listener: OnProblem) -> None:
        """Also tell `listener` of problems in the background."""
        self._listeners.add(listener)

    # -- admission ---------------------------------------------------------------------------------------------------
    def admit(self, reservation: Reservation) -> Reservation:
        if is_local(reservation) and self._mailbox.alive():
            return self._local.admit(reservation)
        if self._mailbox.alive() and self._drawn.admit(reservation):
            return reservation
        why = self._mailbox.why_not()
        if why is not None or not self._mailbox.post((Transactions.admit, reservation, None)):
            reservation.refusal = Refusal("store_unavailable", detail=why or f"The store {self._path} is closed")
            reservation.state = REFUSED
        return reservation

    def withdraw(self, reservation: Reservation) -> bool:
        if is_local(reservation):
            return self._local.withdraw(reservation)
        with self._writer.publishing:
            if reservation.state != PENDING:
                return reservation.state != GRANTED
            reservation.state = WITHDRAWN
        self._mailbox.post((Transactions.withdraw, reservation, None))
        return True

    def sent_late(self, reservation: Reservation, at: float) -> None:
        if not is_local(reservation):  # what only reacts to 429s is not paced
            self._mailbox.post((Transactions.sent_late, reservation, at))

    def settle(self, reservation: Reservation, settlement: Settlement) -> None:
        if is_local(reservation):
            self._local.settle(reservation, settlement)
            if not self._mailbox.alive():
                self._mailbox.refuse_stragglers()
        elif self._drawn.settle(reservation, settlement):
            if settlement.record is not None:
                reservation.stub = None  # it holds the whole call, and would until this is written
            if not self._mailbox.post((Transactions.settle_drawn, settlement, reservation)):
                self._lost(settlement.record)
        elif not self._mailbox.post((Transactions.settle, settlement, None)):
            self._lost(settlement.record)
        self._writer.inbox.ease()

    def append(self, record: CallRecord) -> None:
        if not self._mailbox.post((Transactions.append, record, True)):
            self._lost(record)
        self._writer.inbox.ease()

    def kind(self, like: CallRecord) -> Kind:
        return Kind(like, self._mailbox)

    def throttled(self, limit_key: str, limit: RateLimit, retry_after: float | None) -> None:
        if not shared(limit):
            self._local.throttled(limit_key, limit, retry_after)
        self._drawn.close(limit_key)
        self._mailbox.post((Transactions.throttled, (limit_key, limit), retry_after))

    def resync(self, limit_key: str, limit: RateLimit, remaining: dict[str, tuple[float, float]]) -> None:
        if not shared(limit):
            self._local.resync(limit_key, limit, remaining)
        self._drawn.close(limit_key)
        self._mailbox.post((Transactions.resync, (limit_key, limit), remaining))

    def lift(self, limit_key: str) -> bool:
        local = self._local.lift(limit_key)
        return bool(self._mailbox.question(lambda core, _, now: core.lift(limit_key, now))) or local

    def preview(self, reservation: Reservation) -> tuple[float, Refusal | None]:
        if is_local(reservation):
            return self._local.preview(reservation)
        try:
            found: tuple[float, Refusal | None] = self._mailbox.question(
                lambda core, _, now: core.preview(reservation, now)
            )
            return found
        except StoreUnavailableError as error:
            return inf, Refusal("store_unavailable", detail=str(error))

    # -- the terms of budgets ----------------------------------------------------------------------------------------
    def declare(self, budget: Budget, anew: bool = True) -> None:
        known = self._terms.find(budget.title)
        if known is not None and (known.built == budget or not anew):
            return  # an LM is built for every request
        self._mailbox.post((Transactions.declare, budget, anew))
        self.flush(DECLARE_TIMEOUT)  # another process may have said otherwise

    def steer(self, budget: Budget) -> None:
        self._mailbox.question(lambda core, _, now: core.steer(budget, now))

    def terms(self) -> list[Terms]:
        return self._read(read_terms)

    def known_terms(self, title: str) -> Terms | None:
        return self._terms.find(title)

    def on_terms(self, listener: Callable[[Terms], None]) -> None:
        self._terms.listener = listener

    # -- reading -----------------------------------------------------------------------------------------------------
    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything posted before is applied; False at once while the file cannot be written."""
        return self._mailbox.flush(timeout)

    def account(self, key: str) -> AccountState:
        return self._without_drawn(key, self._read(lambda connection, ns: read_account(connection, ns, key)))

    def accounts(self, prefix: str, suffix: str, most: int) -> list[tuple[str, AccountState]]:
        found = self._read(lambda connection, ns: read_accounts(connection, ns, prefix, suffix, most))
        return [(key, self._without_drawn(key, state)) for key, state in found]

    def _without_drawn(self, key: str, state: AccountState) -> AccountState:
        """What is drawn ahead and no call uses counts as free: it is, for this process at once, for others in time."""
        return state._replace(held=max(0, state.held - self._drawn.money(key)))

    def limiter(self, key: str) -> LimiterSnapshot | None:
        stored: LimiterSnapshot | None = self._mailbox.question(lambda core, _, now: core.limiter(key, now))
        if stored is not None:
            stored = stored.with_free(*self._drawn.capacity(key))
        return merged(self._local.limiter(key), stored)

    def holds(self) -> int:
        return self._read(read_holds) + self._drawn.in_flight() + self._local.holds()

    def waiting(self) -> int:
        stored: int = self._mailbox.question(lambda core, _, now: core.waiting())
        return stored + self._local.waiting()

    def records(
        self, *, since: float | None = None, until: float | None = None, limit: int | None = None, **equals: str
    ) -> list[CallRecord]:
        return self._read(lambda connection, ns: read_records(connection, ns, since, until, limit, equals))

    def totals(
        self,
        *,
        dimension: str = "all",
        since_day: str | None = None,
        until_day: str | None = None,
        value: str | None = None,
    ) -> list[tuple[str, str, Totals]]:
        return self._read(lambda connection, ns: read_totals(connection, ns, dimension, since_day, until_day, value))

    def sums(
        self, *, dimension: str, since_day: str | None = None, most: int | None = None
    ) -> list[tuple[str, Totals]]:
        return self._read(lambda connection, ns: read_sums(connection, ns, dimension, since_day, most))

    def cache_size(self) -> tuple[int, int]:
        return self._read(read_size)

    def unwritten(self) -> int:
        return self._writer.unwritten()

    def correct(self, record_id: str, cost: int) -> bool:
        def run(core: Any, tables: Tables, now: float) -> bool:
            fresh = (record for record in (*core.replaced[::-1], *core.appended[::-1]) if record.id == record_id)
            record = next(fresh, None) or tables.ledger.find(record_id)
            if record is None:
                return False
            core.replaced.append(core.correct(record, cost, now))
            return True

        return bool(self._mailbox.question(run))

    # -- ending ------------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Write what is posted, end the writer, close the file. Reading goes on to work."""
        self._mailbox.close()
        for reader in self._readers:
            reader.close()

    def _lost(self, record: CallRecord | None) -> None:
        if record is not None:
            _log.warning("The store %s is closed: the record of a call to %s is lost", self._path, record.model)

    def _read(self, read: Callable[[sqlite3.Connection, int], T]) -> T:
        self._mailbox.alive()  # whoever only reads must also see the holds of dead processes charged
        self.flush(READ_TIMEOUT)
        try:
            return self._ledger_reader.read(read)
        except (sqlite3.Error, OSError) as error:
            raise unavailable(self._path, error) from error

    # -- fork --------------------------------------------------------------------------------------------------------
    def before_fork(self) -> None:
        """Start no thread; the connections see to themselves, see `process.py`."""
        self._mailbox.before_fork()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._mailbox.after_fork()

    def _after_fork(self) -> None:
        """The parent's holds stay the parent's. Who waited in a thread of the parent is not here any more."""
        old, closed = self._writer, self.closed
        old.abort(Refusal("store_unavailable", detail="the process was forked while this call waited"))
        old.tables.lose()
        self._mailbox.forsake()
        self._start()
        self._mailbox.closed = closed
