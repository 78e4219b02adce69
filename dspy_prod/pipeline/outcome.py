"""What an attempt's end means: for the breaker, for retries, for fallbacks, for the limiter and for the bill.

One table, `_RULES`, decides; nothing else in the library looks at error classes. Billing follows the rule that money
is owed unless the provider certainly did not work: never sent, or refused with 4xx (not 408), 500, 503 or 529.
"""

from __future__ import annotations

import asyncio
from json import JSONDecodeError
from typing import Final, NamedTuple

from dspy.utils.exceptions import (
    ContextWindowExceededError,
    LMAuthError,
    LMBillingError,
    LMConfigurationError,
    LMError,
    LMInvalidRequestError,
    LMLockTimeoutError,
    LMProviderError,
    LMRateLimitError,
    LMServerError,
    LMStreamAssemblyError,
    LMTimeoutError,
    LMTransportError,
    LMUnexpectedError,
    LMUnsupportedFeatureError,
    LMUnsupportedModelError,
)

from dspy_prod.errors import RejectedError
from dspy_prod.pipeline.upstream.ends import causes_of


class Verdict(NamedTuple):
    """How one attempt ended.

    Attributes:
        outcome: the word for the ledger: `ok`, `error`, `timeout`, `cancelled`.
        failure: counts against the breaker; otherwise it is ignored and only releases the permit.
        retry: the same route may succeed if tried again.
        fallback: another model may succeed.
        throttled: the provider said 429; feeds the limiter.
        sent: the request may have reached the provider.
        owed: the provider may have billed it.
    """

    outcome: str
    failure: bool = False
    retry: bool = False
    fallback: bool = False
    throttled: bool = False
    sent: bool = True
    owed: bool = True


CANCELLED: Final = Verdict("cancelled")
_SLOW: Final = Verdict("timeout", failure=True)
_HASTY: Final = Verdict("timeout")
_FAIR_SHARE: Final = 1.0
"""Seconds any upstream should answer in, for routes without `timeout`."""

_UNSENT: Final = Verdict("error", failure=True, retry=True, fallback=True, sent=False, owed=False)

# Most specific first. `owed` here is the answer when no HTTP status decides.
_RULES: Final[tuple[tuple[type[LMError], Verdict], ...]] = (
    (RejectedError, Verdict("error", sent=False, owed=False)),
    (ContextWindowExceededError, Verdict("error", fallback=True, owed=False)),
    (LMAuthError, Verdict("error", fallback=True, owed=False)),
    (LMBillingError, Verdict("error", fallback=True, owed=False)),
    (LMRateLimitError, Verdict("error", retry=True, fallback=True, throttled=True, owed=False)),
    (LMUnsupportedModelError, Verdict("error", fallback=True, owed=False)),
    (LMInvalidRequestError, Verdict("error", owed=False)),
    (LMTimeoutError, Verdict("timeout", failure=True, retry=True, fallback=True)),
    (LMServerError, Verdict("error", failure=True, retry=True, fallback=True)),
    (LMLockTimeoutError, Verdict("error", retry=True, sent=False, owed=False)),
    (LMTransportError, Verdict("error", failure=True, retry=True, fallback=True)),
    (LMUnsupportedFeatureError, Verdict("error", fallback=True, sent=False, owed=False)),
    (LMConfigurationError, Verdict("error", fallback=True, sent=False, owed=False)),
    # A broken answer: the generation was completed and is owed, so the same route is not paid twice for it.
    (LMStreamAssemblyError, Verdict("error", failure=True, fallback=True)),
    (LMProviderError, Verdict("error", failure=True, fallback=True)),
    (LMUnexpectedError, Verdict("error", failure=True, fallback=True)),
)
_UNKNOWN: Final = Verdict("error", failure=True, fallback=True)

_UNBILLED_STATUS: Final = frozenset({500, 503, 529})
_CONNECT_ERRORS: Final = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ClientConnectorError"})
_BROKEN: Final = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)


def judge(error: BaseException) -> Verdict:
    """The verdict on an attempt that raised `error`."""
    if not isinstance(error, Exception) or isinstance(error, asyncio.CancelledError):
        return CANCELLED
    verdict = next((verdict for kind, verdict in _RULES if isinstance(error, kind)), _UNKNOWN)
    if isinstance(error, (LMTransportError, LMServerError)) and not _told_by_http(error):
        causes = list(causes_of(error))
        if _never_connected(causes):
            return _UNSENT
        broken_answer = any(isinstance(cause, JSONDecodeError) for cause in causes)
        return _UNKNOWN if broken_answer else verdict
    status = getattr(error, "status", None)
    if isinstance(status, int) and verdict.owed and _refused_unbilled(status):
        return verdict._replace(owed=False)
    return verdict


def own_deadline(worked: float, timeout: float | None) -> Verdict:
    """The verdict on an attempt that the call's own deadline ended; it is not retryable by nature.

    The breaker learns of it only if the upstream had a fair time: a caller in a hurry says nothing about others.

    Args:
        worked: seconds the upstream had.
        timeout: the route's `timeout`.
    """
    return _SLOW if worked >= (_FAIR_SHARE if timeout is None else timeout) else _HASTY


def _refused_unbilled(status: int) -> bool:
    return (400 <= status < 500 and status != 408) or status in _UNBILLED_STATUS


def _told_by_http(error: BaseException) -> bool:
    """Whether a status is the provider's own word.

    LiteLLM says 500 for whatever it cannot explain: a connection that broke, a body that is not JSON. Only a response
    among the causes, not made up by LiteLLM, shows that there was one.
    """
    translated = False
    for cause in causes_of(error):
        if type(cause).__module__.partition(".")[0] == "litellm":
            translated = True
        elif isinstance(getattr(getattr(cause, "response", None), "status_code", None), int):
            return True
    return not translated and isinstance(getattr(error, "status", None), int)


def _never_connected(causes: list[BaseException]) -> bool:
    """Whether the chain of causes says that no connection was made, so that nothing was sent.

    LiteLLM's asynchronous transport also says `ConnectError` for a connection that was reset after sending.
    """
    if any(isinstance(cause, _BROKEN) or type(cause).__name__ == "ClientOSError" for cause in causes):
        return False
    return any(type(cause).__name__ in _CONNECT_ERRORS or isinstance(cause, ConnectionRefusedError) for cause in causes)
