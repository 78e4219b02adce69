"""What the writer reads from and writes to the SQLite file inside its transactions."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from math import isinf
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.options import RateLimit
from dspy_prod.privacy.visible import carried
from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.granting import shared
from dspy_prod.stores.admission.holds import Hold
from dspy_prod.stores.base import AccountState, Terms
from dspy_prod.stores.durable.served import Served
from dspy_prod.stores.sqlite.answers import CacheTable
from dspy_prod.stores.sqlite.cells import Cells, place, remove
from dspy_prod.stores.sqlite.leases import HOLD_COLUMNS, Leases
from dspy_prod.stores.sqlite.ledger import LedgerTables
from dspy_prod.stores.sqlite.program_tables import ProgramTables
from dspy_prod.stores.sqlite.rows import (
    TERMS,
    Row,
    account_of,
    clean_hold,
    clean_record,
    debit_json,
    hold_of,
    hold_row,
    terms_of,
    terms_row,
)
from dspy_prod.stores.sqlite.schema import create, is_environment, is_locked, patiently, unavailable
from dspy_prod.stores.sqlite.timing import StoreTime

PUT_ACCOUNT: Final = (
    "INSERT INTO accounts VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (ns, key) DO UPDATE SET "
    "spent = excluded.spent, held = excluded.held, unconfirmed = excluded.unconfirmed, "
    "ends_at = CASE WHEN excluded.ends_at > ends_at THEN excluded.ends_at ELSE coalesce(ends_at, excluded.ends_at) END"
)
PUT_LIMITER: Final = (
    "INSERT INTO limiters VALUES (?, ?, ?, ?) ON CONFLICT (ns, key) DO UPDATE SET "
    "state = excluded.state, settings = excluded.settings"
)
PUT_TERMS: Final = f"INSERT OR REPLACE INTO budgets (ns, name, {TERMS}) VALUES (?, ?, ?, ?, ?)"
PUT_HOLD: Final = "INSERT OR REPLACE INTO holds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
RESIZE_HOLD: Final = "UPDATE holds SET amount = ?, debit = ? WHERE ns = ? AND id = ?"
PUT_ABANDONED: Final = "INSERT OR REPLACE INTO abandoned VALUES (?, ?, ?, ?, ?, ?)"
_MOST: Final = 2**63 - 1  # nano-USD; an account with more is over its limit, which cannot be so high

PROBE: Final = 16_384
"""Bytes that a file which could not be written has to take before it counts as writable again."""


class Tables(Leases):
    """One namespace's tables through one connection; the core's `Backing`.

    Every method may raise `sqlite3.Error`, `OSError` or `StoreUnavailableError`. Not thread-safe.
    """

    kind, noun = "sqlite", "file"

    def __init__(
        self,
        path: str,
        namespace: str,
        owner: str,
        *,
        synchronous: str,
        max_records: int | None,
        timing: StoreTime | None = None,
    ) -> None:
        super().__init__(path, namespace, synchronous=synchronous)
        self.owner = owner
        self.cells = Cells(path, owner)
        self._timing = timing
        self.left: list[str] = []  # owners that hold nothing any more
        self._version = -1
        self._settings: dict[str, tuple[RateLimit, str]] = {}
        self.ledger = LedgerTables(max_records)
        self.cache = CacheTable()
        self.programs = ProgramTables(max_records)
        self.served: list[Served] = []  # to be written by this transaction

    # -- the file ----------------------------------------------------------------------------------------------------
    def open(self) -> sqlite3.Connection:
        """The connection, opened when needed; the file is made when there is none."""
        if self.connection is None:
            create(self.path)
            connection = super().open()
            try:
                if self._timing is not None:
                    self._timing.agree(connection)
                connection.execute("PRAGMA busy_timeout=0")  # the writer waits in its own, finer steps
                self._version = -1
                self.ledger.attach(connection, self.ns)
                self.cache.attach(connection, self.ns)
                self.programs.attach(connection, self.ns)
            except BaseException:
                self.close()  # else the next use would find it half attached
                raise
            return connection
        return self.connection

    def begin(self) -> None:
        """Open the file when needed, and take its write lock."""
        patiently(self.open(), "BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Make what was written durable."""
        assert self.connection is not None
        self.connection.execute("COMMIT")
        while self.left:
            remove(place(self.path, self.left.pop()))

    def changed(self) -> bool:
        """Whether another connection has committed since the last call."""
        before, self._version = self._version, self._data_version()
        if self._version == before:
            return False
        self.ledger.changed()
        self.cache.forget()
        self.programs.forget()
        return True

    def stale(self) -> bool:
        """`changed`, only looking."""
        return self.connection is None or self._data_version() != self._version

    def _data_version(self) -> int:
        assert self.connection is not None
        return int(self.connection.execute("PRAGMA data_version").fetchone()[0])

    def rollback(self) -> None:
        """Undo the transaction, if there is one."""
        self._version = -1
        self.left.clear()
        self.ledger.forget()
        self.cache.forget()
        self.programs.forget()
        self.served.clear()
        if self.connection is not None and self.connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self.connection.execute("ROLLBACK")

    def foresee(self, core: AdmissionCore, operations: Sequence[Any]) -> None:
        """Nothing: a row is read as quickly as it is needed."""

    def remembered(self) -> Mapping[str, AccountState]:
        """Nothing but what the core has in memory."""
        return {}

    def forget(self) -> None:
        """Nothing is remembered here."""

    def is_environment(self, error: BaseException) -> bool:
        """The disk, the file or another process is to blame, and not the values to be written."""
        return is_environment(error)

    def unavailable(self, error: BaseException) -> StoreUnavailableError:
        """What a person should read when the file cannot be used."""
        return unavailable(self.path, error)

    def failed(self, error: BaseException) -> None:
        """A transaction failed, and was undone: close what cannot be used any more."""
        if not is_locked(error) and "full" not in str(error):
            self.close()

    # -- what the core asks for ----------------------------------------------------------------------------------------
    def load_account(self, key: str) -> AccountState | None:
        row = self._one("SELECT spent, held, unconfirmed FROM accounts WHERE ns = ? AND key = ?", key)
        return None if row is None else account_of(key, row)

    def load_terms(self, title: str) -> Terms | None:
        row = self._one(f"SELECT {TERMS} FROM budgets WHERE ns = ? AND name = ?", title)
        return None if row is None else terms_of(row)

    def load_limiter(self, key: str) -> tuple[bytes, RateLimit] | None:
        row = self._one("SELECT state, settings FROM limiters WHERE ns = ? AND key = ?", key)
        if row is None:
            return None
        return row[0], _limit(row[1])

    def load_abandoned(self, id: str) -> Hold | None:
        row = self._one("SELECT id, 0.0, amount, accounts, NULL, NULL, stub FROM abandoned WHERE ns = ? AND id = ?", id)
        return None if row is None else hold_of(row)

    def load_own(self) -> list[Hold]:
        assert self.connection is not None
        rows = self.connection.execute(
            f"SELECT {HOLD_COLUMNS} FROM holds WHERE ns = ? AND owner = ?", (self.ns, self.owner)
        )
        return [hold_of(row) for row in rows.fetchall()]

    def probe(self, now: float) -> None:
        """Write something that needs room in the file, and leave only a note of when that worked."""
        self._run("INSERT OR REPLACE INTO meta VALUES ('recovered_at', zeroblob(?))", [(PROBE,)])
        self._run("UPDATE meta SET value = ? WHERE key = 'recovered_at'", [(now,)])

    # -- writing back --------------------------------------------------------------------------------------------------
    def write(self, core: AdmissionCore, now: float) -> list[CallRecord]:
        """Write what the core changed; the records that could not be written whatever was tried."""
        assert self.connection is not None
        self.cache.write()
        self.programs.write()
        self.connection.execute("SAVEPOINT written")
        try:
            self._write_state(core, now, str, lambda hold: hold)
            self.ledger.write(core.appended, core.replaced, self.served)
            return []
        except Exception as error:
            if is_environment(error):
                raise
        # Some value fits neither SQLite nor JSON, or a record is there already: the slow way, value by value.
        self.connection.execute("ROLLBACK TO written")
        self.ledger.forget()
        self._write_state(core, now, carried, clean_hold)
        lost = []
        for record in (*core.appended, *chain.from_iterable(map(Served.records, self.served)), *core.replaced):
            try:
                self.ledger.put(clean_record(record))
            except Exception as error:
                if is_environment(error):
                    raise
                lost.append(record)
        self.ledger.write((), ())
        return lost

    def _write_state(
        self, core: AdmissionCore, now: float, text: Callable[[str], str], fit: Callable[[Hold], Hold]
    ) -> None:
        """Write accounts, limiters and holds; `text` and `fit` make what SQLite can carry."""
        changes, ns, owner = core.changes, self.ns, self.owner
        assert changes is not None
        self._write_accounts(core, text)
        self._write_limiters(core, text)
        self._write_terms(core)
        gone = [(ns, text(id)) for id in (*changes.removed, *changes.reaped, *(changes.stray or ()))]
        self._run("DELETE FROM holds WHERE ns = ? AND id = ?", gone)
        self._run(PUT_HOLD, [hold_row(ns, owner, fit(hold)) for hold in changes.added.values()])
        resized = [
            (hold.amount, debit_json(hold), ns, hold.id) for hold in changes.resized if hold.id not in changes.added
        ]
        self._run(RESIZE_HOLD, resized)
        self._run("DELETE FROM abandoned WHERE ns = ? AND id = ?", [(ns, text(id)) for id in changes.forgiven])
        self._run(PUT_ABANDONED, [self._abandoned_row(fit(hold), now) for hold in changes.abandoned.values()])

    def _write_accounts(self, core: AdmissionCore, text: Callable[[str], str]) -> None:
        book = core.accounts
        rows = []
        for key in book.dirty:
            entry = book.entries[key]
            ends_at = None if isinf(entry.ends_at) else entry.ends_at
            sums = [max(-_MOST, min(each, _MOST)) for each in (entry.spent, entry.held, entry.unconfirmed)]
            rows.append((self.ns, text(key), *sums, ends_at))
        self._run(PUT_ACCOUNT, rows)

    def _write_limiters(self, core: AdmissionCore, text: Callable[[str], str]) -> None:
        assert core.changes is not None
        rows = []
        for key in core.changes.limiters:
            state = core.limiter_state(key)
            if state is not None and shared(state.limit):
                settings = self._settings.get(key)
                if settings is None or settings[0] is not state.limit:
                    settings = self._settings[key] = (state.limit, state.limit.model_dump_json())
                rows.append((self.ns, text(key), state.dump(), settings[1]))
        self._run(PUT_LIMITER, rows)

    def _write_terms(self, core: AdmissionCore) -> None:
        terms = [core.terms.find(title) for title in core.terms.dirty]
        self._run(PUT_TERMS, [terms_row(self.ns, each) for each in terms if each is not None])

    def _abandoned_row(self, hold: Hold, now: float) -> Row:
        _, id, _, _, amount, accounts, _, _, stub = hold_row(self.ns, self.owner, hold)
        return self.ns, id, now, amount, accounts, stub


@lru_cache(maxsize=1024)
def _limit(settings: str) -> RateLimit:
    try:
        return RateLimit.model_validate_json(settings)
    except ValueError:  # options of another version
        return RateLimit()
