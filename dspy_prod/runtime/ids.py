"""Unique ids, cheap to make and ordered in time."""

from __future__ import annotations

import itertools
import time
import uuid
from typing import Final

from dspy_prod.runtime.forking import reset_after_fork


class Ids:
    """Start of the process, a random part, and a counter.

    Ids that grow keep a database's index dense; random ones touch a page each.
    """

    def __init__(self) -> None:
        self._after_fork()

    def _after_fork(self) -> None:
        self._prefix = f"{int(time.time()):08x}{uuid.uuid4().hex[:8]}-%08x"
        self._next = itertools.count(1).__next__

    def make(self) -> str:
        return self._prefix % self._next()

    def several(self, count: int) -> list[str]:
        """So many."""
        prefix, number = self._prefix, self._next
        return [prefix % number() for _ in range(count)]


IDS: Final = Ids()
reset_after_fork(IDS)
