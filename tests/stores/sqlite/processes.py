"""Processes that share a file, driven step by step in one thread, so that a machine of tests can interleave them."""

from __future__ import annotations

import uuid
from typing import Any

from dspy_prod.stores.base import GRANTED, PENDING, Reservation, Settlement
from dspy_prod.stores.durable.drawn import Drawn
from dspy_prod.stores.durable.transactions import Operation, Transactions
from dspy_prod.stores.sqlite.file import leave_open
from dspy_prod.stores.sqlite.tables import Tables


class Process:
    """What a `SqliteStore` is made of, without its thread: operations gather until `run` makes one transaction of them.

    Attributes:
        inbox: operations posted and not yet done.
        waiting: reservations that were put into line.
    """

    def __init__(self, path: str, clock: Any, lease: float = 30.0) -> None:
        self.tables = Tables(path, "test", uuid.uuid4().hex, synchronous="OFF", max_records=None)
        self.tables.open()
        self.drawn = Drawn(clock.time)
        self.inbox: list[Operation] = []
        self.problems: list[str] = []
        self.transactions = Transactions(
            self.tables, clock, lease, lambda name, _: self.problems.append(name), lambda _: None, self.drawn
        )

    @property
    def core(self) -> Any:
        return self.transactions.core

    def admit(self, reservation: Reservation) -> Reservation:
        """As `SqliteStore.admit`, and the transaction that decides."""
        if not self.drawn.admit(reservation):
            self.inbox.append((Transactions.admit, reservation, None))
            self.run()
        return reservation

    def settle(self, reservation: Reservation, done: Settlement) -> None:
        """As `SqliteStore.settle`: posted."""
        if self.drawn.settle(reservation, done):
            self.inbox.append((Transactions.settle_drawn, done, reservation))
        else:
            self.inbox.append((Transactions.settle, done, None))

    def run(self) -> None:
        """One transaction of everything posted, and what is told after it."""
        operations, self.inbox = self.inbox, []
        transactions, changes = self.transactions, self.core.changes
        try:
            transactions.run(operations, lambda _: None)
        except BaseException:
            transactions.undo()
            self.inbox = operations
            raise
        for reservation, state, refusal in changes.verdicts:
            if reservation.state == PENDING:
                reservation.refusal, reservation.state = refusal, state
        changes.clear()
        after, transactions.after = transactions.after, []
        for tell in after:
            tell()

    def end(self) -> None:
        """As `close`: give back what is drawn, write everything."""
        self.transactions.stopping = True
        self.run()
        self.transactions.resign()

    def kill(self) -> None:
        """As `kill -9`: nothing more is written."""
        connection, self.tables.connection = self.tables.connection, None
        if connection is not None:
            leave_open(connection)


def in_flight(reservation: Reservation) -> bool:
    """Whether a call was admitted."""
    return reservation.state == GRANTED
