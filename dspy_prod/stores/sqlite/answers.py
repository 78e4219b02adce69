"""The response cache's table: bounded in entries and bytes, least recently used goes first."""

from __future__ import annotations

import sqlite3
from typing import Final

from dspy_prod.stores.base import CachedAnswer
from dspy_prod.stores.sqlite.inserting import Inserting, among, portions

_EVICT_AT_ONCE: Final = 64

GET: Final = "SELECT value, expires_at, stale_until, size, used_at FROM cache WHERE ns = ? AND key = ?"
PUT: Final = Inserting(
    "cache",
    ("ns", "key", "value", "size", "expires_at", "stale_until", "used_at"),
    " ON CONFLICT (ns, key) DO UPDATE SET value = excluded.value, size = excluded.size, "
    "expires_at = excluded.expires_at, stale_until = excluded.stale_until, used_at = excluded.used_at",
)

_Bounds = tuple[int, int]


class CacheTable:
    """Writes the cache inside the writer's transactions."""

    def __init__(self) -> None:
        self._connection: sqlite3.Connection  # and the namespace's number, from `attach` on
        self._ns: int
        self._size: tuple[int, int] | None = None
        self._puts: dict[_Bounds, dict[bytes, tuple[CachedAnswer, float]]] = {}

    def attach(self, connection: sqlite3.Connection, ns: int) -> None:
        """Use this connection from now on."""
        self._connection = connection
        self._ns = ns
        self.forget()

    def forget(self) -> None:
        """Another process may have changed the table, or a transaction was rolled back."""
        self._size = None
        self._puts.clear()

    def put(self, key: bytes, answer: CachedAnswer, max_entries: int, max_bytes: int, now: float) -> None:
        """Keep an answer, once `write` is called: together they take few statements."""
        self._puts.setdefault((max_entries, max_bytes), {})[key] = (answer, now)

    def write(self) -> None:
        """Write the answers that were put, and evict what was not used for longest until their bounds hold."""
        puts, self._puts = self._puts, {}
        for bounds, answers in puts.items():
            self._write(answers, *bounds)

    def _write(self, answers: dict[bytes, tuple[CachedAnswer, float]], max_entries: int, max_bytes: int) -> None:
        ns, execute = self._ns, self._connection.execute
        entries, size = self._sizes()
        for keys in portions(list(answers)):
            old = among("SELECT count(*), coalesce(sum(size), 0) FROM cache WHERE ns = ? AND key", len(keys))
            count, bytes_ = execute(old, (ns, *keys)).fetchone()
            entries, size = entries - count, size - bytes_
        rows = [
            (ns, key, answer.value, len(answer.value), answer.expires_at, answer.stale_until, now)
            for key, (answer, now) in answers.items()
            if len(answer.value) <= max_bytes
        ]
        if len(rows) < len(answers):  # would push out everything else
            for keys in portions(list(answers.keys() - {row[1] for row in rows})):
                execute(among("DELETE FROM cache WHERE ns = ? AND key", len(keys)), (ns, *keys))
        PUT.run(self._connection, rows)
        entries, size = entries + len(rows), size + sum(row[3] for row in rows)
        while entries > max_entries or size > max_bytes:
            oldest = execute(
                "SELECT id, size FROM cache WHERE ns = ? ORDER BY used_at, id LIMIT ?", (ns, _EVICT_AT_ONCE)
            ).fetchall()
            if not oldest:
                break
            gone = []
            for id, bytes_ in oldest:
                if entries <= max_entries and size <= max_bytes:
                    break
                gone.append(id)
                entries, size = entries - 1, size - bytes_
            for ids in portions(gone):
                execute(among("DELETE FROM cache WHERE id", len(ids)), ids)
        self._keep_sizes(entries, size)

    def touch(self, key: bytes, now: float) -> None:
        """Mark an entry as used."""
        self._connection.execute("UPDATE cache SET used_at = ? WHERE ns = ? AND key = ?", (now, self._ns, key))

    def clear(self) -> None:
        """Delete everything."""
        self._puts.clear()
        self._connection.execute("DELETE FROM cache WHERE ns = ?", (self._ns,))
        self._keep_sizes(0, 0)

    def purge(self, now: float, most: int) -> int:
        """Delete at most `most` that can neither be served fresh nor stale; how many those were."""
        dead = self._connection.execute(
            "SELECT id, size FROM cache WHERE ns = ? AND max(expires_at, stale_until) < ? LIMIT ?",
            (self._ns, now, most),
        ).fetchall()
        if dead:
            entries, size = self._sizes()
            self._connection.executemany("DELETE FROM cache WHERE id = ?", [(id,) for id, _ in dead])
            self._keep_sizes(entries - len(dead), size - sum(bytes_ for _, bytes_ in dead))
        return len(dead)

    def _sizes(self) -> tuple[int, int]:
        if self._size is None:
            self._size = read_size(self._connection, self._ns)
        return self._size

    def _keep_sizes(self, entries: int, size: int) -> None:
        self._size = (entries, size)
        self._connection.execute("INSERT OR REPLACE INTO cache_sizes VALUES (?, ?, ?)", (self._ns, entries, size))


def read_answer(connection: sqlite3.Connection, ns: int, key: bytes) -> tuple[CachedAnswer, float] | None:
    """(answer, when it was last marked as used); a row that cannot be right is a miss."""
    row = connection.execute(GET, (ns, key)).fetchone()
    if row is None:
        return None
    value, expires_at, stale_until, size, used_at = row
    if not (isinstance(value, bytes) and len(value) == size and isinstance(expires_at, float)):
        return None
    if not (isinstance(stale_until, float) and isinstance(used_at, float)):
        return None
    return CachedAnswer(value, expires_at, stale_until), used_at


def read_size(connection: sqlite3.Connection, ns: int) -> tuple[int, int]:
    """(entries, bytes)."""
    row = connection.execute("SELECT entries, bytes FROM cache_sizes WHERE ns = ?", (ns,)).fetchone()
    return (0, 0) if row is None else (row[0], row[1])
