"""The memory store: the core behind one lock, for tests, notebooks and single-process services."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable
from math import inf
from queue import Empty, SimpleQueue
from typing import Final

from dspy_prod.options import RateLimit
from dspy_prod.records import CallRecord, Totals
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.line import wake
from dspy_prod.stores.base import (
    PENDING,
    AccountState,
    CachedAnswer,
    LimiterSnapshot,
    Refusal,
    Reservation,
    Settlement,
)
from dspy_prod.stores.memory_ledger import MemoryLedger

_log = logging.getLogger("dspy_prod")


class MemoryStore:
    """State of this process only; gone when it ends.

    Args:
        namespace: keeps programs that share a process apart.
        clock: durations come from `clock.monotonic()`.
        max_records: the ledger keeps this many newest records; sums (rollups) are kept for all.
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
        self.now: Callable[[], float] = clock.monotonic
        self._lock = threading.Lock()
        self._core = AdmissionCore()
        self._ledger = MemoryLedger(max_records)
        self._nudges: SimpleQueue[None] = SimpleQueue()
        self._janitor: threading.Thread | None = None
        self._planned = inf  # store time at which the janitor will look again
        self._closed = False
        _STORES.add(self)

    @property
    def url(self) -> str:
        return self._url

    @property
    def namespace(self) -> str:
        return self._namespace

    @property
    def durable(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"MemoryStore(namespace={self._namespace!r})"

    # -- admission ---------------------------------------------------------------------------------------------------
    def admit(self, reservation: Reservation) -> Reservation:
        core = self._core
        with self._lock:
            core.admit(reservation, self.now())
            decided = core.take_decided() if core.decided else None
        if decided:
            wake(decided)
        if reservation.state == PENDING or self._janitor is None:
            self._rearm()
        return reservation

    def withdraw(self, reservation: Reservation) -> bool:
        with self._lock:
            free = self._core.withdraw(reservation, self.now())
            decided, due = self._core.take_decided(), self._core.next_due()
        wake(decided)
        if due < self._planned:
            self._rearm()
        return free

    def sent_late(self, reservation: Reservation, at: float) -> None:
        with self._lock:
            self._core.sent_late(reservation, at)

    def settle(self, reservation: Reservation, settlement: Settlement) -> None:
        core = self._core
        with self._lock:
            core.settle(settlement, self.now())
            for record in core.appended:
                self._ledger.append(record)
            core.appended.clear()
            if core.replaced:
                self._write()
            decided = core.take_decided() if core.decided else None
            due = core.next_due() if core.timed else inf
        if decided:
            wake(decided)
        if due < self._planned:
            self._rearm()

    def append(self, record: CallRecord) -> None:
        with self._lock:
            self._ledger.append(record)

    def throttled(self, limit_key: str, limit: RateLimit, retry_after: float | None) -> None:
        with self._lock:
            self._core.throttled(limit_key, limit, retry_after, self.now())
            decided = self._core.take_decided()
        wake(decided)
        self._rearm()

    def resync(self, limit_key: str, limit: RateLimit, remaining: dict[str, tuple[float, float]]) -> None:
        with self._lock:
            self._core.resync(limit_key, limit, remaining, self.now())
            decided = self._core.take_decided()
        wake(decided)
        self._rearm()

    def preview(self, reservation: Reservation) -> tuple[float, Refusal | None]:
        with self._lock:
            return self._core.preview(reservation, self.now())

    # -- reading -----------------------------------------------------------------------------------------------------
    def flush(self, timeout: float | None = None) -> bool:
        return True

    def account(self, key: str) -> AccountState:
        with self._lock:
            return self._core.account(key)

    def limiter(self, key: str) -> LimiterSnapshot | None:
        with self._lock:
            return self._core.limiter(key, self.now())

    def holds(self) -> int:
        with self._lock:
            return len(self._core.holds)

    def waiting(self) -> int:
        with self._lock:
            return self._core.waiting()

    def records(
        self, *, since: float | None = None, until: float | None = None, limit: int | None = None, **equals: str
    ) -> list[CallRecord]:
        with self._lock:
            return self._ledger.records(since, until, limit, equals)

    def totals(
        self, *, dimension: str = "all", since_day: str | None = None, until_day: str | None = None
    ) -> list[tuple[str, str, Totals]]:
        with self._lock:
            return self._ledger.totals(dimension, since_day, until_day)

    def correct(self, record_id: str, cost: int) -> bool:
        with self._lock:
            record = self._ledger.find(record_id)
            if record is None:
                return False
            self._ledger.replace(self._core.correct(record, cost, self.now()))
            decided = self._core.take_decided()
        wake(decided)
        return True

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
        """End the janitor. The store stays usable."""
        self._closed = True
        janitor, self._janitor = self._janitor, None
        if janitor is not None and janitor is not threading.current_thread():
            self._nudges.put(None)
            janitor.join(timeout=5)
        self._closed = False

    # -- the janitor: timers and leases --------------------------------------------------------------------------------
    def _rearm(self) -> None:
        """Let the janitor look at its timers again, starting it when needed."""
        if self._janitor is None:
            with self._lock:
                if self._janitor is None and not self._closed:
                    thread = threading.Thread(
                        target=_tend, args=(weakref.ref(self), self._nudges), name="dspy_prod-memory-store", daemon=True
                    )
                    try:
                        thread.start()
                    except RuntimeError:  # the interpreter is going down
                        return
                    self._janitor = thread
                    return
        self._nudges.put(None)

    def _tick(self) -> float:
        """Serve what is due; seconds until the next due moment (`inf` if none)."""
        with self._lock:
            now = self.now()
            self._core.tick(now)
            self._write()
            decided = self._core.take_decided()
            due = self._planned = self._core.next_due()
        wake(decided)
        return due - now

    def _write(self) -> None:
        core = self._core
        for record in core.appended:
            self._ledger.append(record)
        core.appended.clear()
        for record in core.replaced:
            self._ledger.replace(record)
        core.replaced.clear()

    def _after_fork(self) -> None:
        """The child has its own copy of the state; threads and their calls stayed with the parent."""
        self._lock = threading.Lock()
        self._nudges = SimpleQueue()
        self._janitor = None
        core = self._core
        core.fail_waiting(Refusal("store_unavailable", detail="the process was forked while waiting"))
        core.drop_holds(self.now())
        core.take_decided()


def _tend(ref: weakref.ref[MemoryStore], nudges: SimpleQueue[None]) -> None:
    """Body of the janitor thread; ends when the store is closed or collected."""
    wait = 0.0
    while True:
        if wait > 0:
            with contextlib.suppress(Empty):
                nudges.get(timeout=min(wait, 5.0))
                while True:  # one look answers them all
                    nudges.get_nowait()
        store = ref()
        if store is None or store._closed or store._nudges is not nudges:
            return
        try:
            wait = min(store._tick(), inf)
        except Exception:
            _log.exception("The memory store's janitor met an error; it goes on")
            wait = 1.0
        del store


_STORES: weakref.WeakSet[MemoryStore] = weakref.WeakSet()


_FORKING: Final[list[MemoryStore]] = []
_FORK_LOCK = threading.Lock()


def _before_fork() -> None:
    """No store may be in the middle of a transition."""
    _FORK_LOCK.acquire()
    _FORKING.extend(_STORES)
    for store in _FORKING:
        store._lock.acquire()


def _after_fork_in_parent() -> None:
    while _FORKING:
        _FORKING.pop()._lock.release()
    _FORK_LOCK.release()


def _after_fork_in_child() -> None:
    global _FORK_LOCK
    _FORK_LOCK = threading.Lock()
    while _FORKING:
        _FORKING.pop()._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
