"""Why an answer ended, in the provider's own words.

The engines know a handful of reasons and say "stop" for any other, and LiteLLM also where none was told. So an answer
that broke off would pass for one that is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, Literal

from dspy.lm15 import Response, StreamEndEvent

_BROKEN: Final = frozenset({
    "error", "failed", "abort", "aborted", "cancelled", "canceled", "user_cancel", "timeout", "network_error",
    "insufficient_system_resource", "engine_overloaded", "malformed_function_call", "malformed_response",
    "malformed_model_output", "malformed_tool_use", "unexpected_tool_call", "too_many_tool_calls",
    "missing_thought_signature",
})  # fmt: skip
"""Reasons that say that the provider, or what it served, broke off (OpenRouter, DeepSeek, vLLM, Zhipu, Cohere, Gemini,
Bedrock), in lower case."""

_TOLD: Final = re.compile(r'"(?:finish_reason|stop_reason|finishReason|stopReason|done_reason)"\s*:\s*"')

_BROKE_OFF: Final = re.compile(
    r"malformed[_ ](?:function[_ ]call|response)|unexpected_tool_call|too_many_tool_calls|missing_thought_signature",
    re.IGNORECASE,
)
"""How the native engine for Gemini words such reasons: it raises them, as it does what a filter has blocked."""

Told = Literal["error", "told", ""]


def broken(reason: Any) -> bool:
    """Whether a reason says that the answer broke off."""
    return isinstance(reason, str) and reason.lower() in _BROKEN


def broke_off(code: str | None, text: str) -> bool:
    """Whether an error that came inside an answer stands for such a reason."""
    return broken(code) or _BROKE_OFF.search(text) is not None


def finish_told(data: Mapping[str, Any]) -> Told | None:
    """What a provider's answer, or the last event of its stream, says of its end.

    Returns:
        `"error"`, `"told"`, `""` when it says nothing, None when its language is not known, or when an event may have
        come before it that said why.
    """
    choice = first_of(data.get("choices"))
    if choice is not None:
        if "delta" in choice:  # the last of many events: an earlier one may have told another reason
            return "error" if broken(choice.get("finish_reason")) else None
        reason = choice.get("finish_reason")
        native = choice.get("provider_specific_fields")
        if native and isinstance(native, dict):
            reason = native.get("native_finish_reason", reason)
        return _told(reason)
    if data.get("object") == "response":
        status = data.get("status")
        return "error" if status in ("failed", "cancelled") else "" if status in ("in_progress", "queued") else None
    if data.get("type") == "message":  # Anthropic's
        return _told(data.get("stop_reason"))
    candidate = first_of(data.get("candidates"))  # Gemini's
    return None if candidate is None else _told(candidate.get("finishReason"))


def untold_in(text: str) -> bool:
    """Whether a whole answer, as it arrived, does not say why it ended, though providers of its kind do."""
    if _TOLD.search(text) is not None:
        return False
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and finish_told(data) == ""


def without_end(response: Response) -> Response:
    """The answer, of which the provider did not say why it ended, whatever LiteLLM says for it."""
    data = response.provider_data or {}
    choice = first_of(data.get("choices")) or {}
    return replace(response, provider_data={**data, "choices": [{**choice, "finish_reason": None}]})


def truthful(end: StreamEndEvent) -> StreamEndEvent:
    """The end of a stream, which says `error` where the provider did."""
    if end.provider_data is not None and finish_told(end.provider_data) == "error":
        return replace(end, finish_reason="error")
    return end


def _told(reason: Any) -> Told:
    return "" if not reason else "error" if broken(reason) else "told"


def first_of(items: Any) -> dict[str, Any] | None:
    """The first of a provider's choices; None where there is nothing of the kind."""
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else None
