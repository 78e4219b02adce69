"""In place of a file beside the store: of what a process drew ahead and used, nothing outlives it."""

from __future__ import annotations

from typing import Final

from dspy_prod.stores.durable.tables import CELLS

CALLS: Final = 32
"""Calls that a share is filled up for at once, at most. What a process that dies had drawn is charged whole."""


class NoCells:
    """Cells that say nothing to others, see `durable.tables.Cells`."""

    def __init__(self) -> None:
        self.calls = CALLS
        self.forget()

    def take(self) -> int | None:
        return self._free.pop() if self._free else None

    def leave(self, cell: int) -> None:
        self._free.append(cell)

    def note(self, cell: int, charged: int, in_flight: int, calls: int) -> None:
        self._said[cell] = charged, in_flight, calls

    def read(self, cell: int) -> tuple[int, int, int]:
        return self._said.get(cell, (0, 0, 0))

    def forget(self) -> None:
        self._free = list(range(CELLS - 1, -1, -1))
        self._said: dict[int, tuple[int, int, int]] = {}

    def lost(self) -> None:
        """They are in this process: nothing is."""

    def close(self, delete: bool) -> None:
        """There is nothing to delete."""
