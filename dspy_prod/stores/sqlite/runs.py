"""What a SQLite file keeps of runs: the answers they were given, and notes about them. Nothing is ever evicted."""

from __future__ import annotations

import sqlite3
import time
from concurrent.futures import Future
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.privacy.visible import carried
from dspy_prod.stores.durable.mailbox import READ_TIMEOUT, Mailbox
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.sqlite.reader import Reader
from dspy_prod.stores.sqlite.schema import unavailable
from dspy_prod.stores.sqlite.tables import Tables
from dspy_prod.stores.vocabulary import Size

_NEXT: Final = "SELECT coalesce(max(ordinal) + 1, 0) FROM run_answers WHERE ns = ? AND run = ? AND key = ?"
_PUT: Final = "INSERT INTO run_answers (ns, run, key, ordinal, response, served_model, at) VALUES (?, ?, ?, ?, ?, ?, ?)"
_NOTE: Final = "SELECT value FROM run_notes WHERE ns = ? AND run = ? AND name = ?"
_PUT_NOTE: Final = "INSERT OR REPLACE INTO run_notes VALUES (?, ?, ?, ?)"
_DROP_ACCOUNTS: Final = "DELETE FROM accounts WHERE ns = ?1 AND key >= ?2 AND key < ?2 || char(1114111) AND held = 0"


class KeptRuns:
    """Reads beside the writer, and writes through it. Its methods are the store's, see `Runs`."""

    def __init__(self, mailbox: Mailbox, reader: Reader) -> None:
        self._mailbox = mailbox
        self._reader = reader
        self._path = mailbox.writer.tables.path

    # -- answers -----------------------------------------------------------------------------------------------------
    def answers(self, run: str) -> list[tuple[bytes, int]]:
        self._flush()
        sql = "SELECT key, ordinal FROM run_answers WHERE ns = ? AND run = ? ORDER BY seq"
        return self._rows(sql, carried(run))

    def answer(self, run: str, key: bytes, ordinal: int) -> bytes | None:
        sql = "SELECT response FROM run_answers WHERE ns = ? AND run = ? AND key = ? AND ordinal = ?"
        rows = self._rows(sql, carried(run), key, ordinal)
        return rows[0][0] if rows and isinstance(rows[0][0], bytes) else None

    def keep(self, run: str, key: bytes, response: bytes, served_model: str, again: bool) -> Future[int]:
        run, served_model, at = carried(run), carried(served_model), time.time()

        def put(_: Any, tables: Tables, __: float) -> int:
            assert tables.connection is not None
            ordinal: int = tables.connection.execute(_NEXT, (tables.ns, run, key)).fetchone()[0]
            if ordinal and not again:
                return ordinal - 1
            tables.connection.execute(_PUT, (tables.ns, run, key, ordinal, response, served_model, at))
            return ordinal

        kept: Future[int] = Future()
        if not self._mailbox.post((Transactions.answer, kept, put)):
            kept.set_exception(StoreUnavailableError(f"The store {self._path} is closed"))
        return kept

    def count(self, run: str) -> int:
        self._flush()
        rows = self._rows("SELECT count(*) FROM run_answers WHERE ns = ? AND run = ?", carried(run))
        return int(rows[0][0])

    def answered(self) -> list[str]:
        self._flush()
        return [run for (run,) in self._rows("SELECT DISTINCT run FROM run_answers WHERE ns = ? ORDER BY run")]

    def sizes(self, run: str | None = None) -> dict[str, Size]:
        self._flush()
        which, values = ("", ()) if run is None else ("AND run = ?", (carried(run),))
        rows = self._rows(
            f"SELECT run, count(*), sum(length(response)) FROM run_answers WHERE ns = ? {which} GROUP BY run", *values
        )
        return {run: Size(count, size) for run, count, size in rows}

    # -- notes -------------------------------------------------------------------------------------------------------
    def note(self, run: str, name: str) -> str | None:
        rows = self._rows(_NOTE, carried(run), name)
        return str(rows[0][0]) if rows else None

    def noted(self, name: str) -> dict[str, str]:
        return dict(self._rows("SELECT run, value FROM run_notes WHERE ns = ? AND name = ? ORDER BY run", name))

    def put_note(self, run: str, name: str, value: str | None) -> None:
        run = carried(run)

        def put(_: Any, tables: Tables, __: float) -> None:
            assert tables.connection is not None
            if value is None:
                sql = "DELETE FROM run_notes WHERE ns = ? AND run = ? AND name = ?"
                tables.connection.execute(sql, (tables.ns, run, name))
            else:
                tables.connection.execute(_PUT_NOTE, (tables.ns, run, name, value))

        self._mailbox.question(put)

    def swap_note(self, run: str, name: str, before: str | None, value: str) -> bool:
        run = carried(run)

        def swap(_: Any, tables: Tables, __: float) -> bool:
            assert tables.connection is not None
            row = tables.connection.execute(_NOTE, (tables.ns, run, name)).fetchone()
            if (None if row is None else row[0]) != before:
                return False
            tables.connection.execute(_PUT_NOTE, (tables.ns, run, name, value))
            return True

        swapped: bool = self._mailbox.question(swap)
        return swapped

    def remove(self, run: str, accounts: str | None) -> None:
        run = carried(run)

        def drop(core: Any, tables: Tables, _: float) -> None:
            connection, ns = tables.connection, tables.ns
            assert connection is not None
            if accounts is not None:
                core.accounts.drop(accounts)
                connection.execute(_DROP_ACCOUNTS, (ns, carried(accounts)))
            for table in ("run_answers", "run_notes"):
                connection.execute(f"DELETE FROM {table} WHERE ns = ? AND run = ?", (ns, run))

        self._mailbox.question(drop)

    def bury(self, pid: int) -> None:
        def charge(core: Any, tables: Tables, now: float) -> None:
            for hold in tables.held_by(pid):
                core.abandon(hold, now)

        self._mailbox.question(charge)

    def _flush(self) -> None:
        """Have written what was posted before."""
        self._mailbox.alive()
        self._mailbox.flush(READ_TIMEOUT)

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        try:
            return self._reader.read(lambda connection, ns: connection.execute(sql, (ns, *values)).fetchall())
        except (sqlite3.Error, OSError) as error:
            raise unavailable(self._path, error) from error
