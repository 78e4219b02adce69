"""One message for what happens again and again: at once the first time, and then at most once in a while with a count.

Pure: whoever uses it says what time it is.
"""

from __future__ import annotations

from collections import OrderedDict
from math import inf
from typing import Final

from dspy_prod.alerts.notices import Notice

MOST: Final = 1_000
"""Kinds with subjects that are told apart; of further ones the oldest is forgotten, and would be told anew."""


class _Window:
    __slots__ = ("ends", "folded", "last")

    def __init__(self, ends: float) -> None:
        self.ends = ends
        self.folded = 0
        self.last: Notice | None = None


class Folding:
    """See the module's docstring.

    Args:
        every: seconds of a window.
    """

    def __init__(self, every: float) -> None:
        self._every = every
        self._windows: OrderedDict[tuple[str, str, int], _Window] = OrderedDict()

    def note(self, notice: Notice, now: float) -> Notice | None:
        """The notice, if it is to be told at once; None if it is held back."""
        key = (notice.kind, notice.subject, notice.apart)
        window = self._windows.get(key)
        if window is not None and now < window.ends:
            window.folded += 1
            window.last = notice
            return None
        folded = 0 if window is None else window.folded
        self._open(key, now)
        return notice._replace(folded=folded)

    def due(self, now: float) -> list[Notice]:
        """What was held back in windows that have ended, each with how often it happened."""
        found = []
        for key, window in self._windows.copy().items():
            if now < window.ends:
                continue
            del self._windows[key]
            if window.last is not None:
                found.append(window.last._replace(folded=window.folded - 1))
                self._open(key, now)
        return found

    def rest(self, now: float) -> list[Notice]:
        """All that is held back, though its windows have not ended."""
        for window in self._windows.values():
            if window.last is not None:
                window.ends = now
        return self.due(now)

    def next_due(self) -> float:
        """When the next window ends; `inf` when none is open."""
        return min((window.ends for window in self._windows.values()), default=inf)

    def _open(self, key: tuple[str, str, int], now: float) -> None:
        self._windows[key] = _Window(now + self._every)
        self._windows.move_to_end(key)
        while len(self._windows) > MOST:
            self._windows.popitem(last=False)
