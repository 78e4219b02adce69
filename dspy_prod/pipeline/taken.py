"""What an attempt has taken of the runs it belongs to, until it is settled."""

from __future__ import annotations

from dataclasses import dataclass, field

from dspy_prod.policies.run import Claim
from dspy_prod.stores.base import GRANTED, Reservation, Settlement, Store


@dataclass(slots=True, eq=False)
class Taken:
    """What an attempt has taken of its runs.

    Attributes:
        held: what the runs' stores were asked for, granted or not.
    """

    held: list[tuple[Claim, Reservation]] = field(default_factory=list)

    def settle(self, cost: int | None, tokens: int | None, sent: bool, estimated: bool) -> None:
        """Replace what is held by what the attempt came to; None: all that is held. Posted."""
        used = {"usd": cost, "calls": int(sent), "tokens": tokens}
        for claim, reservation in self.held:
            if reservation.state != GRANTED:
                returned(claim.store, reservation)
                continue
            came_to = used[claim.dimension]
            amount = reservation.amount if came_to is None else came_to
            told = estimated if claim.dimension == "usd" else came_to is None
            claim.store.settle(reservation, Settlement(reservation.id, amount, 0, sent, told, None))

    def give_back(self) -> None:
        """Give back what was asked for last."""
        claim, reservation = self.held[-1]
        returned(claim.store, reservation)
        del self.held[-1]


def returned(store: Store, reservation: Reservation) -> None:
    """Give back what is not used; it may still be waiting, or be granted meanwhile."""
    if not store.withdraw(reservation):
        store.settle(reservation, Settlement(reservation.id, 0, 0, False, False, None))
