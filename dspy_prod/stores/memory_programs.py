"""What a memory store knows of the calls of programs, for as long as its process lasts."""

from __future__ import annotations

import threading
from collections import deque
from operator import itemgetter
from typing import Final

from dspy_prod.records import OTHER
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores.memory_ledger import MAX_VALUES_PER_DAY, day_of
from dspy_prod.stores.programs import ProgramCall, ProgramSums, ProgramTotals, check_compared, program_keys, together

_NEW: Final = 64
"""Calls that are added up at once: few enough that nobody does the work of many."""

_BEGAN: Final = itemgetter(ProgramCall._fields.index("started_at"))

_Ends = dict[tuple[str, str], ProgramTotals]
"""Sums by status and reason."""


class MemoryPrograms:
    """See `ProgramCalls`.

    Args:
        most: how many of the newest are kept.
    """

    def __init__(self, most: int) -> None:
        self._new: deque[ProgramCall] = deque()
        self._calls: deque[ProgramCall] = deque(maxlen=most)
        self._days: dict[str, dict[tuple[str, str], _Ends]] = {}
        self._after_fork()
        reset_after_fork(self)

    def append(self, call: ProgramCall) -> None:
        self._new.append(call)
        if len(self._new) >= _NEW:
            with self._lock:
                self._take()

    def calls(
        self, *, since: float | None = None, until: float | None = None, limit: int | None = None, **equals: str
    ) -> list[ProgramCall]:
        check_compared(equals)
        with self._lock:
            self._take()
            calls = list(self._calls)
        for name, value in equals.items():
            index = ProgramCall._fields.index(name)
            calls = [call for call in calls if call[index] == value]
        if since is not None:
            calls = [call for call in calls if call.started_at >= since]
        if until is not None:
            calls = [call for call in calls if call.started_at < until]
        calls.sort(key=_BEGAN)  # they came as they ended; nearly in order, which is quick
        calls.reverse()
        return calls[:limit]

    def sums(
        self,
        *,
        dimension: str = "all",
        since_day: str | None = None,
        until_day: str | None = None,
        value: str | None = None,
    ) -> list[ProgramSums]:
        with self._lock:
            self._take()
            found = [
                ProgramSums(day, name, status, reason, totals)
                for day, values in self._days.items()
                if (since_day is None or day >= since_day) and (until_day is None or day <= until_day)
                for (of, name), ends in values.items()
                if of == dimension and value in (None, name)
                for (status, reason), totals in ends.items()
            ]
        return sorted(found)

    def _take(self) -> None:
        calls = [self._new.popleft() for _ in range(len(self._new))]  # others go on adding
        self._calls.extend(calls)
        for some in together(calls):
            first, share = some[0], ProgramTotals.of(*some)
            values = self._days.setdefault(day_of(first.started_at), {})
            end = first.status, first.reason or ""
            for pair in program_keys(first):
                if pair not in values and len(values) >= MAX_VALUES_PER_DAY:
                    pair = (pair[0], OTHER)
                ends = values.setdefault(pair, {})
                ends[end] = ends[end].plus(share) if end in ends else share

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
