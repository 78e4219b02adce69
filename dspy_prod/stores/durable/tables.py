"""What the writer of a durable store reads from and writes to, wherever that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.holds import Backing, Hold
from dspy_prod.stores.base import AccountState, CachedAnswer
from dspy_prod.stores.durable.served import Served
from dspy_prod.stores.programs import ProgramCall


class ChangedError(Exception):
    """Others changed what a transaction was decided on: nothing of it was written, and it is to be decided again."""


class DoubtError(Exception):
    """Whether a transaction was written is not known: it stays as it is, and another `commit` finds out."""


CELLS: Final = 64
"""Shares that a process may have at once."""


class Cells(Protocol):
    """Where a process notes what its calls use of its shares, so that its death does not take it along.

    Attributes:
        calls: how many a share is filled up for at once, at most.
    """

    calls: int

    def take(self) -> int | None:
        """A cell of one's own; None when there is none. What it said last stays, for `Share` counts on from there."""
        ...

    def leave(self, cell: int) -> None: ...

    def note(self, cell: int, charged: int, in_flight: int, calls: int) -> None: ...

    def read(self, cell: int) -> tuple[int, int, int]:
        """What `note` wrote."""
        ...

    def forget(self) -> None:
        """All of them were read by others, and count no more."""
        ...

    def lost(self) -> None:
        """What the store keeps was deleted or replaced, perhaps the cells with it."""
        ...

    def close(self, delete: bool) -> None:
        """No share is begun any more; they may go when nothing of what was drawn is left."""
        ...


class Caching(Protocol):
    """The answers that a store keeps, inside a transaction."""

    def put(self, key: bytes, answer: CachedAnswer, max_entries: int, max_bytes: int, now: float) -> None: ...

    def touch(self, key: bytes, now: float) -> None: ...

    def clear(self) -> None: ...


class Finding(Protocol):
    """The ledger of a store, inside a transaction."""

    def find(self, id: str) -> CallRecord | None: ...


class Appending(Protocol):
    """The program calls of a store, inside a transaction."""

    def put(self, call: ProgramCall) -> None: ...


class Reading(Protocol):
    """Another connection of a store, which ends with it."""

    def close(self) -> None: ...

    def leave(self) -> None:
        """`close`, unless the process is forking: then it is closed already."""
        ...


class Copying(Protocol):
    """What is done now and then beside the writer."""

    def committed(self) -> None: ...

    def end(self) -> None: ...


class Tables(Backing, Protocol):
    """One namespace of a durable store through one connection. Not thread-safe.

    Every method may raise what `is_environment` knows: then the store cannot be used, whatever was to be written.

    Attributes:
        kind: of which kind the store is, for the names of its threads.
        path: where it is, as it may be shown.
        noun: what to call it.
        served: cached answers, to be written by the transaction under way.
    """

    kind: str
    path: str
    noun: str
    served: list[Served]

    @property
    def cells(self) -> Cells: ...

    @property
    def ledger(self) -> Finding: ...

    @property
    def cache(self) -> Caching: ...

    @property
    def programs(self) -> Appending: ...

    # -- a transaction -------------------------------------------------------------------------------------------------
    def open(self) -> Any:
        """Connect, where that is not done yet."""
        ...

    def begin(self) -> None: ...

    def changed(self) -> bool:
        """Whether others have written since the last call."""
        ...

    def stale(self) -> bool:
        """`changed`, only looking."""
        ...

    def foresee(self, core: AdmissionCore, operations: Sequence[Any]) -> None:
        """These operations are about to be done: what they need may be fetched together."""
        ...

    def write(self, core: AdmissionCore, now: float) -> list[CallRecord]:
        """Write what the core changed; the records that could not be written whatever was tried."""
        ...

    def probe(self, now: float) -> None:
        """Write something in any case."""
        ...

    def commit(self) -> None:
        """Make what was written durable.

        Raises:
            ChangedError, DoubtError
        """
        ...

    def rollback(self) -> None:
        """Undo the transaction, if there is one."""
        ...

    # -- leases --------------------------------------------------------------------------------------------------------
    def owned(self) -> bool:
        """Whether this process's lease is still there: whoever reaps it deletes it."""
        ...

    def renew(self, until: float) -> None: ...

    def resign(self) -> None:
        """This process holds nothing any more. Where that cannot be written, the lease runs out."""
        ...

    def owners(self, now: float) -> int:
        """Other processes that hold something."""
        ...

    def expired(self, now: float, most: int) -> list[Hold]:
        """Holds of processes whose lease ran out; an owner without holds is deleted."""
        ...

    def sweep(self, now: float, most: int) -> bool:
        """Delete what nothing can refer to any more; whether there may be more."""
        ...

    # -- when it cannot be used ----------------------------------------------------------------------------------------
    def lost(self) -> bool:
        """Whether what it kept was deleted or replaced while in use."""
        ...

    def remembered(self) -> Mapping[str, AccountState]:
        """What accounts held before it was lost, as far as that is known here."""
        ...

    def forget(self) -> None:
        """The core has forgotten what it had in memory."""
        ...

    def lose(self) -> None:
        """Give up a connection that the parent process uses."""
        ...

    def is_environment(self, error: BaseException) -> bool:
        """The store is to blame, and not the values to be written."""
        ...

    def unavailable(self, error: BaseException) -> StoreUnavailableError:
        """What a person should read when the store cannot be used."""
        ...

    def failed(self, error: BaseException) -> None:
        """A transaction failed, and was undone: close what cannot be used any more."""
        ...

    def close(self) -> None:
        """Close the connection; `open` makes a new one."""
        ...
