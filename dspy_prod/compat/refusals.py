"""Refusals of which lm15 makes text: in streams of the Responses API, and in whole answers that it makes of such.

Where it ends a text at `stop` itself, a whole answer is a stream to it. What of a text came as a refusal is not to be
found by its words, which may stand anywhere, and be cut: as it comes it is put in a part of its own. What stands behind
`stop` is no part of it either.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from dspy.lm15 import Response

from dspy_prod.compat.asides import OWN, REFUSAL, refusal, refused

_APART: Final = 2**62
"""The number of that part, behind all that a provider has."""


def set_apart(data: str, events: Iterable[Any]) -> Iterator[Any]:
    """What a reader makes of an event as it came: text of a refusal stands apart, and is told to be one before it."""
    refused = _is_refusal(data)
    for event in events:
        if refused and event is not None and event.type == "delta" and event.delta.type == "text" and event.delta.text:
            yield refusal(event.delta.text, part=event.delta.part_index, apart=_APART)
            event = replace(event, delta=replace(event.delta, part_index=_APART))
        yield event


def _is_refusal(data: str) -> bool:
    if '"response.refusal.delta"' not in data:
        return False
    try:
        payload = json.loads(data)
    except (ValueError, RecursionError):  # the reader says so
        return False
    return isinstance(payload, dict) and payload.get("type") == "response.refusal.delta"


def without_asides(response: Response) -> Response:
    """An answer that lm15 has made of a stream, as `Asides` leaves one: a refusal is one part, and no text.

    Of the events of our own only what they tell is left.
    """
    message = response.message
    others = tuple(state for state in message.continuation if state.provider != OWN)
    parts = [part for part in message.parts if not _told_in(part.continuation)]
    if len(others) == len(message.continuation) and len(parts) == len(message.parts):
        return response
    said, left = _told_in(message.continuation), _told_in(message.continuation)
    for part in message.parts:
        if told := _told_in(part.continuation):
            said += told
            left.append(getattr(part, "text", ""))  # as lm15 has cut it
    if said:
        kept = [part for part in parts if part.type != "text" or part.text]
        parts = [*kept, refused(left, said)]
    return replace(response, message=replace(message, parts=tuple(parts), continuation=others))


@contextmanager
def partial_without_asides() -> Iterator[None]:
    """The same of what an error says came before it."""
    try:
        yield
    except Exception as error:
        partial = getattr(error, "partial", None)
        if isinstance(partial, Response):
            error.partial = without_asides(partial)  # type: ignore[attr-defined]
        raise


def _told_in(states: Iterable[Any]) -> list[str]:
    return [state.data["text"] for state in states if (state.provider, state.kind) == (OWN, REFUSAL)]
