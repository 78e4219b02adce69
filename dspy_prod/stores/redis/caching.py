"""The answers, as the writer's operations put them into the transaction under way."""

from __future__ import annotations

from typing import Protocol

from dspy_prod.stores.base import CachedAnswer
from dspy_prod.stores.redis.answers import RedisAnswers
from dspy_prod.stores.redis.batch import Batch


class Writing(Protocol):
    """Tables with a transaction under way."""

    batch: Batch

    @property
    def answers(self) -> RedisAnswers: ...


class Caching:
    """The answers, as the writer's operations put them into the batch of the transaction."""

    def __init__(self, tables: Writing) -> None:
        self._tables = tables

    def put(self, key: bytes, answer: CachedAnswer, max_entries: int, max_bytes: int, now: float) -> None:
        self._tables.answers.put(self._tables.batch, key, answer, max_entries, max_bytes, now)

    def touch(self, key: bytes, now: float) -> None:
        self._tables.answers.touch(self._tables.batch, key, now)

    def clear(self) -> None:
        self._tables.answers.clear(self._tables.batch)
