"""The LMs alive in this process, for who reads all of them: health, and what hides their secrets."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol


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
    """A copy, taken while other threads may be making LMs."""
    while True:
        try:
            return list(LIVE)
        except RecursionError:  # a RuntimeError too, and no deeper stack comes of trying again
            raise
        except RuntimeError:
            continue
