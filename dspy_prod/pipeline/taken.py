"""What an attempt has taken of the `Run` it belongs to, until it is settled."""

from __future__ import annotations

from dataclasses import dataclass, field

from dspy_prod.policies.run import Run
from dspy_prod.stores.base import Reservation, Settlement, Store


@dataclass(slots=True, eq=False)
class Taken:
    """What an attempt has taken of its run.

    Attributes:
        held: by dimension, what the run's store has granted.
    """

    run: Run
    held: dict[str, Reservation] = field(default_factory=dict)

    def settle(self, cost: int | None, tokens: int | None, sent: bool, estimated: bool) -> None:
        """Replace what is held by what the attempt came to; None: all that is held. Posted."""
        used = {"usd": cost, "calls": int(sent), "tokens": tokens}
        for name, reservation in self.held.items():
            came_to = used[name]
            amount = reservation.amount if came_to is None else came_to
            told = estimated if name == "usd" else came_to is None
            self.run.store.settle(reservation, Settlement(reservation.id, amount, 0, sent, told, None))


def returned(store: Store, reservation: Reservation) -> None:
    """Give back what is not used; it may still be waiting, or be granted meanwhile."""
    if not store.withdraw(reservation):
        store.settle(reservation, Settlement(reservation.id, 0, 0, False, False, None))
