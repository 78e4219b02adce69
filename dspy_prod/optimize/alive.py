"""Whether the process that runs an optimization still lives, as far as another one can tell."""

from __future__ import annotations

import os
import time
import uuid
from typing import Final

from dspy_prod.runtime.processes import dead_pid, is_elsewhere, is_gone, this_process

__all__ = ["SILENT", "begin", "dead_pid", "end", "lives", "this_process"]

SILENT: Final = 120.0
"""Seconds after which a run on another machine that writes nothing is taken to be dead. It writes every other one."""

_GOING: Final[set[str]] = set()
"""What tells the runs that go on in this process."""


def begin() -> str:
    """What tells a run that begins in this process; it goes on until its `end`."""
    token = uuid.uuid4().hex
    _GOING.add(token)
    return f"{this_process()} {token}"


def end(told: str | None) -> None:
    """A run goes on no longer, though its process lives."""
    _GOING.discard((told or "").rpartition(" ")[2])


def lives(told: str | None, seen_at: float) -> bool:
    """Whether what `this_process` or `begin` told goes on.

    Args:
        seen_at: when it wrote last, in seconds since the epoch: of a process on another machine nothing else is known.
    """
    parts = (told or "").split(" ")
    if told is None or len(parts) < 4:
        return False
    if is_elsewhere(told):
        return time.time() - seen_at < SILENT
    if is_gone(told):
        return False
    _, _, pid, _, *token = parts
    return not token or int(pid) != os.getpid() or token[0] in _GOING
