"""The chunks of LiteLLM's streams, of which DSPy's reader refuses some that it has no event for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from dspy_prod.compat.asides import refusal
from dspy_prod.compat.foreign import names
from dspy_prod.compat.lm15 import StreamEvent

_ChatStream: Any
[_ChatStream] = names("dspy.clients.engines.litellm_engine", "_ChatStream")
[plain] = names("dspy.clients.legacy_outputs", "plain")

_EVENTFUL: Final = frozenset({"role", "content", "reasoning_content", "reasoning", "tool_calls"})
_CITED: Final = ("cited_text", "text", "supported_text", "document_title", "title", "url")


class Chunks(_ChatStream):
    """DSPy's reader of chunks. That one refuses what it has no event for, such as Anthropic's blocks of thought.

    Their text comes beside them. Of a whole answer such things stay in `provider_data`, and so they do here.
    """

    def feed(self, chunk: Any) -> Iterator[StreamEvent]:
        eventful = _eventful(chunk)
        yield from super().feed(eventful)
        if eventful is not chunk:
            self.chunks[-1] = chunk  # of which the whole answer is made in the end
            for choice in chunk.choices:
                if said := getattr(choice.delta, "refusal", None):
                    yield refusal(str(said))


def _eventful(chunk: Any) -> Any:
    """A chunk without what no event says; the very chunk, where there is nothing of the kind."""
    if not any(_beside(getattr(choice, "delta", None)) for choice in getattr(chunk, "choices", None) or ()):
        return chunk
    body = plain(chunk)
    for choice in body["choices"]:
        delta = choice["delta"]
        cited = (delta.get("provider_specific_fields") or {}).get("citation")
        choice["delta"] = {name: value for name, value in delta.items() if name in _EVENTFUL}
        if _is_citation(cited):
            choice["delta"]["provider_specific_fields"] = {"citation": cited}
    return body


def _beside(delta: Any) -> bool:
    for name, value in delta or ():
        if name == "provider_specific_fields":
            if value and not (len(value) == 1 and _is_citation(value.get("citation"))):
                return True
        elif value and name not in _EVENTFUL:
            return True
    return False


def _is_citation(value: Any) -> bool:
    return isinstance(value, Mapping) and any(value.get(name) for name in _CITED)
