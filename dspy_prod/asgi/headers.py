"""What the headers of a request say about its calls, as far as they are believed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any, Final

from dspy_prod import ConfigError

USUAL: Final[Mapping[str, str]] = {
    "user": "X-User",
    "tenant": "X-Tenant",
    "session": "X-Session",
    "priority": "X-Priority",
    "trace_id": "X-Request-Id",
    "deadline": "X-Request-Timeout",
}
"""The header of each field, where none is named."""

TIMEOUTS: Final = ("X-Request-Timeout", "grpc-timeout")
"""Headers that are believed by default: they can only make a request shorter."""

MAX_LENGTH: Final = 256
"""Characters of a value. What is longer is no name, and the ledger keeps it with each call."""

_TAG: Final = "tag:"
_UNITS: Final[Mapping[str, float]] = {
    "": 1.0, "s": 1.0, "ms": 1e-3, "H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9,
}  # fmt: skip
_DURATION: Final = re.compile(r"(\d{1,8}(?:\.\d{1,9})?)\s*(ms|[sHMSmun]?)", re.ASCII)
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""What a header may be called: no server passes on another."""
_PRIORITIES: Final = ("high", "normal", "low")


class HeaderError(ValueError):
    """A header that cannot be what it is to say.

    Attributes:
        header: its name. problem: what would be understood.
    """

    def __init__(self, header: str, problem: str) -> None:
        super().__init__(f"{header}: {problem}")
        self.header = header
        self.problem = problem


class Headers:
    """Which headers are believed, and what they say.

    Args:
        believed: fields of `call_context` (with their usual headers), or each with its header; `"tag:<key>"` is a tag.

    Raises:
        ConfigError: a field that no header can say.
    """

    def __init__(self, believed: Mapping[str, str] | Iterable[str] = ()) -> None:
        if isinstance(believed, str):
            raise ConfigError(f"headers={believed!r}: give a list of fields, or a mapping such as {{'user': 'X-User'}}")
        if not isinstance(believed, Iterable):
            raise ConfigError(f"headers={believed!r}: give a list of fields, or a mapping such as {{'user': 'X-User'}}")
        named = list(believed.items()) if isinstance(believed, Mapping) else [(field, "") for field in believed]
        self._fields: list[tuple[bytes, str, str]] = []
        for field, header in named:
            usual = None
            if isinstance(field, str):  # and not a list, which is in no table
                usual = USUAL.get(field) or ("X-Tag-" + field[len(_TAG) :] if field.startswith(_TAG) else None)
            if usual is None or field == _TAG:
                known = ", ".join(map(repr, (*USUAL, "tag:<key>")))
                raise ConfigError(f"headers: {field!r} is said by no header; use {known}")
            if not isinstance(header, str) or _NAME.fullmatch(header or usual) is None:
                raise ConfigError(f"headers: {field!r}: give the name of a header, got {header or usual!r}")
            self._add(field, header or usual)
        if "deadline" not in dict(named):
            for header in TIMEOUTS:
                self._add("deadline", header)

    def _add(self, field: str, header: str) -> None:
        self._fields.append((header.lower().encode("ascii"), header, field))

    def read(self, scope: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `call_context` for one request.

        Raises:
            HeaderError: a header cannot be understood, or stands there twice, so that one may be forged.
        """
        sent: dict[bytes, list[bytes]] = {}
        for name, value in scope.get("headers") or ():
            sent.setdefault(name.lower(), []).append(value)
        found: dict[str, Any] = {}
        for key, header, field in self._fields:
            values = sent.get(key)
            if values is None:
                continue
            if len(values) > 1:
                raise HeaderError(header, "stands there more than once")
            text = _text(values[0], header)
            if not text:
                continue
            if field == "deadline":
                found[field] = min(_seconds(text, header), found.get(field, float("inf")))
            elif field.startswith(_TAG):
                found.setdefault("tags", {})[field[len(_TAG) :]] = text
            else:
                if field == "priority" and text not in _PRIORITIES:
                    raise HeaderError(header, f"is one of {', '.join(_PRIORITIES)}")
                found[field] = text
        return found


def _text(value: bytes, header: str) -> str:
    try:
        text = value.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise HeaderError(header, "is not UTF-8") from None
    if len(text) > MAX_LENGTH or not text.isprintable():
        raise HeaderError(header, f"takes at most {MAX_LENGTH} printable characters")
    return text


def _seconds(text: str, header: str) -> float:
    """Seconds, also as `500ms` or in gRPC's units (`8S`, `500m`)."""
    match = _DURATION.fullmatch(text)
    seconds = float(match[1]) * _UNITS[match[2]] if match is not None else 0.0
    if not isfinite(seconds) or seconds <= 0:
        raise HeaderError(header, "takes seconds above 0, such as 8, 0.5, 500ms, or 500m as gRPC writes milliseconds")
    return seconds
