"""Who alone may look at an experiment in a SQLite file, and what he sees first."""

from __future__ import annotations

import sqlite3
from typing import Final

from dspy_prod.runtime.processes import is_gone, this_process
from dspy_prod.stores.keys import joined
from dspy_prod.stores.sqlite.trial_tables import TRIAL, name_of, trial_of
from dspy_prod.stores.trial_terms import Lease, Progress, Tally

_HELD: Final = "SELECT holder, process, until FROM trial_leases WHERE ns = ? AND name = ?"
_HOLD: Final = "INSERT OR REPLACE INTO trial_leases VALUES (?, ?, ?, ?, ?)"
_GIVE: Final = "DELETE FROM trial_leases WHERE ns = ? AND name = ? AND holder = ?"
_PROGRESS: Final = (
    "SELECT (SELECT max(number) FROM trial_units WHERE trial = id), "
    "(SELECT sum(mixed) FROM trial_arms WHERE trial = id), late, stray, early, unpriced, repeated, "
    f"checkpoint_revision, {TRIAL} FROM trials WHERE ns = ? AND name = ?"
)


def take(connection: sqlite3.Connection, ns: int, name: str, holder: str, seconds: float, now: float) -> Lease:
    """Take a lease, as `Trials.lease` says."""
    key, asking = joined(name), joined(holder)
    held = connection.execute(_HELD, (ns, key)).fetchone()
    if held is None or held[2] <= now or held[0] == asking or is_gone(held[1]):
        connection.execute(_HOLD, (ns, key, asking, this_process(), now + seconds))
        return Lease(holder, now + seconds)
    return Lease(name_of(held[0]), held[2])


def give(connection: sqlite3.Connection, ns: int, name: str, holder: str) -> None:
    """Give one's lease back."""
    connection.execute(_GIVE, (ns, joined(name), joined(holder)))


def read_progress(connection: sqlite3.Connection, ns: int, name: str, unkept: int) -> tuple[int, Progress] | None:
    """(number in the file, how far an experiment is); as quick for a million units as for one."""
    row = connection.execute(_PROGRESS, (ns, joined(name))).fetchone()
    if row is None:
        return None
    units, mixed, late, stray, early, unpriced, repeated, saved, *rest = row
    tally = Tally(units or 0, mixed or 0, late, stray, unkept, early, unpriced, repeated)
    id, trial = trial_of(tuple(rest))
    return id, Progress(trial, tally, saved)
