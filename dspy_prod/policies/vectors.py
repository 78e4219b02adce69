"""The cache of vectors: one entry a text, as the bytes of its float32 numbers, in memory and in the store.

Bounds, lifetimes and keys are those of the response cache. What is kept is exact: the numbers that came, not a decimal
rendering of them.
"""

from __future__ import annotations

import struct
from typing import Final

from dspy_prod.policies.cache import ResponseCache
from dspy_prod.policies.entries import Entry
from dspy_prod.stores.base import CachedAnswer

_HEAD: Final = struct.Struct("<4sq")
_MARK: Final = b"f32\x01"
"""What a row in the store begins with: its form, and then what it cost in nano-USD, -1 where that is not known."""

_OVERHEAD: Final = 256
"""Bytes added to each entry's size for the objects around its numbers."""


class KeptVector(Entry):
    """A kept vector.

    Attributes:
        row: its numbers as float32, little endian.
    """

    __slots__ = ("row",)

    def __init__(self, row: bytes, expires_at: float, stale_until: float, size: int, list_nano: int | None) -> None:
        self.row = row
        self.text = None
        self.expires_at = expires_at
        self.stale_until = stale_until
        self.size = size
        self.list_nano = list_nano


class VectorCache(ResponseCache):
    """Vectors by key, shared by all embedders with the same store, namespace and options."""

    def vector(self, key: bytes) -> KeptVector | None:
        """The fresh vector in memory or in the store, which counts as a hit or a miss."""
        entry = self.get(key)
        return entry if isinstance(entry, KeptVector) else None

    def stale_vector(self, key: bytes) -> KeptVector | None:
        """An expired vector that may still be served because every route failed, or None."""
        entry = self.stale(key)
        return entry if isinstance(entry, KeptVector) else None

    def keep(self, key: bytes, row: bytes, ttl: float | None, list_nano: int | None) -> None:
        """Keep a vector and its part of what it cost. `ttl` overrides the option, in seconds."""
        options = self.options
        expires_at, stale_until = self.times(ttl)
        entry = KeptVector(row, expires_at, stale_until, len(key) + len(row) + _OVERHEAD, list_nano)
        if entry.size > options.max_bytes:
            return
        self._insert(key, entry)
        if self._writes(key):
            self._store.cache_put(
                self._stored_as(key),
                CachedAnswer(_HEAD.pack(_MARK, -1 if list_nano is None else list_nano) + row, expires_at, stale_until),
                max_entries=options.max_entries,
                max_bytes=options.max_bytes,
            )

    def _load(self, key: bytes) -> Entry | None:
        kept = self._store.cache_get(self._stored_as(key))
        if kept is None or len(kept.value) <= _HEAD.size or (len(kept.value) - _HEAD.size) % 4:
            return None
        mark, list_nano = _HEAD.unpack_from(kept.value)
        if mark != _MARK:
            return None
        row = kept.value[_HEAD.size :]
        size = len(key) + len(row) + _OVERHEAD
        entry = KeptVector(row, kept.expires_at, kept.stale_until, size, None if list_nano < 0 else list_nano)
        if entry.expires_at > self._now():
            self._insert(key, entry)
        return entry


def shares(total: int | None, weights: list[int]) -> list[int | None]:
    """What each of some texts cost of their batch: by its length, whole nano-USD that add up to all of it."""
    if total is None:
        return [None] * len(weights)
    whole = sum(weights) or 1
    found: list[int | None] = []
    done = before = 0
    for weight in weights:
        done += weight
        upto = total * done // whole
        found.append(upto - before)
        before = upto
    return found
