"""What a durable store keeps to itself: admissions that draw on no account and no shared limit.

They wait for nothing but a pause after a 429, so nothing of them has to be durable except their records. They are
decided at once, in memory, on the caller's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from dspy_prod.options import RateLimit
from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.granting import shared
from dspy_prod.stores.admission.line import wake
from dspy_prod.stores.base import LimiterSnapshot, Refusal, Reservation, Settlement


def is_local(reservation: Reservation) -> bool:
    """Whether a reservation can be decided without the other processes."""
    return not reservation.accounts and (reservation.limit is None or not shared(reservation.limit))


class LocalLane:
    """An admission core behind a lock. `keep(record, is_new)` takes the records."""

    def __init__(self, now: Callable[[], float], keep: Callable[[CallRecord, bool], None]) -> None:
        self._now = now
        self._keep = keep
        self._lock = threading.Lock()
        self._core = AdmissionCore()

    def admit(self, reservation: Reservation) -> Reservation:
        """See `Store.admit`."""
        with self._lock:
            return self._core.admit(reservation, self._now())

    def withdraw(self, reservation: Reservation) -> bool:
        """See `Store.withdraw`."""
        with self._lock:
            free = self._core.withdraw(reservation, self._now())
            decided = self._core.take_decided()
        wake(decided)
        return free

    def settle(self, done: Settlement) -> None:
        """See `Store.settle`."""
        with self._lock:
            self._core.settle(done, self._now())
            records = self._take_records()
            decided = self._core.take_decided()
        self._publish(records, decided)

    def throttled(self, key: str, limit: RateLimit, retry_after: float | None) -> None:
        """See `Store.throttled`."""
        with self._lock:
            self._core.throttled(key, limit, retry_after, self._now())

    def resync(self, key: str, limit: RateLimit, remaining: dict[str, tuple[float, float]]) -> None:
        """See `Store.resync`."""
        with self._lock:
            self._core.resync(key, limit, remaining, self._now())
            decided = self._core.take_decided()
        wake(decided)

    def preview(self, reservation: Reservation) -> tuple[float, Refusal | None]:
        """See `Store.preview`."""
        with self._lock:
            return self._core.preview(reservation, self._now())

    def limiter(self, key: str) -> LimiterSnapshot | None:
        """See `Store.limiter`."""
        with self._lock:
            return self._core.limiter(key, self._now())

    def holds(self) -> int:
        """Reservations not yet settled."""
        with self._lock:
            return len(self._core.holds)

    def waiting(self) -> int:
        """Reservations in line."""
        with self._lock:
            return self._core.waiting()

    def tick(self) -> float:
        """Serve what is due; the store time of the next due moment."""
        with self._lock:
            now = self._now()
            if self._core.next_due() > now:
                return self._core.next_due()
            self._core.tick(now)
            records = self._take_records()
            decided = self._core.take_decided()
            due = self._core.next_due()
        self._publish(records, decided)
        return due

    def fail(self, refusal: Refusal) -> None:
        """Refuse everybody in line."""
        with self._lock:
            self._core.fail_waiting(refusal)
            decided = self._core.take_decided()
        wake(decided)

    def _take_records(self) -> list[tuple[CallRecord, bool]]:
        core = self._core
        if not core.appended and not core.replaced:
            return []
        records = [(record, True) for record in core.appended] + [(record, False) for record in core.replaced]
        core.appended.clear()
        core.replaced.clear()
        return records

    def _publish(self, records: list[tuple[CallRecord, bool]], decided: list[Reservation]) -> None:
        for record, is_new in records:
            self._keep(record, is_new)
        if decided:
            wake(decided)


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
