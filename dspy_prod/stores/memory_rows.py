"""The newest records in memory, many to an object.

The garbage collector counts what holds other things, and stops everybody to look at what is new once there are some
hundreds. A tuple for each record would be most of what it finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, Protocol

from dspy_prod.records import CallRecord
from dspy_prod.runtime.ids import DIGITS

BLOCK: Final = 16
"""Records of a tuple."""
MOST_ALIKE: Final = len(DIGITS) // 2
"""Records alike of a block: each has two ids."""
_FEW: Final = BLOCK // 2
"""Fewer records alike are no block of their own."""
_WIDTH: Final = len(CallRecord._fields)
_FULL: Final = BLOCK * _WIDTH
_ID: Final = CallRecord._fields.index("id")
_CALL_ID: Final = CallRecord._fields.index("call_id")
_STARTED_AT: Final = CallRecord._fields.index("started_at")
_SAVED: Final = CallRecord._fields.index("saved_nano")
_TAGS: Final = CallRecord._fields.index("tags")
TAG: Final = "tag:"
"""How the name of a tag begins among the names of fields: `tag:feature`."""


class Block(Protocol):
    """Some records that follow each other; never changed, so that a reader's `View` stays as it was."""

    @property
    def size(self) -> int: ...

    def fields(self) -> tuple[Any, ...]:
        """The fields of one record after the other."""
        ...

    def column(self, index: int) -> Sequence[Any]:
        """One field of each."""
        ...

    def may_have(self, index: int, value: Any) -> bool:
        """Whether a record may have this in a field."""
        ...


class Written(tuple[Any, ...]):
    """The fields of one record after the other."""

    __slots__ = ()

    @property
    def size(self) -> int:
        return len(self) // _WIDTH

    def fields(self) -> tuple[Any, ...]:
        return self

    def column(self, index: int) -> Sequence[Any]:
        return self[index::_WIDTH]

    def may_have(self, index: int, value: Any) -> bool:
        return value in self[index::_WIDTH]


class AlikeBlock:
    """Records that differ in nothing but ids, time and `saved_nano`; what they have in common is kept once.

    Args:
        like: a record such as theirs.
        head: the beginning of their ids, which nobody else's have.
        times, saved: of each; at most `MOST_ALIKE`.
    """

    __slots__ = ("_like", "_saved", "_times", "head")

    def __init__(self, like: CallRecord, head: str, times: Sequence[float], saved: Sequence[int | None]) -> None:
        self.head = head
        self._like = like
        self._times = times
        self._saved = saved

    @property
    def size(self) -> int:
        return len(self._times)

    def fields(self) -> tuple[Any, ...]:
        fields = list(self._like) * self.size
        for index in (_ID, _CALL_ID, _STARTED_AT, _SAVED):
            fields[index::_WIDTH] = self.column(index)
        return tuple(fields)

    def column(self, index: int) -> Sequence[Any]:
        if index in (_ID, _CALL_ID):
            return [self.head + two for two in DIGITS[index == _ID : 2 * self.size : 2]]
        if index == _STARTED_AT:
            return self._times
        return self._saved if index == _SAVED else [self._like[index]] * self.size

    def may_have(self, index: int, value: Any) -> bool:
        if index in (_ID, _CALL_ID):
            return isinstance(value, str) and value[:-2] == self.head
        return value in self.column(index) if index in (_STARTED_AT, _SAVED) else self._like[index] == value


class Rows:
    """Records by their ids, in the order in which they came; a later one with the same id takes the place of the first.

    Not thread-safe. Blocks are replaced, never changed, so that a reader's `view` stays as it was.

    Args:
        most: how many of the newest are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._blocks: dict[int, Block] = {}  # by the place of the first record, the oldest first
        self._tail: list[Any] = []  # what comes after them
        self._begins: dict[str, int] = {}  # where the block begins that has the record with an id, or the tail
        self._heads: dict[str, int] = {}  # the same by the beginning of the ids of records alike
        self._first = self._rest = self._end = 0  # places: of the oldest that is held, of the tail, of the next to come

    def find(self, id: str) -> CallRecord | None:
        """The record with this id."""
        held = self._held(id)
        if held is None:
            return None
        _, fields, at = held
        return CallRecord._make(fields[at : at + _WIDTH])

    def put(self, record: CallRecord) -> CallRecord | None:
        """Add a record; the one whose place it took, if it took one."""
        held = self._held(record.id)
        if held is None:
            self._begins[record.id] = self._rest
            self._tail += record
            self._end += 1
            if len(self._tail) >= _FULL:
                self._close()
            return None
        begin, fields, at = held
        before = CallRecord._make(fields[at : at + _WIDTH])
        if begin == self._rest:
            self._tail[at : at + _WIDTH] = record
        else:
            self._blocks[begin] = Written((*fields[:at], *record, *fields[at + _WIDTH :]))
        return before

    def extend(self, block: AlikeBlock) -> None:
        """Add records alike."""
        if block.size < _FEW:
            fields = block.fields()
            for at in range(0, len(fields), _WIDTH):
                self.put(CallRecord._make(fields[at : at + _WIDTH]))
            return
        if self._tail:
            self._close()
        self._heads[block.head] = self._rest
        self._blocks[self._rest] = block
        self._end += block.size
        self._rest = self._end
        self._drop()

    def view(self) -> View:
        """Every record as it is now; it may be read without a lock."""
        blocks = [*self._blocks.values(), Written(self._tail)]
        return View(blocks, min(self._end - self._first, self._most))

    def _held(self, id: str) -> tuple[int, Sequence[Any], int] | None:
        """(where the block begins, its fields, where the record's are among them) of a record that is kept."""
        for begin in (self._begins.get(id), self._heads.get(id[:-2])):
            if begin is None:
                continue
            fields = self._tail if begin == self._rest else self._blocks[begin].fields()
            ids = fields[_ID::_WIDTH]
            if id in ids:
                at = len(ids) - 1 - ids[::-1].index(id)  # of two the later: the other is kept no longer
                if begin + at >= self._end - self._most:
                    return begin, fields, at * _WIDTH
        return None

    def _close(self) -> None:
        """Make a block of the tail."""
        self._blocks[self._rest] = Written(self._tail)
        self._tail.clear()
        self._rest = self._end
        self._drop()

    def _drop(self) -> None:
        """Forget the blocks of which no record is kept."""
        while self._first in self._blocks and self._first + self._blocks[self._first].size <= self._end - self._most:
            oldest, begin = self._blocks.pop(self._first), self._first
            ids = oldest.column(_ID)
            for known, names in ((self._begins, ids), (self._heads, [ids[0][:-2]])):
                for name in names:
                    if known.get(name) == begin:
                        del known[name]
            self._first += oldest.size


class View:
    """Records as they were at one moment, oldest first.

    Args:
        blocks: of them and of some before them.
        kept: how many there are.
    """

    def __init__(self, blocks: Sequence[Block], kept: int) -> None:
        self._blocks = blocks
        self._kept = kept

    def matching(
        self, since: float | None, until: float | None, limit: int | None, equals: Mapping[str, str]
    ) -> list[CallRecord]:
        """Those that match, newest first."""
        wanted = [(CallRecord._fields.index(name), value) for name, value in equals.items() if not name.startswith(TAG)]
        tags = {(name.removeprefix(TAG), value) for name, value in equals.items() if name.startswith(TAG)}
        found = (
            fields[at : at + _WIDTH]
            for fields, at in self._newest(wanted)
            if (since is None or fields[at + _STARTED_AT] >= since)
            and (until is None or fields[at + _STARTED_AT] < until)
            and all(fields[at + index] == value for index, value in wanted)
            and tags.issubset(fields[at + _TAGS])
        )
        return [CallRecord._make(row) for row in (found if limit is None else islice(found, limit))]

    def _newest(self, wanted: Sequence[tuple[int, str]]) -> Iterator[tuple[tuple[Any, ...], int]]:
        """The records of blocks that may hold one with these fields: whole blocks are passed over in one step."""
        left = self._kept
        for block in reversed(self._blocks):
            if not all(block.may_have(index, value) for index, value in wanted):
                left -= block.size
                continue
            fields = block.fields()
            for at in range(len(fields) - _WIDTH, -1, -_WIDTH):
                if left <= 0:
                    return
                left -= 1
                yield fields, at
