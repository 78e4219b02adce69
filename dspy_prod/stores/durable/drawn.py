"""Calls admitted from what their process has drawn ahead: on the caller's thread, without a transaction.

The shares themselves are made, filled up and given back by `drawing.py`, inside the writer's transactions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from dspy_prod.runtime.brief import brief
from dspy_prod.stores.admission.share import Lot, Share, lot_of
from dspy_prod.stores.base import Reservation, Settlement


class Drawn:
    """The shares of one process and namespace.

    Attributes:
        lock: held while a share is read or changed.
        shares: by the kind of calls that they are for.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.lock = threading.Lock()
        self.shares: dict[Lot, Share] = {}
        self._now = now

    def admit(self, reservation: Reservation) -> bool:
        """Grant from a share; False where that is the writer's to decide."""
        share = self.shares.get(lot_of(reservation))
        if share is None:
            return False
        with brief(self.lock):
            return share.take(reservation, self._now())

    def settle(self, reservation: Reservation, done: Settlement) -> bool:
        """A call has ended; False when it was not admitted from a share of ours, or is in flight no more."""
        share = reservation.share
        if not isinstance(share, Share) or share.home is not self:
            return False
        with brief(self.lock):
            return share.end(reservation, done)

    def close(self, limit_key: str) -> None:
        """The provider said something: whoever comes now is decided by the writer."""
        for share in self._of_limiter(limit_key):
            with brief(self.lock):
                share.close()

    # -- reading -------------------------------------------------------------------------------------------------------
    def in_flight(self) -> int:
        """Calls in flight."""
        with brief(self.lock):
            return sum(len(share.live) for share in self.shares.values())

    def money(self, account: str) -> int:
        """Nano-USD held on an account that no call uses."""
        with brief(self.lock):
            return sum(max(0, share.money) for share in self.shares.values() if account in share.lot[1])

    def capacity(self, limit_key: str) -> tuple[int, int, int]:
        """(requests, tokens, seats) of a limiter that no call uses."""
        with brief(self.lock):
            found = [(share.requests, share.tokens, share.seats) for share in self._of_limiter(limit_key)]
        requests, tokens, seats = (sum(each) for each in zip((0, 0, 0), *found, strict=True))
        return requests, tokens, seats

    def _of_limiter(self, key: str) -> Iterator[Share]:
        return (share for share in list(self.shares.values()) if share.lot[0] == key)
