"""What the headers of a refusal say: when to come back, whether at all, and what is left of a limit.

The native transport leaves the headers of an HTTP error here, LiteLLM leaves them in the errors it translates; they are
read alike. OpenAI-compatible providers send `x-ratelimit-remaining-requests` with `x-ratelimit-reset-requests: 6m0s`;
Anthropic sends `anthropic-ratelimit-requests-remaining` with an RFC 3339 time; others a time since the epoch.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from math import isfinite
from typing import Any, Final

from dspy_prod.compat.dspy import retry_after_seconds
from dspy_prod.pipeline.upstream.ends import causes_of

Headers = dict[str, str]
"""Lower-case names to first values."""

PLAUSIBLE: Final = 86_400.0
"""Seconds of a hint or reset beyond which it is taken for nonsense; a daily quota is the longest there is."""

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_PATTERNS: Final = (
    ("x-ratelimit-remaining-{}", "x-ratelimit-reset-{}"),
    ("anthropic-ratelimit-{}-remaining", "anthropic-ratelimit-{}-reset"),
)
_EPOCH: Final = 1e9
_EPOCH_MS: Final = 1e12

_REFUSAL: ContextVar[tuple[Headers, int | None] | None] = ContextVar("dspy_prod_refusal", default=None)


def note_refusal(headers: Iterable[tuple[str, str]], status: int | None = None) -> None:
    """Keep what an HTTP error begins with until the driver of the same attempt asks for it."""
    found: Headers = {}
    for name, value in headers:
        found.setdefault(name.lower(), value)
    _REFUSAL.set((found, status))


def forget_refusal() -> None:
    """Nobody will ask: the attempt was left before its error was told. Else the next one's would have these headers."""
    _REFUSAL.set(None)


def refusal_of(error: BaseException) -> tuple[Headers, int | None]:
    """The headers that came with an error, on whichever route, and the status if the native transport has read one."""
    noted = _REFUSAL.get()
    if noted is not None:
        _REFUSAL.set(None)
        return noted
    for cause in causes_of(error):
        headers: Any = getattr(getattr(cause, "response", None), "headers", None) or getattr(cause, "headers", None)
        if isinstance(headers, Mapping) and headers:
            return {str(name).lower(): str(value) for name, value in headers.items()}, None
    return {}, None


def hint_in(headers: Mapping[str, str], body: float | None = None) -> float | None:
    """Seconds after which to come back, the most precise header first; None when nothing sensible is said.

    Zero, a date in the past and what is not plausible are no hint.

    Args:
        headers: see `refusal_of`.
        body: what the error's body says.
    """
    for name in ("retry-after-ms", "x-ms-retry-after-ms"):
        number = _number(headers.get(name))
        if number is not None and _plausible(number / 1000):
            return number / 1000
    for value in (retry_after_seconds(headers.get("retry-after")), body):
        if value is not None and _plausible(value):
            return value
    return None


def should_retry_in(headers: Mapping[str, str]) -> bool | None:
    """What the provider's `x-should-retry` asks for; None when it is not there."""
    return {"true": True, "false": False}.get(headers.get("x-should-retry", "").strip().lower())


def remaining(headers: Mapping[str, str | Sequence[str]] | None, wall: float) -> dict[str, tuple[float, float]]:
    """`{"requests" | "tokens": (remaining, seconds until reset)}` as far as the headers tell it.

    Args:
        headers: lower-case names to a value, or to several of which the first counts.
        wall: seconds since the epoch, for resets given as a time.
    """
    found: dict[str, tuple[float, float]] = {}
    for dimension in ("requests", "tokens") if headers else ():
        for left_name, reset_name in _PATTERNS:
            left = _number(_first(headers, left_name.format(dimension)))
            reset = _seconds(_first(headers, reset_name.format(dimension)), wall)
            if left is not None and reset is not None and _plausible(reset):
                found[dimension] = (left, reset)
    return found


def _plausible(seconds: float) -> bool:
    return 0 < seconds <= PLAUSIBLE


def _first(headers: Mapping[str, str | Sequence[str]] | None, name: str) -> str | None:
    values = (headers or {}).get(name)
    if not values:
        return None
    return values if isinstance(values, str) else values[0]


def _number(text: str | None) -> float | None:
    try:
        number = None if text is None else float(text)
    except ValueError:
        return None
    return None if number is None or not isfinite(number) else max(0.0, number)


def _seconds(text: str | None, wall: float) -> float | None:
    if text is None:
        return None
    text = text.strip()
    number = _number(text)
    if number is not None:
        if number >= _EPOCH_MS:
            return number / 1000 - wall
        return number - wall if number >= _EPOCH else number
    parts = _PART.findall(text)
    if parts and "".join(value + unit for value, unit in parts) == text:
        return sum(float(value) * _UNITS[unit] for value, unit in parts)
    try:
        return dt.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() - wall
    except (ValueError, OverflowError):
        return None
