"""What a model says when it refuses to answer, in streams: lm15 has a part for it in whole answers, and no event.

Of OpenAI's chat API its readers leave it out of a stream, so that nothing seems to be in it; of the Responses API they
make text, which would pass for an answer, and be kept. Here an event of its own tells it. No reader of a stream sees
that event: what is shown is what a plain `dspy.LM` shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from dspy.lm15 import ContinuationDelta, RefusalPart, Response, StreamDeltaEvent

_KIND: Final = "dspy_prod_refusal"


def event_of(text: str) -> StreamDeltaEvent:
    """The event that tells a piece of a refusal."""
    return StreamDeltaEvent(ContinuationDelta(provider="openai", kind=_KIND, data={"text": text}))


def told_by(event: Any) -> str | None:
    """The piece of a refusal that an event tells; None of any other event."""
    delta = event.delta if event.type == "delta" else None
    if delta is None or delta.type != "continuation" or delta.kind != _KIND:
        return None
    return str(delta.data["text"])


def refusals_in(data: str) -> Iterator[StreamDeltaEvent]:
    """The events for what an event as it came, of whatever dialect, says of a refusal."""
    if "refusal" not in data:
        return
    payload = json.loads(data)
    if not isinstance(payload, dict):
        return
    said = payload.get("delta") if payload.get("type") == "response.refusal.delta" else None
    choices = payload.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        delta = choice.get("delta") if isinstance(choice, dict) else None
        said = delta.get("refusal") if isinstance(delta, dict) else None
    if said and isinstance(said, str):
        yield event_of(said)


def refusing(response: Response, refusal: str) -> Response:
    """The answer of a stream in which a refusal was told, as a whole one has it: a part of its own, and no text."""
    message = response.message
    parts = [part for part in message.parts if part.type != "text" or part.text not in ("", refusal)]
    return replace(response, message=replace(message, parts=(*parts, RefusalPart(text=refusal))))
