"""The line in which tickets wait: FIFO within a priority, fair between groups, without starvation."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Final

from dspy_prod.options import PRIORITIES
from dspy_prod.stores.base import Ticket

_log = logging.getLogger("dspy_prod")

MAX_BYPASSES: Final = 10
"""After this many tickets of a higher priority overtook a waiting lower one, the lower one is served."""


class WaitingLine:
    """Tickets in order of service.

    Higher priority goes first, but after `MAX_BYPASSES` overtakings in a row whoever of the overtaken waits longest is
    served once. Within a priority, groups (`Ask.fair`) take turns; within a group it is first in, first out by
    `Ticket.seq`, so a ticket that had to wait elsewhere meanwhile gets its old place back.
    """

    __slots__ = ("_bypassed", "_classes", "_size")

    def __init__(self) -> None:
        self._classes: tuple[OrderedDict[str, deque[Ticket]], ...] = tuple(OrderedDict() for _ in PRIORITIES)
        self._bypassed = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Ticket]:
        for groups in self._classes:
            for group in groups.values():
                yield from group

    def push(self, ticket: Ticket) -> None:
        """Put the ticket into its place."""
        groups = self._classes[ticket.ask.priority]
        group = groups.get(ticket.ask.fair)
        if group is None:
            group = groups[ticket.ask.fair] = deque()
        self._size += 1
        if not group or group[-1].seq < ticket.seq:
            group.append(ticket)
            return
        position = 0
        for position, other in enumerate(group):  # noqa: B007  (rare: only a ticket that comes back)
            if other.seq > ticket.seq:
                break
        group.insert(position, ticket)

    def head(self) -> Ticket | None:
        """The next ticket to serve; stays the same until `pop`, `push` or `remove`."""
        chosen = self._chosen()
        return None if chosen is None else next(iter(self._classes[chosen].values()))[0]

    def pop(self) -> Ticket:
        """Take the head out, and give the next group its turn."""
        chosen = self._chosen()
        assert chosen is not None, "pop from an empty line"
        groups = self._classes[chosen]
        name, group = next(iter(groups.items()))
        ticket = group.popleft()
        if group:
            groups.move_to_end(name)
        else:
            del groups[name]
        self._size -= 1
        overtaken = any(self._classes[lower] for lower in range(chosen + 1, len(self._classes)))
        self._bypassed = self._bypassed + 1 if overtaken and self._bypassed < MAX_BYPASSES else 0
        return ticket

    def remove(self, ticket: Ticket) -> bool:
        """Take a ticket out wherever it stands; False when it is not in this line."""
        groups = self._classes[ticket.ask.priority]
        group = groups.get(ticket.ask.fair)
        if group is None:
            return False
        try:
            group.remove(ticket)
        except ValueError:
            return False
        if not group:
            del groups[ticket.ask.fair]
        self._size -= 1
        return True

    def ahead_of(self, ticket: Ticket) -> int:
        """How many tickets will certainly be served before this one: same class and group, older."""
        group = self._classes[ticket.ask.priority].get(ticket.ask.fair)
        if not group:
            return 0
        if group[-1].seq < ticket.seq:
            return len(group)
        return sum(1 for other in group if other.seq < ticket.seq)

    def _chosen(self) -> int | None:
        waiting = [index for index, groups in enumerate(self._classes) if groups]
        if not waiting:
            return None
        if self._bypassed < MAX_BYPASSES or len(waiting) == 1:
            return waiting[0]
        return min(waiting[1:], key=lambda index: next(iter(self._classes[index].values()))[0].seq)


def wake(tickets: Iterable[Ticket]) -> None:
    """Run the callbacks of decided tickets."""
    for ticket in tickets:
        callback = ticket.wake
        if callback is not None:
            try:
                callback()
            except Exception:  # a loop that closed meanwhile: its waiter is gone too
                _log.debug("A waiter could not be woken", exc_info=True)
