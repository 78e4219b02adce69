"""Why a program did not answer, in one word."""

from __future__ import annotations

from typing import Final, Literal, get_args

from dspy.utils.exceptions import AdapterParseError, LMError, LMTimeoutError

from dspy_prod.errors import DeadlineExceededError, RejectedError
from dspy_prod.status.spending import Reason as Refusal

Reason = Literal[Refusal, "upstream_error", "parse_error", "unexpected_error"]

REASONS: Final = frozenset(get_args(Reason))
REFUSALS: Final = frozenset(get_args(Refusal))

LONGEST_CHAIN: Final = 16
"""Errors of which each is behind another, at most, that are looked at."""


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


def has_hung(error: BaseException | None, handled: BaseException | None = None) -> bool:
    """Whether the call behind an error was sent and its upstream did not answer in all the time there was: a deadline
    passed while it was working, or what was refused is another attempt. So it is as well where the error was raised
    while that was being handled, as by another LM that has no time left. Of other calls of the program it says nothing.

    Args:
        error: what was raised. handled: what somebody was handling when the program was called: it is none of its own.
    """
    seen, level = {id(None), id(handled)}, [error]
    for _ in range(LONGEST_CHAIN):
        behind: list[BaseException | None] = []
        for one in level:
            if one is None or id(one) in seen:
                continue
            seen.add(id(one))
            if _timed_out(one):
                return True
            members = getattr(one, "exceptions", None)
            behind += [one.__cause__, one.__context__, *(members if isinstance(members, tuple) else ())]
        level = behind
    return False


def _timed_out(error: BaseException) -> bool:
    if isinstance(error, RejectedError):
        return error.timed_out or (isinstance(error, DeadlineExceededError) and error.working)
    return isinstance(error, LMTimeoutError)
