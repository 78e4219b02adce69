"""What the response cache keeps: which answers, in what form, under which name."""

from __future__ import annotations

import copy
import hashlib
import logging
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

from dspy.lm15 import Response, Usage

from dspy_prod.policies.written import dumped

_log = logging.getLogger("dspy_prod")

KEY_VERSION: Final = b"dspy_prod:1:"
"""Part of every key; raised when the meaning of a key or value changes."""

LOCAL: Final = b"local:"
"""Keys that begin so mean something in this process only; their answers are not written to the store."""

_OVERHEAD: Final = 512
"""Bytes added to each entry's size for the objects around its text."""

EMPTY_USAGE: Final = Usage()


class Entry:
    """A kept answer.

    Attributes:
        text: the answer's text when it is text and nothing else.
        expires_at, stale_until: store time.
        size: bytes it counts for.
        list_nano: what it cost when it was asked upstream, in nano-USD; None when that is not known.
    """

    __slots__ = ("_answer", "_emptied", "_mutable", "expires_at", "list_nano", "size", "stale_until", "text")

    def __init__(
        self, answer: Response, expires_at: float, stale_until: float, size: int, list_nano: int | None = None
    ) -> None:
        self._mutable = any(part.type in _MUTABLE for part in answer.message.parts)
        self._answer = _own(answer) if self._mutable else answer
        self._emptied = False
        self.text = _text_alone(answer)
        self.expires_at = expires_at
        self.stale_until = stale_until
        self.size = size
        self.list_nano = list_nano

    @property
    def response(self) -> Response:
        """The answer with empty usage, because serving it used nothing; whoever gets it may change what is in it."""
        if not self._emptied:
            self._answer = _without_usage(self._answer)
            self._emptied = True
        return _own(self._answer) if self._mutable else self._answer


def cacheable(response: Response) -> bool:
    """Whether an answer may be kept: complete, with something in it, and not a refusal."""
    if response.finish_reason not in ("stop", "tool_call"):
        return False
    if not has_substance(response):
        return False
    parts = response.message.parts
    if len(parts) == 1:
        return bool(parts[0].type != "refusal")
    return all(part.type != "refusal" for part in parts)


def has_substance(response: Response) -> bool:
    """Whether there is anything in an answer but white space and the model's own thoughts."""
    for part in response.message.parts:
        kind = part.type
        if kind == "text":
            text = part.text
            if text and not text.isspace():
                return True
        elif kind != "thinking":
            return True
    return False


def _text_alone(response: Response) -> str | None:
    parts = response.message.parts
    if len(parts) == 1 and parts[0].type == "text" and response.logprobs is None:
        text: str = parts[0].text
        return text
    return None


_MUTABLE: Final = frozenset({"tool_call", "tool_result", "data"})
"""Kinds of parts that may hold a dict or list."""


def _own(response: Response) -> Response:
    """The answer with dicts and lists of its own."""
    message = response.message
    return replace(response, message=replace(message, parts=copy.deepcopy(message.parts)))


def _without_usage(response: Response) -> Response:
    return Response(
        id=response.id,
        model=response.model,
        message=response.message,
        finish_reason=response.finish_reason,
        usage=EMPTY_USAGE,
        logprobs=response.logprobs,
        provider_data=None,
        adaptations=response.adaptations,
        logprobs_complete=response.logprobs_complete,
    )


def size_of(key: bytes, response: Response) -> int:
    """The bytes that an answer counts for."""
    size = len(key) + _OVERHEAD
    parts = response.message.parts
    if len(parts) == 1 and parts[0].type == "text":
        return size + len(parts[0].text)
    for part in parts:
        for name in ("text", "data"):
            value: Any = getattr(part, name, None)
            if isinstance(value, str):
                size += len(value)
        if part.type == "tool_call":
            size += len(repr(part.input))
    return size


def dump(response: Response, list_nano: int | None) -> bytes | None:
    """An answer as the store keeps it; None when it cannot be written."""
    try:
        return dumped(response, list_nano)
    except (TypeError, ValueError) as error:
        _log.warning("An answer cannot be written as JSON (%s); it is cached in memory only", type(error).__name__)
        return None


@lru_cache(maxsize=4096)  # each call asks three times
def store_key(key: bytes) -> bytes:
    """What the store calls a key."""
    return hashlib.sha256(KEY_VERSION + key).digest()
