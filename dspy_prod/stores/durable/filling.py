"""How a share of capacity is begun, filled up and given back, inside a transaction of the writer.

Nothing of a share is usable before its hold is durable, and nothing of it is lost when a transaction cannot be: each
step says how it is undone. When that is done is decided in `drawing.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Final

from dspy_prod.records import CallRecord
from dspy_prod.runtime.brief import brief
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.holds import Changes, Drawn, Hold
from dspy_prod.stores.admission.limiter import Debit, LimiterState
from dspy_prod.stores.admission.share import Lot, Share
from dspy_prod.stores.admission.window import AHEAD
from dspy_prod.stores.base import Reservation
from dspy_prod.stores.durable import drawn
from dspy_prod.stores.durable.tables import CELLS, Cells

LEAST: Final = 4
"""Calls; a share for fewer is not worth it."""
PART: Final = 100
"""A share takes at most this part of what is left of a budget."""


class Filling:
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

    def _begin(self, lot: Lot, reservation: Reservation) -> Share | None:
        with brief(self._lock):  # it may move to another file, and a note that is made meanwhile must not be lost
            cell = self._cells.take() if len(self._shares) < CELLS else None
        if cell is None:
            return None
        charged, _, _ = self._cells.read(cell)
        id = uuid.uuid4().hex
        hold = Hold(id, lot[1], 0, lot[0], None, inf, _stub(reservation, id), Drawn(cell, charged))
        share = Share(hold, reservation, partial(self._cells.note, cell), charged, self._drawn)
        share.note(charged, 0, 0)
        self._core.holds[id] = self._changes.added[id] = hold
        with brief(self._lock):
            self._shares[lot] = share
        self._changes.undone.append(lambda: self._end(share))
        return share

    def _fill(self, share: Share, now: float) -> bool:
        """Draw for the calls to be expected; False where so little is left that each is to be decided by itself."""
        core, hold, want = self._core, share.hold, self._wanted(share)
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
            for account in share.accounts:
                core.accounts.use(account, now)
                self._changes.bounds[account.key] = core.terms.limit(account)
        self._changes.undone.append(partial(_count_again, share, share.taken, share.amount, share.size))
        share.taken, share.amount, share.size = 0, share.amount * 7 // 8, share.size * 7 // 8
        self._after(partial(self._open, share, one, want, want * share.size, max(0, seats), max(0, money), now + AHEAD))
        return True

    def _open(
        self, share: Share, one: Debit | None, requests: int, tokens: int, seats: int, money: int, until: float
    ) -> None:
        """What was drawn is durable."""
        with brief(self._lock):
            if share.one is not None and share.requests:
                self._unused.append((share, share.one, share.requests, share.tokens))
            share.one = one
            share.requests, share.tokens = (requests, tokens) if one is not None else (0, 0)
            share.seats += seats
            share.money += money
            share.until = until

    def _wanted(self, share: Share) -> int:
        """How many calls a share should hold, by how many came since it was looked at last."""
        return max(2 * LEAST, min(2 * share.taken, self._cells.calls))

    def _keep_seats(self, share: Share, now: float) -> None:
        """Calls in flight hold their seats as long as the process lives."""
        hold, part, key = share.hold, share.hold.drawn, share.hold.limit_key
        if part is None or key is None or not part.seats or self._fresh(part, now):
            return
        limiter = self._core.known_limiter(key, now)
        if limiter is not None:
            self._changes.resize(hold)
            self._renew(hold, limiter, now, 0)
            self._changes.limiters.add(key)

    def _fresh(self, part: Drawn, now: float) -> bool:
        """Whether seats were taken so lately that they need no renewal. They are renewed as often as the lease of the
        process, so that they last as long where it cannot write for a while; their end is told in whole seconds."""
        return part.end - now > self._lease * 2 / 3 + 1

    def _renew(self, hold: Hold, limiter: LimiterState, now: float, more: int) -> None:
        """Keep the seats that the process has, and take some more."""
        part = hold.drawn
        assert part is not None
        if part.seats and self._fresh(part, now):
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
        with brief(lock):
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
            with brief(lock):
                share.money += money
                share.seats += seats
            if one is not None:
                self._unused.append((share, one, requests, tokens))

        self._changes.undone.append(undo)
        if over:
            core.holds.pop(hold.id, None)
            self._changes.end(hold)
            self._after(partial(self._end, share))

    def _end(self, share: Share) -> None:
        with brief(self._lock):
            if self._shares.get(share.lot) is share:
                del self._shares[share.lot]
        if share.hold.drawn is not None:
            self._cells.leave(share.hold.drawn.cell)


def _count_again(share: Share, taken: int, amount: int, size: int) -> None:
    share.taken, share.amount, share.size = share.taken + taken, max(share.amount, amount), max(share.size, size)


def _stub(reservation: Reservation, id: str) -> CallRecord | None:
    """The record of what a process that died used of a share, which is not known call by call."""
    made = reservation.stub
    record = made if made is None or isinstance(made, CallRecord) else made()
    if record is None:
        return None
    return record._replace(
        id=id,
        call_id=id,
        attempt=1,
        user=None,
        tenant=None,
        session=None,
        tags=(),
        trace_id=None,
        prompt_version=None,
        run=None,
    )
