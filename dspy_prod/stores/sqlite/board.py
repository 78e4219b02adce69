"""The board of a SQLite file: two tables, written through the store's writer, and a bell that others look at."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

import orjson

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.privacy.visible import carried
from dspy_prod.stores.board import MOST_NOTES, Change, Decide, Note, Row, Rows, decided, note_of, surplus
from dspy_prod.stores.durable.mailbox import Mailbox
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.sqlite.bell import Bell
from dspy_prod.stores.sqlite.reader import Reader
from dspy_prod.stores.sqlite.schema import unavailable
from dspy_prod.stores.sqlite.tables import Tables

_FIND: Final = "SELECT content FROM board WHERE ns = ? AND kind = ? AND key = ?"
_PUT: Final = "INSERT OR REPLACE INTO board VALUES (?, ?, ?, ?, ?)"
_DROP: Final = "DELETE FROM board WHERE ns = ? AND kind = ? AND key = ?"
_ALL: Final = "SELECT kind, key, content FROM board WHERE ns = ?"
_KIND: Final = "SELECT key, at, content FROM board WHERE ns = ? AND kind = ?"
_NOTE: Final = "INSERT INTO board_notes (ns, content) VALUES (?, ?)"
_FORGET: Final = (
    "DELETE FROM board_notes WHERE ns = ?1 AND seq <= "
    "(SELECT seq FROM board_notes WHERE ns = ?1 ORDER BY seq DESC LIMIT 1 OFFSET ?2)"
)
_NOTES: Final = "SELECT content FROM board_notes WHERE ns = ? ORDER BY seq DESC LIMIT ?"


class KeptBoard:
    """Reads beside the writer, and writes through it. Its methods are those of `Board`.

    Args:
        reader: used by nobody else, so that no reading of the ledger keeps a call waiting.
        now: the store's time.
    """

    def __init__(self, mailbox: Mailbox, reader: Reader, now: Callable[[], float]) -> None:
        self.now = now
        self._bell = Bell(reader.path)
        self.begin(mailbox, reader)

    def begin(self, mailbox: Mailbox, reader: Reader) -> None:
        """Use these from now on."""
        self._mailbox = mailbox
        self._reader = reader

    @property
    def token(self) -> object:
        return self._bell.token

    def rows(self) -> Rows:
        try:
            found = self._reader.read(lambda connection, ns: connection.execute(_ALL, (ns,)).fetchall())
        except (sqlite3.Error, OSError) as error:
            raise unavailable(self._reader.path, error) from error
        return {(kind, key): row for kind, key, content in found if (row := _row(content)) is not None}

    def change(self, kind: str, key: str, decide: Decide) -> Future[Row | None]:
        changed: Future[Row | None] = Future()
        rung: list[bool] = []
        key = carried(key)

        def put(_: Any, tables: Tables, now: float) -> Row | StoreUnavailableError | None:
            assert tables.connection is not None
            found = tables.connection.execute(_FIND, (tables.ns, kind, key)).fetchone()
            row = None if found is None else _row(found[0])
            change = decided(decide, row, now)
            if not isinstance(change, Change):
                return row if change is None else change
            rung.append(True)
            self._bell.begin()
            self._write(tables.connection, tables.ns, kind, key, change, now, new=found is None)
            return change.row

        told: Future[Row | StoreUnavailableError | None] = Future()
        told.add_done_callback(lambda told: self._tell(told, changed, bool(rung)))
        if not self._mailbox.post((Transactions.answer, told, put)):
            told.set_exception(StoreUnavailableError(f"The store {self._reader.path} is closed"))
        return changed

    def _write(
        self, connection: sqlite3.Connection, ns: int, kind: str, key: str, change: Change, now: float, new: bool
    ) -> None:
        if change.row is None:
            connection.execute(_DROP, (ns, kind, key))
        else:
            if new:
                for other in self._surplus(connection, ns, kind, now):
                    connection.execute(_DROP, (ns, kind, other))
            connection.execute(_PUT, (ns, kind, key, now, _text(change.row)))
        if change.note is not None:
            connection.execute(_NOTE, (ns, _text([now, *change.note])))
            connection.execute(_FORGET, (ns, MOST_NOTES))

    def _surplus(self, connection: sqlite3.Connection, ns: int, kind: str, now: float) -> list[str]:
        rows = connection.execute(_KIND, (ns, kind)).fetchall()
        return surplus({key: (at, _row(content) or {}) for key, at, content in rows}, kind, now)

    def _tell(self, told: Future[Row | StoreUnavailableError | None], changed: Future[Row | None], rung: bool) -> None:
        """Once it is durable, or is known not to be."""
        if rung:
            self._bell.ring()
        error = told.exception()
        answer = told.result() if error is None else StoreUnavailableError(str(error))
        if isinstance(answer, StoreUnavailableError):
            changed.set_exception(answer)
        else:
            changed.set_result(answer)

    def journal(self, most: int) -> list[Note]:
        try:
            found = self._reader.read(lambda connection, ns: connection.execute(_NOTES, (ns, most)).fetchall())
        except (sqlite3.Error, OSError) as error:
            raise unavailable(self._reader.path, error) from error
        return [note for (content,) in found if (note := note_of(content)) is not None]


def _text(value: Any) -> str:
    return carried(orjson.dumps(value).decode())


def _row(content: Any) -> Row | None:
    """A row as it was written; None of one that is damaged."""
    try:
        row = orjson.loads(content)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
