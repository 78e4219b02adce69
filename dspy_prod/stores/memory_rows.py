"""The newest records in memory, many to a tuple.

The garbage collector counts what holds other things, and stops everybody to look at what is new once there are some
hundreds. A tuple for each record would be most of what it finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, Final

from dspy_prod.records import CallRecord

BLOCK: Final = 16
"""Records of a tuple."""
_WIDTH: Final = len(CallRecord._fields)
_FULL: Final = BLOCK * _WIDTH
_ID: Final = CallRecord._fields.index("id")
_STARTED_AT: Final = CallRecord._fields.index("started_at")
_TAGS: Final = CallRecord._fields.index("tags")
TAG: Final = "tag:"
"""How the name of a tag begins among the names of fields: `tag:feature`."""


class Rows:
    """Records by their ids, in the order in which they came; a later one with the same id takes the place of the first.

    Not thread-safe. Full blocks are replaced, never changed, so that a reader's `view` stays as it was.

    Args:
        most: how many of the newest are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._places: dict[str, int] = {}
        self._blocks: dict[int, tuple[Any, ...]] = {}  # the full ones, by their number, the oldest first
        self._tail: list[Any] = []  # what comes after them
        self._first = self._end = 0  # places: of the oldest that is held, and of the next to come

    def find(self, id: str) -> CallRecord | None:
        """The record with this id."""
        place = self._places.get(id)
        if place is None or place < self._end - self._most:
            return None
        block, at = self._where(place)
        return CallRecord._make(block[at : at + _WIDTH])

    def put(self, record: CallRecord) -> CallRecord | None:
        """Add a record; the one whose place it took, if it took one."""
        before = self.find(record.id)
        if before is None:
            self._add(record)
            return None
        place = self._places[record.id]
        block, at = self._where(place)
        if block is self._tail:
            block[at : at + _WIDTH] = record
        else:
            self._blocks[place // BLOCK] = (*block[:at], *record, *block[at + _WIDTH :])
        return before

    def extend(self, records: Sequence[tuple[Any, ...]]) -> None:
        """Add records, or their fields, whose ids are new."""
        self._places.update(zip([record[_ID] for record in records], count(self._end)))
        tail = self._tail
        for record in records:
            tail += record
        self._end += len(records)
        while len(tail) >= _FULL:
            self._close()

    def view(self) -> View:
        """Every record as it is now; it may be read without a lock."""
        return View([*self._blocks.values(), tuple(self._tail)], max(0, self._end - self._first - self._most))

    def _add(self, record: CallRecord) -> None:
        self._places[record.id] = self._end
        self._tail += record
        self._end += 1
        if len(self._tail) == _FULL:
            self._close()

    def _close(self) -> None:
        """Make a block of the oldest in the tail."""
        tail = self._tail
        self._blocks[(self._end - len(tail) // _WIDTH) // BLOCK] = tuple(tail[:_FULL])
        del tail[:_FULL]
        if self._end - self._first >= self._most + BLOCK:
            self._drop()

    def _drop(self) -> None:
        oldest = self._blocks.pop(self._first // BLOCK)
        for place, id in enumerate(oldest[_ID::_WIDTH], self._first):
            if self._places.get(id) == place:
                del self._places[id]
        self._first += BLOCK

    def _where(self, place: int) -> tuple[Any, int]:
        return self._blocks.get(place // BLOCK, self._tail), place % BLOCK * _WIDTH


class View:
    """Records as they were at one moment, oldest first.

    Args:
        blocks: their fields, one record after the other.
        hidden: so many of the oldest are no longer kept.
    """

    def __init__(self, blocks: Sequence[tuple[Any, ...]], hidden: int) -> None:
        self._blocks = blocks
        self._hidden = hidden

    def matching(
        self, since: float | None, until: float | None, limit: int | None, equals: Mapping[str, str]
    ) -> list[CallRecord]:
        """Those that match, newest first."""
        wanted = [(CallRecord._fields.index(name), value) for name, value in equals.items() if not name.startswith(TAG)]
        tags = {(name.removeprefix(TAG), value) for name, value in equals.items() if name.startswith(TAG)}
        found = (
            block[at : at + _WIDTH]
            for block, at in self._newest(wanted)
            if (since is None or block[at + _STARTED_AT] >= since)
            and (until is None or block[at + _STARTED_AT] < until)
            and all(block[at + index] == value for index, value in wanted)
            and tags.issubset(block[at + _TAGS])
        )
        return [CallRecord._make(row) for row in (found if limit is None else islice(found, limit))]

    def _newest(self, wanted: Sequence[tuple[int, str]]) -> Iterator[tuple[tuple[Any, ...], int]]:
        """The records of blocks that may hold one with these fields: whole blocks are passed over in one step."""
        left = sum(map(len, self._blocks)) // _WIDTH - self._hidden
        for block in reversed(self._blocks):
            if any(value not in block[index::_WIDTH] for index, value in wanted):
                left -= len(block) // _WIDTH
                continue
            for at in range(len(block) - _WIDTH, -1, -_WIDTH):
                if left <= 0:
                    return
                left -= 1
                yield block, at
