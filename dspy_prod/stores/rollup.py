"""The ledger in memory: the newest records, and sums per day that are O(1) in the ledger's age."""

from __future__ import annotations

import datetime as dt
from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice
from typing import Final

from dspy_prod.records import CallRecord, Totals, rollup_keys

MAX_VALUES_PER_DAY: Final = 20_000
"""Distinct (dimension, value) pairs summed per day; further values are summed as `"(other)"`."""

_DAY: Final = 86_400


def day_of(at: float) -> str:
    """The UTC day of an epoch time as `YYYY-MM-DD`."""
    number = int(at // _DAY)
    day = _days.get(number)
    if day is None:
        if len(_days) > 1000:
            _days.clear()
        day = _days[number] = dt.datetime.fromtimestamp(number * _DAY, dt.timezone.utc).strftime("%Y-%m-%d")
    return day


_days: dict[int, str] = {}


class MemoryLedger:
    """Records and rollups. Not thread-safe; the store's lock protects it."""

    def __init__(self, max_records: int) -> None:
        self._max = max_records
        self._records: OrderedDict[str, CallRecord] = OrderedDict()
        self._days: dict[str, dict[tuple[str, str], list[int]]] = {}

    def append(self, record: CallRecord) -> None:
        """Add a record. One with a known id replaces it (settling is idempotent)."""
        records = self._records
        if record.id in records:
            self.replace(record)
            return
        records[record.id] = record
        if len(records) > self._max:
            records.popitem(last=False)
        self._sum(record, 1)

    def replace(self, record: CallRecord) -> None:
        """Put a corrected record in place of the one with its id; appended when that is gone."""
        old = self._records.get(record.id)
        if old is None:
            self.append(record)
            return
        self._sum(old, -1)
        self._records[record.id] = record
        self._sum(record, 1)

    def find(self, id: str) -> CallRecord | None:
        """The record with this id."""
        return self._records.get(id)

    def records(
        self, since: float | None, until: float | None, limit: int | None, equals: Mapping[str, str]
    ) -> list[CallRecord]:
        """Matching records, newest first."""
        matching = (
            record
            for record in reversed(self._records.values())
            if (since is None or record.started_at >= since)
            and (until is None or record.started_at < until)
            and all(getattr(record, name) == value for name, value in equals.items())
        )
        return list(matching if limit is None else islice(matching, limit))

    def totals(self, dimension: str, since_day: str | None, until_day: str | None) -> list[tuple[str, str, Totals]]:
        """(day, value, sums) of one dimension."""
        return [
            (day, value, Totals(*sums))
            for day in sorted(self._days)
            if (since_day is None or day >= since_day) and (until_day is None or day <= until_day)
            for (name, value), sums in sorted(self._days[day].items())
            if name == dimension
        ]

    def _sum(self, record: CallRecord, sign: int) -> None:
        day = self._days.setdefault(day_of(record.started_at), {})
        contribution = Totals.of(record)
        for key in rollup_keys(record):
            sums = day.get(key)
            if sums is None:
                if len(day) >= MAX_VALUES_PER_DAY:
                    key = (key[0], "(other)")
                    sums = day.get(key)
                if sums is None:
                    sums = day[key] = [0] * len(contribution)
            for index, value in enumerate(contribution):
                if value:
                    sums[index] += sign * value
