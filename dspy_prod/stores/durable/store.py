"""What every durable store answers by its writer, its lanes and what it has drawn ahead, wherever it writes to.

Decisions are made by one writer thread per store (`writer.py`) on the same core as the memory store's, in group
commits. The waiting order is per process; limits and budgets are strict across processes.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from math import inf
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.options import Budget, RateLimit
from dspy_prod.records import CallRecord
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
from dspy_prod.stores.durable.alone import Alone, Lone
from dspy_prod.stores.durable.drawn import Drawn
from dspy_prod.stores.durable.flights import Flights
from dspy_prod.stores.durable.mailbox import KnownTerms, Listeners, Mailbox
from dspy_prod.stores.durable.served import Kind
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.durable.writer import Writer
from dspy_prod.stores.lane import Lane, is_local, merged

_log = logging.getLogger("dspy_prod")

DECLARE_TIMEOUT: Final = 1.0
"""Seconds that building an LM waits for the settings its budgets have in the store."""

OnProblem = Callable[[str, dict[str, Any]], None]


class DurableStore(ABC):
    """The part of a store that does not depend on where it keeps its state.

    Args:
        path: where it is, as it may be shown.
        namespace: keeps programs that share it apart.
        on_problem: called with a name and details when something went wrong in the background.
    """

    now: Callable[[], float]
    _writer: Writer
    _mailbox: Mailbox
    _local: Lane
    _drawn: Drawn
    _alone: Alone
    flights: Flights | None = None

    def __init__(self, path: str, namespace: str, on_problem: OnProblem | None) -> None:
        self._path = path
        self._namespace = namespace
        self._listeners = Listeners(on_problem)
        self._terms = KnownTerms()

    def _begin(self, writer: Writer, mailbox: Mailbox) -> None:
        """Use these from now on: at construction, and in a forked child."""
        self._writer, self._mailbox = writer, mailbox
        self._local, self._drawn = writer.local, writer.drawn
        self._alone = Alone(self.now)
        self._throttled: dict[str, float] = {}  # limiters, as many as this process calls by

    @abstractmethod
    def _start(self) -> None:
        """Make a fresh writer and what reads, and `_begin` with them."""

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

    def on_problem(self, listener: OnProblem) -> None:
        """Also tell `listener` of problems in the background."""
        self._listeners.add(listener)

    # -- admission ---------------------------------------------------------------------------------------------------
    def admit(self, reservation: Reservation) -> Reservation:
        if is_local(reservation) and self._mailbox.alive():
            return self._local.admit(reservation)
        if self._mailbox.alive() and self._drawn.admit(reservation):
            return reservation
        failing = self._writer.failing
        if failing is not None and self._writer.outage is not None:  # the writer may be busy finding out how long
            reservation.refusal, reservation.state = failing, REFUSED
            return reservation
        why = self._mailbox.why_not()
        if why is not None or not self._mailbox.post((Transactions.admit, reservation, None)):
            reservation.refusal = Refusal("store_unavailable", detail=why or f"The store {self._path} is closed")
            reservation.state = REFUSED
        return reservation

    def admit_alone(self, reservation: Reservation) -> Reservation:
        if not self._mailbox.alive():
            reservation.refusal = Refusal("store_unavailable", detail=f"The store {self._path} is closed")
            reservation.state = REFUSED
            return reservation
        limit, writer = reservation.limit, self._writer
        workers = writer.workers if limit is None or limit.workers is None else limit.workers
        return self._alone.admit(reservation, writer.outage, workers)

    def withdraw(self, reservation: Reservation) -> bool:
        if isinstance(reservation.share, Lone):
            return reservation.share.withdraw(reservation)
        if is_local(reservation):
            return self._local.withdraw(reservation)
        with self._writer.publishing:
            if reservation.state != PENDING:
                return reservation.state != GRANTED
            reservation.state = WITHDRAWN
        self._mailbox.post((Transactions.withdraw, reservation, None))
        return True

    def sent_late(self, reservation: Reservation, at: float) -> None:
        if isinstance(reservation.share, Lone):
            return
        if not is_local(reservation):  # what only reacts to 429s is not paced
            self._mailbox.post((Transactions.sent_late, reservation, at))

    def settle(self, reservation: Reservation, settlement: Settlement) -> None:
        if is_local(reservation):
            self._local.settle(reservation, settlement)
            if not self._mailbox.alive():
                self._mailbox.refuse_stragglers()
        elif isinstance(reservation.share, Lone):
            reservation.share.settle(settlement)
            reservation.stub = None
            if not self._mailbox.post((Transactions.settle_alone, settlement, reservation)):
                self._lost(settlement.record)
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
        self._alone.throttled(limit_key, retry_after)
        self._throttled[limit_key] = self.now()
        self._mailbox.post((Transactions.throttled, (limit_key, limit), retry_after))

    def throttled_since(self, limit_key: str | None, at: float) -> bool:
        return self._throttled.get(limit_key or "", -inf) >= at

    def resync(self, limit_key: str, limit: RateLimit, remaining: dict[str, tuple[float, float]]) -> None:
        if not shared(limit):
            self._local.resync(limit_key, limit, remaining)
        self._drawn.close(limit_key)
        self._mailbox.post((Transactions.resync, (limit_key, limit), remaining))

    def lift(self, limit_key: str) -> bool:
        local, alone = self._local.lift(limit_key), self._alone.lane.lift(limit_key)
        self._throttled.pop(limit_key, None)
        return bool(self._mailbox.question(lambda core, _, now: core.lift(limit_key, now))) or local or alone

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

    def known_terms(self, title: str) -> Terms | None:
        return self._terms.find(title)

    def on_terms(self, listener: Callable[[Terms], None]) -> None:
        self._terms.listener = listener

    def _end_beside(self) -> None:
        """End what stands beside the writer, which has ended."""
        if self.flights is not None:
            self.flights.close()
        self._alone.close(Refusal("store_unavailable", detail=f"The store {self._path} was closed"))

    def _hurry(self) -> None:
        """Have written soon what is posted: another process waits for it."""
        self._mailbox.post((Transactions.nudge, None, None))

    def _moved(self) -> None:
        """Somebody moved the clock: what waits may be due."""
        if not self.closed:
            self._hurry()
        self._alone.moved()

    # -- reading -----------------------------------------------------------------------------------------------------
    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything posted before is applied; False at once while nothing can be written."""
        return self._mailbox.flush(timeout)

    def _without_drawn(self, key: str, state: AccountState) -> AccountState:
        """What is drawn ahead and no call uses counts as free: it is, for this process at once, for others in time."""
        return state._replace(held=max(0, state.held - self._drawn.money(key)))

    def limiter(self, key: str) -> LimiterSnapshot | None:
        stored: LimiterSnapshot | None = self._mailbox.question(lambda core, _, now: core.limiter(key, now))
        if stored is not None:
            stored = stored.with_free(*self._drawn.capacity(key))
        return merged(self._local.limiter(key), stored)

    def waiting(self) -> int:
        stored: int = self._mailbox.question(lambda core, _, now: core.waiting())
        return stored + self._local.waiting() + self._alone.lane.waiting()

    def _in_flight(self) -> int:
        """Calls in flight that are no holds in the store."""
        return self._drawn.in_flight() + self._local.holds() + self._alone.lane.holds()

    def unwritten(self) -> int:
        return self._writer.unwritten()

    def correct(self, record_id: str, cost: int) -> bool:
        def run(core: Any, tables: Any, now: float) -> bool:
            fresh = (record for record in (*core.replaced[::-1], *core.appended[::-1]) if record.id == record_id)
            record = next(fresh, None) or tables.ledger.find(record_id)
            if record is None:
                return False
            core.replaced.append(core.correct(record, cost, now))
            return True

        return bool(self._mailbox.question(run))

    def _lost(self, record: CallRecord | None) -> None:
        if record is not None:
            _log.warning("The store %s is closed: the record of a call to %s is lost", self._path, record.model)

    # -- fork --------------------------------------------------------------------------------------------------------
    def before_fork(self) -> None:
        """Start no thread; the connections see to themselves."""
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
