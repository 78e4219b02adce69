"""Many records as one row: what they have in common once, what differs as a list for each field.

JSON, by the names of the fields, so that another release reads it. Whatever JSON cannot carry exactly raises, and is
written as an ordinary row instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, Final, NamedTuple

import orjson

from dspy_prod.records import CallRecord
from dspy_prod.stores.durable.served import Served
from dspy_prod.stores.memory_rows import TAG
from dspy_prod.stores.sqlite.indices import SELECTIVE

PLACE: Final = "place"
"""Among the fields of a page: the `seq` of the newest row of `records` that was written before."""

_FIELDS: Final = CallRecord._fields
_STARTED: Final = 1 + _FIELDS.index("started_at")
_ROUGH: Final = ("id", "call_id")


class Found(NamedTuple):
    """A record as it is sorted: by time, and where that is the same in the order of writing."""

    started_at: float
    place: int
    order: int
    record: CallRecord


class Page:
    """Some records, by column.

    Attributes:
        size: how many.
    """

    def __init__(self, size: int, same: Mapping[str, Any], each: Mapping[str, Sequence[Any]], seq: int = 0) -> None:
        self.size = size
        self._same = same
        self._each = each
        self._seq = seq

    @classmethod
    def of(cls, places: Sequence[int], records: Sequence[CallRecord]) -> Page:
        """The page of some records, at least one, each with its place."""
        same: dict[str, Any] = {}
        each: dict[str, Sequence[Any]] = {}
        for name, column in ((PLACE, places), *zip(_FIELDS, zip(*records, strict=True), strict=True)):
            first = column[0]
            if column.count(first) < len(column):
                each[name] = column
            elif first is not None:
                same[name] = first
        return cls(len(records), same, each)

    @classmethod
    def of_served(cls, place: int, served: Served) -> Page:
        """The page of cached answers that were taken together, all at one place."""
        each: dict[str, Sequence[Any]] = {"id": served.ids, "call_id": served.call_ids, "started_at": served.times}
        saved, first = served.saved, served.saved[0]
        like = zip(_FIELDS, served.like._replace(saved_nano=first), strict=True)
        if saved.count(first) < len(saved):
            each["saved_nano"] = saved
        same = {name: value for name, value in like if value is not None and name not in each}
        return cls(len(served), {PLACE: place, **same}, each)

    @classmethod
    def joined(cls, pages: Sequence[Page]) -> Page:
        """One page of all that is in these, in their order."""
        pages = [page for page in pages if page.size]
        same: dict[str, Any] = {}
        each: dict[str, Sequence[Any]] = {}
        for name in (PLACE, *_FIELDS):
            values = [page._same.get(name) for page in pages]
            if values.count(values[0]) == len(values) and not any(name in page._each for page in pages):
                if values[0] is not None:
                    same[name] = values[0]
            else:
                each[name] = list(chain.from_iterable(page.column(name) for page in pages))
        return cls(sum(page.size for page in pages), same, each)

    def part(self, start: int, stop: int) -> Page:
        """The page of some of its records."""
        if start <= 0 and stop >= self.size:
            return self
        each = {name: column[start:stop] for name, column in self._each.items()}
        return Page(min(stop, self.size) - start, self._same, each)

    @classmethod
    def load(cls, body: Any, seq: int = 0) -> Page:
        """What `dump` wrote; no records where it is damaged, for one row must not stop all others."""
        try:
            loaded = orjson.loads(body)
            size, same, each = loaded["size"], dict(loaded["same"]), dict(loaded["each"])
            if type(size) is int and all(len(column) == size for column in each.values()):
                return cls(size, same, each, seq)
        except (TypeError, ValueError, KeyError):
            pass
        return cls(0, {}, {}, seq)

    def dump(self) -> bytes:
        """As JSON.

        Raises:
            TypeError: a value that JSON cannot carry.
        """
        return orjson.dumps({"size": self.size, "same": self._same, "each": self._each})

    def pairs(self) -> list[tuple[str, str]]:
        """The (field, value) pairs under which the page is looked up.

        Raises:
            TypeError: a value that is no text.
        """
        found: list[tuple[str, str]] = []
        for name in SELECTIVE:
            column = self._each.get(name)
            if column is None:
                column = (self._same.get(name),)
            values = rougher(column) if name in _ROUGH else set(column) - {None}
            if values:
                if set(map(type, values)) != {str}:
                    raise TypeError(f"{name} is no text")
                found += [(name, value) for value in values]
        return found

    def column(self, name: str) -> Sequence[Any]:
        """The values of one field."""
        column = self._each.get(name)
        return [self._same.get(name)] * self.size if column is None else column

    def find(self, equals: Mapping[str, Any], since: float | None = None, until: float | None = None) -> list[Found]:
        """The records that match, in the order in which they were written."""
        kept: Sequence[int] = range(self.size)
        for name, value in equals.items():
            if name.startswith(TAG):
                pair, tags = [name.removeprefix(TAG), value], self.column("tags")
                kept = [index for index in kept if pair in map(list, tags[index] or ())]
                continue
            column = self._each.get(name)
            if column is not None:
                kept = [index for index in kept if equal(column[index], value)]
            elif not equal(self._same.get(name), value):
                return []
        if since is not None:
            times = self.column("started_at")
            kept = [index for index in kept if times[index] >= since]
        if until is not None:
            times = self.column("started_at")
            kept = [index for index in kept if times[index] < until]
        return self._records(kept) if kept else []

    def all(self) -> list[Found]:
        """Every record."""
        return self.find({})

    def _records(self, kept: Sequence[int]) -> list[Found]:
        columns: list[Iterable[Any]] = []
        for name in (PLACE, *_FIELDS):
            column, loaded = self._each.get(name), _LOADED.get(name)
            if column is None:
                value = self._same.get(name)
                columns.append(repeat(value if loaded is None else loaded(value), len(kept)))
            else:
                values = column if len(kept) == self.size else [column[index] for index in kept]
                columns.append(values if loaded is None else map(loaded, values))
        first = self._seq << 20
        return [
            Found(values[_STARTED], values[0], first + index, CallRecord._make(values[1:]))
            for index, values in zip(kept, zip(*columns, strict=True), strict=True)
        ]


def looked_up_as(name: str, value: str) -> str:
    """How a value of a field is looked up."""
    return value[:-2] if name in _ROUGH else value


def rougher(ids: Iterable[str | None]) -> set[str]:
    """What ids are looked up as: they grow, so all of a page begin with the same few beginnings."""
    return {id[:-2] for id in ids if id is not None}


def equal(value: Any, wanted: Any) -> bool:
    """Whether a field has a value, compared as SQLite compares its column with it."""
    if isinstance(value, str) or value is None or not isinstance(wanted, str):
        return bool(value == wanted)
    try:
        return bool(value == float(wanted))
    except ValueError:
        return False


def _pairs(value: Any) -> tuple[tuple[str, str], ...]:
    return tuple((name, text) for name, text in value or ())


_LOADED: Final[dict[str, Callable[[Any], Any]]] = {"tags": _pairs, "accounts": lambda value: tuple(value or ())}
