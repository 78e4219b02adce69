"""Which traces are kept. The choice is made when a trace has ended, so that what is worth a look is always kept."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Final

_REMEMBERED: Final = 500
_ENOUGH: Final = 20
_DEAREST: Final = 0.99


class Sampler:
    """Keeps a share of the traces by their id, and all that erred, fell back, or are among the most expensive: as dear
    as 99 % of the recent ones or dearer, and dearer than most.

    Args:
        share: 0 to 1, of the ordinary traces. The same id always falls the same way, in every process.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._below = round(share * 2**32)
        self._costs: deque[int] = deque()
        self._ordered: list[int] = []

    def keeps(self, trace_id: str, remarkable: bool, cost_nano: int, share: float | None = None) -> bool:
        """Whether to keep a trace.

        Args:
            trace_id: hex digits. remarkable: it erred or fell back. cost_nano: nano-USD.
            share: of the ordinary ones among the like of it, where that is less than elsewhere.
        """
        dear = self._is_dear(cost_nano)
        below = self._below if share is None else min(self._below, round(share * 2**32))
        return remarkable or dear or int(trace_id[-8:], 16) < below

    def _is_dear(self, cost_nano: int) -> bool:
        """Whether a cost is among the most expensive. Remembers it."""
        ordered = self._ordered
        enough = len(ordered) >= _ENOUGH
        dear = enough and cost_nano >= ordered[int(len(ordered) * _DEAREST)] and cost_nano > ordered[len(ordered) // 2]
        if len(self._costs) >= _REMEMBERED:
            del ordered[bisect_left(ordered, self._costs.popleft())]
        self._costs.append(cost_nano)
        insort(ordered, cost_nano)
        return dear
