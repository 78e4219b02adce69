"""The keys of the ledger in Redis.

All begin with `<tag>:ledger`; `ledger.lua` makes the same ones. What a record is found by ends with the value as it is,
which cannot be mistaken, for it is the last part.

- `rows`: hash, id → the day on which it came and the record; `at`: sorted set, id by `started_at`.
- `by:<field>:<value>`: sorted set, id by `started_at`. The ids of calls and traces share buckets, for most have a
  record each, and a key each would be as large as the record.
- `loose`: hash, id → a cached answer; `page`: hash, number → the day, how many, and they; `gone`: hash, number → the
  ids of those on the page that have become rows; `paged` and `paged:<field>:<value>`: sorted sets, number by when the
  page ended.
- `hits`: how many are on pages; `numbered`: the number of the newest page.
- `slots:<day>:<dimension>`: hash, value → its place in `sums:<day>:<dimension>`, a string of ten 64-bit numbers for
  each; `names:<day>:<dimension>`: the values in the order of their places, with a comma after each; `values:<day>`: how
  many values the day has.
"""

from __future__ import annotations

from hashlib import sha1
from typing import Final

from dspy_prod.stores.redis.connection import Connection

LONGEST: Final = 64
"""Bytes of a value that stands in a key as it is."""

_BUCKETS: Final = ("call_id", "trace_id")
_ROUGH: Final = ("id", "call_id")


class LedgerKeys:
    """The keys of one namespace."""

    def __init__(self, connection: Connection) -> None:
        self.base = connection.key("ledger")
        for name in ("rows", "at", "loose", "page", "gone", "paged"):
            setattr(self, name, f"{self.base}:{name}")

    rows: str
    at: str
    loose: str
    page: str
    gone: str
    paged: str

    def by(self, field: str, value: str) -> str:
        """Where the rows are found whose field has a value, or the bucket they share with others."""
        named = _hash(value)[:4] if field in _BUCKETS else _named(value)
        return f"{self.base}:by:{field}:{named}"

    def paged_by(self, field: str, value: str) -> str:
        """Where the pages are found that have a hit whose field has a value, or begins so."""
        return f"{self.base}:paged:{field}:{_named(value[:-2] if field in _ROUGH else value)}"

    def slots(self, day: str, dimension: str) -> str:
        """Where the places of a dimension's values are."""
        return f"{self.base}:slots:{day}:{dimension}"

    def names(self, day: str, dimension: str) -> str:
        """Where the values are, in the order of their places."""
        return f"{self.base}:names:{day}:{dimension}"

    def sums(self, day: str, dimension: str) -> str:
        """Where their sums are."""
        return f"{self.base}:sums:{day}:{dimension}"


def _named(value: str) -> str:
    return value if len(value.encode()) <= LONGEST else f"#{_hash(value)}"


def _hash(value: str) -> str:
    return sha1(value.encode(), usedforsecurity=False).hexdigest()
