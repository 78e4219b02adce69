"""A request that stands for a call which no canonical request can say: for bounds, records and traces; never sent.

It holds every text and setting of the call, so that no bound is too low: what cannot be said is there as text, or as
an extension, in full. A part whose tokens its bytes do not tell (a recording, a file) is there as a medium of its kind
and of unknown size, which costs as much as the model can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from dspy.lm15 import (
    AudioPart,
    BuiltinTool,
    Config,
    DocumentPart,
    ImagePart,
    Message,
    Request,
    TextPart,
    VideoPart,
    request_from_openai_chat,
)

_TEXTS: Final = frozenset(
    {"text", "input_text", "output_text", "thinking", "redacted_thinking", "refusal", "reasoning", "tool_use",
     "tool_result", "tool_call", "search_result"}
)  # fmt: skip
_MEDIA: Final[Mapping[str, Any]] = {
    "input_audio": AudioPart, "audio": AudioPart, "audio_url": AudioPart, "image_url": ImagePart, "image": ImagePart,
    "input_image": ImagePart, "video_url": VideoPart, "video": VideoPart,
}  # fmt: skip
_NOWHERE: Final = "about:blank"
_ALREADY: Final = frozenset({"model", "messages"})


def standing_for(model: str, body: Mapping[str, Any]) -> Request:
    """The request that stands for a call.

    Args:
        model: model string.
        body: messages and arguments as `dspy.LM` hands them to LiteLLM.
    """
    said: dict[str, Any] = {}
    unsaid: dict[str, Any] = {}
    for name, value in body.items():
        if name not in _ALREADY and value is not None:
            (unsaid if _converted(model, {**said, name: value}) is None else said)[name] = value
    plain = _converted(model, said)
    config, tools = (Config(), ()) if plain is None else (plain.config, plain.tools)
    hosted = unsaid.pop("tools", None)
    if hosted is not None:
        tools = (*tools, *_hosted(hosted))
        unsaid["given_tools"] = hosted  # under another name: what is billed apart is told by the tools themselves
    if unsaid:
        config = replace(config, extensions={**(config.extensions or {}), **_json(unsaid)})
    rows = body.get("messages") or ()
    messages = tuple([_message(row) for row in rows]) or (Message(role="user", parts=(TextPart(" "),)),)
    return Request(model=model, messages=messages, config=config, tools=tools)


def _converted(model: str, arguments: Mapping[str, Any]) -> Request | None:
    """Arguments as settings of a canonical request; None when it cannot say them."""
    try:
        asked: Request = request_from_openai_chat(
            {"model": model, "messages": [{"role": "user", "content": "."}], **arguments}
        )
        return asked
    except Exception:  # whatever it is: then the argument counts by its size
        return None


def _hosted(tools: Any) -> Iterable[BuiltinTool]:
    """The tools that the provider runs, and bills apart from tokens."""
    for tool in tools if isinstance(tools, (list, tuple)) else ():
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind not in (None, "function", "custom"):
            yield BuiltinTool(name=str(kind))


def _message(row: Any) -> Message:
    if not isinstance(row, Mapping):
        return Message(role="user", parts=(TextPart(_text(row)),))
    content = row.get("content")
    parts: list[Any] = []
    for item in content if isinstance(content, (list, tuple)) else ([] if content is None else [content]):
        kind = item.get("type") if isinstance(item, Mapping) else None
        if isinstance(item, str):
            parts.append(TextPart(item or " "))
        elif kind == "text" and isinstance(item.get("text"), str) and len(item) == 2:
            parts.append(TextPart(item["text"] or " "))
        elif kind in _TEXTS:
            parts.append(TextPart(_text(item)))
        else:
            parts.append(_MEDIA.get(str(kind), DocumentPart)(url=_NOWHERE))
    rest = {name: value for name, value in row.items() if name not in ("role", "content") and value is not None}
    if rest:
        parts.append(TextPart(_text(rest)))
    role = "assistant" if row.get("role") == "assistant" and not _media(parts) else "user"
    return Message(role=role, parts=tuple(parts) or (TextPart(" "),))


def _media(parts: Iterable[Any]) -> bool:
    return any(part.type != "text" for part in parts)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=repr))
