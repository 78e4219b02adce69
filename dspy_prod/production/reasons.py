"""Why a program did not answer, in one word."""

from __future__ import annotations

from typing import Final, Literal, get_args

from dspy.utils.exceptions import AdapterParseError, LMError

from dspy_prod.errors import DeadlineExceededError, RejectedError
from dspy_prod.status.spending import Reason as Refusal

Reason = Literal[Refusal, "upstream_error", "parse_error", "unexpected_error"]

REASONS: Final = frozenset(get_args(Reason))
REFUSALS: Final = frozenset(get_args(Refusal))


def reason_of(error: BaseException) -> Reason:
    """The word in reports for an error. A group of errors has the word of the first, when all of them are LM errors."""
    if isinstance(error, RejectedError):
        return error.reason if error.reason in REASONS else "upstream_error"  # type: ignore[return-value]
    if isinstance(error, AdapterParseError):
        return "parse_error"
    if isinstance(error, LMError):
        return "upstream_error"
    members = getattr(error, "exceptions", None)  # an ExceptionGroup, of Python 3.11 or of its backport
    if isinstance(members, tuple) and members:
        reasons = [reason_of(member) for member in members]
        if "unexpected_error" not in reasons:
            return reasons[0]
    return "unexpected_error"


def has_hung(error: BaseException | None) -> bool:
    """Whether the call behind an error was sent and its upstream did not answer in all the time there was: a deadline
    passed while it was working, or what was refused is another attempt. Of other calls of the program it says nothing.
    """
    members = getattr(error, "exceptions", None)
    each = members if isinstance(members, tuple) else (error,)
    return any(
        isinstance(one, RejectedError) and (one.timed_out or (isinstance(one, DeadlineExceededError) and one.working))
        for one in each
    )
