"""Capacity drawn ahead: how shares are begun, filled up and given back, inside the writer's transactions.

Calls of one kind that follow close on each other are admitted from a share (`share.py`): one hold in the file for
many calls. A share is small near a limit, and where it would be too small there is none: then each call is decided
by itself, as if there were no shares. Nothing of a share is usable before its hold is durable, nor later than
`AHEAD` seconds after it was looked at last; what nobody used by then, or somebody waits for, goes back.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Final

from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.holds import Changes, Drawn, Hold
from dspy_prod.stores.admission.limiter import Debit, LimiterState
from dspy_prod.stores.admission.share import Lot, Share, lot_of
from dspy_prod.stores.admission.window import AHEAD
from dspy_prod.stores.base import Reservation, Settlement
from dspy_prod.stores.sqlite import drawn
from dspy_prod.stores.sqlite.cells import CELLS, Cells

CLOSE: Final = 0.1
"""Seconds within which a second call of a kind has to come for a share to be begun."""
LEAST: Final = 4
"""Calls; a share for fewer is not worth it."""
MOST: Final = 512
"""Calls that a share is filled up for at once, at most."""
PART: Final = 100
"""A share takes at most this part of what is left of a budget."""
_LOOK_FOR_LOST: Final = 1.0
_KINDS: Final = 1000


class Drawing:
    """The shares of one process, as its writer sees them.

    Args:
        core: decides; a share is one of its holds.
        shares: what callers' threads use.
        cells: where it is noted what of the shares is used.
        lease: seconds for which seats are held without being renewed.
        after: takes what is to be done once the transaction is durable.
    """

    def __init__(
        self,
        core: AdmissionCore,
        shares: drawn.Drawn,
        cells: Cells,
        lease: float,
        after: Callable[[Callable[[], None]], None],
    ) -> None:
        assert core.changes is not None
        self._core = core
        self._changes: Changes = core.changes
        self._drawn = shares
        self._shares = shares.shares
        self._lock = shares.lock
        self._cells = cells
        self._lease = lease
        self._after = after
        self._latest: dict[Lot, float] = {}  # when a call of a kind was last decided by itself
        self._unused: list[tuple[Share, Debit, int, int]] = []  # of blocks that newer ones replaced
        self._look_at = -inf

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
        with self._lock:
            for share in self._shares.values():
                share.close()
                share.dead, share.note = True, _forget
            self._shares.clear()
        self._unused.clear()
        self._cells.forget()

    def moved(self) -> None:
        """The file was deleted or replaced."""
        self._cells.lost()

    def close(self) -> None:
        """Nothing can be written: nobody is admitted from a share."""
        with self._lock:
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
        for share, one, requests, tokens in unused:
            key = share.hold.limit_key
            limiter = None if key is None else self._core.known_limiter(key, now)
            if limiter is not None and key is not None:
                limiter.undraw(one, now, requests, tokens)
                self._changes.limiters.add(key)

    def balance(self, now: float, end: bool = False) -> None:
        """Fill up what is used, give back what is not, or what somebody waits for; everything at the `end`."""
        if not self._shares:
            return
        core, folded = self._core, False
        if now >= self._look_at:
            self._look_at = now + _LOOK_FOR_LOST
            self._abandon_lost(now)
        for lot, share in list(self._shares.items()):
            wanted = core.waits(*lot) or self._crowded(share, now)
            folded = folded or wanted
            if wanted or end or self._over(share) or not self._kept_up(share, now):
                self._fold(share, now)
            self._keep_seats(share, now)
        if folded:
            core.serve(now)
        self._after(self._note_spent)

    def _kept_up(self, share: Share, now: float) -> bool:
        """Fill a share up if its calls need it; False where it is not used, or too little is left for it."""
        if not share.taken or now - share.latest > AHEAD:
            return now < share.until
        return not self._low(share, now) or self._fill(share, now)

    def _low(self, share: Share, now: float) -> bool:
        want = _wanted(share)
        return (
            share.until - now < AHEAD / 2
            or (share.hold.limit_key is not None and (share.requests < want / 2 or share.seats < LEAST / 2))
            or share.money < want * share.amount / 2
        )

    def _over(self, share: Share) -> bool:
        """A budget was made smaller than what is spent and held."""
        return any(self._core.left(account) < 0 for account in share.accounts)

    def _crowded(self, share: Share, now: float) -> bool:
        """No seat is left for others."""
        key = share.hold.limit_key
        limiter = None if key is None or not share.seats else self._core.known_limiter(key, now)
        return limiter is not None and limiter.free_seats(now) < 1

    # -- a share's life ------------------------------------------------------------------------------------------------
    def _begin(self, lot: Lot, reservation: Reservation) -> Share | None:
        cell = self._cells.take() if len(self._shares) < CELLS else None
        if cell is None:
            return None
        charged, _, _ = self._cells.read(cell)
        id = uuid.uuid4().hex
        hold = Hold(id, lot[1], 0, lot[0], None, inf, _stub(reservation, id), Drawn(cell, charged))
        share = Share(hold, reservation, partial(self._cells.note, cell), charged)
        share.note(charged, 0, 0)
        self._core.holds[id] = self._changes.added[id] = hold
        with self._lock:
            self._shares[lot] = share
        self._changes.undone.append(lambda: self._end(share))
        return share

    def _fill(self, share: Share, now: float) -> bool:
        """Draw for the calls to be expected; False where so little is left that each is to be decided by itself."""
        core, hold, want = self._core, share.hold, _wanted(share)
        key, one, seats = hold.limit_key, None, 0
        limiter = None
        if key is not None:
            assert share.limit is not None
            limiter = core.limiter_for(key, share.limit, now)
            want = limiter.drawable(now, share.size, want)
            if want < LEAST:
                return False
            seats = int(min(max(LEAST, len(share.live)) - share.seats, limiter.free_seats(now) // 8))
            if share.seats + seats < 1:
                return False
        money = 0
        if hold.accounts:
            most = min(map(core.left, share.accounts)) // PART
            money = min(most, want * share.amount - share.money)
            if share.money + money < LEAST * share.amount:
                return False
        self._changes.resize(hold)
        if limiter is not None and key is not None:
            one = limiter.draw(now, want, want * share.size)
            self._renew(hold, limiter, now, max(0, seats))
            self._changes.limiters.add(key)
        if money > 0:
            hold.amount += money
            core.accounts.hold(hold.accounts, money)
        share.taken, share.amount, share.size = 0, share.amount * 7 // 8, share.size * 7 // 8
        self._after(partial(self._open, share, one, want, want * share.size, max(0, seats), max(0, money), now + AHEAD))
        return True

    def _open(
        self, share: Share, one: Debit | None, requests: int, tokens: int, seats: int, money: int, until: float
    ) -> None:
        """What was drawn is durable."""
        with self._lock:
            if share.one is not None and share.requests:
                self._unused.append((share, share.one, share.requests, share.tokens))
            share.one = one
            share.requests, share.tokens = (requests, tokens) if one is not None else (0, 0)
            share.seats += seats
            share.money += money
            share.until = until

    def _keep_seats(self, share: Share, now: float) -> None:
        """Calls in flight hold their seats as long as the process lives."""
        hold, part, key = share.hold, share.hold.drawn, share.hold.limit_key
        if part is None or key is None or not part.seats or part.end - now > self._lease / 2:
            return
        limiter = self._core.known_limiter(key, now)
        if limiter is not None:
            self._changes.resize(hold)
            self._renew(hold, limiter, now, 0)
            self._changes.limiters.add(key)

    def _renew(self, hold: Hold, limiter: LimiterState, now: float, more: int) -> None:
        """Keep the seats that the process has, and take some more."""
        part = hold.drawn
        assert part is not None
        if part.seats and part.end - now > self._lease / 2:
            limiter.take_seats(now, part.end - now, more)
        else:
            limiter.leave_seats(part.end, part.seats)
            part.end = limiter.take_seats(now, self._lease, part.seats + more)
        part.seats += more

    def _fold(self, share: Share, now: float) -> None:
        """Give back what no call uses; the share ends when nothing of it is in use."""
        core, hold, lock = self._core, share.hold, self._lock
        part = hold.drawn
        assert part is not None
        with lock:
            share.close()
            money, share.money = max(0, share.money), min(0, share.money)
            requests, tokens, share.requests, share.tokens = share.requests, share.tokens, 0, 0
            seats, share.seats = share.seats, 0
            one, share.one = share.one, None
            share.taken = 0
            over = not share.live and not share.pending
        if not (over or money or requests or tokens or seats):
            return
        self._changes.resize(hold)
        if money:
            hold.amount -= money
            core.accounts.charge(hold.accounts, money, 0, False)
        limiter = None if hold.limit_key is None else core.known_limiter(hold.limit_key, now)
        if limiter is not None and hold.limit_key is not None:
            if one is not None:
                limiter.undraw(one, now, requests, tokens)
            limiter.leave_seats(part.end, seats)
            part.seats -= seats
            self._changes.limiters.add(hold.limit_key)

        def undo() -> None:
            with lock:
                share.money += money
                share.seats += seats

        self._changes.undone.append(undo)
        if over:
            core.holds.pop(hold.id, None)
            self._changes.end(hold)
            self._after(partial(self._end, share))

    def _end(self, share: Share) -> None:
        with self._lock:
            if self._shares.get(share.lot) is share:
                del self._shares[share.lot]
        if share.hold.drawn is not None:
            self._cells.leave(share.hold.drawn.cell)

    def _note_spent(self) -> None:
        """Callers are told what is spent, for the soft thresholds of budgets."""
        book = self._core.accounts
        with self._lock:
            for share in self._shares.values():
                part = share.hold.drawn
                if share.lot[1] and part is not None:
                    entries = [book.entries.get(key) for key in share.lot[1]]
                    if None not in entries:
                        share.spent = tuple([entry.spent for entry in entries if entry is not None])
                        share.seen = part.written

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
                with self._lock:
                    share.money += cost - taken
                self._changes.undone.append(partial(self._take_again, share, cost - taken))
        return Hold(reservation.id, hold.accounts, taken, hold.limit_key, reservation.debit, inf, reservation.stub)

    def _take_again(self, share: Share, money: int) -> None:
        with self._lock:
            share.money -= money

    def _abandon_lost(self, now: float) -> None:
        """Charge calls whose lease has ended: nobody will settle them."""
        for share in list(self._shares.values()):
            with self._lock:
                lost = [each for each in share.live.values() if each.granted_at + each.lease <= now]
            for reservation in lost:
                cost = reservation.amount if reservation.accounts else 0
                ended = Settlement(reservation.id, cost, None, True, True, None)
                with self._lock:
                    if not share.end(reservation, ended):
                        continue
                self._changes.undone.append(partial(self._find_again, share, reservation, cost))
                self._core.abandon(self._part(share, reservation, cost), now)

    def _find_again(self, share: Share, reservation: Reservation, cost: int) -> None:
        with self._lock:
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


def _wanted(share: Share) -> int:
    return max(2 * LEAST, min(2 * share.taken, MOST))


def _forget(charged: int, in_flight: int, calls: int) -> None:
    """In place of the cell of a share that is dead."""


def _stub(reservation: Reservation, id: str) -> CallRecord | None:
    """The record of what a process that died used of a share, which is not known call by call."""
    made = reservation.stub
    record = made if made is None or isinstance(made, CallRecord) else made()
    if record is None:
        return None
    return record._replace(
        id=id, call_id=id, attempt=1, user=None, tenant=None, session=None, tags=(), trace_id=None, prompt_version=None
    )
