"""The board of a namespace: the little that all its workers must know at once, see `policies.fleet` for what it is.

A board holds rows: small JSON objects by a kind and a key. A change of a row is decided on the row as it is, atomically
for all workers, written durably with a line in the journal, and noticed by the others through a token: they look at it
before each call, which costs nanoseconds, and read the rows only when it is another one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final, NamedTuple, Protocol

from dspy_prod.errors import StoreUnavailableError

MOST_ROWS: Final = 1_000
"""Rows of one kind; of more, those that were changed longest ago and say no more than none would are forgotten."""
MOST_NOTES: Final = 1_000
"""Lines of the journal."""

Row = Mapping[str, Any]
Rows = Mapping[tuple[str, str], Row]
"""By kind and key."""


ALERT: Final = "alert"
"""The kind of rows by which one of several workers tells what all of them have heard."""


class Note(NamedTuple):
    """A line of the journal.

    Attributes:
        at: seconds since the epoch, store time.
        what: what was done, in a word. target: to what.
        by: who did it. reason: why, as text without secrets.
    """

    at: float
    what: str
    target: str
    by: str
    reason: str


class Change(NamedTuple):
    """What becomes of a row.

    Attributes:
        row: its new content; None removes it.
        note: (what, target, by, reason) for the journal; None: it is not worth a line.
    """

    row: Row | None
    note: tuple[str, str, str, str] | None = None


Decide = Callable[[Row | None, float], Change | None]
"""From a row (None: there is none) and store time to what becomes of it; None: it stays. May be asked again."""


def decided(decide: Decide, row: Row | None, now: float) -> Change | StoreUnavailableError | None:
    """What `decide` says, or the error for whoever asked: it must not end the transaction that others are in."""
    try:
        return decide(row, now)
    except Exception as error:
        return StoreUnavailableError(f"The change of a row cannot be decided: {error!r}")


class Board(Protocol):
    """What all workers of a namespace must know at once. Thread-safe."""

    @property
    def token(self) -> object:
        """Another one than before once a row may have changed. Never waits, never raises."""
        ...

    def rows(self) -> Rows:
        """All rows.

        Raises:
            StoreUnavailableError: they cannot be read.
        """
        ...

    def change(self, kind: str, key: str, decide: Decide) -> Future[Row | None]:
        """Change a row. Posted: never waits or raises.

        The future has the row as it is afterwards, once that is durable, or a StoreUnavailableError. Its callbacks may
        run on the store's writer thread, and must not wait for the store.
        """
        ...

    def journal(self, most: int) -> list[Note]:
        """The latest lines of the journal, newest first.

        Raises:
            StoreUnavailableError: they cannot be read.
        """
        ...

    def now(self) -> float:
        """Store time."""
        ...


def idle(kind: str, row: Row, now: float) -> bool:
    """Whether a row says no more than none would, so that it may be forgotten where there are too many."""
    if kind == "circuit":
        return row.get("state") == "closed"
    if kind == ALERT:
        return bool(row.get("until", 0.0) <= now)
    if kind == "stop":
        until = row.get("until")
        return until is not None and until <= now
    return row.get("move") == "reset"


def surplus(rows: Mapping[str, tuple[float, Row]], kind: str, now: float) -> list[str]:
    """The keys of rows of one kind that are to be forgotten before another one is added.

    Args:
        rows: when each was changed, and what it says.
    """
    over = len(rows) - MOST_ROWS + 1
    if over <= 0:
        return []
    spare = sorted(rows, key=lambda key: (not idle(kind, rows[key][1], now), rows[key][0]))
    return spare[: max(over, MOST_ROWS // 10)]


def note_of(content: str | bytes) -> Note | None:
    """A line of the journal as stores write it, a JSON array; None of one that is damaged."""
    try:
        at, what, target, by, reason = json.loads(content)
        return Note(float(at), str(what), str(target), str(by), str(reason))
    except (TypeError, ValueError):
        return None
