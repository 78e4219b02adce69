"""What providers tell in streams beside the answer, for which lm15 has no event: events of our own tell it.

- Why a model does not answer. Of OpenAI's chat API lm15's readers leave a refusal out of a stream, so that nothing
  seems to be in it; of the Responses API they make text, which would pass for an answer, and be kept.
- What Anthropic counts at the beginning: the end may count the output alone.
- When the usage was told. lm15 makes one end of all there are and forgets where they stood, and forgets what Gemini
  counts beside a text. What was told last holds, unless more of the answer came behind it: that may have cost more.
  Not so behind `[DONE]`, where all is told.

No reader of a stream sees these events: of the answer is shown what a plain `dspy.LM` shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, Final

from dspy.lm15 import ContinuationDelta, RefusalPart, Response, StreamDeltaEvent, StreamEndEvent, Usage

from dspy_prod.compat.foreign import names

_usage_of_gemini: Callable[..., Usage]
[_usage_of_gemini] = names("dspy._vendor.lm15.providers.gemini", "_gemini_usage")

_OWN: Final = "dspy_prod"
_REFUSAL: Final = "refusal"
_BEGINNING: Final = "beginning"
_COUNTED: Final = "counted"
_BESIDE: Final = "beside"
_DONE: Final = "done"
_COUNTERS: Final = {
    "input_tokens": "input_tokens",
    "cache_read_tokens": "cache_read_input_tokens",
    "cache_write_tokens": "cache_creation_input_tokens",
}
"""Anthropic's counters of the input, by lm15's names."""


def refusal(text: str, *, as_text: bool = False) -> StreamDeltaEvent:
    """The event that tells a piece of a refusal; whether the next event makes text of it."""
    return _event(_REFUSAL, {"text": text, "as_text": as_text})


def refused_in(data: str) -> Iterator[StreamDeltaEvent]:
    """The event for a piece of a refusal of which the reader of the Responses API makes text: it comes before that."""
    if '"response.refusal.delta"' not in data:
        return
    try:
        payload = json.loads(data)
    except (ValueError, RecursionError):  # the reader says so
        return
    said = payload.get("delta") if isinstance(payload, dict) else None
    if said and isinstance(said, str) and payload.get("type") == "response.refusal.delta":
        yield refusal(said, as_text=True)


def counted(end: StreamEndEvent) -> Iterator[StreamDeltaEvent]:
    """The event that tells where an end stood which counts; none for one that does not."""
    usage = end.usage
    if usage is not None and (usage.input_tokens, usage.output_tokens) != (None, None):
        yield _event(_COUNTED, {"usage": asdict(usage), "raw": _counters_of(end.provider_data or {})})


def counted_beside(data: str) -> Iterator[StreamDeltaEvent]:
    """The same for an event of Gemini's that is no end. It is read when nothing is told behind it."""
    if '"usageMetadata"' in data:
        yield _event(_BESIDE, {"event": data})


def done_in(data: str) -> Iterator[StreamDeltaEvent]:
    """The event that tells that a provider has told all: OpenAI's way to say so, behind which its reader reads on."""
    if data == "[DONE]":
        yield _event(_DONE, {})


def asides_in(data: str) -> Iterator[StreamDeltaEvent]:
    """The events for what an event as it came, of whatever dialect, tells beside the answer."""
    if "refusal" not in data and '"message_start"' not in data:
        return
    payload = json.loads(data)
    if not isinstance(payload, dict):
        return
    said = None
    choices = payload.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        delta = choice.get("delta") if isinstance(choice, dict) else None
        said = delta.get("refusal") if isinstance(delta, dict) else None
    if said and isinstance(said, str):
        yield refusal(said)
    message = payload.get("message") if payload.get("type") == "message_start" else None
    usage = message.get("usage") if isinstance(message, dict) else None
    if isinstance(usage, dict) and all(_is_count(usage.get(name)) for name in _COUNTERS.values()):
        yield _event(_BEGINNING, usage)


class Asides:
    """What a stream has told beside its answer."""

    __slots__ = ("_as_text", "_beginning", "_counted", "_done", "_more", "_refusal")

    def __init__(self) -> None:
        self._beginning: Mapping[str, Any] | None = None
        self._counted: Mapping[str, Any] | None = None
        self._more = self._done = False
        self._refusal = ""
        self._as_text = False

    def takes(self, event: Any) -> bool:
        """Whether an event tells such a thing, which is taken."""
        delta = event.delta if event.type == "delta" else None
        if delta is None:
            return False
        if delta.type != "continuation":
            self._adds(delta.type != "text" or bool(delta.text))
            return False
        if delta.provider != _OWN:
            return False
        if delta.kind == _REFUSAL:
            self._refusal += delta.data["text"]
            self._as_text = delta.data["as_text"]
            self._adds(True)
        elif delta.kind == _BEGINNING:
            self._beginning = delta.data
        elif delta.kind == _DONE:
            self._done = True
        elif not self._done or self._counted is None:
            self._counted, self._more = delta.data, False
        return True

    def _adds(self, more: bool) -> None:
        """Something of the answer came; behind its end nothing that could have cost more."""
        self._more = self._more or (more and not self._done)

    def has(self, event: Any) -> bool:
        """Whether an event is text that a reader has made of what was taken: nothing of the answer, though shown."""
        told, self._as_text = self._as_text, False
        return told and event.type == "delta" and event.delta.type == "text"

    def ended(self, end: StreamEndEvent) -> StreamEndEvent:
        """The end of the stream, with the usage that holds, and what that leaves out because the beginning told it."""
        end = self._with_what_holds(end)
        beginning, usage, data = self._beginning, end.usage, end.provider_data
        if beginning is None or usage is None:
            return end
        missing = {ours: beginning.get(theirs) for ours, theirs in _COUNTERS.items() if getattr(usage, ours) is None}
        if data is not None and isinstance(data.get("usage"), dict):  # also of where it was served, which has its price
            data = {**data, "usage": {**beginning, **data["usage"]}}
        return replace(end, usage=replace(usage, total_tokens=None, **missing), provider_data=data)

    def _with_what_holds(self, end: StreamEndEvent) -> StreamEndEvent:
        if self._counted is None:
            return end
        if self._more:
            return replace(end, usage=None)
        usage: Usage | None
        if "event" in self._counted:
            raw = _counters_of(json.loads(self._counted["event"]))
            usage = _usage_beside(raw.get("usageMetadata"))
        else:
            raw, usage = self._counted["raw"], Usage(**self._counted["usage"])
        if usage == end.usage:
            return end
        return replace(end, usage=usage, provider_data={**(end.provider_data or {}), **raw})

    def whole(self, response: Response) -> Response:
        """What came of a stream's answer, in which a refusal is a part of its own, and no text, as in a whole one."""
        if not self._refusal:
            return response
        message = response.message
        parts = [part for part in message.parts if part.type != "text" or part.text]
        return replace(response, message=replace(message, parts=(*parts, RefusalPart(text=self._refusal))))


def without_asides(response: Response) -> Response:
    """An answer that lm15 has made of a stream, as where it ends a text at `stop` itself, as `Asides` leaves one.

    Of its events only what they tell is left, among what continues the message.
    """
    message = response.message
    states = message.continuation
    if not states or not any(state.provider == _OWN for state in states):
        return response
    refused = [state.data for state in states if (state.provider, state.kind) == (_OWN, _REFUSAL)]
    others = tuple(state for state in states if state.provider != _OWN)
    parts = message.parts
    if refused:
        text = "".join(data["text"] for data in refused)
        texts = _without([data["text"] for data in refused if data["as_text"]], parts)
        parts = (*(part for part in texts if part.type != "text" or part.text), RefusalPart(text=text))
    return replace(response, message=replace(message, parts=parts, continuation=others))


def _without(pieces: list[str], parts: tuple[Any, ...]) -> Iterator[Any]:
    """The parts of an answer, of whose text the pieces of a refusal are left out, as far as they were shown."""
    spans = list(_shown("".join(part.text for part in parts if part.type == "text"), pieces))
    end = 0
    for part in parts:
        if part.type != "text":
            yield part
            continue
        begin, end, kept, at = end, end + len(part.text), "", 0
        for first, last in spans:
            first, last = max(first - begin, at), min(last, end) - begin
            if first < last:
                kept, at = kept + part.text[at:first], last
        yield replace(part, text=kept + part.text[at:])


def _shown(text: str, pieces: list[str]) -> Iterator[tuple[int, int]]:
    """Where a text shows the pieces of a refusal, in their order. What the text ends in may be cut off at `stop`.

    They are looked for as one first: the same words may stand before them.
    """
    whole = "".join(pieces)
    shortest = len(whole) - len(pieces[-1]) if pieces else 0
    at = text.rfind(whole)
    if at >= 0:
        yield at, at + len(whole)
        return
    if shortest and (cut := _cut(text, whole)) >= shortest:
        yield len(text) - cut, len(text)
        return
    at = 0
    for piece in pieces:
        found = text.find(piece, at)
        if found < 0:
            yield len(text) - _cut(text[at:], piece), len(text)
            return
        at = found + len(piece)
        yield found, at


def _cut(text: str, whole: str) -> int:
    """How much of something a text ends with, that goes no further."""
    return next(size for size in range(min(len(text), len(whole)), -1, -1) if text.endswith(whole[:size]))


def _event(kind: str, data: dict[str, Any]) -> StreamDeltaEvent:
    return StreamDeltaEvent(ContinuationDelta(provider=_OWN, kind=kind, data=data))


def _usage_beside(counts: Any) -> Usage | None:
    """What Gemini counts beside a text; None where no usage can be made of it, as nobody else reads it."""
    try:
        return _usage_of_gemini(counts, output_keys=("candidatesTokenCount", "responseTokenCount"))
    except (TypeError, ValueError):
        return None


def _counters_of(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in ("usage", "usageMetadata") if name in data}


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)
