"""What can be posted to a writer: each is done on the admission core, inside a transaction.

The lower half of `transactions.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from math import inf
from typing import Any, Protocol

from dspy_prod.options import Budget
from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.holds import Hold
from dspy_prod.stores.base import PENDING, CachedAnswer, Reservation, Settlement
from dspy_prod.stores.durable.drawing import Drawing
from dspy_prod.stores.durable.served import Served
from dspy_prod.stores.durable.tables import Reading, Tables
from dspy_prod.stores.programs import ProgramCall

Report = Callable[[str, dict[str, Any]], None]
Operation = tuple[Callable[["Operations", Any, Any, float], None], Any, Any]
"""What to do (one of the operations of `Transactions`), and its two arguments; the third is the store's time."""


class Look(threading.Event):
    """Set once all is written that was posted before it.

    Attributes:
        given_up: nobody waits for it any more.
    """

    given_up = False


class Fate(Protocol):
    """Is told what becomes of a note: by the writer, or by who closes the store after that has ended."""

    def written(self) -> None:
        """It is durable."""
        ...

    def lost(self, why: str) -> int:
        """It will never be written; how many things are lost with it."""
        ...


class Put(Protocol):
    """An answer to keep."""

    answer: CachedAnswer
    max_entries: int
    max_bytes: int

    def written(self) -> None:
        """Others can read it, or never will."""
        ...


class Operations:
    """See `Transactions`, whose attributes these are."""

    tables: Tables
    core: AdmissionCore
    drawing: Drawing
    after: list[Callable[[], None]]
    stopping: bool
    _readers: tuple[Reading, ...]

    def admit(self, reservation: Reservation, _: Any, now: float) -> None:
        if reservation.state == PENDING:
            self.core.admit(reservation, now)
            if reservation.id in self.core.holds:
                self.drawing.decided(reservation, now)

    def sent_late(self, reservation: Reservation, at: float, now: float) -> None:
        if reservation.share is None:
            self.core.sent_late(reservation, at)
        else:
            self.drawing.sent_late(reservation, at)

    def settle(self, done: Settlement, _: Any, now: float) -> None:
        self.core.settle(done, now)

    def settle_drawn(self, done: Settlement, reservation: Reservation, now: float) -> None:
        self.drawing.settle(done, reservation, now)

    def settle_alone(self, done: Settlement, reservation: Reservation, now: float) -> None:
        """A call that its process admitted while nothing could be decided here."""
        for account in reservation.accounts:
            self.core.accounts.use(account, now)
        accounts = tuple([account.key for account in reservation.accounts])
        self.core.finish(Hold(done.id, accounts, 0, None, None, inf, None), done, now)
        self.core.sent_alone(reservation, done, now)

    def declare(self, budget: Budget, anew: bool, now: float) -> None:
        self.core.declare(budget, anew, now)

    def withdraw(self, reservation: Reservation, _: Any, now: float) -> None:
        if reservation.id in self.core.holds:  # granted before the withdrawal was known here
            self.core.settle(Settlement(reservation.id, 0, 0, False, False, None), now)
        else:
            self.core.remove(reservation, now)

    def append(self, record: CallRecord, is_new: bool, now: float) -> None:
        (self.core.appended if is_new else self.core.replaced).append(record)

    def append_served(self, served: Served, _: Any, now: float) -> None:
        self.tables.served.append(served)

    def append_program(self, call: ProgramCall, _: Any, now: float) -> None:
        self.tables.programs.put(call)

    def throttled(self, limiter: Any, retry_after: float | None, now: float) -> None:
        key, limit = limiter
        self.core.throttled(key, limit, retry_after, now)

    def resync(self, limiter: Any, remaining: dict[str, tuple[float, float]], now: float) -> None:
        key, limit = limiter
        self.core.resync(key, limit, remaining, now)

    def put_answer(self, key: bytes, put: Put, now: float) -> None:
        self.tables.cache.put(key, put.answer, put.max_entries, put.max_bytes, now)
        self.after.append(put.written)

    def touch_answer(self, key: bytes, _: Any, now: float) -> None:
        self.tables.cache.touch(key, now)

    def clear_answers(self, _: Any, __: Any, now: float) -> None:
        self.tables.cache.clear()

    def answer(self, told: Future[Any], ask: Callable[[AdmissionCore, Any, float], Any], now: float) -> None:
        found = ask(self.core, self.tables, now)
        self.after.append(lambda: told.set_result(found))

    def note(self, write: Callable[[Any, float], None], fate: Fate | None, now: float) -> None:
        """Nobody waits for it: it is written with what else there is."""
        write(self.tables, now)
        if fate is not None:
            self.after.append(fate.written)

    def give_up_shares(self, _: Any, __: Any, now: float) -> None:
        """The last one: what is drawn ahead goes back, because the store is `stopping`."""

    # Those that need no transaction:
    def flush(self, look: Look, _: Any, now: float) -> None:
        self.after.append(look.set)

    def nudge(self, _: Any, __: Any, now: float) -> None:
        """Look at the timers again."""

    def stop(self, readers: Any, _: Any, now: float) -> None:
        """The last operation; `readers`: connections that nobody else can close any more."""
        self.stopping = True
        self._readers = readers or ()
