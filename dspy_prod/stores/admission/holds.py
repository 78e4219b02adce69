"""Holds, and what a durable store has to write back. Part of the admission core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from dspy_prod.options import RateLimit
from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.limiter import Debit
from dspy_prod.stores.base import AccountState, Refusal, Reservation, Terms


@dataclass(slots=True, eq=False)
class Drawn:
    """What makes a hold one for several calls, see `share.py`.

    Attributes:
        cell: where the process notes what of the hold its calls use.
        written: nano-USD charged from the hold so far, by the count of the cell.
        seats: seats of the limiter that the process has, in use or not.
        end: the end of their lease, see `Seats`.
    """

    cell: int
    written: int
    seats: int = 0
    end: int = 0


@dataclass(slots=True, eq=False)
class Hold:
    """Capacity and money reserved for one attempt until it is settled or its lease ends; or drawn for several.

    `lease_until` is the store time at which its own worker gives it up (`Reservation.lease`). `owed` is what its
    worker owes for it if it is gone, in nano-USD; None: all of it.
    """

    id: str
    accounts: tuple[str, ...]
    amount: int
    limit_key: str | None
    debit: Debit | None
    lease_until: float
    _stub: CallRecord | Callable[[], CallRecord] | None
    drawn: Drawn | None = None
    owed: int | None = None

    @property
    def stub(self) -> CallRecord | None:
        """The record to write if the holder dies."""
        stub = self._stub
        return stub if stub is None or isinstance(stub, CallRecord) else stub()


class Backing(Protocol):
    """Where a durable store's core finds state that it does not have in memory.

    Attributes:
        owner: this process's id.
    """

    owner: str

    def load_account(self, key: str) -> AccountState | None: ...

    def load_terms(self, title: str) -> Terms | None: ...

    def load_limiter(self, key: str) -> tuple[bytes, RateLimit] | None:
        """The dumped state, and the settings it was used with."""
        ...

    def load_abandoned(self, id: str) -> Hold | None:
        """A hold that was charged as abandoned, by whichever process."""
        ...

    def load_own(self) -> list[Hold]:
        """The holds that are there as this process's: after a loss, those that an older copy brought back."""
        ...


class Changes:
    """What the core did since the last commit of a durable store.

    Attributes:
        verdicts: reservations decided; their `state` is set only after the commit, for a grant must be durable first.
        limiters: keys of limiters to write back.
        added, removed: holds made and ended; one that was both never touches the disk.
        resized: holds of several calls that hold more or less than before, each with what it held.
        undone: what else has to be done if nothing of all this can be written.
        bounds: the limits in nano-USD that money was drawn ahead under, by account.
        reaped: ids of other processes' holds that ended here.
        abandoned: holds charged in full because their worker is gone; kept for a late settlement.
        forgiven: ids of abandoned holds whose charge was replaced.
        stray: holds of this process that are in the store and have ended: an older copy brought them back. None where
            nothing is carried over; what is must be written onto what it was made of.
    """

    __slots__ = (
        *("abandoned", "added", "bounds", "forgiven", "limiters", "reaped", "removed", "resized", "stray"),
        *("undone", "verdicts"),
    )

    def __init__(self) -> None:
        self.verdicts: list[tuple[Reservation, int, Refusal | None]] = []
        self.limiters: set[str] = set()
        self.added: dict[str, Hold] = {}
        self.removed: dict[str, Hold] = {}
        self.reaped: list[str] = []
        self.abandoned: dict[str, Hold] = {}
        self.forgiven: set[str] = set()
        self.resized: dict[Hold, tuple[int, Drawn]] = {}
        self.undone: list[Callable[[], None]] = []
        self.bounds: dict[str, int] = {}
        self.stray: dict[str, Hold] | None = None

    def resize(self, hold: Hold) -> None:
        """Note that a hold of several calls is about to hold something else."""
        if hold not in self.resized:
            assert hold.drawn is not None
            self.resized[hold] = hold.amount, replace(hold.drawn)

    def undo(self) -> None:
        """Holds are again what was last committed."""
        for hold, (amount, drawn) in self.resized.items():
            hold.amount, hold.drawn = amount, drawn
        for undo in self.undone:
            undo()

    def end(self, hold: Hold) -> None:
        """Note that one of this process's holds ended."""
        if self.added.pop(hold.id, None) is None:
            self.removed[hold.id] = hold

    def clear(self) -> None:
        """All is written (or given up)."""
        self.verdicts.clear()
        self.limiters.clear()
        self.added.clear()
        self.removed.clear()
        self.reaped.clear()
        self.abandoned.clear()
        self.forgiven.clear()
        self.resized.clear()
        self.undone.clear()
        self.bounds.clear()
        self.stray = None
