"""What records add to the sums of their days, put together before it is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Any, Final

from dspy_prod.records import REFUSED, CallRecord, Totals, alike, rollup_keys
from dspy_prod.stores.memory_ledger import day_of

DAYS: Final = ("", "day")
"""Where the sums of each day as a whole are: the dimension `day` of no day."""

SUMS: Final = Struct(f">{len(Totals._fields)}q")
"""The sums of one value."""

_DAY: Final = 86_400
_MOST: Final = 2**63 - 1

Sums = dict[tuple[str, str], dict[str, list[int]]]
"""(day, dimension) → value → what is added to its `Totals`."""


class Summing:
    """The sums of one commit."""

    def __init__(self) -> None:
        self.found: Sums = {}

    def add(self, records: Iterable[CallRecord]) -> None:
        """Add records."""
        groups: dict[tuple[float, tuple[Any, ...]], list[CallRecord]] = {}
        for record in records:
            if record.outcome != REFUSED:
                groups.setdefault((record.started_at // _DAY, alike(record)), []).append(record)
        for (number, _), group in groups.items():
            self._add(number * _DAY, group[0], Totals.of(*group))

    def add_served(self, like: CallRecord, times: Sequence[float], saved: Sequence[int | None]) -> None:
        """Add cached answers that are alike."""
        days: dict[float, list[int | None]] = {}
        for at, nano in zip(times, saved, strict=True):
            days.setdefault(at // _DAY, []).append(nano)
        for number, known in days.items():
            self._add(number * _DAY, like, Totals.of_hits(known))

    def _add(self, at: float, like: CallRecord, totals: Totals) -> None:
        day = day_of(at)
        for dimension, value in rollup_keys(like):
            place, value = (DAYS, day) if dimension == "all" else ((day, dimension), value)
            values = self.found.setdefault(place, {})
            sums = values.get(value)
            if sums is None:
                values[value] = list(totals)
            else:
                for index, number in enumerate(totals):
                    sums[index] += number

    def arguments(self) -> Iterable[tuple[str, list[str]]]:
        """Of each day: (dimension, value, sums) after each other, as the ledger's step takes them."""
        days: dict[str, list[str]] = {}
        for (day, dimension), values in self.found.items():
            flat = days.setdefault(day, [])
            for value, sums in values.items():
                flat += dimension, value, ",".join([str(max(-_MOST, min(number, _MOST))) for number in sums])
        return days.items()


def totals_of(packed: bytes | None, place: bytes | int) -> Totals:
    """The sums of one value among those of a dimension; a string that ends before it says that they are nothing."""
    size = SUMS.size
    begin = int(place) * size
    return Totals(*SUMS.unpack((packed or b"")[begin : begin + size].ljust(size, b"\0")))
