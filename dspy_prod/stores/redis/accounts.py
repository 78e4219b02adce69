"""Accounts as Redis keeps them, and how they are found."""

from __future__ import annotations

from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.privacy.visible import carried
from dspy_prod.stores.base import AccountState
from dspy_prod.stores.keys import BETWEEN
from dspy_prod.stores.redis.connection import Connection

FIELDS: Final = ("s", "h", "u", "v")
"""Spent, held, unconfirmed, and the number of the commit that changed it last."""
_AT_ONCE: Final = 1000


def window_of(connection: Connection, key: str) -> str | None:
    """The key of the accounts of the same budget in the same window."""
    begin, first, _ = key.partition(BETWEEN)
    _, last, end = key.rpartition(BETWEEN)
    return connection.key("window", begin + first, last + end) if first else None


def state_of(key: str, row: list[Any]) -> AccountState:
    """What an account holds.

    Raises:
        StoreUnavailableError: something else than numbers is there: what is spent is not known.
    """
    try:
        spent, held, unconfirmed = (int(each or 0) for each in row[:3])
    except (TypeError, ValueError):
        raise StoreUnavailableError(
            f"The account {key!r} in {BETWEEN.join(FIELDS[:3])} holds what is no number; delete its key in Redis"
        ) from None
    return AccountState(spent, max(0, held), unconfirmed)


def read_accounts(connection: Connection, keys: list[str]) -> list[AccountState | None]:
    """What accounts hold; None for those that there are not."""
    found: list[AccountState | None] = []
    for at in range(0, len(keys), _AT_ONCE):
        some = keys[at : at + _AT_ONCE]
        rows = connection.read([("HMGET", connection.key("account", key), *FIELDS) for key in some])
        found += [None if row[3] is None else state_of(key, row) for key, row in zip(some, rows, strict=True)]
    return found


def beginning(connection: Connection, prefix: str) -> list[tuple[str, AccountState]]:
    """The accounts whose keys begin so."""
    begin = carried(prefix).encode()
    (names,) = connection.read([("ZRANGEBYLEX", connection.key("names"), b"[" + begin, b"[" + begin + b"\xff")])
    return _states(connection, names)


def dearest(connection: Connection, prefix: str, suffix: str, most: int) -> list[tuple[str, AccountState]]:
    """The accounts whose keys begin and end so, those that spent most first."""
    if prefix.count(BETWEEN) == suffix.count(BETWEEN) == 1 and prefix.endswith(BETWEEN) and suffix.startswith(BETWEEN):
        window = connection.key("window", prefix, suffix)
        (names,) = connection.read([("ZREVRANGE", window, 0, most - 1)])
        found = _states(connection, names)
    else:
        found = [item for item in beginning(connection, prefix) if item[0].endswith(suffix)]
    return sorted(found, key=lambda item: (-item[1].spent, item[0]))[:most]


def _states(connection: Connection, names: list[bytes]) -> list[tuple[str, AccountState]]:
    keys = [name.decode("utf-8", "replace") for name in names]
    found = zip(keys, read_accounts(connection, keys), strict=True)
    return [(key, state) for key, state in found if state is not None]
