"""The calls of programs in a SQLite file, as callers use them: reading beside the writer, writing through it."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from typing import Any, Final, TypeVar

from dspy_prod.privacy.visible import carried
from dspy_prod.stores.durable.mailbox import READ_TIMEOUT, Mailbox
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.programs import COMPARED, ProgramCall, ProgramSums, ProgramTotals, check_compared
from dspy_prod.stores.sqlite.program_rows import COLUMNS, TOTALS, call_of
from dspy_prod.stores.sqlite.reader import Reader
from dspy_prod.stores.sqlite.rollups import days_of
from dspy_prod.stores.sqlite.rows import clean
from dspy_prod.stores.sqlite.schema import unavailable

_log = logging.getLogger("dspy_prod")

T = TypeVar("T")
_DAYS: Final = days_of("program_sums")


class KeptPrograms:
    """Its methods are the store's, see `ProgramCalls`."""

    def __init__(self, mailbox: Mailbox, reader: Reader) -> None:
        self._mailbox = mailbox
        self._reader = reader
        self._path = mailbox.writer.tables.path

    def append(self, call: ProgramCall) -> None:
        if not self._mailbox.post((Transactions.append_program, call, None)):
            _log.warning("The store %s is closed: the record of a call of %r is lost", self._path, call.program)
        self._mailbox.writer.inbox.ease()

    def calls(
        self, *, since: float | None = None, until: float | None = None, limit: int | None = None, **equals: str
    ) -> list[ProgramCall]:
        check_compared(equals)
        best = next((name for name in COMPARED if name in equals), None)
        bounds: list[tuple[str, Any]] = [("started_at >= ?", since), ("started_at < ?", until)]
        where = [("ns = ?", None), *(bound for bound in bounds if bound[1] is not None)]
        for name, value in equals.items():
            plus = "" if name == best else "+"  # keeps SQLite, which cannot know better, off another index
            where.append((f'{plus}"{name}" = ?', clean(value)))
        sql = (
            f"SELECT {COLUMNS} FROM program_calls WHERE {' AND '.join(condition for condition, _ in where)} "
            "ORDER BY started_at DESC, seq DESC LIMIT ?"
        )
        values = (*(value for _, value in where[1:]), -1 if limit is None else limit)
        rows = self._read(lambda connection, ns: connection.execute(sql, (ns, *values)).fetchall())
        return [call_of(row) for row in rows]

    def sums(
        self,
        *,
        dimension: str = "all",
        since_day: str | None = None,
        until_day: str | None = None,
        value: str | None = None,
    ) -> list[ProgramSums]:
        one = () if value is None else (carried(value),)
        sql = (
            f"{_DAYS} SELECT s.day, value, status, reason, {TOTALS} FROM days CROSS JOIN program_sums s "
            f"WHERE s.ns = ?1 AND s.day = days.day AND dimension = ?4 {'AND value = ?5 ' if one else ''}"
            "ORDER BY s.day, value, status, reason"
        )
        wanted = (since_day or "", until_day or "~", carried(dimension), *one)
        rows = self._read(lambda connection, ns: connection.execute(sql, (ns, *wanted)).fetchall())
        return [ProgramSums._make((*row[:4], ProgramTotals(*row[4:]))) for row in rows]

    def _read(self, read: Callable[[sqlite3.Connection, int], T]) -> T:
        self._mailbox.alive()
        self._mailbox.flush(READ_TIMEOUT)
        try:
            return self._reader.read(read)
        except (sqlite3.Error, OSError) as error:
            raise unavailable(self._path, error) from error
