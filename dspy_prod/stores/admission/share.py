"""What a process has drawn ahead for calls of one kind: it admits them from here, without a transaction for each.

A share is one hold of a durable store: money on the accounts that its calls draw on, and requests, tokens and seats
of their limiter. What its calls use is noted in a cell that outlives the process, so that after its death they are
charged and the rest is free. Pure, but for the cell: the store calls it under its lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from dspy_prod.options import RateLimit
from dspy_prod.stores.admission.holds import Hold
from dspy_prod.stores.admission.limiter import Debit
from dspy_prod.stores.base import GRANTED, Account, Reservation, Settlement

Lot = tuple[str | None, tuple[str, ...]]
"""Calls of one kind: the key of their limiter, and the keys of their accounts."""

Note = Callable[[int, int, int], None]
"""Notes (nano-USD charged since the cell's beginning, nano-USD in flight, calls in flight) of a share."""


def caps_of(accounts: Sequence[Account]) -> tuple[int, ...]:
    """The limits that callers set themselves, because no budget's terms do."""
    return tuple([account.limit for account in accounts if not account.budget])


def lot_of(reservation: Reservation) -> Lot:
    """The kind of calls that a reservation is for."""
    return reservation.limit_key, tuple([account.key for account in reservation.accounts])


class Share:
    """Capacity and money for several calls of one lot.

    Attributes:
        lot: the calls it is for; `accounts` are those that they draw on.
        hold: what of it is durable; the writer's.
        home: whose it is; a forked child has copies of its parent's shares.
        limit: the settings of the limiter that it was drawn under.
        caps: the limits of accounts that it was drawn under, as far as callers set them.
        until: store time until which it may be used.
        money: nano-USD that no call uses.
        requests, tokens, seats: what of the limiter's part no call uses.
        one: the debit of one call of one token.
        in_flight: nano-USD that calls in flight may cost.
        charged: nano-USD that ended calls cost, since the beginning of the cell.
        live: the calls in flight, by id.
        told: nano-USD of `charged` that were in the accounts when they were looked at last, and per account what was
            spent then. The writer replaces it without the lock.
        taken: calls since it was looked at last; `amount` and `size` are the largest of them in money and tokens, and
            `latest` is when the last one came.
        dead: it was charged as abandoned: nothing is admitted from it, and what ends late replaces that charge.
    """

    __slots__ = (
        *("accounts", "amount", "caps", "charged", "dead", "hold", "home", "in_flight", "latest", "limit", "live"),
        *("lot", "money", "note", "one", "requests", "seats", "size", "taken", "told", "tokens", "until"),
    )

    def __init__(self, hold: Hold, like: Reservation, note: Note, charged: int, home: object) -> None:
        self.lot = lot_of(like)
        self.home = home
        self.hold = hold
        self.limit: RateLimit | None = like.limit
        self.accounts = like.accounts
        self.caps = caps_of(like.accounts)
        self.note = note
        self.charged = charged
        self.until = self.latest = -inf
        self.money = self.in_flight = 0
        self.requests = self.tokens = self.seats = 0
        self.one: Debit | None = None
        self.live: dict[str, Reservation] = {}
        self.told: tuple[int, tuple[int, ...]] = (charged, ())
        self.taken = self.amount = self.size = 0
        self.dead = False

    def take(self, reservation: Reservation, now: float) -> bool:
        """Grant from what is drawn; False where it is too little, or not for this call."""
        amount, limit = reservation.amount if reservation.accounts else 0, reservation.limit
        if now >= self.until or amount > self.money or (limit is not self.limit and limit != self.limit):
            return False
        if self.caps and caps_of(reservation.accounts) != self.caps:
            return False
        one = self.one
        if one is not None:
            tokens = reservation.tokens
            if self.requests < 1 or self.seats < 1 or tokens > self.tokens:
                return False
            self.requests -= 1
            self.seats -= 1
            self.tokens -= tokens
            reservation.debit = one[0], tokens, one[2], one[3] * tokens, one[4], one[5]
            if tokens > self.size:
                self.size = tokens
        if amount > self.amount:
            self.amount = amount
        self.taken += 1
        self.latest = now
        self.money -= amount
        self.in_flight += amount
        live = self.live
        live[reservation.id] = reservation
        self.note(self.charged, self.in_flight, len(live))
        seen, spent = self.told
        ahead = self.charged - seen
        reservation.spent = tuple([each + ahead for each in spent])
        reservation.share = self
        reservation.granted_at = now
        reservation.state = GRANTED
        return True

    def end(self, reservation: Reservation, done: Settlement) -> bool:
        """A call has ended; False when it is in flight no more."""
        live = self.live
        if live.pop(reservation.id, None) is None:
            return False
        if reservation.accounts:
            amount, cost = reservation.amount, done.cost or 0
            self.charged += cost
            self.money += amount - cost
            self.in_flight -= amount
        self.seats += 1
        self.note(self.charged, self.in_flight, len(live))
        return True

    @property
    def pending(self) -> int:
        """Nano-USD of ended calls that are not charged durably yet."""
        assert self.hold.drawn is not None
        return self.charged - self.hold.drawn.written

    def close(self) -> None:
        """Admit nobody from it."""
        self.until = -inf
