"""Events as log lines: `enable_logging`."""

from __future__ import annotations

import datetime as dt
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import orjson

from dspy_prod import privacy
from dspy_prod.errors import ConfigError
from dspy_prod.privacy.outward import LET_OUT, outward
from dspy_prod.privacy.redactor import Redactor
from dspy_prod.telemetry.events import BUS, EVENTS, Event

LEVELS: Final[Mapping[str, int]] = {name: kind.level for name, kind in EVENTS.items()}
"""The level of each event; a name of somebody's own is a warning."""

_SUBJECTS: Final = ("program", "model", "route", "budget", "store", "path")
_HIDDEN: Final = frozenset({
    *("call_id", "record_id", "generation", "estimated", "session", "tags", "run"),
    *("experiment", "variant", "prompt_version", "trace_id"),
})  # fmt: skip
"""Details that a short line leaves out."""

_IDS: Final = frozenset({"call_id", "record_id", "trace_id"})
_PERSONAL: Final = frozenset({"user", "tenant", "session"})
_HUMAN_FORMAT: Final = "%(asctime)s %(levelname)-7s %(message)s"

_lock = threading.Lock()
_active: dict[str, Callable[[], None]] = {}


def enable_logging(
    level: int | str = "INFO",
    format: Literal["human", "json"] = "human",
    prompts: bool = False,
    logger: str = "dspy_prod",
    redact: bool | Redactor = True,
) -> Callable[[], None]:
    """Log every event as one line, through the standard `logging`.

    Levels: finished calls are DEBUG; retries, model fallbacks, waits, throttling, failed attempts, promotions and a
    breaker that recovers are INFO; an opened breaker, a refusal, an answer by `fallback_response` and a budget past its
    soft threshold are WARNING; a budget overrun is ERROR. No line holds a key; prompts and answers are logged only with
    `prompts=True`, and everything is redacted.

    Lines go to the handlers your application has set up. Where it has none, they go to stderr. Calling it again for the
    same logger replaces what was set up before.

    Args:
        level: of the logger; events below it are skipped.
        format: `"human"`, or `"json"`: one object a line with `event`, `at` (ISO 8601, UTC), `level` and the event's
            details: those of a call carry `call_id`, `user`, `tenant`, `session`, `tags`, `program`, `experiment`,
            `variant`, `prompt_version` and `trace_id` as the ledger has them, and its tokens. Give your handler the
            format `"%(message)s"` to keep the lines pure JSON.
        prompts: also log the prompt and answer of each upstream call (INFO). They are your users' data.
        logger: name of the logger.
        redact: replace secrets and personal data in every line: by the given `Redactor`, or with True by the installed
            one, else by one with the built-in rules. False logs texts as they are.

    Returns:
        A function that ends it and restores the logger's level.

    Raises:
        ConfigError: an unknown level or format, or a `redact` that is neither a bool nor a `Redactor`.

    Example:
        ```python
        stop = dspy_prod.enable_logging()
        lm("hello")
        ```
    """
    number = checked(level, format, redact)
    with _lock:
        previous = _active.get(logger)
        if previous is not None:
            previous()
        stop = _start(logging.getLogger(logger), number, format == "json", prompts, redact)
        _active[logger] = stop

    def disable() -> None:
        with _lock:
            if _active.get(logger) is stop:
                del _active[logger]
                stop()

    return disable


def checked(level: int | str = "INFO", format: str = "human", redact: bool | Redactor = True, **_: Any) -> int:
    """The number of the level, or the `ConfigError` of `enable_logging`."""
    if format not in ("human", "json"):
        raise ConfigError(f"enable_logging(format={format!r}): use 'human' or 'json'")
    number = logging.getLevelName(level.upper()) if isinstance(level, str) else level
    if not isinstance(number, int) or isinstance(level, bool):
        raise ConfigError(f"enable_logging(level={level!r}): use a level of the logging module, such as 'INFO'")
    if not isinstance(redact, (bool, Redactor)):
        raise ConfigError(f"enable_logging(redact={redact!r}): use True, False or a dspy_prod.Redactor")
    return number


def _start(
    logger: logging.Logger, level: int, as_json: bool, prompts: bool, redact: bool | Redactor
) -> Callable[[], None]:
    before = logger.level
    logger.setLevel(level)
    handler: logging.Handler | None = None
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.addFilter(lambda record: logger.parent is None or not logger.parent.hasHandlers())  # set up since
        handler.setFormatter(logging.Formatter("%(message)s" if as_json else _HUMAN_FORMAT))
        logger.addHandler(handler)

    def listen(event: Event) -> None:
        number = LEVELS.get(event.name, logging.WARNING)
        if logger.isEnabledFor(number):
            if redact is not False:
                event = redacted(event, (privacy.active() or privacy.default()) if redact is True else redact)
            line = json_line(event) if as_json else human_line(event)
            if prompts and event.name == "call_content":  # the only one with more than names and what was let out
                line = outward(line)
            logger.log(number, "%s", line, extra=LET_OUT)

    remove = BUS.add(listen, content=prompts)

    def stop() -> None:
        remove()
        logger.setLevel(before)
        if handler is not None:
            logger.removeHandler(handler)

    return stop


def redacted(event: Event, redactor: Redactor) -> Event:
    """The event without secrets and personal data; users and tenants stay distinct as pseudonyms."""
    name_of = redactor.claimed if privacy.active() is None else redactor.identity  # pseudonyms are given already
    clean: dict[str, Any] = {}
    for name, value in event.data.items():
        if name in _PERSONAL and isinstance(value, str):
            clean[name] = name_of(value)
        elif name == "tags" and isinstance(value, Mapping):
            clean[name] = {redactor.text(key): name_of(tag) for key, tag in value.items()}
        else:
            clean[name] = value if name in _IDS else redactor.value(value)
    return Event(event.name, event.at, MappingProxyType(clean))


def json_line(event: Event) -> str:
    """An event as one JSON object."""
    at = dt.datetime.fromtimestamp(event.at, dt.timezone.utc).isoformat(timespec="milliseconds")
    level = logging.getLevelName(LEVELS.get(event.name, logging.WARNING))
    row = {**event.data, "event": event.name, "at": at, "level": level}
    ordered = {name: row.pop(name) for name in ("event", "at", "level")} | row
    try:
        return orjson.dumps(ordered, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # text that is not valid Unicode
        return json.dumps(ordered, default=str)


def human_line(event: Event) -> str:
    """An event as a short line: `breaker opened  openai/gpt-4o-mini  LMServerError 500, retry in 60.0 s`."""
    data = {name: value for name, value in event.data.items() if value is not None and value != ""}
    if "model" in data or "call_id" in data:
        data.pop("program", None)  # a call's line begins with what was called
    subject = next((data.pop(name) for name in _SUBJECTS if name in data), "")
    parts = _DETAILS.get(event.name, _others)
    details = ", ".join(filter(None, parts(data) if callable(parts) else (_told(part, data) for part in parts)))
    return "  ".join(_one_line(part) for part in (event.name.replace("_", " "), str(subject), details) if part)


def _told(part: Part, data: dict[str, Any]) -> str | None:
    """The first of these texts whose details are all known."""
    for text in (part,) if isinstance(part, str) else part:
        try:
            return text.format_map(data)
        except KeyError:
            continue
    return None


def _finished(data: dict[str, Any]) -> Iterable[str | None]:
    cost = data.get("cost_usd")
    paid = "cost unknown" if cost is None else f"{cost:.6f} USD{' (unconfirmed)' if data.get('estimated') else ''}"
    yield data.get("outcome")
    if not data.get("cached"):
        yield f"{data.get('latency', 0.0):.2f} s, {paid}"
    yield from (_told(part, data) for part in _WHOSE)


def _content(data: dict[str, Any]) -> Iterable[str]:
    said = [f"{message['role']}: {message['text']}" for message in data.get("prompt") or ()]
    return [" | ".join([*said, f"answer: {data.get('answer', '')}"])]


def _others(data: dict[str, Any]) -> Iterable[str]:
    return (f"{name}={value}" for name, value in data.items() if name not in _HIDDEN)


Part = str | tuple[str, ...]
"""A text about an event's details, or several of which the first is taken that can be told; else it is left out."""

_WHOSE: Final = ("tenant={tenant}", "user={user}")
_BREAKER: Final = ("{cause}", "retry in {retry_after:.1f} s")
_DETAILS: Final[Mapping[str, tuple[Part, ...] | Callable[[dict[str, Any]], Iterable[str | None]]]] = {
    "breaker_opened": _BREAKER,
    "breaker_half_open": _BREAKER,
    "breaker_closed": _BREAKER,
    "call_finished": _finished,
    "attempt_failed": (("{error} {status}", "{error}"), "attempt {attempt}", "{latency:.2f} s", *_WHOSE),
    "retry": ("attempt {attempt} in {pause:.1f} s, after {error}",),
    "fallback": ("to {to}", "{reason}"),
    "waiting": (("for {blocked_on}", "for admission"),),
    "rejected": ("{reason}", *_WHOSE),
    "fallback_response": ("{reason}", "{error}", *_WHOSE),
    "budget_soft": ("{spent_usd:.6f} of {limit_usd:.6f} USD spent", "now using {degrade_to}"),
    "budget_overrun": ("billed {cost_usd:.6f} USD, reserved {bound_usd:.6f} USD",),
    "call_content": _content,
}


def _one_line(text: str) -> str:
    """Control characters escaped: what a user typed must not look like a line of its own."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
