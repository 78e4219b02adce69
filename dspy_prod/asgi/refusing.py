"""What the client is told when a call was refused or failed: a status, a word, and when to come back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from math import ceil
from typing import Any, Final

import dspy
from dspy.utils.exceptions import (
    AdapterParseError,
    ContextWindowExceededError,
    LMError,
    LMRateLimitError,
    LMTimeoutError,
)
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket

from dspy_prod import BudgetExceededError, ConfigError, RateLimitedError, RejectedError

STATUSES: Final[Mapping[str, int]] = {
    "rate_limited": 429,
    "budget_exceeded": 402,
    "circuit_open": 503,
    "store_unavailable": 503,
    "outage": 503,
    "run_stopped": 503,
    "stopped": 503,
    "unpriced_model": 503,
    "rejected": 503,
    "deadline_exceeded": 504,
    "upstream_timeout": 504,
    "upstream_rate_limited": 503,
    "upstream_error": 502,
    "parse_error": 502,
    "input_too_long": 413,
    "too_large": 413,
    "caller_unknown": 400,
}
"""The status of each reason. 503: not now, another worker or moment may do; 502: the provider's or our fault."""

_DETAILS: Final[Mapping[str, str]] = {
    "rate_limited": "Too many requests at the moment.",
    "budget_exceeded": "The budget is used up.",
    "circuit_open": "The model is unavailable at the moment.",
    "store_unavailable": "The service cannot account for calls at the moment.",
    "outage": "The model is unavailable at the moment.",
    "run_stopped": "This work was stopped.",
    "stopped": "The service has been stopped for now.",
    "unpriced_model": "The model's cost cannot be bounded, so a budget forbids to call it.",
    "deadline_exceeded": "There was no answer in time.",
    "upstream_timeout": "The model did not answer in time.",
    "upstream_rate_limited": "The model takes no more requests at the moment.",
    "upstream_error": "The model could not answer.",
    "parse_error": "The model's answer could not be understood.",
    "input_too_long": "The input is too long for the model.",
    "too_large": "The request is larger than the service's limits ever allow.",
    "caller_unknown": "The request does not say for whom it is.",
}

Handler = Callable[[HTTPConnection, Exception], Awaitable[Response | None]]

_TRY_AGAIN_LATER: Final = 1013
_INTERNAL_ERROR: Final = 1011


def reason_of(error: BaseException) -> str | None:
    """The word for an error of a call, None for any other error."""
    if isinstance(error, BudgetExceededError) and error.missing:
        return "caller_unknown"
    if isinstance(error, (BudgetExceededError, RateLimitedError)) and error.never:
        return "too_large"
    if isinstance(error, RejectedError):
        return error.reason
    if isinstance(error, ContextWindowExceededError):
        return "input_too_long"
    if isinstance(error, LMRateLimitError):
        return "upstream_rate_limited"
    if isinstance(error, LMTimeoutError):
        return "upstream_timeout"
    if isinstance(error, AdapterParseError):
        return "parse_error"
    return "upstream_error" if isinstance(error, LMError) else None


def told(error: BaseException, reason: str) -> dict[str, Any]:
    """What a client may know of an error: never a text of the provider, nor whose budget it was."""
    answer: dict[str, Any] = {"reason": reason, "detail": _DETAILS.get(reason, "The call was refused.")}
    after = getattr(error, "retry_after", None)
    if isinstance(after, (int, float)) and 0 <= after < float("inf"):
        answer["retry_after"] = max(1, ceil(after))
    return answer


def exception_handlers(statuses: Mapping[str, int] | None = None) -> dict[Any, Handler]:
    """Handlers for `Starlette(exception_handlers=...)`, FastAPI's likewise: each refusal and failure of a call as JSON.

    `{"reason": "rate_limited", "detail": "Too many requests at the moment.", "retry_after": 3}`, with `Retry-After`
    where it is known. Reasons are those of `RejectedError`, and `upstream_error`, `upstream_timeout`,
    `upstream_rate_limited`, `parse_error`, `input_too_long`, `too_large` (no minute and no budget would ever hold it)
    and `caller_unknown` (a budget requires a user, tenant or tag that the request does not say). A websocket is closed
    with 1013 (try again later) or 1011, and the reason.

    Args:
        statuses: other statuses by reason, such as `{"budget_exceeded": 429}`. Default: 429 `rate_limited`, 402
            `budget_exceeded`, 413 `input_too_long` and `too_large`, 400 `caller_unknown`, 504 `deadline_exceeded` and
            `upstream_timeout`, 502 `upstream_error` and `parse_error`, 503 for the others.

    Raises:
        ConfigError: an unknown reason, or a status that tells no error.

    Example:
        ```python
        app = Starlette(exception_handlers=dspy_prod.asgi.exception_handlers({"budget_exceeded": 429}))
        ```
    """
    if statuses is not None and not isinstance(statuses, Mapping):
        raise ConfigError(f"statuses={statuses!r}: give a mapping of reasons to statuses, {{'budget_exceeded': 429}}")
    table = {**STATUSES, **(statuses or {})}
    for reason, status in (statuses or {}).items():
        if reason not in STATUSES:
            raise ConfigError(f"statuses: {reason!r} is no reason; use one of {', '.join(STATUSES)}")
        if isinstance(status, bool) or not isinstance(status, int) or not 400 <= status < 600:
            raise ConfigError(f"statuses: {reason!r}: {status!r} is no status of an error; use 400 to 599")

    async def answer(conn: HTTPConnection, error: Exception) -> Response | None:
        reason = reason_of(error) or "upstream_error"
        status, body = table.get(reason, STATUSES["rejected"]), told(error, reason)
        if isinstance(conn, WebSocket):
            await conn.close(_TRY_AGAIN_LATER if status in (429, 503) else _INTERNAL_ERROR, reason)
            return None
        after = body.get("retry_after")
        return JSONResponse(body, status, None if after is None else {"Retry-After": str(after)})

    return {LMError: answer, dspy.AdapterParseError: answer}
