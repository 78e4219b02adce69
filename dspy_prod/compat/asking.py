"""From the arguments of a public call to what is sent: DSPy's own conversions, and a short way for plain texts.

Most calls differ from the one before in their texts alone. Those are looked at once: what DSPy checks of them, and
what lm15 does, is the same question of each text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, Final

from dspy.clients.backend_selection import CLIENT_KEYS
from dspy.lm15 import Config, Message, Request, TextPart

from dspy_prod.compat.dspy import Engined
from dspy_prod.compat.lm15 import CANONICAL
from dspy_prod.compat.steps import SHORT, PreparedCall, canonical


@lru_cache(maxsize=512)
def _config(shape: tuple[Any, ...]) -> list[Config]:
    """Where the settings are kept that were converted from these arguments; empty until they were, and for good where
    the arguments add more than settings to a request. `lru_cache` alone is safe between threads and quick."""
    return []


def plain(lm: Engined, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> tuple[PreparedCall, Request] | None:
    """A call as DSPy prepares it, and its canonical request, if it asks for one answer to plain texts under settings
    that were converted before; None where DSPy has to look."""
    if not SHORT or lm.use_developer_role or (messages and type(messages) is not list):
        return None
    if kwargs and not _LOOKED_AT.isdisjoint(kwargs):
        return None
    rows = messages or [{"role": "user", "content": prompt}]
    said = {"model": lm.model, "messages": rows, **lm.kwargs, **kwargs}
    cache = said.pop("cache", lm.cache) if "cache" in kwargs else lm.cache
    if said.get("rollout_id") is None:
        said.pop("rollout_id", None)
    elif said.get("temperature") == 0:
        return None  # of which DSPy warns
    try:
        kept = _config(_shape(said))
    except TypeError:  # tools, schemas, ...: not hashable
        return None
    if not kept or said.get("n", 1) not in (1, None) or "prompt_cache" in said:
        return None
    texts = _texts(rows)
    if texts is None:
        return None
    request = _request(lm.model, texts[1], texts[0], (), kept[0])
    return PreparedCall(prompt, messages, dict(kwargs), said, None, cache, 1, True), request


def request_of(lm: Engined, call: PreparedCall) -> Request:
    """The canonical request of a call; DSPy's conversion, remembered for `plain`.

    Client settings and arguments that only LiteLLM understands are not in it.

    Raises:
        LM15Error, TypeError, ValueError: no canonical request can say it.
    """
    if call.request is not None:
        request: Request = call.request
        return request
    said = {name: value for name, value in call.legacy.items() if name in _SAID}
    request = canonical(call if len(said) == len(call.legacy) else replace(call, legacy=said))
    texts = _texts(call.legacy["messages"])
    if texts is not None:
        try:
            kept = _config(_shape(call.legacy))
        except TypeError:
            return request
        if not kept and _request(request.model, texts[1], texts[0], (), request.config) == request:
            kept.append(request.config)
    return request


_NOT_SETTINGS: Final = frozenset({"messages", "rollout_id"}) | CLIENT_KEYS
_LOOKED_AT: Final = CLIENT_KEYS | {"request"}
"""Arguments of a call that DSPy refuses, or goes by instead of prompt and messages."""
_SAID: Final = CANONICAL | {"n", "rollout_id", "num_generations", "prompt_cache"}


def _shape(said: dict[str, Any]) -> tuple[Any, ...]:
    """What the settings of a request depend on: arguments, and of what type they are."""
    return tuple([(name, type(value), value) for name, value in said.items() if name not in _NOT_SETTINGS])


def _texts(rows: list[Any]) -> tuple[str | None, tuple[Message, ...]] | None:
    """(system, messages) when every message is plain text from user or assistant after at most one system text."""
    system: str | None = None
    messages = []
    for row in rows:
        if type(row) is not dict or len(row) != 2:
            return None
        role, text = row.get("role"), row.get("content")
        if type(text) is not str or not text or not (text.isascii() or _is_encodable(text)):
            return None
        if role == "user" or role == "assistant":
            messages.append(_message(role, (_text(text, (), "text"),), ()))
        elif role == "system" and row is rows[0]:
            system = text
        else:
            return None
    return (system, tuple(messages)) if messages else None


def _is_encodable(text: str) -> bool:
    """Whether a provider can receive it; DSPy says what is wrong with it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unchecked(kind: type[Any], *names: str) -> Callable[..., Any]:
    """A constructor of one of lm15's frozen classes that takes all fields, and leaves out checks that were made."""
    found = {field.name: field.init for field in fields(kind)}
    if list(found) != list(names):  # of another version: it may have to be told less, or more
        return lambda *values: kind(**{name: value for name, value in zip(names, values, strict=True) if found[name]})
    setters = [getattr(kind, name).__set__ for name in names]

    def made(*values: Any) -> Any:
        new = object.__new__(kind)
        for put, value in zip(setters, values):  # noqa: B905  (a keyword would cost as much as a field)
            put(new, value)
        return new

    return made


_text: Final = _unchecked(TextPart, "text", "continuation", "type")
_message: Final = _unchecked(Message, "role", "parts", "continuation")
_request: Final = _unchecked(Request, "model", "messages", "system", "tools", "config")
