"""The board of one process, see `board`: of a memory store, and in place of one where a store has none."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores.board import MOST_NOTES, Decide, Note, Row, Rows, decided, surplus


class MemoryBoard:
    """Rows in memory.

    Args:
        now: the store's time.

    Attributes:
        token: changes with every row.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.token: object = 0
        self.now = now
        self._kinds: dict[str, dict[str, tuple[float, Row]]] = {}
        self._notes: deque[Note] = deque(maxlen=MOST_NOTES)
        self._revision = 0
        self._after_fork()
        reset_after_fork(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()

    def rows(self) -> Rows:
        with self._lock:
            return {(kind, key): row for kind, rows in self._kinds.items() for key, (_, row) in rows.items()}

    def change(self, kind: str, key: str, decide: Decide) -> Future[Row | None]:
        changed: Future[Row | None] = Future()
        now = self.now()
        with self._lock:
            rows = self._kinds.setdefault(kind, {})
            _, row = rows.get(key, (0.0, None))
            change = decided(decide, row, now)
            if isinstance(change, StoreUnavailableError):
                changed.set_exception(change)
                return changed
            if change is not None:
                row = change.row
                if row is None:
                    rows.pop(key, None)
                else:
                    for other in () if key in rows else surplus(rows, kind, now):
                        del rows[other]
                    rows[key] = now, row
                if change.note is not None:
                    self._notes.append(Note(now, *change.note))
                self._revision += 1
                self.token = self._revision
        changed.set_result(row)
        return changed

    def journal(self, most: int) -> list[Note]:
        with self._lock:
            notes = list(self._notes)
        return notes[::-1][:most]
