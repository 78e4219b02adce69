"""Capacity drawn ahead: when shares are begun, filled up and given back, inside the writer's transactions.

Calls of one kind that follow close on each other are admitted from a share (`share.py`): one hold in the file for
many calls. A share is small near a limit, and where it would be too small there is none: then each call is decided
by itself, as if there were no shares. Nothing of a share is usable before its hold is durable, nor later than
`AHEAD` seconds after it was looked at last; what nobody used by then, or somebody waits for, goes back.
"""

from __future__ import annotations

from functools import partial
from math import inf
from typing import Final

from dspy_prod.runtime.brief import brief
from dspy_prod.stores.admission.holds import Hold
from dspy_prod.stores.admission.share import Share, caps_of, lot_of
from dspy_prod.stores.admission.window import AHEAD
from dspy_prod.stores.base import Reservation, Settlement
from dspy_prod.stores.durable.filling import LEAST, Filling

CLOSE: Final = 0.1
"""Seconds within which a second call of a kind has to come for a share to be begun."""
_LOOK_FOR_LOST: Final = 1.0
_KINDS: Final = 1000


class Drawing(Filling):
    """The shares of one process, as its writer sees them: see `Filling` for its arguments."""

    # -- what the writer's operations tell -----------------------------------------------------------------------------
    def decided(self, reservation: Reservation, now: float) -> None:
        """A call was granted by itself: perhaps more of its kind come."""
        lot = lot_of(reservation)
        before = self._latest.pop(lot, -inf)
        self._latest[lot] = now
        if len(self._latest) > _KINDS:
            del self._latest[next(iter(self._latest))]
        if now - before > CLOSE:
            return
        share = self._shares.get(lot) or self._begin(lot, reservation)
        if share is not None:
            share.taken += 1
            share.latest = now
            share.amount = max(share.amount, reservation.amount)
            share.size = max(share.size, reservation.tokens)
            caps = caps_of(reservation.accounts)
            if caps != share.caps:  # what was drawn under others goes back, or may be used once it is looked at
                with brief(self._lock):
                    share.close()
                    share.caps = caps
            share.limit, share.accounts = reservation.limit, reservation.accounts

    def settle(self, done: Settlement, reservation: Reservation, now: float) -> None:
        """A call that was admitted from a share has ended."""
        share = reservation.share
        assert isinstance(share, Share)
        if share.dead:
            self._settle_dead(share, done, reservation, now)
        else:
            self._core.finish(self._part(share, reservation, done.cost or 0), done, now)

    def sent_late(self, reservation: Reservation, at: float) -> None:
        """A call that was admitted from a share left only at `at`."""
        key, debit = reservation.limit_key, reservation.debit
        limiter = None if key is None or debit is None else self._core.known_limiter(key, at)
        if limiter is not None and debit is not None and key is not None:
            reservation.debit = limiter.sent_late(debit, at)
            self._changes.limiters.add(key)

    def lose(self) -> None:
        """Others thought this process dead and charged what it had drawn: what ends now replaces that."""
        with brief(self._lock):
            for share in self._shares.values():
                share.close()
                share.dead, share.note = True, _forget
            self._shares.clear()
            self._cells.forget()
        self._unused.clear()

    def moved(self) -> None:
        """The file was deleted or replaced."""
        with brief(self._lock):
            self._cells.lost()

    def close(self) -> None:
        """Nothing can be written: nobody is admitted from a share."""
        with brief(self._lock):
            for share in self._shares.values():
                share.close()

    def end(self, delete: bool) -> None:
        """The process holds nothing any more, or nothing that it could still give back."""
        self._cells.close(delete)

    # -- in each transaction -------------------------------------------------------------------------------------------
    def due_in(self, now: float) -> float:
        """Seconds until a share has to be looked at."""
        return min((share.until - now for share in list(self._shares.values()) if share.until > -inf), default=inf)

    def return_unused(self, now: float) -> None:
        """Give back what nobody used of the blocks that newer ones replaced."""
        unused, self._unused = self._unused, []
        if unused:
            self._changes.undone.append(partial(self._unused.extend, unused))
        for share, one, requests, tokens in unused:
            key = share.hold.limit_key
            limiter = None if key is None else self._core.known_limiter(key, now)
            if limiter is not None and key is not None:
                limiter.undraw(one, now, requests, tokens)
                self._changes.limiters.add(key)

    def keep_seats(self, now: float) -> None:
        """Renew the seats of calls in flight, before anybody who waits for one is served."""
        for share in list(self._shares.values()):
            self._keep_seats(share, now)

    def balance(self, now: float, end: bool = False) -> None:
        """Fill up what is used, give back what is not, or what somebody waits for; everything at the `end`."""
        if not self._shares:
            return
        core, folded = self._core, False
        if now >= self._look_at:
            self._look_at = now + _LOOK_FOR_LOST
            self._abandon_lost(now)
        for lot, share in self._shares.copy().items():
            wanted = core.waits(*lot) or self._crowded(share, now)
            folded = folded or wanted
            if wanted or end or self._over(share) or not self._kept_up(share, now):
                self._fold(share, now)
        if folded:
            core.serve(now)
        self._after(self._note_spent)

    def _kept_up(self, share: Share, now: float) -> bool:
        """Fill a share up if its calls need it; False where it is not used, or too little is left for it."""
        if not share.taken or now - share.latest > AHEAD:
            return now < share.until
        return not self._low(share, now) or self._fill(share, now)

    def _low(self, share: Share, now: float) -> bool:
        want = self._wanted(share)
        return (
            share.until - now < AHEAD / 2
            or (share.hold.limit_key is not None and (share.requests < want / 2 or share.seats < LEAST / 2))
            or share.money < want * share.amount / 2
        )

    def _over(self, share: Share) -> bool:
        """A budget was made smaller than what is spent and held."""
        return any(self._core.left(account) < 0 for account in share.accounts)

    def _crowded(self, share: Share, now: float) -> bool:
        """The provider said something, or no seat is left for others."""
        key = share.hold.limit_key
        limiter = None if key is None or not share.seats else self._core.known_limiter(key, now)
        return limiter is not None and (limiter.held_back(now) or limiter.free_seats(now) < 1)

    def _note_spent(self) -> None:
        """Callers are told what is spent, for the soft thresholds of budgets."""
        book = self._core.accounts
        for share in self._shares.values():
            part = share.hold.drawn
            if share.lot[1] and part is not None:
                entries = [book.entries.get(key) for key in share.lot[1]]
                if None not in entries:
                    share.told = part.written, tuple([entry.spent for entry in entries if entry is not None])

    # -- ends out of the ordinary --------------------------------------------------------------------------------------
    def _part(self, share: Share, reservation: Reservation, cost: int) -> Hold:
        """What a call that ends at `cost` held, taken out of the share's hold."""
        hold, part = share.hold, share.hold.drawn
        assert part is not None
        taken = 0
        if hold.accounts:
            self._changes.resize(hold)
            taken = min(cost, hold.amount)
            hold.amount -= taken
            part.written += cost
            if taken < cost:  # it cost more than was held for it
                with brief(self._lock):
                    share.money += cost - taken
                self._changes.undone.append(partial(self._take_again, share, cost - taken))
        return Hold(reservation.id, hold.accounts, taken, hold.limit_key, reservation.debit, inf, reservation.stub)

    def _take_again(self, share: Share, money: int) -> None:
        with brief(self._lock):
            share.money -= money

    def _abandon_lost(self, now: float) -> None:
        """Charge calls whose lease has ended: nobody will settle them."""
        for share in list(self._shares.values()):
            with brief(self._lock):
                lost = [each for each in share.live.values() if each.granted_at + each.lease <= now]
            for reservation in lost:
                cost = reservation.amount if reservation.accounts else 0
                ended = Settlement(reservation.id, cost, None, True, True, None)
                with brief(self._lock):
                    if not share.end(reservation, ended):
                        continue
                self._changes.undone.append(partial(self._find_again, share, reservation, cost))
                self._core.abandon(self._part(share, reservation, cost), now)

    def _find_again(self, share: Share, reservation: Reservation, cost: int) -> None:
        with brief(self._lock):
            share.live[reservation.id] = reservation
            share.in_flight += cost
            share.charged -= cost
            share.seats -= 1

    def _settle_dead(self, share: Share, done: Settlement, reservation: Reservation, now: float) -> None:
        """Of a share that was charged whole: what this call cost takes the place of its part."""
        core, changes = self._core, self._changes
        if done.record is not None:
            core.appended.append(done.record)
        hold = core.take_abandoned(share.hold.id) if share.hold.accounts else None
        if hold is None:
            return
        was = min(reservation.amount, hold.amount)
        core.accounts.mend(hold.accounts, was, True, done.cost or 0, done.estimated)
        hold.amount -= was
        changes.abandoned[hold.id] = hold
        if hold.stub is not None:
            core.replaced.append(hold.stub._replace(outcome="abandoned", cost_nano=hold.amount, estimated=True))


def _forget(charged: int, in_flight: int, calls: int) -> None:
    """In place of the cell of a share that is dead."""
