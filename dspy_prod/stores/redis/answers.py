"""The response cache in Redis: bounded in entries and bytes, least recently used goes first, the server ends what ends.

Keys begin with `<tag>:answers`: `of:<key>`, an answer after its two times and a checksum; `used`: sorted set, key by
when it was used last; `ends`: the same by when it can be served no more; `sizes`: hash, key → bytes; `bytes`: their
sum; `dead`: what was cleared and is still to be deleted. An answer is there if it is in `used`.
"""

from __future__ import annotations

from math import inf, isnan
from pathlib import Path
from struct import Struct
from typing import Final
from zlib import crc32

from dspy_prod.stores.redis.batch import STEPS, Batch
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.vocabulary import CachedAnswer

STEP: Final = "answers"
STEPS[STEP] = Path(__file__).with_name("answers.lua").read_text(encoding="utf-8")

IDLE: Final = 90 * 86_400.0
"""Seconds after which an answer that was not used is no longer kept, as in `answers.lua`."""

_HEAD: Final = Struct(">ddII")
"""When it expires, until when it may be served stale, a checksum of all this, and the length of the value."""


class RedisAnswers:
    """Keeps answers by commands of a commit; reads them at any time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._base = connection.key("answers")

    def put(self, batch: Batch, key: bytes, answer: CachedAnswer, max_entries: int, max_bytes: int, now: float) -> None:
        """Keep an answer, and evict what was not used for longest until the bounds hold.

        One that is too large for them, or can be served no more, only takes the place of the one before.
        """
        ends = max(answer.expires_at, answer.stale_until)
        left = 0.0 if isnan(ends) else max(0.0, min(ends - now, IDLE))
        batch.call(
            STEP, self._base, "put", key, _packed(answer), len(answer.value), "" if ends == inf else repr(ends),
            int(left * 1000), repr(now), max_entries, max_bytes,
        )  # fmt: skip

    def touch(self, batch: Batch, key: bytes, now: float) -> None:
        """Mark an answer as used."""
        batch.call(STEP, self._base, "touch", key, repr(now))

    def clear(self, batch: Batch) -> None:
        """Forget all answers; their values are deleted little by little."""
        batch.call(STEP, self._base, "clear")

    def purge(self, batch: Batch, now: float, most: int) -> bool:
        """Delete at most `most` of each kind that can be served no more; whether there may be others."""
        names = [("ends", now), ("used", now - IDLE), ("dead", inf)]
        counts = self._connection.read(
            [("ZCOUNT", f"{self._base}:{name}", "-inf", f"({before!r}") for name, before in names]
        )
        if any(counts):
            batch.call(STEP, self._base, "purge", repr(now), most)
        return bool(max(counts) > most)

    def get(self, key: bytes) -> CachedAnswer | None:
        """An answer; None when there is none, or it cannot be right."""
        found = self.find(key)
        return None if found is None else found[0]

    def find(self, key: bytes) -> tuple[CachedAnswer, float] | None:
        """(answer, when it was last marked as used)."""
        value, used = self._connection.read(
            [("GET", f"{self._base}:of:".encode() + key), ("ZSCORE", f"{self._base}:used", key)]
        )
        answer = None if value is None or used is None else unpacked(value)
        return None if answer is None else (answer, float(used))

    def size(self) -> tuple[int, int]:
        """(entries, bytes)."""
        entries, size = self._connection.read([("ZCARD", f"{self._base}:used"), ("GET", f"{self._base}:bytes")])
        return int(entries), int(size or 0)


def _packed(answer: CachedAnswer) -> bytes:
    return _HEAD.pack(answer.expires_at, answer.stale_until, _checksum(answer), len(answer.value)) + answer.value


def unpacked(packed: bytes) -> CachedAnswer | None:
    """An answer as it is kept; None when it cannot be right."""
    if len(packed) < _HEAD.size:
        return None
    expires_at, stale_until, checksum, size = _HEAD.unpack_from(packed)
    answer = CachedAnswer(packed[_HEAD.size :], expires_at, stale_until)
    return answer if size == len(answer.value) and checksum == _checksum(answer) else None


def _checksum(answer: CachedAnswer) -> int:
    return crc32(answer.value, crc32(b"%r %r" % (answer.expires_at, answer.stale_until)))
