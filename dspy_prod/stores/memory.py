"""The memory store: a lane with a ledger, for tests, notebooks and single-process services."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import inf
from operator import add
from typing import TYPE_CHECKING, Any

from dspy_prod.options import Budget
from dspy_prod.records import CallRecord, Totals
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock, follow
from dspy_prod.runtime.forking import Stage, hold_while_forking
from dspy_prod.stores.admission.accounts import worst
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.base import AccountState, CachedAnswer, Refusal, Reservation, Terms
from dspy_prod.stores.lane import Janitor, Lane
from dspy_prod.stores.memory_board import MemoryBoard
from dspy_prod.stores.memory_ledger import ENOUGH_ALIKE, Alike, MemoryLedger, check_fields
from dspy_prod.stores.memory_programs import MemoryPrograms
from dspy_prod.stores.memory_runs import MemoryRuns

if TYPE_CHECKING:
    from dspy_prod.stores.trials import Trials


class Kind(Alike):
    """Cached answers whose records are alike."""

    def __init__(self, like: CallRecord, store: MemoryStore) -> None:
        super().__init__(like)
        self._store = store

    def served(self, at: float, saved: int | None = None) -> bool:
        given = self.given
        given.append((at, saved))
        if not self.listed:
            self._store._ledger.expect(self)
        if len(given) >= ENOUGH_ALIKE:
            self._store._take()
        return True


class MemoryStore(Lane):
    """State of this process only; gone when it ends.

    Args:
        namespace: keeps programs that share a process apart.
        clock: durations come from `clock.monotonic()`.
        max_records: the ledger keeps this many newest records; sums (rollups) are kept for all.

    Attributes:
        companions: what others keep in memory beside the store, and must live as long as it.
    """

    def __init__(
        self,
        namespace: str = "default",
        *,
        clock: Clock = SYSTEM_CLOCK,
        max_records: int = 100_000,
        url: str = "memory://",
    ) -> None:
        self._url = url
        self._namespace = namespace
        self._clock = clock
        self._ledger = MemoryLedger(max_records)
        self._janitor = Janitor(self, "dspy_prod-memory-store")
        self.companions: dict[Any, Any] = {}
        self.runs = MemoryRuns(self._forget_accounts)
        self._trials: Trials | None = None
        self.programs = MemoryPrograms(max_records)
        self.board = MemoryBoard(clock.time)
        self._on_terms: Callable[[Terms], None] | None = None
        super().__init__(clock.monotonic, self._ledger.append, self._janitor.rearm)
        hold_while_forking(self, Stage.STATE)
        follow(clock, self._janitor, Janitor.nudge)

    @property
    def url(self) -> str:
        return self._url

    @property
    def namespace(self) -> str:
        return self._namespace

    @property
    def durable(self) -> bool:
        return False

    @property
    def flights(self) -> None:
        return None

    @property
    def trials(self) -> Trials:
        """What is kept of experiments."""
        if self._trials is None:
            from dspy_prod.stores.memory_trials import MemoryTrials  # importing the package stays light

            with self._lock:
                if self._trials is None:
                    self._trials = MemoryTrials(self._clock.time)
        return self._trials

    def __repr__(self) -> str:
        return f"MemoryStore(namespace={self._namespace!r})"

    def admit_alone(self, reservation: Reservation) -> Reservation:
        return self.admit(reservation)

    def append(self, record: CallRecord) -> None:
        if self._ledger.note(record):
            self._take()

    def _take(self) -> None:
        with self._lock:
            self._ledger.take()

    def kind(self, like: CallRecord) -> Kind:
        return Kind(like, self)

    # -- the terms of budgets ----------------------------------------------------------------------------------------
    def declare(self, budget: Budget, anew: bool = True) -> None:
        self._step(lambda core, now: core.declare(budget, anew, now))
        self._tell_terms()

    def steer(self, budget: Budget) -> None:
        self._step(lambda core, now: core.steer(budget, now))
        self._tell_terms()

    def terms(self) -> list[Terms]:
        with self._lock:
            return self._core.terms.all()

    def known_terms(self, title: str) -> Terms | None:
        with self._lock:
            return self._core.terms.find(title)

    def on_terms(self, listener: Callable[[Terms], None]) -> None:
        self._on_terms = listener

    def _tell_terms(self) -> None:
        with self._lock:
            news = self._core.terms.take_news()
        for terms in news:
            if self._on_terms is not None:
                self._on_terms(terms)

    # -- reading -----------------------------------------------------------------------------------------------------
    def flush(self, timeout: float | None = None) -> bool:
        return True

    def account(self, key: str) -> AccountState:
        with self._lock:
            return self._core.account(key)

    def accounts(self, prefix: str, suffix: str, most: int) -> list[tuple[str, AccountState]]:
        book = self._core.accounts
        with self._lock:
            known = book.entries.copy()
        keys = worst(known.items(), prefix, suffix, most)
        with self._lock:
            return [(key, book.state(key)) for key in keys if key in book.entries]

    def _forget_accounts(self, prefix: str) -> None:
        with self._lock:
            self._core.accounts.drop(prefix)

    def records(
        self, *, since: float | None = None, until: float | None = None, limit: int | None = None, **equals: str
    ) -> list[CallRecord]:
        check_fields(equals)
        with self._lock:
            view = self._ledger.view()
        return view.matching(since, until, limit, equals)

    def unconfirmed(self, since: float | None = None) -> list[CallRecord]:
        return [record for record in self.records(since=since) if record.estimated and (record.cost_nano or 0) > 0]

    def totals(
        self,
        *,
        dimension: str = "all",
        since_day: str | None = None,
        until_day: str | None = None,
        value: str | None = None,
    ) -> list[tuple[str, str, Totals]]:
        with self._lock:
            days = self._ledger.days(since_day, until_day)
        found: list[tuple[str, str, Totals]] = []
        for day in days:
            with self._lock:
                sums = self._ledger.sums(day, dimension)
            names = sorted(sums) if value is None else [value] if value in sums else []
            found.extend((day, name, Totals(*sums[name])) for name in names)
        return found

    def sums(
        self, *, dimension: str, since_day: str | None = None, most: int | None = None
    ) -> list[tuple[str, Totals]]:
        with self._lock:
            days = self._ledger.days(since_day, None)
        found: dict[str, tuple[int, ...]] = {}
        for day in days:
            with self._lock:
                sums = self._ledger.sums(day, dimension)
            for value, some in sums.items():
                known = found.get(value)
                found[value] = some if known is None else tuple(map(add, known, some))
        dearest = sorted(found.items(), key=lambda each: (-each[1][0], each[0]))[:most]
        return [(value, Totals(*some)) for value, some in dearest]

    def unwritten(self) -> int:
        return 0

    def correct(self, record_id: str, cost: int) -> bool:
        def mend(core: AdmissionCore, now: float) -> bool:
            record = self._ledger.find(record_id)
            if record is not None:
                core.replaced.append(core.correct(record, cost, now))
            return record is not None

        return self._step(mend)

    # -- response cache ----------------------------------------------------------------------------------------------
    def cache_get(self, key: bytes) -> CachedAnswer | None:
        return None  # the cache keeps its own answers in memory; a second copy here would serve nobody

    def cache_put(self, key: bytes, answer: CachedAnswer, *, max_entries: int, max_bytes: int) -> None:
        return None

    def cache_clear(self) -> None:
        return None

    def cache_size(self) -> tuple[int, int]:
        return 0, 0

    def close(self) -> None:
        """End the thread of the timers. The store stays usable."""
        self._janitor.close()
        self._planned = inf

    # -- fork --------------------------------------------------------------------------------------------------------
    def before_fork(self) -> None:
        """No store may be in the middle of a transition."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._lock.release()

    def _after_fork(self) -> None:
        """The child has its own copy of the state; threads and their calls stayed with the parent."""
        self._lock = threading.Lock()
        self._janitor.reset()
        self._planned = inf
        core = self._core
        core.fail_waiting(Refusal("store_unavailable", detail="the process was forked while waiting"))
        core.drop_holds(self.now())
        core.take_decided()
