"""Whose turn it is among the processes that share a limiter.

Each process has a line of its own, and whoever frees a place serves his own line first: others would look in vain for
ever. So who waits says so in the row that all share, and after some calls that went past him the next place is left
to him. Pure; part of a limiter's state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

PASSED: Final = 4
"""Calls of other processes that may go past one that waits; ten, where theirs are of a higher priority."""
PASSED_BY_HIGHER: Final = 10
FRESH: Final = 0.5
"""Seconds for which a process counts as waiting after it said so: one that died keeps nobody for longer."""


class Turns:
    """Processes that wait for a limiter, each with its first in line."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: dict[str, list[Any]] = {}  # process → [priority, waits until it says so again, passed by]

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def wait(self, process: str, priority: int, now: float) -> bool:
        """A process has somebody in line; whether that was news."""
        row = self._waiting.get(process)
        if row is None:
            self._waiting[process] = [priority, now + FRESH, 0]
            return True
        if row[0] == priority and row[1] - now > FRESH / 2:
            return False
        row[0], row[1] = priority, now + FRESH
        return True

    def leave(self, process: str) -> bool:
        """A process has nobody in line; whether that is news."""
        return self._waiting.pop(process, None) is not None

    def belongs_to_another(self, process: str, priority: int, now: float) -> bool:
        """Whether the next place is another process's, seen from a call of this one with this priority."""
        own = self._waiting.get(process)
        for other, (theirs, until, passed) in self._waiting.copy().items():
            if until <= now:
                del self._waiting[other]
            elif other != process:
                overdue = passed >= _patience(theirs, priority)
                ours_too = own is not None and own[2] >= _patience(priority, theirs)
                if overdue and not ours_too:
                    return True
                if overdue == ours_too and theirs < priority:
                    return True
        return False

    def places(self, process: str) -> int:
        """Free places among which one for a call of this process is not missed by the others that wait.

        Where there are so many nobody needs to wait for his turn. If he did, all would do so for ever: each sees others
        that wait, and lets no more than a few of his own go at a time.
        """
        others = sum(other != process for other in self._waiting)
        return 1 + PASSED * others

    def only_of(self, process: str) -> bool:
        """Whether no other process waits."""
        return all(each == process for each in self._waiting)

    def is_next(self, process: str) -> bool:
        """Whether nobody waits who comes before this process: of a higher priority, or passed by more often."""
        first = min(
            self._waiting, key=lambda each: (self._waiting[each][0], -self._waiting[each][2], each), default=process
        )
        return first == process

    def taken(self, process: str, priority: int) -> None:
        """A call of a process has gone; the others were passed by."""
        for other, row in self._waiting.items():
            if other == process:
                row[2] = 0
            elif row[0] >= priority:
                row[2] += 1

    def dump(self) -> list[list[Any]]:
        """Everything, as JSON values."""
        return [[process, *row] for process, row in self._waiting.items()]

    def restore(self, rows: Iterable[list[Any]]) -> None:
        """Take over what another dumped."""
        self._waiting = {process: row for process, *row in rows}


def _patience(theirs: int, ours: int) -> int:
    return PASSED if theirs <= ours else PASSED_BY_HIGHER
