"""Who waits for news, held weakly: what nobody holds any more is collected, though what it waits for may go on long.

A task is left by whoever closes its loop. Were it held from here, what it has of a limit and of a budget would come
back only with the end of what it waits for.
"""

from __future__ import annotations

from typing import Protocol
from weakref import ref


class Waiter(Protocol):
    """Held by the call that waits."""

    def tell(self) -> None:
        """There is news; said again, it changes nothing."""
        ...


class Waiters:
    """Those that wait; any thread may change them."""

    def __init__(self) -> None:
        self._refs: dict[int, ref[Waiter]] = {}  # by id: a reference whose object is being collected equals no other

    def __len__(self) -> int:
        return len(self._refs)

    def add(self, waiter: Waiter) -> None:
        """Tell it from now on, for as long as it is held elsewhere."""
        self._refs[id(waiter)] = ref(waiter)

    def __contains__(self, waiter: Waiter) -> bool:
        return id(waiter) in self._refs

    def discard(self, waiter: Waiter) -> None:
        """Tell it no more. Each does so before it goes, else its number is another's."""
        self._refs.pop(id(waiter), None)

    def all(self) -> list[Waiter]:
        """Those that are there."""
        return [found for each in list(self._refs.values()) if (found := each()) is not None]
