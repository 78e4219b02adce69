"""Everything observable is a frozen event passed to listeners; a failing listener never fails a call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import DEBUG, ERROR, INFO, WARNING
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dspy_prod.privacy.outward import outward

if TYPE_CHECKING:
    from dspy_prod.records import CallRecord

_log = logging.getLogger("dspy_prod")

Listener = Callable[["Event"], None]
Meter = Callable[["tuple[CallRecord, int | None, str]"], None]
"""Takes a record, what a cache has saved by it, and what was asked for (`Route.operation`); of an answer from memory
perhaps a record that its own resembles."""


class Kind(NamedTuple):
    """What is known of all events of one name.

    Attributes:
        level: how loud `enable_logging` tells it, as a level of the `logging` module.
        fields: every detail that one may carry.
        meaning: when it happens, and what to do about what needs a person.
    """

    level: int
    fields: frozenset[str]
    meaning: str


def _kind(level: int, fields: str, meaning: str) -> Kind:
    return Kind(level, frozenset(fields.split()), meaning)


_TOLD: Final = "user tenant session tags run program experiment variant prompt_version trace_id"
"""As `CallContext.told` tells it."""

_WHOSE: Final = f"call_id {_TOLD}"
_CALL: Final = f"{_WHOSE} model"
_TOKENS: Final = "input_tokens output_tokens cached_tokens reasoning_tokens"
_ATTEMPT: Final = f"{_CALL} route attempt outcome cost_usd estimated cached latency error status record_id {_TOKENS}"
_BREAKER: Final = "route cause retry_after generation"
_EXPERIMENT: Final = "experiment what reason stage variant verdict"
_FOLLOW: Final = "program reference version error"

_OF_CALLS: Final = frozenset({"call_finished", "attempt_failed"})
"""Of every call there is at least one."""

EVENTS: Final[Mapping[str, Kind]] = {
    "call_finished": _kind(DEBUG, _ATTEMPT, "An answer came, from upstream or the cache."),
    "call_content": _kind(INFO, f"{_CALL} prompt answer", "The prompt and the answer of an upstream call."),
    "attempt_failed": _kind(INFO, _ATTEMPT, "An upstream attempt ended without an answer."),
    "retry": _kind(INFO, f"{_CALL} attempt pause error", "The next attempt follows after `pause` seconds."),
    "fallback": _kind(INFO, f"{_WHOSE} to reason", "The call goes on with another model."),
    "arguments_left_out": _kind(INFO, f"{_CALL} route arguments", "The other model refuses these, so it is not told."),
    "waiting": _kind(INFO, f"{_CALL} blocked_on", "The call waits for a limit or a budget."),
    "waited": _kind(DEBUG, f"{_CALL} blocked_on seconds", "A wait for a limit or a budget has ended, either way."),
    "rejected": _kind(WARNING, f"{_CALL} route reason budget", "A policy refused the call on this route."),
    "throttled": _kind(INFO, f"{_CALL} route retry_after", "The provider said 429: its limiter slows down."),
    "pause_lifted": _kind(INFO, "route", "An operator lifted what a provider's 429 or headers had brought about."),
    "fallback_response": _kind(WARNING, f"{_TOLD} reason error", "`Production` gave its own answer."),
    "breaker_opened": _kind(WARNING, _BREAKER, "Calls are refused. Look at the upstream; `lm.breaker` overrules it."),
    "breaker_half_open": _kind(INFO, _BREAKER, "Single probes try the upstream again."),
    "breaker_closed": _kind(INFO, _BREAKER, "Calls pass again, or an operator disabled the breaker."),
    "budget_soft": _kind(WARNING, f"{_WHOSE} budget spent_usd limit_usd degrade_to", "Its soft threshold is passed."),
    "budget_changed": _kind(INFO, "budget limit_usd before_usd changed", "Other settings hold for all who share it."),
    "budget_overrun": _kind(ERROR, f"{_CALL} cost_usd bound_usd", "More was billed than reserved. Check `prices=`."),
    "calls_stopped": _kind(WARNING, "scope value reason by until", "An operator stopped these calls, in every worker."),
    "calls_resumed": _kind(INFO, "scope value", "What an operator had stopped goes on."),
    "breaker_alone": _kind(WARNING, "route path error", "The store cannot share the circuit: it is this worker's own."),
    "board_unread": _kind(
        WARNING, "path error", "What operators and other workers say cannot be read. Mend the store."
    ),
    "run_stopped": _kind(INFO, "run reason", "Nothing is sent any more for calls of this run."),
    "outage_waiting": _kind(WARNING, "run models error patience", "The run waits until its upstreams answer again."),
    "outage_over": _kind(INFO, "run model seconds", "An upstream that a run waited for has answered."),
    "unpriced_model": _kind(WARNING, "model", "Calls of this model are recorded without a cost. Pass `prices=`."),
    "hold_abandoned": _kind(WARNING, "path holds cost_nano", "Calls of dead processes were charged in full."),
    "store_degraded": _kind(WARNING, "path error", "The file cannot be written; what is settled is kept. Mend it."),
    "store_recovered": _kind(INFO, "path", "The store's file can be written again."),
    "operation_dropped": _kind(
        WARNING, "path kind error dropped", "The ledger or a trial lacks something. See `error`."
    ),
    "tracking_lost": _kind(
        WARNING, "lost messages_lost error", "MLflow lacks so many traces and messages. Told each time they double."
    ),
    "promotion": _kind(INFO, "program action alias from_version to_version by", "An alias was moved."),
    "program_changed": _kind(INFO, "program reference version previous", "A program runs another version from now on."),
    "experiment_moved": _kind(INFO, _EXPERIMENT, "A candidate gets more of the traffic, or all of it, from now on."),
    "experiment_alarm": _kind(
        WARNING, _EXPERIMENT, "A candidate is taken back, or somebody has to look. See `reason`."
    ),
    "registry_stale": _kind(WARNING, f"{_FOLLOW} age", "MLflow is down; the last good copy serves."),
    "signature_refused": _kind(WARNING, f"{_FOLLOW} predictor field", "A version does not fit the code. Roll back."),
    "follow_failed": _kind(WARNING, _FOLLOW, "A promoted version cannot be taken; the one before runs. See `error`."),
}
"""Every event by name."""


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        name: what, in snake case; `dspy_prod.telemetry.events.EVENTS` lists all of them with their details.
        at: seconds since the epoch.
        data: the details; values are JSON-friendly and never contain a secret. Prompts and answers are part of
            `call_content` alone, which only listeners added with `content=True` receive.

    Example:
        ```python
        remove = dspy_prod.add_listener(lambda event: print(event.name, event.at, dict(event.data)))
        lm("hello")
        remove()
        ```
    """

    name: str
    at: float
    data: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


class EventBus:
    """Delivers events to listeners, outside every lock of this library, on the thread where they happened.

    Attributes:
        active: somebody listens; callers skip building events when nobody does.
        hears_calls: somebody listens to what happens at every call; that costs as much as a cached answer does.
        meters: who counts every attempt and every cached answer, see `measure`.
    """

    def __init__(self) -> None:
        self.active = self.hears_calls = False
        self.meters: tuple[Meter, ...] = ()
        self._lock = threading.Lock()
        self._listeners: tuple[Listener, ...] = ()
        self._call_listeners: tuple[Listener, ...] = ()
        self._content_listeners: tuple[Listener, ...] = ()

    @property
    def wants_content(self) -> bool:
        """Whether anybody asked for prompts and answers."""
        return bool(self._content_listeners)

    def add(self, listener: Listener, *, content: bool = False, calls: bool = True) -> Callable[[], None]:
        """Add a listener; the returned function removes it again.

        Args:
            content: also tell it prompts and answers.
            calls: also tell it what happens at every call.
        """
        if not callable(listener):
            raise TypeError(f"a listener is a callable that takes one Event, got {type(listener).__name__}")
        with self._lock:
            self._listeners = (*self._listeners, listener)
            self.active = True
            if calls:
                self._call_listeners = (*self._call_listeners, listener)
                self.hears_calls = True
            if content:
                self._content_listeners = (*self._content_listeners, listener)

        def remove() -> None:
            with self._lock:
                self._listeners = tuple(item for item in self._listeners if item is not listener)
                self._call_listeners = tuple(item for item in self._call_listeners if item is not listener)
                self._content_listeners = tuple(item for item in self._content_listeners if item is not listener)
                self.active, self.hears_calls = bool(self._listeners), bool(self._call_listeners)

        return remove

    def measure(self, meter: Meter) -> Callable[[], None]:
        """Have `meter` take every record; the returned function ends that. It must not raise or wait for anything."""
        with self._lock:
            self.meters = (*self.meters, meter)

        def remove() -> None:
            with self._lock:
                self.meters = tuple(item for item in self.meters if item is not meter)

        return remove

    def emit(self, name: str, at: float, **data: Any) -> None:
        """Deliver one event. Never raises: a listener's own error is logged."""
        self._deliver(self._call_listeners if name in _OF_CALLS else self._listeners, name, at, data)

    def emit_content(self, name: str, at: float, **data: Any) -> None:
        """Deliver an event with a prompt or an answer, to those listeners alone that asked for content."""
        self._deliver(self._content_listeners, name, at, data)

    def _deliver(self, listeners: tuple[Listener, ...], name: str, at: float, data: dict[str, Any]) -> None:
        if not listeners:
            return
        error = data.get("error")
        if error is not None and " " in error:  # no name of a class, but a text
            data["error"] = outward(error)
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

    Example:
        ```python
        def page(event):
            if event.name == "breaker_opened":
                print(event.data["route"], event.data["cause"])


        remove = dspy_prod.add_listener(page)
        remove()
        ```
    """
    return BUS.add(listener, content=content)
