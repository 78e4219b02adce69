"""Which run of the machine this is: what was noted in an earlier one says nothing of its clocks, nor of its memory."""

from __future__ import annotations

import time
from math import isclose
from pathlib import Path
from typing import Final

_TOLERANCE: Final = 60.0
"""Seconds by which the clock may be set without the machine counting as started anew, where it has no id for it."""


def boot() -> str:
    """What tells this run of the machine from others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{time.time() - time.monotonic():.3f}"


def is_this_boot(told: str) -> bool:
    """Whether `boot` said so in this run of the machine."""
    now = boot()
    if told == now:
        return True
    try:
        return isclose(float(told), float(now), abs_tol=_TOLERANCE)
    except ValueError:
        return False
