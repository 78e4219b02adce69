"""What is done when a process forks: the one registry of it, and its order.

A fork copies memory, but only the thread that forked. A lock that another thread held stays locked in the child, and a
pooled connection is one socket for two processes. So what must not be caught in the middle is held while the process
forks, and a child makes anew what it cannot share.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from enum import IntEnum
from typing import Final, Protocol, TypeVar

_log = logging.getLogger("dspy_prod")

F = TypeVar("F", bound="Forked")


class Stage(IntEnum):
    """The order: before a fork from first to last, after it, in parent and child, from last to first.

    What other threads may keep busy for seconds comes first, while nothing is held yet that they might need. A child
    has its locks before anything that takes them, and its state before a thread that uses it.
    """

    THREADS = 0  # a child begins its own
    IMPORTS = 1  # may take ten seconds
    FILES = 2  # a transaction ends
    STATE = 3  # microseconds
    LOCKS = 4  # nothing is held; a child makes new ones


class Forked(Protocol):
    """Something that has to be set right in a forked child."""

    def _after_fork(self) -> None: ...


class Held(Forked, Protocol):
    """Something that must not be in the middle of its work when the process forks."""

    def before_fork(self) -> None: ...

    def after_fork_in_parent(self) -> None: ...


_STAGES: Final[dict[weakref.ref[Forked], Stage]] = {}
_HELD: Final[dict[weakref.ref[Held], Stage]] = {}
_holding: Final[list[Held]] = []  # what this fork holds, in the order in which it was taken
_forking = threading.RLock()  # a signal's handler may fork just here
PATIENCE: Final = 10.0
"""Seconds a fork waits for whoever is in the middle of something."""


def reset_after_fork(item: Forked, stage: Stage = Stage.LOCKS) -> None:
    """Have `item._after_fork()` called in every child forked from now on, for as long as the item lives."""
    _STAGES[weakref.ref(item, _STAGES.pop)] = stage


def hold_while_forking(item: Held, stage: Stage) -> None:
    """As `reset_after_fork`; every fork also calls `item.before_fork()`, and then `after_fork_in_parent()`.

    Waits while another thread forks, which could not hold a newcomer any more.
    """
    lock = _forking
    waited = lock.acquire(timeout=PATIENCE)
    try:
        reset_after_fork(item, stage)
        _HELD[weakref.ref(item, _HELD.pop)] = stage
    finally:
        if waited:
            lock.release()


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
        hold_while_forking(self, Stage.IMPORTS)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def before_fork(self) -> None:
        self._held = self._lock.acquire(timeout=PATIENCE)

    def after_fork_in_parent(self) -> None:
        if self._held:
            self._lock.release()

    def _after_fork(self) -> None:
        self._lock = threading.RLock()


IMPORTING: Final = _Importing()


def _before() -> None:
    _forking.acquire()
    for item in _in_order(_HELD):
        _holding.append(item)
        _call(item.before_fork)


def _in_parent() -> None:
    while _holding:
        _call(_holding.pop().after_fork_in_parent)
    _forking.release()


def _in_child() -> None:
    global _forking
    _forking = threading.RLock()
    for item in reversed(_in_order(_STAGES)):
        _call(item._after_fork)
    _holding.clear()


def _in_order(registry: dict[weakref.ref[F], Stage]) -> list[F]:
    """Who lives, by stage and then in the order of registration. Other threads may register meanwhile."""
    found = [(stage, item) for ref, stage in registry.copy().items() if (item := ref()) is not None]
    return [item for _, item in sorted(found, key=lambda each: each[0])]


def _call(hook: Callable[[], None]) -> None:
    """One that fails must not keep the others from being called."""
    try:
        hook()
    except Exception:
        _log.exception("At a fork, %r failed", hook)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
