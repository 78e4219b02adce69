"""The LMs alive in this process, for who reads all of them: health, and what hides their secrets."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Given(Protocol):
    """What was given to an LM, as far as it may hold a secret."""

    @property
    def clients(self) -> Mapping[str, Any]: ...

    @property
    def extras(self) -> Mapping[str, Any]: ...


class Living(Protocol):
    """An LM, as this lowest of rooms knows it."""

    @property
    def settings(self) -> Given: ...

    @property
    def pipeline(self) -> object: ...


LIVE: weakref.WeakSet[Living] = weakref.WeakSet()


def living() -> list[Living]:
    """The LMs that there are."""
    return members(LIVE)


def members(these: weakref.WeakSet[T]) -> list[T]:
    """A copy, taken while other threads may be adding to the set."""
    while True:
        try:
            return list(these)
        except RecursionError:  # a RuntimeError too, and no deeper stack comes of trying again
            raise
        except RuntimeError:
            continue
