"""Which process this is, and whether another one is gone, as far as its name can tell on this machine."""

from __future__ import annotations

import os
import socket
from functools import lru_cache

from dspy_prod.runtime.boot import boot, is_this_boot

_PARTS = 4


def this_process() -> str:
    """What tells this process from others, on whatever machine."""
    return _named(os.getpid())


@lru_cache(maxsize=1)
def _named(pid: int) -> str:
    return " ".join([_host(), boot(), str(pid), _begun(pid) or "-"])


def is_elsewhere(told: str) -> bool:
    """Whether what `this_process` told runs on another machine, so that nothing is known of it here."""
    return told.split(" ")[0] != _host()


def is_gone(told: str) -> bool:
    """Whether a process of this machine has ended; False of one that runs elsewhere, for it may live."""
    parts = told.split(" ")
    if len(parts) < _PARTS or parts[0] != _host():
        return False
    pid, begun = parts[2], parts[3]
    if not _is_here(parts) or not _has_process(int(pid)):
        return True
    return begun not in ("-", _begun(int(pid)) or "-")


def dead_pid(told: str | None) -> int | None:
    """The number of a process of this machine that is gone, and whose number nobody has now; else None."""
    parts = (told or "").split(" ")
    return int(parts[2]) if len(parts) >= _PARTS and _is_here(parts) and not _has_process(int(parts[2])) else None


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
