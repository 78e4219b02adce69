"""The ledger in memory: the newest records, and sums per day that are O(1) in the ledger's age."""

from __future__ import annotations

import datetime as dt
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from operator import add
from typing import Any, Final

from dspy_prod.records import OTHER, REFUSED, CallRecord, Totals, alike, rollup_keys

MAX_VALUES_PER_DAY: Final = 20_000
"""Distinct (dimension, value) pairs summed per day; further values are summed as `OTHER`."""

TAG: Final = "tag:"
"""How the name of a tag begins among the names of fields: `tag:feature`."""

_COMPARABLE: Final = frozenset(CallRecord._fields) - {"tags", "accounts"}
_DAY: Final = 86_400
_NEW: Final = 16
"""Records that become rows at once."""
_WAITING: Final = 128
"""Records whose sums are not made yet: what a read has to add up first."""
_STARTED_AT: Final = CallRecord._fields.index("started_at")
_TAGS: Final = CallRecord._fields.index("tags")


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
        if name not in _COMPARABLE and not name.startswith(TAG):
            raise ValueError(
                f"{name!r} is no field to compare; use one of {', '.join(sorted(_COMPARABLE))}, tag:<name>"
            )


class MemoryLedger:
    """Records and rollups. Not thread-safe but for `note`; the store's lock protects it.

    Appending is on the path of every call. Adding up many records alike costs little more than adding one, so they
    wait for each other, but only a few: no call does the work of many. Rows and sums are plain tuples that are
    replaced, never changed: the garbage collector stops tracking them, and a reader's copy stays as it was.
    """

    def __init__(self, max_records: int) -> None:
        self._max = max_records
        self._rows: dict[str, tuple[Any, ...]] = {}
        self._order: deque[str] = deque()  # the ids, oldest first: a dict finds its first key slowly after deletions
        self._new: deque[CallRecord] = deque()
        self._waiting: dict[tuple[Any, ...], list[CallRecord]] = {}
        self._wait = 0  # how many records wait
        self._days: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}

    def append(self, record: CallRecord, is_new: bool = True) -> None:
        """Add a record. One with a known id replaces it (settling is idempotent, and costs are corrected)."""
        if self.note(record):
            self.take()

    def note(self, record: CallRecord) -> bool:
        """Add a record without the lock; whether so many are new that somebody with the lock should `take` them."""
        self._new.append(record)
        return len(self._new) >= _NEW

    def find(self, id: str) -> CallRecord | None:
        """The record with this id."""
        self.take()
        row = self._rows.get(id)
        return None if row is None else CallRecord._make(row)

    def rows(self) -> list[tuple[Any, ...]]:
        """Every row, oldest first, as it is now: for `matching`, which needs no lock."""
        self.take()
        return list(self._rows.values())

    def days(self, since_day: str | None, until_day: str | None) -> list[str]:
        """The days that have sums, oldest first; brings the sums up to date."""
        self.take()
        for group in list(self._waiting):
            self._fold(group)
        return sorted(
            day
            for day in self._days
            if (since_day is None or day >= since_day) and (until_day is None or day <= until_day)
        )

    def sums(self, day: str, dimension: str) -> dict[str, tuple[int, ...]]:
        """What one day sums up to for each value of a dimension, as it is now."""
        return dict(self._days[day].get(dimension, ()))

    def take(self) -> None:
        """Make rows of the new records, and let them wait for their like."""
        rows, order, waiting, wait, new = self._rows, self._order, self._waiting, 0, self._new
        for _ in range(len(new)):  # others go on adding
            record = new.popleft()
            id = record.id
            if id in rows:
                self._sum([CallRecord._make(rows[id])], -1)
            else:
                order.append(id)
            rows[id] = tuple(record)
            if record.outcome == REFUSED:
                continue
            group = (int(record.started_at // _DAY), alike(record))
            others = waiting.get(group)
            if others is None:
                waiting[group] = [record]
            else:
                others.append(record)
            wait += 1
        self._wait += wait
        while self._wait > _WAITING:
            self._fold(next(iter(waiting)))
        while len(order) > self._max:
            del rows[order.popleft()]

    def _fold(self, group: tuple[Any, ...]) -> None:
        """Add up records that wait."""
        records = self._waiting.pop(group)
        self._wait -= len(records)
        self._sum(records, 1)

    def _sum(self, records: list[CallRecord], sign: int) -> None:
        """Add records that belong to the same day and values."""
        first = records[0]
        day = self._days.setdefault(day_of(first.started_at), {})
        contribution = tuple([sign * total for total in Totals.of(*records)])
        for dimension, value in rollup_keys(first):
            values = day.get(dimension)
            if values is None:
                values = day[dimension] = {}
            sums = values.get(value)
            if sums is None:
                if sum(map(len, day.values())) >= MAX_VALUES_PER_DAY:
                    value = OTHER
                sums = values.get(value)
            values[value] = contribution if sums is None else tuple(map(add, sums, contribution))


def matching(
    rows: Sequence[tuple[Any, ...]],
    since: float | None,
    until: float | None,
    limit: int | None,
    equals: Mapping[str, str],
) -> list[CallRecord]:
    """Those of `MemoryLedger.rows` that match, newest first."""
    wanted = [(CallRecord._fields.index(name), value) for name, value in equals.items() if not name.startswith(TAG)]
    tags = {(name.removeprefix(TAG), value) for name, value in equals.items() if name.startswith(TAG)}
    found = (
        row
        for row in reversed(rows)
        if (since is None or row[_STARTED_AT] >= since)
        and (until is None or row[_STARTED_AT] < until)
        and all(row[index] == value for index, value in wanted)
        and tags.issubset(row[_TAGS])
    )
    return [CallRecord._make(row) for row in (found if limit is None else islice(found, limit))]
