"""What is asked of the file beside records and sums: accounts, terms and holds."""

from __future__ import annotations

import sqlite3

from dspy_prod.privacy.visible import carried
from dspy_prod.stores.base import AccountState, Terms
from dspy_prod.stores.keys import BETWEEN
from dspy_prod.stores.sqlite.indices import ACCOUNT_OF
from dspy_prod.stores.sqlite.rows import TERMS, Row, account_of, terms_of, text_of


def read_account(connection: sqlite3.Connection, ns: int, key: str) -> AccountState:
    """What one account holds."""
    find = "SELECT spent, held, unconfirmed FROM accounts WHERE ns = ? AND key = ?"
    row = connection.execute(find, (ns, carried(key))).fetchone()
    return AccountState() if row is None else _state(key, row)


def _state(key: str, row: Row) -> AccountState:
    try:
        return account_of(key, row)
    except ValueError as error:
        raise sqlite3.DataError(str(error)) from error


def read_accounts(
    connection: sqlite3.Connection, ns: int, prefix: str, suffix: str, most: int
) -> list[tuple[str, AccountState]]:
    """The accounts whose keys begin and end so, those that spent most first."""
    if prefix.count(BETWEEN) == suffix.count(BETWEEN) == 1:  # those of a budget in a window, of which there may be many
        begin, end = ACCOUNT_OF
        alike = f"{begin} = ?2 AND {end} = ?3"
    else:
        alike = "key >= ?2 AND key < ?2 || char(1114111) AND substr(key, length(key) - length(?3) + 1) = ?3"
    found = f"SELECT key, spent, held, unconfirmed FROM accounts WHERE ns = ?1 AND {alike}"
    rows = connection.execute(f"{found} ORDER BY spent DESC, key LIMIT ?4", (ns, carried(prefix), suffix, most))
    return [(text_of(row[0]), _state(row[0], row[1:])) for row in rows]


def read_terms(connection: sqlite3.Connection, ns: int) -> list[Terms]:
    """The terms of every budget."""
    rows = connection.execute(f"SELECT {TERMS} FROM budgets WHERE ns = ? ORDER BY name", (ns,))
    return [terms for row in rows if (terms := terms_of(row)) is not None]


def read_holds(connection: sqlite3.Connection, ns: int) -> int:
    """Reservations not yet settled, without what is drawn ahead for several calls."""
    alone = "substr(CAST(coalesce(debit, '') AS TEXT), 1, 1) <> '{'"
    found = connection.execute(f"SELECT count(*) FROM holds WHERE ns = ? AND {alone}", (ns,))
    return int(found.fetchone()[0])
