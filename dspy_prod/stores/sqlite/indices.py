"""The indices of the SQLite file that need no schema version of their own: any release keeps them up."""

from __future__ import annotations

import sqlite3
from typing import Final

SELECTIVE: Final = (
    *("id", "call_id", "trace_id", "session", "user", "tenant", "run", "prompt_version", "variant", "experiment"),
    *("program", "model", "outcome"),
)
"""Fields of records that have an index: a value of the first has the fewest records."""

ACCOUNT_OF: Final = "substr(key, 1, instr(key, '|'))", "substr(key, length(rtrim(key, replace(key, '|', ''))))"
"""What the accounts of one budget in one window have in common: how their keys begin and end."""

_INDICES: Final = {
    **{f"records_{name}": f'records (ns, "{name}", started_at) WHERE "{name}" IS NOT NULL' for name in SELECTIVE[1:]},
    "records_unconfirmed": "records (ns, started_at) WHERE estimated",
    "cache_ends": "cache (ns, max(expires_at, stale_until))",
    "accounts_dearest": f"accounts (ns, {', '.join(ACCOUNT_OF)}, spent DESC)",
    "accounts_ends": "accounts (ns, ends_at) WHERE ends_at IS NOT NULL",
    "abandoned_at": "abandoned (ns, at)",
}
_REPLACED: Final = ("records_call",)
"""Of earlier releases. Not in the order of time, this one was passed over for one that is, and all rows were read."""


def missing(connection: sqlite3.Connection) -> list[str]:
    """The statements that give the file of an earlier release the indices of this one."""
    known = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    made = [f"CREATE INDEX IF NOT EXISTS {name} ON {what}" for name, what in _INDICES.items() if name not in known]
    return made + [f"DROP INDEX IF EXISTS {name}" for name in _REPLACED if name in known]
