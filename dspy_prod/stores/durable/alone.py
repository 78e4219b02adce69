"""What a process decides by itself while its durable store cannot.

A limited call has this process's part of the limit: the limit divided by the number of processes, and at least one
request a minute. A budget whose calls may go on has a tenth of what was left of it when this process saw it last, and
never more than half of that divided among the processes. What is sent meanwhile is charged, and counted by the limit,
when the store is back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from dspy_prod.options import RateLimit
from dspy_prod.stores.admission.granting import shared
from dspy_prod.stores.base import REFUSED, Account, Refusal, Reservation, Settlement
from dspy_prod.stores.lane import Janitor, Lane

PART: Final = 10
"""What was left of a budget, divided by this, may be spent by one process alone."""
_KEPT: Final = 86_400.0


class Alone:
    """The admissions of one process while nobody else decides.

    Args:
        now: the store's time.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.lane = Lane(now, lambda record, is_new: None, self._rearm)
        self._janitor = Janitor(self.lane, "dspy_prod-alone")
        self._used: dict[str, RateLimit] = {}
        self._limits: dict[tuple[RateLimit, int], RateLimit] = {}

    def admit(self, reservation: Reservation, outage: Outage | None, workers: int) -> Reservation:
        """Grant, refuse, or put into line.

        Args:
            outage: what is known of budgets; None: nothing.
            workers: how many processes share the store.
        """
        accounts = []
        for account in reservation.accounts:
            left = None if outage is None else outage.left(account)
            if outage is None or left is None:
                reservation.refusal = Refusal(
                    "store_unavailable", detail=f"what is left of the budget {account.title!r} is not known here"
                )
                reservation.state = REFUSED
                return reservation
            part = max(0, min(left // PART, left // (2 * workers)))
            accounts.append(Account(f"{outage.number}|{account.key}", part, account.title, _KEPT))
        limit = reservation.limit
        if limit is not None and shared(limit):
            limit = self._part(limit, workers)
            if reservation.limit_key is not None:
                self._used[reservation.limit_key] = limit
        tokens = reservation.tokens
        if limit is not None and limit.tpm is not None:
            tokens = min(tokens, int(limit.tpm))  # at least one call a minute
        own = replace(reservation, accounts=tuple(accounts), limit=limit, tokens=tokens, stub=None, share=None)
        own.attach(lambda: _follow(own, reservation))
        reservation.share = Lone(self, own)
        self.lane.admit(own)
        _take_over(own, reservation)
        return reservation

    def throttled(self, limit_key: str, retry_after: float | None) -> None:
        """The provider answered 429: whoever is admitted here by this limit waits too."""
        limit = self._used.get(limit_key)
        if limit is not None:
            self.lane.throttled(limit_key, limit, retry_after)

    def _part(self, limit: RateLimit, workers: int) -> RateLimit:
        key = limit, workers
        part = self._limits.get(key)
        if part is None:
            if len(self._limits) >= 256:
                self._limits.clear()
            part = self._limits[key] = part_of(limit, workers)
        return part

    def _rearm(self) -> None:
        self._janitor.rearm()

    def moved(self) -> None:
        """Somebody moved the clock."""
        self._janitor.nudge()

    def close(self, refusal: Refusal) -> None:
        """Refuse who waits, and end."""
        self.lane.fail_waiting(refusal)
        self._janitor.close()


class Lone:
    """A reservation that its process decides alone: `own` stands in the lane for it."""

    __slots__ = ("alone", "own")

    def __init__(self, alone: Alone, own: Reservation) -> None:
        self.alone = alone
        self.own = own

    def withdraw(self, reservation: Reservation) -> bool:
        """See `Admission.withdraw`."""
        withdrawn = self.alone.lane.withdraw(self.own)
        _take_over(self.own, reservation)
        return withdrawn

    def settle(self, done: Settlement) -> None:
        """Free what the call used of this process's part."""
        self.alone.lane.settle(self.own, done._replace(record=None))


class Outage:
    """What was known of budgets when the store could not be used any more.

    Args:
        number: tells outages of one process apart.
        known: nano-USD spent and held, by account.
        limits: limits in nano-USD that the terms of budgets say, by title.
    """

    def __init__(self, number: int, known: Mapping[str, int], limits: Mapping[str, int]) -> None:
        self.number = number
        self._known = known
        self._limits = limits

    def left(self, account: Account) -> int | None:
        """Nano-USD that were left of it; None when that is not known."""
        used = self._known.get(account.key)
        return None if used is None else min(account.limit, self._limits.get(account.budget, account.limit)) - used


def part_of(limit: RateLimit, workers: int) -> RateLimit:
    """One process's part of a limit."""
    most = {
        "rpm": None if limit.rpm is None else max(1.0, limit.rpm / workers),
        "tpm": None if limit.tpm is None else max(1.0, limit.tpm / workers),
        "concurrency": None if limit.concurrency is None else max(1, limit.concurrency // workers),
        "burst": None if limit.burst is None else max(1, limit.burst // workers),
    }
    return limit.model_copy(update={name: value for name, value in most.items() if value is not None})


def _take_over(own: Reservation, reservation: Reservation) -> None:
    """What was decided for the one holds for the other."""
    reservation.blocked_on = own.blocked_on
    reservation.granted_at, reservation.spent, reservation.refusal = own.granted_at, own.spent, own.refusal
    reservation.state = own.state


def _follow(own: Reservation, reservation: Reservation) -> None:
    _take_over(own, reservation)
    if reservation.wake is not None:
        reservation.wake()
