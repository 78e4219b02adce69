"""The line in which reservations wait: FIFO within a priority, fair between groups, without starvation."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Final

from dspy_prod.options import PRIORITIES
from dspy_prod.stores.base import Reservation

_log = logging.getLogger("dspy_prod")

MAX_BYPASSES: Final = 10
"""After this many reservations of a higher priority overtook a waiting lower one, the lower one is served."""


class WaitingLine:
    """Reservations in order of service.

    Higher priority goes first, but after `MAX_BYPASSES` overtakings in a row whoever of the overtaken waits longest is
    served once. Within a priority, groups (`Reservation.fair`) take turns; within a group it is first in, first out by
    `Reservation.seq`, so a reservation that had to wait elsewhere meanwhile gets its old place back.
    """

    __slots__ = ("_bypassed", "_classes", "_size")

    def __init__(self) -> None:
        self._classes: tuple[OrderedDict[str, deque[Reservation]], ...] = tuple(OrderedDict() for _ in PRIORITIES)
        self._bypassed = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Reservation]:
        for groups in self._classes:
            for group in groups.values():
                yield from group

    def push(self, reservation: Reservation) -> None:
        """Put the reservation into its place."""
        groups = self._classes[reservation.priority]
        group = groups.get(reservation.fair)
        if group is None:
            group = groups[reservation.fair] = deque()
        self._size += 1
        if not group or group[-1].seq < reservation.seq:
            group.append(reservation)
            return
        position = 0
        for position, other in enumerate(group):  # noqa: B007  (rare: only a reservation that comes back)
            if other.seq > reservation.seq:
                break
        group.insert(position, reservation)

    def head(self) -> Reservation | None:
        """The next reservation to serve; stays the same until `pop`, `push` or `remove`."""
        chosen = self._chosen()
        return None if chosen is None else next(iter(self._classes[chosen].values()))[0]

    def pop(self) -> Reservation:
        """Take the head out, and give the next group its turn."""
        chosen = self._chosen()
        assert chosen is not None, "pop from an empty line"
        groups = self._classes[chosen]
        name, group = next(iter(groups.items()))
        reservation = group.popleft()
        if group:
            groups.move_to_end(name)
        else:
            del groups[name]
        self._size -= 1
        overtaken = any(self._classes[lower] for lower in range(chosen + 1, len(self._classes)))
        self._bypassed = self._bypassed + 1 if overtaken and self._bypassed < MAX_BYPASSES else 0
        return reservation

    def remove(self, reservation: Reservation) -> bool:
        """Take a reservation out wherever it stands; False when it is not in this line."""
        groups = self._classes[reservation.priority]
        group = groups.get(reservation.fair)
        if group is None:
            return False
        try:
            group.remove(reservation)
        except ValueError:
            return False
        if not group:
            del groups[reservation.fair]
        self._size -= 1
        return True

    def ahead_of(self, reservation: Reservation) -> int:
        """How many reservations will certainly be served before this one: same class and group, older."""
        group = self._classes[reservation.priority].get(reservation.fair)
        if not group:
            return 0
        if group[-1].seq < reservation.seq:
            return len(group)
        return sum(1 for other in group if other.seq < reservation.seq)

    def _chosen(self) -> int | None:
        waiting = [index for index, groups in enumerate(self._classes) if groups]
        if not waiting:
            return None
        if self._bypassed < MAX_BYPASSES or len(waiting) == 1:
            return waiting[0]
        return min(waiting[1:], key=lambda index: next(iter(self._classes[index].values()))[0].seq)


def wake(reservations: Iterable[Reservation]) -> None:
    """Run the callbacks of decided reservations."""
    for reservation in reservations:
        callback = reservation.wake
        if callback is not None:
            try:
                callback()
            except Exception:  # a loop that closed meanwhile: its waiter is gone too
                _log.debug("A waiter could not be woken", exc_info=True)
