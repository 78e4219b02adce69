"""The LMs alive in this process, for who reads all of them: health, and what hides their secrets."""

from __future__ import annotations

import weakref
from typing import Any

LIVE: weakref.WeakSet[Any] = weakref.WeakSet()
"""Each has a `pipeline` and `settings`."""


def living() -> list[Any]:
    """A copy, taken while other threads may be making LMs."""
    while True:
        try:
            return list(LIVE)
        except RuntimeError:
            continue
