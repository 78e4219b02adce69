"""How an attempt can end that no provider says: at its time limit, or for a cause further down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from dspy.lm15 import Response


class AttemptTimeoutError(Exception):
    """The driver ended an attempt at its `until`.

    Attributes:
        late: set when the attempt still runs in a worker thread and will report there.
    """

    def __init__(self, late: LateResult | None = None) -> None:
        super().__init__("the attempt was ended at its time limit")
        self.late = late


class SealedError(ValueError):
    """Says what a library said of a text that it could not read, without the secrets in it: its own error is sealed."""


class LateResult(Protocol):
    """An abandoned attempt that goes on in a worker thread."""

    def on_end(self, report: Callable[[Response | None, BaseException | None], None]) -> None:
        """Call `report(response, error)` when the attempt has ended, at once if it has."""
        ...


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """An error and, in turn, what it was raised from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def billed_by(error: BaseException) -> Response | None:
    """What an answer that nobody could read tells of its usage; see `compat.lm15.read_or_billed`."""
    own: Response | None = getattr(error, "billed", None)
    return getattr(error.__cause__, "billed", None) if own is None else own  # no further: that may be another attempt's
