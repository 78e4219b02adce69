"""The ledger in memory: the newest records, and sums per day that are O(1) in the ledger's age."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, Final

from dspy_prod.records import OTHER, REFUSED, CallRecord, Totals, rollup_keys

MAX_VALUES_PER_DAY: Final = 20_000
"""Distinct (dimension, value) pairs summed per day; further values are summed as `OTHER`."""

_COMPARABLE: Final = frozenset(CallRecord._fields) - {"tags", "accounts"}
_DAY: Final = 86_400
_BATCH: Final = 512


def day_of(at: float) -> str:
    """The UTC day of an epoch time as `YYYY-MM-DD`."""
    return _day(int(at // _DAY))


@lru_cache(maxsize=1024)
def _day(number: int) -> str:
    return dt.datetime.fromtimestamp(number * _DAY, dt.timezone.utc).strftime("%Y-%m-%d")


def check_fields(names: Iterable[str]) -> None:
    """Refuse names that no record can be compared by.

    Raises:
        ValueError: names the field and those that exist.
    """
    for name in names:
        if name not in _COMPARABLE:
            raise ValueError(f"{name!r} is no field to compare; use one of {', '.join(sorted(_COMPARABLE))}")


class MemoryLedger:
    """Records and rollups. Not thread-safe; the store's lock protects it.

    Appending is on the path of every call, so it only notes the record; sums are made in batches, before a read or
    when `_BATCH` records wait. Rows are kept as plain tuples, which the garbage collector stops tracking.
    """

    def __init__(self, max_records: int) -> None:
        self._max = max_records
        self._rows: dict[str, tuple[Any, ...]] = {}
        self._new: list[CallRecord] = []
        self._days: dict[str, dict[tuple[str, str], list[int]]] = {}

    def append(self, record: CallRecord, is_new: bool = True) -> None:
        """Add a record. One with a known id replaces it (settling is idempotent, and costs are corrected)."""
        self._new.append(record)
        if not is_new or len(self._new) >= _BATCH:
            self._fold()

    def find(self, id: str) -> CallRecord | None:
        """The record with this id."""
        self._fold()
        row = self._rows.get(id)
        return None if row is None else CallRecord._make(row)

    def records(
        self, since: float | None, until: float | None, limit: int | None, equals: Mapping[str, str]
    ) -> list[CallRecord]:
        """Matching records, newest first."""
        check_fields(equals)
        self._fold()
        matching = (
            record
            for record in map(CallRecord._make, reversed(self._rows.values()))
            if (since is None or record.started_at >= since)
            and (until is None or record.started_at < until)
            and all(getattr(record, name) == value for name, value in equals.items())
        )
        return list(matching if limit is None else islice(matching, limit))

    def totals(self, dimension: str, since_day: str | None, until_day: str | None) -> list[tuple[str, str, Totals]]:
        """(day, value, sums) of one dimension."""
        self._fold()
        rows: list[tuple[str, str, Totals]] = []
        for day in sorted(self._days):
            if (since_day is None or day >= since_day) and (until_day is None or day <= until_day):
                sums = self._days[day]
                if dimension == "all":  # the common question, without a look at the day's other values
                    rows.append((day, "", Totals(*sums["all", ""])))
                else:
                    found = sorted(value for name, value in sums if name == dimension)
                    rows.extend((day, value, Totals(*sums[dimension, value])) for value in found)
        return rows

    def _fold(self) -> None:
        """Bring rows and sums up to date."""
        if not self._new:
            return
        rows = self._rows
        groups: dict[tuple[Any, ...], list[CallRecord]] = {}
        for record in self._new:
            old = rows.get(record.id)
            if old is not None:
                self._sum([CallRecord._make(old)], -1)
            rows[record.id] = tuple(record)
            if record.outcome == REFUSED:
                continue
            group = (
                int(record.started_at // _DAY), record.model, record.user, record.tenant, record.program,
                record.variant, record.prompt_version, record.tags,
            )  # fmt: skip
            groups.setdefault(group, []).append(record)
        self._new.clear()
        for group_records in groups.values():
            self._sum(group_records, 1)
        for id in list(islice(rows, max(0, len(rows) - self._max))):
            del rows[id]

    def _sum(self, records: list[CallRecord], sign: int) -> None:
        """Add records that belong to the same day and values."""
        first = records[0]
        day = self._days.setdefault(day_of(first.started_at), {})
        contribution = [sign * sum(column) for column in zip(*map(Totals.of, records), strict=True)]
        for key in rollup_keys(first):
            sums = day.get(key)
            if sums is None:
                if len(day) >= MAX_VALUES_PER_DAY:
                    key = (key[0], OTHER)
                sums = day.setdefault(key, [0] * len(contribution))
            for index, value in enumerate(contribution):
                sums[index] += value
