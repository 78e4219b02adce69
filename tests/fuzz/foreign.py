"""Answers in the languages of Anthropic and Google, which the native engines read too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from dspy_prod.testing.dialects import sse

_TEXT: Final = "answer 0000 0000"
_TOLD: Final = {"input_tokens": 7, "output_tokens": 5, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}


def _message(content: list[dict[str, Any]], stop: str | None, usage: dict[str, Any] | None) -> dict[str, Any]:
    body = {"id": "msg_1", "type": "message", "role": "assistant", "model": "fuzz", "content": content,
            "stop_reason": stop, "stop_sequence": None}  # fmt: skip
    return body if usage is None else {**body, "usage": usage}


_CONTENTS: Final[tuple[list[dict[str, Any]], ...]] = (
    [{"type": "text", "text": _TEXT}],
    [{"type": "thinking", "thinking": "because", "signature": "s"}, {"type": "text", "text": _TEXT}],
    [{"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"a": 1}}],
    [],
)


def _anthropic_stream(usage: dict[str, Any]) -> tuple[bytes, ...]:
    start = {"type": "message_start", "message": _message([], None, {**usage, "output_tokens": 1})}
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    deltas = [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
              for text in (_TEXT[:8], _TEXT[8:])]  # fmt: skip
    end = [{"type": "content_block_stop", "index": 0},
           {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage},
           {"type": "message_stop"}]  # fmt: skip
    return tuple(sse(event, str(event["type"])) for event in (start, block, *deltas, *end))


def _generated(parts: list[dict[str, Any]], reason: str | None = "STOP", told: bool = True) -> dict[str, Any]:
    candidate = {"content": {"parts": parts, "role": "model"}, "finishReason": reason, "index": 0}
    usage = {"promptTokenCount": 7, "candidatesTokenCount": 5, "totalTokenCount": 12}
    return {"candidates": [candidate], "modelVersion": "fuzz", **({"usageMetadata": usage} if told else {})}


BODIES: Final[Mapping[str, tuple[str, ...]]] = {
    "anthropic": tuple(
        json.dumps(_message(content, stop, usage))
        for content, stop, usage in (
            *((content, "end_turn", _TOLD) for content in _CONTENTS),
            (_CONTENTS[0], "max_tokens", _TOLD), (_CONTENTS[0], "refusal", _TOLD), (_CONTENTS[0], "end_turn", None),
        )
    ),
    "gemini": tuple(
        json.dumps(body)
        for body in (
            _generated([{"text": _TEXT}]), _generated([{"text": _TEXT}], "MAX_TOKENS"), _generated([], "SAFETY"),
            _generated([{"functionCall": {"name": "look", "args": {}}}]), _generated([{"text": _TEXT}], told=False),
            {"promptFeedback": {"blockReason": "SAFETY"}, "candidates": []},
        )
    ),
}  # fmt: skip
"""Whole answers, the plainest first."""

STREAMS: Final[Mapping[str, tuple[tuple[bytes, ...], ...]]] = {
    "anthropic": (_anthropic_stream(_TOLD), _anthropic_stream({})),
    "gemini": (
        (sse(_generated([{"text": _TEXT}], None)), sse(_generated([{"text": ""}]))),
        (sse(_generated([{"text": _TEXT}], told=False)),),
    ),
}
"""Streams, event by event."""
