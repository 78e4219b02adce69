"""What an attempt's end means: for retries, fallbacks, the breaker, the limiter and the bill.

One table, `TABLE`, decides, for every engine alike; `docs/guide/flow.md` shows it. Which row an end belongs to is
decided by the HTTP status, then by the provider's code and text, and only where no status was told by the kind of the
error. Nothing else in the library looks at error classes. Money is owed unless the provider certainly did not work.
"""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

from dspy.lm15 import Response
from dspy.utils.exceptions import (
    ContextWindowExceededError,
    LMAuthError,
    LMBillingError,
    LMConfigurationError,
    LMError,
    LMInvalidRequestError,
    LMLockTimeoutError,
    LMRateLimitError,
    LMServerError,
    LMStreamAssemblyError,
    LMTimeoutError,
    LMTransportError,
    LMUnsupportedFeatureError,
    LMUnsupportedModelError,
)

from dspy_prod.errors import CircuitOpenError, RateLimitedError, RejectedError, UnusableAnswerError
from dspy_prod.pipeline.upstream.ends import causes_of
from dspy_prod.pipeline.upstream.finish import broke_off, finish_told, first_of
from dspy_prod.pipeline.upstream.heard import Heard, heard
from dspy_prod.pipeline.upstream.vocabulary import meant_by, status_meant_by
from dspy_prod.policies.entries import has_substance


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


class Row(NamedTuple):
    """One line of the table: what tells this end, in words, and what it means."""

    told_by: str
    verdict: Verdict


TABLE: Final[dict[str, Row]] = {
    "refused": Row(
        "this library refused; from an open circuit or a full limit the next route is asked",
        Verdict("error", sent=False, owed=False),
    ),
    "unsent": Row(
        "nothing sent: a package or credentials missing, an argument no engine or no JSON can carry, a rule or a "
        "hook of LiteLLM's that comes before",
        Verdict("error", fallback=True, sent=False, owed=False),
    ),
    "locked": Row(
        "nothing sent: a credential file is locked, or no thread is to be had",
        Verdict("error", retry=True, fallback=True, sent=False, owed=False),
    ),
    "unreached": Row(
        "no connection was made, also within `timeout`",
        Verdict("error", failure=True, retry=True, fallback=True, sent=False, owed=False),
    ),
    "lost": Row("the connection broke after sending", Verdict("error", failure=True, retry=True, fallback=True)),
    "slow": Row("408, 504, 522, 524; `timeout` passed", Verdict("timeout", failure=True, retry=True, fallback=True)),
    "down": Row("500, 503, 529", Verdict("error", failure=True, retry=True, fallback=True, owed=False)),
    "failing": Row("any other 5xx", Verdict("error", failure=True, retry=True, fallback=True)),
    "unusable": Row(
        "200 with nothing in it: no choices, no content, `finish_reason` error or none; a stream without its end",
        Verdict("error", failure=True, retry=True, fallback=True),
    ),
    # The generation was completed and is owed, so the same route is not paid twice for it.
    "garbled": Row(
        "200 with what cannot be read; 303, the answer is elsewhere", Verdict("error", failure=True, fallback=True)
    ),
    "throttled": Row("429", Verdict("error", retry=True, fallback=True, throttled=True, owed=False)),
    "busy": Row("409, 423, 424, 425, 499", Verdict("error", retry=True, fallback=True, owed=False)),
    "account": Row(
        "401, 402, 403; key refused or credit used up, whatever the status", Verdict("error", fallback=True, owed=False)
    ),
    "model": Row("404, 410; the model is unknown or retired", Verdict("error", fallback=True, owed=False)),
    "filtered": Row(
        "a content filter, a rule, a hook or a schema of LiteLLM's; 451", Verdict("error", fallback=True, owed=False)
    ),
    "unfit": Row(
        "any other 3xx or 4xx; too long for this model, `max_tokens` above its limit, a setting it does not take",
        Verdict("error", fallback=True, owed=False),
    ),
    "mistake": Row("400 for any other reason", Verdict("error", owed=False)),
    "cancelled": Row("the caller left", Verdict("cancelled")),
}
"""Rows by name. What an answer that had begun cost is owed under every row but those where nothing was sent."""

_STATUS: Final = {
    **dict.fromkeys((408, 504, 522, 524), "slow"),
    **dict.fromkeys((500, 503, 529), "down"),
    **dict.fromkeys((409, 423, 424, 425, 499), "busy"),
    **dict.fromkeys((401, 402, 403), "account"),
    **dict.fromkeys((404, 410), "model"),
    429: "throttled",
    451: "filtered",
    303: "garbled",
    400: "mistake",
}

_KINDS: Final[tuple[tuple[type[LMError], str], ...]] = (
    (RejectedError, "refused"),
    (ContextWindowExceededError, "unfit"),
    (LMAuthError, "account"),
    (LMBillingError, "account"),
    (LMRateLimitError, "throttled"),
    (LMUnsupportedModelError, "model"),
    (LMInvalidRequestError, "mistake"),
    (LMTimeoutError, "slow"),
    (LMServerError, "failing"),
    (LMLockTimeoutError, "locked"),
    (LMTransportError, "lost"),
    (LMUnsupportedFeatureError, "unsent"),
    (LMConfigurationError, "unsent"),
    (LMStreamAssemblyError, "unusable"),
)
"""Rows for errors without a status, most specific first; any other is `garbled`."""

_CANONICAL: Final = {
    ContextWindowExceededError.default_code: "unfit",
    LMAuthError.default_code: "account",
    LMBillingError.default_code: "account",
    LMUnsupportedModelError.default_code: "model",
    LMUnsupportedFeatureError.default_code: "unfit",
}
"""Rows by DSPy's own code: an engine may know more of a 400 or a 429 than its text says."""

_OF_CONNECTIONS: Final = frozenset({"unreached", "lost"})
"""Rows of failures that a time limit of the transport may be the cause of: a time-out, whoever set it."""

_PASSING: Final = frozenset({"locked", "unreached", "lost", "slow", "down", "failing", "throttled", "busy"})
"""Rows of failures that pass by themselves."""

CANCELLED: Final = TABLE["cancelled"].verdict
_SLOW: Final = TABLE["slow"].verdict
_HASTY: Final = _SLOW._replace(failure=False, retry=False, fallback=False)
_FAIR_SHARE: Final = 1.0
"""Seconds any upstream should answer in, for routes without `timeout`."""


def judge(error: BaseException) -> Verdict:
    """The verdict on an attempt that raised `error`."""
    if not isinstance(error, Exception) or isinstance(error, asyncio.CancelledError):
        return CANCELLED
    if isinstance(error, RejectedError):
        return TABLE["refused"].verdict
    said = heard(error)
    row = _row(error, said)
    verdict = TABLE[row].verdict
    if row in _OF_CONNECTIONS and _timed_out(error):
        verdict = verdict._replace(outcome="timeout")
    if not verdict.sent:
        return verdict
    if said.begun or isinstance(error, UnusableAnswerError):
        verdict = verdict._replace(owed=True)
    if said.should_retry is not None:
        verdict = verdict._replace(retry=said.should_retry)
    return verdict


def _timed_out(error: Exception) -> bool:
    """Whether a connection, or a read or write on it, took longer than it may, as far as an engine tells."""
    return any(isinstance(cause, (TimeoutError, asyncio.TimeoutError, LMTimeoutError)) for cause in causes_of(error))


def is_outage(error: BaseException) -> bool:
    """Whether an error tells that nobody answers just now, rather than that something is wrong with what was asked.

    An open circuit tells it, and a limiter that an upstream has paused. What was answered, however badly, does not.
    """
    if isinstance(error, RejectedError):
        return isinstance(error, CircuitOpenError) or (
            isinstance(error, RateLimitedError) and error.retry_after is not None
        )
    if not isinstance(error, Exception) or isinstance(error, asyncio.CancelledError):
        return False
    said = heard(error)
    return _row(error, said) in _PASSING and said.should_retry is not False


_ASKED_FOR: Final = frozenset({"mistake", "unfit", "filtered", "unusable", "garbled"})


def is_of_the_request(error: Exception) -> bool:
    """Whether a failure says something about what was asked, and not about who was asked, or about us."""
    return not isinstance(error, RejectedError) and _row(error, heard(error)) in _ASKED_FOR


def _row(error: Exception, said: Heard) -> str:
    if isinstance(error, UnusableAnswerError):
        return "filtered" if error.flaw == "filtered" else "unusable"
    if said.local:
        return "unsent"
    if said.unreached and said.status is None:
        return "unreached"
    if said.status is not None:
        return _by_status(error, said, said.status)
    if said.shape is not None:
        return said.shape
    if said.begun or said.hearsay is not None:
        status = status_meant_by(said.code) or said.hearsay
        if status is not None:
            return _by_status(error, said, status)
        if said.begun and broke_off(said.code, said.text):
            return "unusable"
        meant = meant_by(said.code, said.text, throttled=False)
        if meant is not None:
            return meant
    return next((row for kind, row in _KINDS if isinstance(error, kind)), "garbled")


def _by_status(error: Exception, said: Heard, status: int) -> str:
    row = _STATUS.get(status)
    if row in ("mistake", "throttled"):  # providers say many things with these
        meant = meant_by(said.code, said.text, throttled=row == "throttled")
        known = _CANONICAL.get(getattr(error, "code", None))
        return meant or (known if known is not None and (row == "mistake" or known == "account") else row)
    if row is not None:
        return row
    if status < 300:
        return "garbled"
    return "unfit" if status < 500 else "failing"


def flaw_of(response: Response) -> str | None:
    """Why nobody can use an answer: `empty`, `error`, `no_end` or `filtered`; None when somebody can.

    An answer that was cut at `max_tokens` is the caller's to judge, even if nothing of it is left.
    """
    finish = response.finish_reason
    if finish == "length":
        return None
    told = None if response.provider_data is None else finish_told(response.provider_data)
    if finish == "error" or told == "error":
        return "error"
    if not has_substance(response) and not _refusal_told(response):
        return "filtered" if finish == "content_filter" else "empty"
    if finish == "stop" and told == "":
        return "no_end"
    return None


def _refusal_told(response: Response) -> bool:
    """Whether the model refused in words that LiteLLM passes beside the message."""
    choice = first_of((response.provider_data or {}).get("choices"))
    message = None if choice is None else choice.get("message")
    beside = message.get("provider_specific_fields") if isinstance(message, dict) else None
    return isinstance(beside, dict) and bool(beside.get("refusal"))


def own_deadline(worked: float, timeout: float | None) -> Verdict:
    """The verdict on an attempt that the call's own deadline ended; it is not retryable by nature.

    The breaker learns of it only if the upstream had a fair time: a caller in a hurry says nothing about others.

    Args:
        worked: seconds the upstream had.
        timeout: the route's `timeout`.
    """
    return _HASTY._replace(failure=worked >= (_FAIR_SHARE if timeout is None else timeout))


def markdown() -> str:
    """The table as the guide shows it."""
    lines = ["| what ended the attempt | retried | next route | breaker | billed |", "|---|---|---|---|---|"]
    for row in TABLE.values():
        verdict = row.verdict
        billed = "usage, else its bound" if verdict.owed else "no"
        breaker = "failure" if verdict.failure else "pauses the limiter" if verdict.throttled else "–"
        yes = ["yes" if said else "–" for said in (verdict.retry, verdict.fallback)]
        lines.append(f"| {row.told_by} | {yes[0]} | {yes[1]} | {breaker} | {billed} |")
    return "\n".join(lines)
