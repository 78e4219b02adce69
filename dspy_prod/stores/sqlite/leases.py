"""Which process holds what, and until when: the leases of a store's file, and the sweep of what is over.

The lower half of `tables.py`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable
from typing import Final

from dspy_prod.privacy.visible import carried
from dspy_prod.stores.admission.accounts import PRUNE_AFTER
from dspy_prod.stores.admission.holds import Hold
from dspy_prod.stores.sqlite.answers import CacheTable
from dspy_prod.stores.sqlite.cells import left_by, orphans, remove
from dspy_prod.stores.sqlite.file import File
from dspy_prod.stores.sqlite.rows import Row, hold_of

PUT_OWNER: Final = "INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?)"
SWEEP_ACCOUNTS: Final = (
    "DELETE FROM accounts WHERE ns = ?1 AND key IN "
    "(SELECT key FROM accounts WHERE ns = ?1 AND ends_at < ?2 AND held = 0 LIMIT ?3)"
)
SWEEP_ABANDONED: Final = (
    "DELETE FROM abandoned WHERE ns = ?1 AND id IN (SELECT id FROM abandoned WHERE ns = ?1 AND at < ?2 LIMIT ?3)"
)
HOLD_COLUMNS: Final = "id, ends_at, amount, accounts, limit_key, debit, stub"

KEEP_ABANDONED: Final = 7 * 86_400.0
"""Seconds for which a late settlement still replaces the charge of an abandoned hold."""


class Leases(File):
    """See `Tables`, whose attributes these are."""

    owner: str
    cache: CacheTable
    left: list[str]

    def owned(self) -> bool:
        """Whether this process's lease is still there: whoever reaps it deletes it."""
        return self._one("SELECT 1 FROM owners WHERE ns = ? AND owner = ?", self.owner) is not None

    def renew(self, until: float) -> None:
        """Extend this process's lease on all its holds."""
        self._run(PUT_OWNER, [(self.ns, self.owner, until, os.getpid())])

    def resign(self) -> None:
        """This process holds nothing any more. Where that cannot be written, the lease runs out."""
        if self.connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._run("DELETE FROM owners WHERE ns = ? AND owner = ?", [(self.ns, self.owner)])

    def owners(self, now: float) -> int:
        """Other processes that hold something."""
        assert self.connection is not None
        counting = "SELECT count(*) FROM owners WHERE ns = ? AND lease_until >= ? AND owner <> ?"
        return int(self.connection.execute(counting, (self.ns, now, self.owner)).fetchone()[0])

    def expired(self, now: float, most: int) -> list[Hold]:
        """Holds of processes whose lease ran out; an owner without holds is deleted."""
        return self._taken("lease_until < ?", now, most)

    def held_by(self, pid: int) -> list[Hold]:
        """Holds of a process that is gone, whatever its lease says; it is no owner any more."""
        return self._taken("pid = ?", pid, 2**31)

    def _taken(self, which: str, value: float, most: int) -> list[Hold]:
        assert self.connection is not None
        found: list[Hold] = []
        owners = self.connection.execute(
            f"SELECT owner FROM owners WHERE ns = ? AND {which} AND owner <> ?", (self.ns, value, self.owner)
        ).fetchall()
        for (owner,) in owners:
            rows = self.connection.execute(
                f"SELECT {HOLD_COLUMNS} FROM holds WHERE ns = ? AND owner = ? LIMIT ?",
                (self.ns, owner, most - len(found) + 1),
            ).fetchall()
            found.extend(self._owed(str(owner), [hold_of(row) for row in rows]))
            if len(found) > most:
                return found[:most]
            self._run("DELETE FROM owners WHERE ns = ? AND owner = ?", [(self.ns, owner)])
            self.left.append(str(owner))
        return found

    def _owed(self, owner: str, holds: list[Hold]) -> list[Hold]:
        """Of what a process had drawn ahead, its calls used what its cells say."""
        if any(hold.drawn is not None for hold in holds):
            cells = left_by(self.path, owner) or {}
            for hold in holds:
                cell = None if hold.drawn is None else cells.get(hold.drawn.cell)
                if hold.drawn is not None and cell is not None:
                    charged, in_flight, _ = cell
                    hold.owed = max(0, charged - hold.drawn.written + in_flight)
        return holds

    def sweep(self, now: float, most: int) -> bool:
        """Delete what nothing can refer to any more, at most `most` rows of a table; whether there may be more."""
        assert self.connection is not None
        done = [self.cache.purge(now, most)]
        for sql, before in ((SWEEP_ACCOUNTS, now - PRUNE_AFTER), (SWEEP_ABANDONED, now - KEEP_ABANDONED)):
            done.append(self.connection.execute(sql, (self.ns, before, most)).rowcount)
        owners = self.connection.execute("SELECT owner FROM owners").fetchall()
        for file in orphans(self.path, {owner for (owner,) in owners}):
            remove(file)
        return max(done) >= most

    def _one(self, sql: str, key: str) -> Row | None:
        assert self.connection is not None
        try:
            row: Row | None = self.connection.execute(sql, (self.ns, key)).fetchone()
        except UnicodeEncodeError:
            row = self.connection.execute(sql, (self.ns, carried(key))).fetchone()
        return row

    def _run(self, sql: str, rows: Iterable[Row]) -> None:
        assert self.connection is not None
        if rows:
            self.connection.executemany(sql, rows)
