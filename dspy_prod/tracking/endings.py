"""How a call ended, in words that MLflow's list of traces shows without opening one: status, reason, and a line in the
place of an answer that no model, or another model than usual, has given. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from dspy.utils.exceptions import AdapterParseError, LMError

from dspy_prod.errors import RejectedError
from dspy_prod.records import ANSWERED, CallRecord
from dspy_prod.tracking.attributes import dumped

LONGEST: Final = 900
"""Characters of the line; MLflow keeps 1,000."""


class Answer(NamedTuple):
    """What the attempts of a trace came to so far.

    Attributes:
        served: whether there is an answer.
        stale: whether one of them was an older one that a cache gave while nothing better was to be had.
        fallback: the model of a fallback route that gave one of them; None when the usual one gave all.
        fresh: whether anything was asked upstream.
    """

    served: bool = False
    stale: bool = False
    fallback: str | None = None
    fresh: bool = False

    def after(self, record: CallRecord) -> Answer:
        """The same with one more attempt."""
        fresh = self.fresh or not record.cached
        if record.outcome not in ANSWERED:
            return self._replace(fresh=fresh)
        fallback = self.fallback if record.route == "primary" else record.model
        return Answer(True, self.stale or record.outcome == "stale", fallback, fresh)


NOTHING_YET: Final = Answer()


def status_of(told: Mapping[str, Any], error: BaseException | None, answer: Answer) -> str:
    """`ok`, `cached` or `fallback` as in reports; `refused` by this library, or `error`."""
    if error is not None:
        return "refused" if isinstance(error, RejectedError) else "error"
    return str(told.get("status") or ("cached" if answer.served and not answer.fresh else "ok"))


def reason_of(told: Mapping[str, Any], error: BaseException | None) -> str | None:
    """Why it was refused, failed or was answered with a fallback; None for an answer of the program's."""
    if told.get("reason") or error is None:
        return told.get("reason")
    if isinstance(error, RejectedError):
        return error.reason
    return (
        "parse_error"
        if isinstance(error, AdapterParseError)
        else "upstream_error"
        if isinstance(error, LMError)
        else None
    )


def line_of(status: str, reason: str | None, error: str | None, outputs: Any, answer: Answer) -> str | None:
    """What MLflow's list shows in the place of the answer; None to show the answer alone.

    Args:
        status, reason: as above. error: its text, as it may be shown. outputs: of the call, as they may be shown.
        answer: what the attempts came to.
    """
    if status == "refused":  # the reason says what the error's class would
        said = (status, reason, None if error is None else error.partition(": ")[2] or error)
    elif status == "error":
        said = (status, None, error)
    elif status == "fallback":
        said = (status, reason, _text(outputs))
    elif answer.fallback is not None:
        said = (f"fallback to {answer.fallback}", None, _text(outputs))
    elif answer.stale:
        said = ("stale answer", None, _text(outputs))
    else:
        return None
    line = ": ".join(" ".join(part.split()) for part in said if part)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def _text(outputs: Any) -> str | None:
    """The text of an answer with a single one, else all of it."""
    while isinstance(outputs, (Mapping, list)) and len(outputs) == 1:
        outputs = next(iter(outputs.values() if isinstance(outputs, Mapping) else outputs))
    if outputs is None or isinstance(outputs, str):
        return outputs
    return dumped(outputs)
