"""What a forked child sets right: locks that nobody holds, and connections of its own.

A fork copies memory, but only the thread that forked. A lock that another thread held stays locked in the child, and a
pooled connection is one socket for two processes.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Final, Protocol


class Forked(Protocol):
    """Something that has to be set right in a forked child."""

    def _after_fork(self) -> None: ...


_LIVING: weakref.WeakSet[Any] = weakref.WeakSet()


def reset_after_fork(item: Forked) -> None:
    """Have `item._after_fork()` called in every child forked from now on, for as long as the item lives."""
    _LIVING.add(item)


class RegistryLock:
    """The lock of a module's registry; free in a forked child, whoever held it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        reset_after_fork(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _Importing:
    """Held while a thread imports: a child forked meanwhile would wait for ever for that module.

    Reentrant. A fork waits for its holder, within reason.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held = False

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def before_fork(self) -> None:
        self._held = self._lock.acquire(timeout=_PATIENCE)

    def after_fork_in_parent(self) -> None:
        if self._held:
            self._lock.release()

    def after_fork_in_child(self) -> None:
        self._lock = threading.RLock()


_PATIENCE: Final = 10.0
IMPORTING: Final = _Importing()


def _in_child() -> None:
    for item in list(_LIVING):
        item._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
    os.register_at_fork(
        before=IMPORTING.before_fork,
        after_in_parent=IMPORTING.after_fork_in_parent,
        after_in_child=IMPORTING.after_fork_in_child,
    )
