"""Whether the process that runs an optimization still lives, as far as another one can tell."""

from __future__ import annotations

import os
import socket
import time
import uuid
from typing import Final

from dspy_prod.runtime.boot import boot, is_this_boot

SILENT: Final = 120.0
"""Seconds after which a run on another machine that writes nothing is taken to be dead. It writes every other one."""

_GOING: Final[set[str]] = set()
"""What tells the runs that go on in this process."""


def this_process() -> str:
    """What tells this process from others, on whatever machine."""
    return " ".join([_host(), boot(), str(os.getpid()), _begun(os.getpid()) or "-"])


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
    if len(parts) < 4:
        return False
    host, _, pid, begun, *token = parts
    if host != _host():
        return time.time() - seen_at < SILENT
    if not _is_here(parts) or not _has_process(int(pid)) or begun not in ("-", _begun(int(pid)) or "-"):
        return False
    return not token or int(pid) != os.getpid() or token[0] in _GOING


def dead_pid(told: str | None) -> int | None:
    """The number of a process of this machine that is gone, and whose number nobody has now; else None."""
    parts = (told or "").split(" ")
    return int(parts[2]) if len(parts) >= 4 and _is_here(parts) and not _has_process(int(parts[2])) else None


def _is_here(parts: list[str]) -> bool:
    """Whether it is a process of this machine, since it was started."""
    return parts[0] == _host() and is_this_boot(parts[1]) and parts[2].isdecimal()


def _has_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        pass
    return True


def _host() -> str:
    """The machine, and where it is known the space in which processes are numbered: containers may share a name."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = "-"
    return f"{socket.gethostname() or '-'}/{space}"


def _begun(pid: int) -> str | None:
    """When a process began, in the machine's own count: a number is given to another one later."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
