"""Admissions decided at once, in memory, on the caller's thread: a core behind a lock, and the thread of its timers.

The memory store is one with a ledger. A durable store keeps one beside its file for admissions that draw on no account
and no shared limit: they wait for nothing but a pause after a 429, so nothing of them has to be durable except their
records.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable
from math import inf
from queue import Empty, SimpleQueue
from typing import TypeVar

from dspy_prod.options import RateLimit
from dspy_prod.records import CallRecord
from dspy_prod.runtime.brief import brief
from dspy_prod.runtime.threads import begin
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.granting import shared
from dspy_prod.stores.admission.line import wake
from dspy_prod.stores.base import LimiterSnapshot, Refusal, Reservation, Settlement

_log = logging.getLogger("dspy_prod")

T = TypeVar("T")


class Lane:
    """The admissions of a `Store`. Every transition wakes those whom it decided, once the lock is free.

    Args:
        now: the store's time.
        keep: takes (record, whether it is new) of the ledger, under the lock.
        rearm: called when something becomes due before the moment that `tick` told last.
    """

    def __init__(
        self, now: Callable[[], float], keep: Callable[[CallRecord, bool], None], rearm: Callable[[], None]
    ) -> None:
        self.now = now
        self._keep = keep
        self._rearm = rearm
        self._core = AdmissionCore()
        self._lock = threading.Lock()
        self._planned = inf  # store time of the next `tick`

    def admit(self, reservation: Reservation) -> Reservation:
        """Grant, refuse, or put into line, see `Admission.admit`."""
        core = self._core
        with brief(self._lock):
            core.admit(reservation, self.now())
            news = core.decided or core.next_due() < self._planned
        if news:
            self._tell()
        return reservation

    def withdraw(self, reservation: Reservation) -> bool:
        """Take a waiting reservation out of line; False when it was granted meanwhile, and the caller must settle."""
        return self._step(lambda core, now: core.withdraw(reservation, now))

    def sent_late(self, reservation: Reservation, at: float) -> None:
        """A granted call left only at `at`: its limiter counts it from then on."""
        with brief(self._lock):
            self._core.sent_late(reservation, at)

    def settle(self, reservation: Reservation, settlement: Settlement) -> None:
        """Replace the hold by what happened, keep the record, and serve who waited for what that frees."""
        core = self._core
        with brief(self._lock):
            core.settle(settlement, self.now())
            if core.appended or core.replaced:
                self._write()
            news = core.decided or core.next_due() < self._planned
        if news:
            self._tell()

    def throttled(self, limit_key: str, limit: RateLimit, retry_after: float | None) -> None:
        """The provider answered 429: pause the key and lower its rate."""
        self._step(lambda core, now: core.throttled(limit_key, limit, retry_after, now))

    def throttled_since(self, limit_key: str | None, at: float) -> bool:
        """Nothing is granted ahead here, so nobody has to ask."""
        return False

    def resync(self, limit_key: str, limit: RateLimit, remaining: dict[str, tuple[float, float]]) -> None:
        """The provider told what is left of its limits, and for how many seconds."""
        self._step(lambda core, now: core.resync(limit_key, limit, remaining, now))

    def lift(self, limit_key: str) -> bool:
        """An operator lifts a pause; whether there was one."""
        return self._step(lambda core, now: core.lift(limit_key, now))

    def preview(self, reservation: Reservation) -> tuple[float, Refusal | None]:
        """(seconds until this reservation could be granted, refusal or None), changing nothing."""
        return self._step(lambda core, now: core.preview(reservation, now))

    def limiter(self, key: str) -> LimiterSnapshot | None:
        """The state of one limiter, None when it was never used here."""
        return self._step(lambda core, now: core.limiter(key, now))

    def holds(self) -> int:
        """Reservations not yet settled."""
        with brief(self._lock):
            return len(self._core.holds)

    def waiting(self) -> int:
        """Reservations in any line."""
        with brief(self._lock):
            return self._core.waiting()

    def tick(self) -> float:
        """Serve what is due; the store time of the next due moment, `inf` when there is none."""
        self._planned = -inf  # whoever calls this need not be told of what comes up meanwhile
        self._step(lambda core, now: core.tick(now))
        with brief(self._lock):
            self._planned = self._core.next_due()
            return self._planned

    def fail_waiting(self, refusal: Refusal) -> None:
        """Refuse everybody in line."""
        self._step(lambda core, _: core.fail_waiting(refusal))

    def _step(self, transition: Callable[[AdmissionCore, float], T]) -> T:
        """One transition; `admit` and `settle` are on the path of every call and do the same themselves."""
        with brief(self._lock):
            result = transition(self._core, self.now())
            self._write()
        self._tell()
        return result

    def _write(self) -> None:
        core = self._core
        for record in core.appended:
            self._keep(record, True)
        core.appended.clear()
        for record in core.replaced:
            self._keep(record, False)
        core.replaced.clear()

    def _tell(self) -> None:
        with brief(self._lock):
            decided = self._core.take_decided()
            sooner = self._core.next_due() < self._planned
        wake(decided)
        if sooner:
            self._rearm()


class Janitor:
    """The thread of a lane's timers: begins when it is first needed, ends with its lane or with `close`."""

    def __init__(self, lane: Lane, name: str) -> None:
        self._lane = weakref.ref(lane)
        self._name = name
        self.reset()

    def reset(self) -> None:
        """In a forked child: the thread stayed with the parent."""
        self._nudges: SimpleQueue[None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def rearm(self) -> None:
        """Have the timers looked at again."""
        if self._thread is None:
            self._start()
        self._nudges.put(None)

    def nudge(self) -> None:
        """Have the timers looked at again, if there are any."""
        if self._thread is not None:
            self._nudges.put(None)

    def close(self) -> None:
        """End the thread; the next `rearm` begins a new one."""
        with self._starting:
            nudges, self._nudges = self._nudges, SimpleQueue()
            thread, self._thread = self._thread, None
        nudges.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = begin(self._name, self._tend, self._nudges)

    def _tend(self, nudges: SimpleQueue[None]) -> None:
        wait = 0.0
        while True:
            if wait > 0:
                with contextlib.suppress(Empty):
                    nudges.get(timeout=min(wait, 5.0))
                    while True:  # one look answers them all
                        nudges.get_nowait()
            lane = self._lane()
            if lane is None or self._nudges is not nudges:
                return
            try:
                wait = lane.tick() - lane.now()
            except Exception:
                _log.exception("%s met an error; it goes on", self._name)
                wait = 1.0
            del lane


def is_local(reservation: Reservation) -> bool:
    """Whether a reservation can be decided without the other processes."""
    return not reservation.accounts and (reservation.limit is None or not shared(reservation.limit))


def merged(one: LimiterSnapshot | None, other: LimiterSnapshot | None) -> LimiterSnapshot | None:
    """One view of a limit that only reacts to 429s, used both with and without a budget."""
    if one is None or other is None:
        return one or other
    return one._replace(
        in_flight=one.in_flight + other.in_flight,
        waiting=one.waiting + other.waiting,
        paused_for=max(one.paused_for, other.paused_for),
        rate_factor=min(one.rate_factor, other.rate_factor),
    )
