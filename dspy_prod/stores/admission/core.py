"""The admission core: limiter capacity and money, granted together or not at all.

Pure state transitions: no lock, no clock, no I/O. A store serialises the calls, passes its time as `now`, wakes the
decided reservations outside its lock, and (when durable) writes back what the core marked dirty. Memory and SQLite run
this same code; it is the reference for any other store. How a reservation is granted or waits is in `granting.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Final

from dspy_prod.options import Budget, RateLimit
from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.durable import Durable
from dspy_prod.stores.admission.granting import no_money
from dspy_prod.stores.admission.holds import Hold
from dspy_prod.stores.base import (
    GRANTED,
    PENDING,
    REFUSED,
    WITHDRAWN,
    Account,
    AccountState,
    LimiterSnapshot,
    Refusal,
    Reservation,
    Settlement,
)

PRUNE_PAUSE: Final = 1.0
"""Seconds between two steps of a round through many accounts."""
WINDOW: Final = 120.0
"""Seconds after which no limiter counts a call any more, whatever its guard."""
MAX_ABANDONED: Final = 10_000
"""Abandoned holds the core remembers for a late settlement; a durable store keeps them on disk instead."""


class AdmissionCore(Durable):
    """See the module's docstring."""

    # -- reserving ---------------------------------------------------------------------------------------------------
    def admit(self, reservation: Reservation, now: float) -> Reservation:
        """Grant, refuse, or put into line."""
        self._seq += 1
        reservation.seq = self._seq
        if reservation.id in self.holds:  # reserved already: once is enough
            self._decide(reservation, GRANTED, None)
            return reservation
        line = self._lines.get(reservation.limit_key) if reservation.limit_key is not None else None
        if not line and not (self._parked and self._must_park(reservation)):
            blocked = self._attempt(reservation, now)
            if blocked is None:
                return reservation
            self._queue(reservation, blocked, now)
            return reservation
        parked_at = self._must_park(reservation)
        if parked_at is not None:
            if self._refuse_for_money(reservation):
                return reservation
            reservation.blocked_on = next(account.title for account in reservation.accounts if account.key == parked_at)
            self._park(reservation, parked_at)
            self._serve_account(parked_at, now)
            return reservation
        assert reservation.limit_key is not None
        head = line.head() if line is not None else None
        if head is not None:
            reservation.blocked_on = head.blocked_on  # whoever stands behind waits for the same
        if self._refuse_for_money(reservation) or self._refuse_for_time(reservation, now):
            return reservation
        reservation.blocked_on = reservation.blocked_on or "requests"
        self._line(reservation.limit_key).push(reservation)
        if line is not None and line.head() is reservation:
            self._serve_limiter(reservation.limit_key, now)
        return reservation

    def preview(self, reservation: Reservation, now: float) -> tuple[float, Refusal | None]:
        """(seconds until a grant, refusal) for a reservation that is not made; changes nothing."""
        for account in reservation.accounts:
            state, limit = self.accounts.state(account.key), self.terms.limit(account)
            if state.spent + reservation.amount > limit:
                return inf, no_money(account, limit, state, reservation.amount)
        if reservation.limit_key is None or reservation.limit is None:
            return 0.0, None
        limiter = self.limiter_for(reservation.limit_key, reservation.limit, now)
        line = self._lines.get(reservation.limit_key)
        if not line:
            return max(0.0, limiter.ready_at(now, reservation.tokens) - now), None
        return max(0.0, limiter.earliest(now, reservation.tokens, len(line)) - now), None

    def withdraw(self, reservation: Reservation, now: float) -> bool:
        """Take a waiting reservation out of line; False when it was granted meanwhile."""
        if reservation.state != PENDING:
            return reservation.state != GRANTED
        reservation.state = WITHDRAWN
        self.remove(reservation, now)
        return True

    def remove(self, reservation: Reservation, now: float) -> None:
        """Take a reservation out of whatever line it stands in, and serve those behind it."""
        key = reservation.limit_key
        line = self._lines.get(key) if key is not None else None
        if line is not None and line.remove(reservation):
            assert key is not None
            self._serve_limiter(key, now)
            return
        for account in reservation.accounts:
            parked = self._parked.get(account.key)
            if parked is not None and parked.remove(reservation):
                self._serve_account(account.key, now)
                return

    def sent_late(self, reservation: Reservation, at: float) -> None:
        """A granted call left only at `at`."""
        hold = self.holds.get(reservation.id)
        if hold is None or hold.debit is None or reservation.limit_key is None or reservation.limit is None:
            return
        hold.debit = self.limiter_for(reservation.limit_key, reservation.limit, at).sent_late(hold.debit, at)
        if self.changes is not None:
            self.changes.limiters.add(reservation.limit_key)

    # -- settling ----------------------------------------------------------------------------------------------------
    def settle(self, done: Settlement, now: float) -> None:
        """Replace the hold by what happened. Idempotent by id; a hold charged as abandoned is corrected."""
        hold = self.holds.pop(done.id, None)
        if hold is None:
            self._settle_late(done, now)
            return
        if self.changes is not None:
            self.changes.end(hold)
        self.finish(hold, done, now)

    def finish(self, hold: Hold, done: Settlement, now: float) -> None:
        """Charge a hold that has ended, give back what its call did not use, and serve who waits for that."""
        self.accounts.charge(hold.accounts, hold.amount, done.cost or 0, done.estimated)
        if done.record is not None:
            self.appended.append(done.record)
        key = hold.limit_key
        if key is not None and (hold.debit is not None or hold.drawn is not None):
            limiter = self.known_limiter(key, now)
            if limiter is not None:
                if hold.debit is not None:
                    limiter.give_back(hold.debit, now=now, used=done.tokens, sent=done.sent)
                elif hold.drawn is not None:
                    limiter.leave_seats(hold.drawn.end, hold.drawn.seats)
                if self.changes is not None or key in self._lines:
                    self._touch_limiter(key, now)
        if self._parked:
            for name in hold.accounts:
                self._serve_account(name, now)

    def sent_alone(self, reservation: Reservation, done: Settlement, now: float) -> None:
        """A call was sent that nobody had admitted here: its limiter counts it from now on, whatever room it has."""
        key, limit = reservation.limit_key, reservation.limit
        if key is None or limit is None or not done.sent or now - reservation.granted_at > WINDOW:
            return
        limiter = self.limiter_for(key, limit, now)
        debit = limiter.take(now, reservation.tokens, reservation.lease)
        limiter.give_back(debit, now=now, used=done.tokens, sent=True)
        self._touch_limiter(key, now)

    def correct(self, record: CallRecord, cost: int, now: float) -> CallRecord:
        """The record with its true cost; the accounts it charged are mended."""
        mended = record._replace(cost_nano=cost, estimated=False)
        self.take_abandoned(record.id)  # a settlement that still comes does not overrule the correction
        self.accounts.mend(record.accounts, record.cost_nano or 0, record.estimated, cost, False)
        for key in record.accounts:
            self._serve_account(key, now)
        return mended

    def throttled(self, key: str, limit: RateLimit, retry_after: float | None, now: float) -> None:
        """The provider answered 429."""
        self.limiter_for(key, limit, now).throttled(now, retry_after)
        self._touch_limiter(key, now)

    def resync(self, key: str, limit: RateLimit, remaining: dict[str, tuple[float, float]], now: float) -> None:
        """The provider told what is left of its limits."""
        self.limiter_for(key, limit, now).resync(now, remaining)
        self._touch_limiter(key, now)

    def lift(self, key: str, now: float) -> bool:
        """An operator lifts a pause; whether there was one."""
        state = self.limiter_state(key) or self._visit_limiter(key, now)
        lifted = state is not None and state.lift(now)
        if lifted:
            self._touch_limiter(key, now)
        return lifted

    # -- terms -------------------------------------------------------------------------------------------------------
    def declare(self, budget: Budget, anew: bool, now: float) -> None:
        """An LM is built with a budget."""
        if self.terms.declare(budget, anew):
            self._serve_terms(now)

    def steer(self, budget: Budget, now: float) -> None:
        """The settings of a budget change while it is in use."""
        if self.terms.steer(budget):
            self._serve_terms(now)

    # -- time --------------------------------------------------------------------------------------------------------
    def tick(self, now: float) -> None:
        """Serve lines whose moment has come and charge holds whose lease ended."""
        for key in [key for key, at in self._timers.items() if at <= now]:
            self._serve_limiter(key, now)
        if now >= self._next_lease:
            for hold in [hold for hold in self.holds.values() if hold.lease_until <= now]:
                self.abandon(hold, now)
            self._next_lease = min((hold.lease_until for hold in self.holds.values()), default=inf)
            if self.accounts.prune(now, self._parked):
                self._next_lease = min(self._next_lease, now + PRUNE_PAUSE)

    @property
    def timed(self) -> bool:
        """Whether all who wait do so for a moment that is known, and nobody for a release or for his turn."""
        states = [self._limiters.get(key) for key, line in self._lines.items() if line]
        return not self._parked and all(state is not None and state.timed for state in states)

    def next_due(self) -> float:
        """Store time of the next `tick` that can change something; `inf` when none can."""
        return min(self._next_lease, *self._timers.values()) if self._timers else self._next_lease

    def abandon(self, hold: Hold, now: float) -> None:
        """Charge a hold whose worker is gone in full, as unconfirmed. A late settle replaces the charge."""
        own = self.holds.pop(hold.id, None)
        if self.changes is not None:
            if own is None:
                self.changes.reaped.append(hold.id)
            else:
                self.changes.end(hold)
            self.changes.abandoned[hold.id] = hold  # at `owed`, see below
        else:
            while len(self._abandoned) >= MAX_ABANDONED:
                del self._abandoned[next(iter(self._abandoned))]
            self._abandoned[hold.id] = hold
        owed = hold.amount if hold.owed is None else hold.owed
        stub = hold.stub if owed or hold.drawn is None else None
        record = None if stub is None else stub._replace(outcome="abandoned", cost_nano=owed, estimated=True)
        self.finish(hold, Settlement(hold.id, owed, None, True, True, record), now)
        hold.amount = owed

    def waits(self, limit_key: str | None, accounts: Iterable[str]) -> bool:
        """Whether anybody waits for this limiter, or for money of one of these accounts."""
        if limit_key is not None and self._lines.get(limit_key):
            return True
        return bool(self._parked) and any(key in self._parked for key in accounts)

    def left(self, account: Account) -> int:
        """Nano-USD of a budget that are neither spent nor held."""
        entry = self.accounts.get(account.key)
        return self.terms.limit(account) - entry.spent - entry.held

    # -- reading -----------------------------------------------------------------------------------------------------
    def account(self, key: str) -> AccountState:
        """What an account holds."""
        return self.accounts.state(key)

    def limiter(self, key: str, now: float) -> LimiterSnapshot | None:
        """State of one limiter, None when it was never used."""
        state = self.limiter_state(key) or self._visit_limiter(key, now)
        line = self._lines.get(key)
        return None if state is None else state.snapshot(now, key, len(line) if line is not None else 0)

    def waiting(self) -> int:
        """Reservations in any line."""
        return sum(map(len, self._lines.values())) + sum(map(len, self._parked.values()))

    def take_decided(self) -> list[Reservation]:
        """The reservations decided since the last call, to be woken outside the lock."""
        decided = self.decided
        if decided:
            self.decided = []
        return decided

    # -- ends out of the ordinary ------------------------------------------------------------------------------------
    def fail_waiting(self, refusal: Refusal) -> None:
        """Refuse everybody in line (the store broke)."""
        for line in [*self._lines.values(), *self._parked.values()]:
            while (reservation := line.head()) is not None:
                line.pop()
                self._decide(reservation, REFUSED, refusal)
        self._parked.clear()
        self._timers.clear()

    def _settle_late(self, done: Settlement, now: float) -> None:
        hold = self.take_abandoned(done.id)
        if hold is None:
            return
        self.accounts.mend(hold.accounts, hold.amount, True, done.cost or 0, done.estimated)
        record = done.record
        if record is None and hold.stub is not None:
            record = hold.stub._replace(outcome="abandoned", cost_nano=done.cost, estimated=done.estimated)
        if record is not None:
            self.replaced.append(record)
        for key in hold.accounts:
            self._serve_account(key, now)

    def take_abandoned(self, id: str) -> Hold | None:
        """The abandoned hold with this id, which then is no longer one."""
        if self.changes is None:
            return self._abandoned.pop(id, None)
        assert self._backing is not None
        hold = self.changes.abandoned.pop(id, None)
        if hold is None and id not in self.changes.forgiven:
            hold = self._backing.load_abandoned(id)
            if hold is not None:
                self.changes.forgiven.add(id)
        return hold

    def drop_holds(self, now: float) -> None:
        """Free what every hold reserves, at no charge: a forked child does not make its parent's calls."""
        for id in list(self.holds):
            self.settle(Settlement(id, 0, None, True, False, None), now)
