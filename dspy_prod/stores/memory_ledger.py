"""The ledger in memory: the newest records, and sums per day that are O(1) in the ledger's age."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import add
from typing import Any, Final

from dspy_prod.records import OTHER, REFUSED, CallRecord, Totals, alike, rollup_keys
from dspy_prod.runtime.ids import IDS
from dspy_prod.stores.memory_rows import MOST_ALIKE, TAG, AlikeBlock, Rows, View

MAX_VALUES_PER_DAY: Final = 20_000
"""Distinct (dimension, value) pairs summed per day; further values are summed as `OTHER`."""

_COMPARABLE: Final = frozenset(CallRecord._fields) - {"tags", "accounts"}
_DAY: Final = 86_400
_NEW: Final = 16
"""Records that become rows at once."""
ENOUGH_ALIKE: Final = 64
"""The same of records alike, of which only the first takes long."""
_WAITING: Final = 128
"""Records whose sums are not made yet: what a read has to add up first."""


def day_of(at: float) -> str:
    """The UTC day of an epoch time as `YYYY-MM-DD`."""
    return _day(int(at // _DAY))


@lru_cache(maxsize=1024)
def _day(number: int) -> str:
    return dt.datetime.fromtimestamp(number * _DAY, dt.timezone.utc).strftime("%Y-%m-%d")


def _by_day(times: Sequence[float], saved: Sequence[int | None]) -> Iterable[tuple[int, Sequence[int | None]]]:
    """(number of the day, what was saved on it) of cached answers."""
    first = min(times) // _DAY
    if max(times) // _DAY == first:
        return [(int(first), saved)]
    days: dict[int, list[int | None]] = defaultdict(list)
    for at, nano in zip(times, saved, strict=True):
        days[int(at // _DAY)].append(nano)
    return days.items()


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


class Alike:
    """Cached answers whose records differ in nothing but when they were given and what each would have cost: only that
    is noted of each.

    Args:
        like: a record such as theirs; its ids, its time and its `saved_nano` stand for nothing.
    """

    __slots__ = ("given", "group", "like", "listed")

    def __init__(self, like: CallRecord) -> None:
        self.like = like
        self.group = alike(like)
        self.given: deque[tuple[float, int | None]] = deque()
        self.listed = False  # the ledger knows that there are some

    def take(self) -> list[tuple[float, int | None]]:
        """Those so far; whoever holds the ledger's lock."""
        self.listed = False  # before it is looked how many there are: whoever adds one from now on lists it again
        pop = self.given.popleft
        return [pop() for _ in range(len(self.given))]


class MemoryLedger:
    """Records and rollups. Not thread-safe but for `note` and `expect`; the store's lock protects it.

    Appending is on the path of every call. Adding up many records alike costs little more than adding one, so they
    wait for each other, but only a few: no call does the work of many. Sums are plain tuples that are replaced,
    never changed: the garbage collector stops tracking them, and a reader's copy stays as it was.
    """

    def __init__(self, max_records: int) -> None:
        self._rows = Rows(max_records)
        self._new: deque[CallRecord] = deque()
        self._kinds: deque[Alike] = deque()  # of which there are some
        self._waiting: dict[tuple[Any, ...], list[CallRecord]] = {}
        self._wait = 0  # how many records wait
        # Cached answers that are in no sum yet: what they are like, and what each would have cost.
        self._served: dict[tuple[int, Any], tuple[CallRecord, Totals]] = {}
        self._days: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}

    def append(self, record: CallRecord, is_new: bool = True) -> None:
        """Add a record. One with a known id replaces it (settling is idempotent, and costs are corrected)."""
        if self.note(record):
            self.take()

    def note(self, record: CallRecord) -> bool:
        """Add a record without the lock; whether so many are new that somebody with the lock should `take` them."""
        self._new.append(record)
        return len(self._new) >= _NEW

    def expect(self, kind: Alike) -> None:
        """There are some of a kind, added without the lock."""
        kind.listed = True
        self._kinds.append(kind)

    def find(self, id: str) -> CallRecord | None:
        """The record with this id."""
        self.take()
        return self._rows.find(id)

    def view(self) -> View:
        """Every record as it is now; it may be read without a lock."""
        self.take()
        return self._rows.view()

    def days(self, since_day: str | None, until_day: str | None) -> list[str]:
        """The days that have sums, oldest first; brings the sums up to date."""
        self.take()
        for group in list(self._waiting):
            self._fold(group)
        for group in list(self._served):
            self._fold_served(group)
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
        put, waiting, wait, new = self._rows.put, self._waiting, 0, self._new
        for _ in range(len(new)):  # others go on adding
            record = new.popleft()
            before = put(record)
            if before is not None:
                self._sum([before], -1)
            if record.outcome == REFUSED:
                continue
            group = (int(record.started_at // _DAY), alike(record))
            others = waiting.get(group)
            if others is None:
                waiting[group] = [record]
            else:
                others.append(record)
            wait += 1
        while self._kinds:
            self._take_alike(self._kinds.popleft())
        self._wait += wait
        while self._wait > _WAITING:
            self._fold(next(iter(waiting)))

    def _take_alike(self, kind: Alike) -> None:
        given = kind.take()
        for start in range(0, len(given), MOST_ALIKE):
            times, saved = zip(*given[start : start + MOST_ALIKE], strict=True)
            self._rows.extend(AlikeBlock(kind.like, IDS.make(), times, saved))
            for day, some in _by_day(times, saved):
                group = (day, kind.group)
                _, before = self._served.get(group, (kind.like, Totals()))
                self._served[group] = kind.like, before.plus(Totals.of_hits(some))
        while len(self._served) > _WAITING:
            self._fold_served(next(iter(self._served)))

    def _fold(self, group: tuple[Any, ...]) -> None:
        """Add up records that wait."""
        records = self._waiting.pop(group)
        self._wait -= len(records)
        self._sum(records, 1)

    def _fold_served(self, group: tuple[int, Any]) -> None:
        """The same of cached answers."""
        like, totals = self._served.pop(group)
        self._add(_day(group[0]), like, tuple(totals))

    def _sum(self, records: list[CallRecord], sign: int) -> None:
        """Add records that belong to the same day and values."""
        first = records[0]
        self._add(day_of(first.started_at), first, tuple([sign * total for total in Totals.of(*records)]))

    def _add(self, name: str, like: CallRecord, contribution: tuple[int, ...]) -> None:
        """Add to the sums of a day and of all values that a record has."""
        day = self._days.setdefault(name, {})
        for dimension, value in rollup_keys(like):
            values = day.get(dimension)
            if values is None:
                values = day[dimension] = {}
            sums = values.get(value)
            if sums is None:
                if sum(map(len, day.values())) >= MAX_VALUES_PER_DAY:
                    value = OTHER
                sums = values.get(value)
            values[value] = contribution if sums is None else tuple(map(add, sums, contribution))
