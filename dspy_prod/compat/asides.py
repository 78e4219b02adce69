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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, Final

from dspy.lm15 import ContinuationDelta, RefusalPart, Response, StreamDeltaEvent, StreamEndEvent, Usage

from dspy_prod.compat.foreign import names

_usage_of_gemini: Callable[..., Usage]
[_usage_of_gemini] = names("dspy._vendor.lm15.providers.gemini", "_gemini_usage")

OWN: Final = "dspy_prod"
"""Who tells these events."""
REFUSAL: Final = "refusal"
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


def refusal(text: str, *, part: int | None = None, apart: int | None = None) -> StreamDeltaEvent:
    """The event that tells a piece of a refusal.

    Args:
        text: the piece.
        part: where the next event makes text of it: the number of the part of the answer that this came for. Where
            lm15 ends the text at `stop`, that event has less of it, or does not come.
        apart: the number of the part in which it stands instead.
    """
    return _event(REFUSAL, {"text": text, "part": part}, apart)


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

    __slots__ = ("_beginning", "_counted", "_done", "_left", "_more", "_part", "_refusal")

    def __init__(self) -> None:
        self._beginning: Mapping[str, Any] | None = None
        self._counted: Mapping[str, Any] | None = None
        self._more = self._done = False
        self._refusal: list[str] = []
        self._left: list[str] = []
        self._part: int | None = None

    def takes(self, event: Any) -> bool:
        """Whether an event tells such a thing, which is taken."""
        delta = event.delta if event.type == "delta" else None
        if delta is None:
            return False
        if delta.type != "continuation":
            self._adds(delta.type != "text" or bool(delta.text))
            return False
        if delta.provider != OWN:
            return False
        if delta.kind == REFUSAL:
            self._refusal.append(delta.data["text"])
            self._part = delta.data["part"]
            if self._part is None:  # no text is made of it
                self._left.append(delta.data["text"])
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

    def shown(self, event: Any) -> Any:
        """An event that is text which a reader has made of what was taken, as it came; None for any other.

        Nothing of the answer is in it, though it is shown.
        """
        part, self._part = self._part, None
        if part is None or event.type != "delta" or event.delta.type != "text":
            return None
        self._left.append(event.delta.text)
        return replace(event, delta=replace(event.delta, part_index=part))

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
        return replace(response, message=replace(message, parts=(*parts, refused(self._left, self._refusal))))


def refused(left: Iterable[str], said: Iterable[str]) -> RefusalPart:
    """The part for a refusal.

    Args:
        left: what `stop` has left of it. said: all that came; where nothing is left, that it refused is still to be
            told, and such a part is never empty.
    """
    return RefusalPart(text="".join(left) or "".join(said))


def _event(kind: str, data: dict[str, Any], part: int | None = None) -> StreamDeltaEvent:
    return StreamDeltaEvent(ContinuationDelta(provider=OWN, kind=kind, data=data, part_index=part))


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
