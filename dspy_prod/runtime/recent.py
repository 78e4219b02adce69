"""What was used most recently."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from dspy_prod.runtime.forking import reset_after_fork

V = TypeVar("V")


class Recent(Generic[V]):
    """At most `most` values, by key: the least recently used goes first. Safe in threads and in forked children."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()
        reset_after_fork(self)

    def find(self, key: Hashable) -> V | None:
        """The value of this key, if it is kept."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def keep(self, key: Hashable, value: V, *, anew: bool = False) -> V:
        """Keep a value, unless another thread was faster or else `anew`, in place of what is kept; which one it is."""
        with self._lock:
            kept = self._kept[key] = value if anew else self._kept.get(key, value)
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
            return kept

    def all(self) -> list[V]:
        """Every value kept."""
        with self._lock:
            return list(self._kept.values())

    def clear(self) -> None:
        """Keep nothing of it."""
        with self._lock:
            self._kept.clear()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
