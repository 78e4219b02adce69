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
            `breaker_half_open`, `breaker_closed`, `throttled`, `waiting`, `rejected`, `fallback_response`,
            `budget_soft`, `budget_overrun`, `hold_abandoned`, `store_degraded`, `unpriced_model`,
            `promotion`, `program_changed`, `registry_stale`, `signature_refused`, `follow_failed`, ...
        at: seconds since the epoch.
        data: the details; values are JSON-friendly and never contain a secret. Prompts and answers are part of
            `call_content` alone, which only listeners added with `content=True` receive.
    """

    name: str
    at: float
    data: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


class EventBus:
    """Delivers events to listeners, outside every lock of this library, on the thread where they happened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: tuple[Listener, ...] = ()
        self._content_listeners: tuple[Listener, ...] = ()

    @property
    def wants_content(self) -> bool:
        """Whether anybody asked for prompts and answers."""
        return bool(self._content_listeners)

    @property
    def active(self) -> bool:
        """Whether anybody listens; callers skip building events when nobody does."""
        return bool(self._listeners)

    def add(self, listener: Listener, *, content: bool = False) -> Callable[[], None]:
        """Add a listener, with `content` for prompts and answers too; the returned function removes it again."""
        if not callable(listener):
            raise TypeError(f"a listener is a callable that takes one Event, got {type(listener).__name__}")
        with self._lock:
            self._listeners = (*self._listeners, listener)
            if content:
                self._content_listeners = (*self._content_listeners, listener)

        def remove() -> None:
            with self._lock:
                self._listeners = tuple(item for item in self._listeners if item is not listener)
                self._content_listeners = tuple(item for item in self._content_listeners if item is not listener)

        return remove

    def emit(self, name: str, at: float, **data: Any) -> None:
        """Deliver one event. Never raises: a listener's own error is logged."""
        self._deliver(self._listeners, name, at, data)

    def emit_content(self, name: str, at: float, **data: Any) -> None:
        """Deliver an event with a prompt or an answer, to those listeners alone that asked for content."""
        self._deliver(self._content_listeners, name, at, data)

    def _deliver(self, listeners: tuple[Listener, ...], name: str, at: float, data: dict[str, Any]) -> None:
        if not listeners:
            return
        event = Event(name, at, MappingProxyType(data))
        for listener in listeners:
            try:
                listener(event)
            except Exception:
                _log.exception("A dspy_prod listener failed on event %r; the call goes on", name)


BUS = EventBus()


def add_listener(listener: Listener, *, content: bool = False) -> Callable[[], None]:
    """Call `listener(event)` for every event from now on; returns a function that removes it.

    Args:
        listener: takes one `Event`. It runs where the event happens, so it should be quick; its errors are logged.
        content: also deliver `call_content` events, with the prompt and the answer of each upstream call.
    """
    return BUS.add(listener, content=content)
