"""Provider rate-limit headers, as lm15 attaches them to refusals, in the limiter's terms.

OpenAI-compatible providers send `x-ratelimit-remaining-requests` with `x-ratelimit-reset-requests: 6m0s`; Anthropic
sends `anthropic-ratelimit-requests-remaining` with an RFC 3339 time.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from typing import Final

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_PATTERNS: Final = (
    ("x-ratelimit-remaining-{}", "x-ratelimit-reset-{}"),
    ("anthropic-ratelimit-{}-remaining", "anthropic-ratelimit-{}-reset"),
)


def remaining(headers: Mapping[str, Sequence[str]] | None, wall: float) -> dict[str, tuple[float, float]]:
    """`{"requests" | "tokens": (remaining, seconds until reset)}` as far as the headers tell it.

    Args:
        headers: lower-case names to values.
        wall: seconds since the epoch, for resets given as a time.
    """
    found: dict[str, tuple[float, float]] = {}
    for dimension in ("requests", "tokens") if headers else ():
        for left_name, reset_name in _PATTERNS:
            left = _number(_first(headers, left_name.format(dimension)))
            reset = _seconds(_first(headers, reset_name.format(dimension)), wall)
            if left is not None and reset is not None and reset > 0:
                found[dimension] = (left, reset)
    return found


def _first(headers: Mapping[str, Sequence[str]] | None, name: str) -> str | None:
    values = (headers or {}).get(name)
    return values[0] if values else None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:
        return None


def _seconds(text: str | None, wall: float) -> float | None:
    if text is None:
        return None
    number = _number(text)
    if number is not None:
        return number
    parts = _PART.findall(text)
    if parts and "".join(value + unit for value, unit in parts) == text:
        return sum(float(value) * _UNITS[unit] for value, unit in parts)
    try:
        return dt.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() - wall
    except ValueError:
        return None
