"""The processes that hold something: their leases, and what is done with the holds of one that is gone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Protocol

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.privacy.visible import carried
from dspy_prod.runtime.processes import this_process
from dspy_prod.stores.admission.holds import Hold
from dspy_prod.stores.redis.asking import KEPT_FOR
from dspy_prod.stores.redis.batch import Batch
from dspy_prod.stores.redis.commits import Commit
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.holds import hold_of

HOLDING: Final = ("holds", "drawn")
"""For single calls, and for several."""
_LATE: Final = 600_000
"""Milliseconds for which a commit may still come late from a process that has ended."""
_OWNERS: Final = 100
"""Processes looked at in one transaction."""


class Writing(Protocol):
    """Tables with a transaction under way."""

    batch: Batch
    owner: str

    @property
    def connection(self) -> Connection: ...


class Owners:
    """Leases, as one process's transactions read and write them."""

    def __init__(self, tables: Writing) -> None:
        self._tables = tables
        self._connection = tables.connection
        self._owners, self._homes = tables.connection.key("owners"), tables.connection.key("homes")
        self._whose: dict[str, tuple[str, str]] = {}  # hold -> owner, hash that it is in; of this transaction
        self._leases: dict[str, float] = {}  # as they were seen
        self._over: dict[str, int] = {}  # owners of which nothing is left, and how many holds they had

    def clear(self) -> None:
        """A transaction is over."""
        self._whose.clear()
        self._leases.clear()
        self._over.clear()

    def renew(self, until: float) -> None:
        batch = self._tables.batch
        batch.call("ZADD", self._owners, until, self._tables.owner)
        batch.call("HSET", self._homes, self._tables.owner, carried(this_process()))
        for key in (self._owners, self._homes):
            batch.call("EXPIRE", key, KEPT_FOR)

    def resign(self) -> None:
        owner = self._tables.owner
        try:
            counts = self._connection.read([("HLEN", self._connection.key(kind, owner)) for kind in HOLDING])
            if any(counts):
                return  # more is held there than is known here: who has no lease any more is never looked at
            done = self._connection.key("done", owner)
            self._connection.read(
                [("ZREM", self._owners, owner), ("HDEL", self._homes, owner), ("PEXPIRE", done, _LATE)]
            )
        except StoreUnavailableError:
            return  # the lease runs out

    def abandoned(self, id: str) -> Hold | None:
        """A hold that was charged as abandoned."""
        (text,) = self._connection.read([("GET", self._connection.key("abandoned", id))])
        return None if text is None else hold_of(id.encode("utf-8", "replace"), text)

    def own(self) -> list[Hold]:
        """The holds that are there as this process's."""
        rows = self._connection.read([("HGETALL", self._connection.key(kind, self._tables.owner)) for kind in HOLDING])
        holds = [hold_of(*item) for row in rows for item in row.items()]
        return [hold for hold in holds if hold is not None]

    def others(self, now: float) -> int:
        """Other processes that hold something."""
        (rows,) = self._connection.read([("ZRANGEBYSCORE", self._owners, repr(now), "+inf", "LIMIT", 0, _OWNERS)])
        return sum(_text(owner) != self._tables.owner for owner in rows)

    def expired(self, now: float, most: int) -> list[Hold]:
        (rows,) = self._connection.read(
            [("ZRANGEBYSCORE", self._owners, "-inf", f"({now!r}", "WITHSCORES", "LIMIT", 0, _OWNERS)]
        )
        return self._taken([(_text(owner), lease) for owner, lease in _pairs(rows)], most)

    def held_by(self, pid: int) -> list[Hold]:
        (homes, rows) = self._connection.read([("HGETALL", self._homes), ("ZRANGE", self._owners, 0, -1, "WITHSCORES")])
        leases = {_text(owner): lease for owner, lease in _pairs(rows)}
        here = this_process().split(" ")[:2]  # the machine, since it was started
        found = [(_text(owner), _text(home).split(" ")) for owner, home in homes.items()]
        gone = [owner for owner, home in found if home[:2] == here and home[2:3] == [str(pid)] and owner in leases]
        return self._taken([(owner, leases[owner]) for owner in gone], 2**31)

    def _taken(self, owners: Iterable[tuple[str, float]], most: int) -> list[Hold]:
        found: list[Hold] = []
        for owner, lease in owners:
            if owner == self._tables.owner:
                continue
            keys = [self._connection.key(kind, owner) for kind in HOLDING]
            rows = self._connection.read([("HGETALL", key) for key in keys])
            holds = [(key, hold_of(*item)) for key, row in zip(keys, rows, strict=True) for item in row.items()]
            self._leases[owner] = lease
            for key, hold in holds:
                if len(found) == most:
                    return found
                if hold is not None:
                    self._whose[hold.id] = owner, key
                    found.append(hold)
            self._over[owner] = len(holds)
        return found

    def write(self, commit: Commit, reaped: Iterable[str]) -> None:
        """Have the holds deleted that were charged, and the owners of which nothing is left."""
        batch = self._tables.batch
        taken: dict[str, list[list[Any]]] = {owner: [] for owner in self._over}
        for id in reaped:
            owner, key = self._whose[id]
            taken.setdefault(owner, []).append([commit.key(key), carried(id)])
            batch.call("HDEL", key, carried(id))
        for owner, holds in taken.items():
            hashes = [commit.key(self._connection.key(kind, owner)) for kind in HOLDING]
            # A commit that was under way when its process died may still come: its hold must not go with the hashes.
            commit.reaped.append([owner, self._leases[owner], holds, hashes, self._over.get(owner, -1)])
        for owner in self._over:
            batch.call("ZREM", self._owners, owner)
            batch.call("HDEL", self._homes, owner)
            for kind in HOLDING:
                batch.call("DEL", self._connection.key(kind, owner))


def read_holds(connection: Connection) -> int:
    """Reservations not yet settled, without what is drawn ahead for several calls."""
    (owners,) = connection.read([("ZRANGE", connection.key("owners"), 0, -1)])
    counts = connection.read([("HLEN", connection.key("holds", _text(owner))) for owner in owners]) if owners else []
    return sum(map(int, counts))


def _pairs(rows: Any) -> list[tuple[bytes, float]]:
    """Members and scores, as one list or as pairs."""
    if rows and not isinstance(rows[0], list | tuple):
        rows = list(zip(rows[::2], rows[1::2], strict=True))
    return [(member, float(score)) for member, score in rows]


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
