"""Everything observable is a frozen event passed to listeners; a failing listener never fails a call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_log = logging.getLogger("dspy_prod")

Listener = Callable[["Event"], None]


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        name: what, in snake case: `call_finished`, `attempt_failed`, `retry`, `fallback`, `breaker_opened`,
            `breaker_half_open`, `breaker_closed`, `throttled`, `waiting`, `rejected`, `budget_soft`,
            `budget_overrun`, `hold_abandoned`, `store_degraded`, `unpriced_model`, ...
        at: seconds since the epoch.
        data: the details; values are JSON-friendly and never contain a secret. Prompts and answers are never part
            of an event.
    """

    name: str
    at: float
    data: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


class EventBus:
    """Delivers events to listeners, outside every lock of this library, on the thread where they happened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: tuple[Listener, ...] = ()

    @property
    def active(self) -> bool:
        """Whether anybody listens; callers skip building events when nobody does."""
        return bool(self._listeners)

    def add(self, listener: Listener) -> Callable[[], None]:
        """Add a listener; the returned function removes it again."""
        if not callable(listener):
            raise TypeError(f"a listener is a callable that takes one Event, got {type(listener).__name__}")
        with self._lock:
            self._listeners = (*self._listeners, listener)

        def remove() -> None:
            with self._lock:
                self._listeners = tuple(item for item in self._listeners if item is not listener)

        return remove

    def emit(self, name: str, at: float, **data: Any) -> None:
        """Deliver one event. Never raises: a listener's own error is logged."""
        listeners = self._listeners
        if not listeners:
            return
        event = Event(name, at, MappingProxyType(data))
        for listener in listeners:
            try:
                listener(event)
            except Exception:
                _log.exception("A dspy_prod listener failed on event %r; the call goes on", name)


BUS = EventBus()


def add_listener(listener: Listener) -> Callable[[], None]:
    """Call `listener(event)` for every event from now on; returns a function that removes it."""
    return BUS.add(listener)
