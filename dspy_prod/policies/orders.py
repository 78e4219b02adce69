"""What operators say, as values, and the board on which it stands as it was read: see `fleet`."""

from __future__ import annotations

import getpass
import os
import socket
from typing import Final, NamedTuple

from dspy_prod.errors import StoppedError
from dspy_prod.policies.breaker import circuit
from dspy_prod.policies.breaker.transitions import SAID, OperatorMove
from dspy_prod.stores.board import Row, Rows

STOP: Final = "stop"
ORDER: Final = "order"


class Stop(NamedTuple):
    """What an operator has stopped: calls for it are refused, and nothing is sent for them.

    Attributes:
        scope: `program`, `model`, `tenant` or `all`. value: which; empty for all.
        reason: why. by: who said so.
        since: when, seconds since the epoch. until: until when; None: until it is resumed.
    """

    scope: str
    value: str
    reason: str
    by: str
    since: float
    until: float | None

    def over(self, now: float) -> bool:
        """Whether it has ended by itself."""
        return self.until is not None and self.until <= now

    @property
    def target(self) -> str:
        """In words: `program 'triage'`."""
        return f"{self.scope} {self.value!r}" if self.value else "everything"

    def error(self, now: float, model: str, route: str) -> StoppedError:
        """What a caller is told."""
        left = None if self.until is None else max(0.0, self.until - now)
        why = f": {self.reason}" if self.reason else ""
        later = "until it is resumed (dspy-prod resume)" if left is None else f"for another {left:.0f} s"
        return StoppedError(
            f"An operator has stopped {self.target}{why}; nothing is sent {later}", retry_after=left, model=model,
            route=route, scope=self.scope, value=self.value, why=self.reason,
        )  # fmt: skip


class Order(NamedTuple):
    """What an operator has said of the circuits of a route.

    Attributes:
        target: a model, or the address and model of a route.
        move: what. reason, by, since: as of a stop.
        number: another one each time that something is said.
    """

    target: str
    move: OperatorMove
    reason: str
    by: str
    since: float
    number: str

    @property
    def cause(self) -> str:
        """For callers and listeners."""
        return f"{SAID[self.move]}: {self.reason}" if self.reason else SAID[self.move]


class View:
    """The board as it was read.

    Attributes:
        stops: by scope and value. orders: by target. circuits: by key.
    """

    __slots__ = ("circuits", "orders", "stops")

    def __init__(self, rows: Rows) -> None:
        self.stops: dict[tuple[str, str], Stop] = {}
        self.orders: dict[str, Order] = {}
        self.circuits: dict[str, Row] = {}
        for (kind, key), row in rows.items():
            try:
                if kind == circuit.KIND:
                    self.circuits[key] = row
                elif kind == STOP:
                    stop = Stop(**row)
                    self.stops[stop.scope, stop.value] = stop
                elif kind == ORDER:
                    self.orders[key] = Order(**row)
            except (TypeError, KeyError):  # of another version
                continue

    def order(self, place: str, model: str) -> Order | None:
        """The latest word on a route: on its address and model, or on its model wherever it is."""
        found = [order for each in (place, model) if (order := self.orders.get(each)) is not None]
        return max(found, key=lambda order: order.since) if found else None


def operator() -> str:
    """How who speaks from this process is called in the journal."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, in a container
        user = "somebody"
    return f"{user} on {socket.gethostname()} (process {os.getpid()})"
