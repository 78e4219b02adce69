"""Writing the calls of programs, and their sums per day, inside the writer's transactions."""

from __future__ import annotations

import logging
import sqlite3
from typing import Final

from dspy_prod.records import OTHER
from dspy_prod.stores.memory_ledger import MAX_VALUES_PER_DAY, day_of
from dspy_prod.stores.programs import ProgramCall, ProgramTotals, program_keys, together
from dspy_prod.stores.sqlite.program_rows import ADD_SUMS, INSERT, call_row
from dspy_prod.stores.sqlite.rows import clean
from dspy_prod.stores.sqlite.schema import is_environment

_log = logging.getLogger("dspy_prod")

_DAYS_KNOWN: Final = 3

_Key = tuple[str, str, str, str, str]


class ProgramTables:
    """Appends calls and keeps their sums; the newest `max_records` are kept, None: all."""

    def __init__(self, max_records: int | None) -> None:
        self._max = max_records
        self._since_trim = 0
        self._connection: sqlite3.Connection  # and the namespace's number, from `attach` on
        self._ns: int
        self._put: list[ProgramCall] = []
        self._known: dict[str, set[tuple[str, str]]] = {}

    def attach(self, connection: sqlite3.Connection, ns: int) -> None:
        """Use this connection from now on."""
        self._connection = connection
        self._ns = ns
        self.forget()

    def forget(self) -> None:
        """A transaction was rolled back, or another process may have written."""
        self._put.clear()
        self._known.clear()

    def put(self, call: ProgramCall) -> None:
        """Keep a call, once `write` is called: together they take few statements."""
        self._put.append(call)

    def write(self) -> None:
        """Write the calls that were put."""
        if not self._put:
            return
        calls, self._put = self._put, []
        self._connection.execute("SAVEPOINT programs")
        try:
            self._write(calls)
        except Exception as error:
            if is_environment(error):
                raise
            # Some value fits neither SQLite nor JSON: the slow way, one by one.
            self._connection.execute("ROLLBACK TO programs")
            self._known.clear()
            for call in calls:
                self._write_cleaned(call)
        self._since_trim += len(calls)
        if self._max is not None and self._since_trim > 100 + self._max // 100:
            self._trim(self._max)

    def _write_cleaned(self, call: ProgramCall) -> None:
        try:
            self._write([ProgramCall(*(clean(value) for value in call))])
        except Exception as error:
            if is_environment(error):
                raise
            _log.exception("The record of a call of a program cannot be written")

    def _write(self, calls: list[ProgramCall]) -> None:
        sums: dict[_Key, ProgramTotals] = {}
        for some in together(calls):
            first, share = some[0], ProgramTotals.of(*some)
            end, day = (first.status, first.reason or ""), day_of(first.started_at)
            for pair in self._summed_as(day, program_keys(first)):
                key = (day, *pair, *end)
                sums[key] = sums[key].plus(share) if key in sums else share
        INSERT.run(self._connection, [call_row(self._ns, call) for call in calls])
        ADD_SUMS.run(self._connection, [(self._ns, *key, *totals) for key, totals in sums.items()])

    def _summed_as(self, day: str, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        known = self._known.get(day)
        if known is None:
            while len(self._known) >= _DAYS_KNOWN:
                del self._known[next(iter(self._known))]
            rows = self._connection.execute(
                "SELECT DISTINCT dimension, value FROM program_sums WHERE ns = ? AND day = ?", (self._ns, day)
            )
            known = self._known[day] = set(rows.fetchall())
        found = []
        for pair in pairs:
            if pair not in known and len(known) >= MAX_VALUES_PER_DAY:
                pair = (pair[0], OTHER)
            known.add(pair)
            found.append(pair)
        return found

    def _trim(self, most: int) -> None:
        self._since_trim = 0
        oldest = "SELECT started_at FROM program_calls WHERE ns = ?1 ORDER BY started_at DESC LIMIT 1 OFFSET ?2"
        self._connection.execute(
            f"DELETE FROM program_calls WHERE ns = ?1 AND started_at <= ({oldest})", (self._ns, most)
        )
