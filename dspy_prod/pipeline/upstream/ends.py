"""How an attempt can end that no provider says: at its time limit, or for a cause further down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol

from dspy.lm15 import Response

EARLY: Final = 0.005
"""Seconds by which a time-out of a socket may come before the time it was made for."""


class AttemptTimeoutError(Exception):
    """The driver ended an attempt at its `until`. It may go on in a worker thread, see `effects.Send.late`."""

    def __init__(self) -> None:
        super().__init__("the attempt was ended at its time limit")


class SealedError(ValueError):
    """Says what a library said of a text that it could not read, without the secrets in it: its own error is sealed."""


class LateResult(Protocol):
    """An attempt in a thread, which goes on there when its caller leaves: at a time limit, cancelled, or for Ctrl-C.

    Attributes:
        heard: its caller has its end.
    """

    heard: bool

    def on_end(self, report: Callable[[Response | None, BaseException | None], None]) -> None:
        """Call `report(response, error)` when the attempt has ended, at once if it has; it does not begin any more."""
        ...


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """An error and, in turn, what it was raised from, without what is known to be of its caller, see `bounded_by`."""
    told = getattr(error, "own_causes", None)
    own: int | None = told if type(told) is int else None  # an engine's own error may have any attribute
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen and (own is None or len(seen) <= own):
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def bounded_by(outside: BaseException | None, error: BaseException) -> int | None:
    """How many causes of an attempt's error are its own, where the last one was raised while a caller handled another.

    Python makes that the context of whatever is raised meanwhile: who asks a model because a service said 503 has that
    503 behind each error of the model's.

    Args:
        outside: what was handled where the attempt was made; None where nothing was.
        error: the attempt's.

    Returns:
        None where all of them are.
    """
    if outside is None:
        return None
    return next((count for count, cause in enumerate(causes_of(error), -1) if cause is outside and count >= 0), None)


def billed_by(error: BaseException) -> Response | None:
    """What an answer that nobody could read tells of its usage; see `compat.lm15.read_or_billed`."""
    for each in (error, error.__cause__):  # no further: that may be another attempt's
        found = getattr(each, "billed", None)
        if isinstance(found, Response):
            return found
    return None
