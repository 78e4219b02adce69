"""How each endpoint writes a reply: the JSON body, and the events of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from dspy_prod.testing.answers import Choice, Reply
from dspy_prod.testing.bill import Usage
from dspy_prod.testing.calls import Api
from dspy_prod.testing.embeddings import Embeddings


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of a stream: the bytes of its event(s), and what a bill needs to know about it."""

    data: bytes
    share: float
    """How much of the output (0 to 1) has been generated once this is sent."""
    delta: bool = False
    """Whether it carries text of the answer (a chunk of it)."""
    usage: bool = False
    """Whether it tells the usage."""


class Dialect(Protocol):
    """One endpoint's way to write a reply."""

    def body(self, reply: Reply, usage: Usage | None) -> dict[str, Any]:
        """The body of a plain answer; `usage` None leaves it out."""


class StreamingDialect(Dialect, Protocol):
    """One that has streams, too."""

    def stream(self, reply: Reply, usage: Usage | None, chunks: int) -> Iterator[Piece]:
        """The events of a stream, each text in up to `chunks` pieces."""


def dumps(data: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + dumps(data) + b"\n\n"


def split(text: str, chunks: int) -> list[str]:
    """`text` in at most `chunks` pieces of about equal length."""
    size = max(1, -(-len(text) // chunks))
    return [text[start : start + size] for start in range(0, len(text), size)]


class _Progress:
    """Counts characters sent, to give each piece its share."""

    def __init__(self, reply: Reply) -> None:
        self.total = max(1, sum(choice.chars for choice in reply.choices))
        self.sent = 0

    def after(self, text: str) -> float:
        self.sent += len(text)
        return self.sent / self.total


def chat_usage(usage: Usage) -> dict[str, Any]:
    """Usage as Chat Completions writes it."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens, "audio_tokens": 0},
    }


def _stamp(reply: Reply, kind: str) -> dict[str, Any]:
    return {"id": reply.call.call_id, "object": kind, "created": reply.created, "model": reply.call.model}


class Chat:
    """POST /v1/chat/completions."""

    def body(self, reply: Reply, usage: Usage | None) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(reply.choices):
            message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.reasoning is not None:
                message["reasoning_content"] = choice.reasoning
            if choice.tool_calls:
                message["tool_calls"] = [
                    {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                    for c in choice.tool_calls
                ]
            entry = {"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason}
            choices.append(entry)
        body = {**_stamp(reply, "chat.completion"), "choices": choices, "system_fingerprint": None}
        return body if usage is None else {**body, "usage": chat_usage(usage)}

    def stream(self, reply: Reply, usage: Usage | None, chunks: int) -> Iterator[Piece]:
        stamp = _stamp(reply, "chat.completion.chunk")
        progress = _Progress(reply)

        def chunk(index: int, delta: dict[str, Any], text: str = "", finish: str | None = None) -> Piece:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
            event = {**stamp, "choices": [choice]}
            if usage is not None:
                event["usage"] = None
            return Piece(sse(event), progress.after(text), delta=bool(text))

        for index, choice in enumerate(reply.choices):
            yield chunk(index, {"role": "assistant", "content": None if choice.tool_calls else ""})
            for text in split(choice.reasoning or "", chunks):
                yield chunk(index, {"reasoning_content": text}, text)
            for text in split(choice.text or "", chunks):
                yield chunk(index, {"content": text}, text)
            for number, call in enumerate(choice.tool_calls):
                function = {"name": call.name, "arguments": ""}
                head = {"index": number, "id": call.id, "type": "function", "function": function}
                yield chunk(index, {"tool_calls": [head]}, call.name)
                for text in split(call.arguments, chunks):
                    part = {"index": number, "function": {"arguments": text}}
                    yield chunk(index, {"tool_calls": [part]}, text)
            yield chunk(index, {}, finish=choice.finish_reason)
        if usage is not None:
            yield Piece(sse({**stamp, "choices": [], "usage": chat_usage(usage)}), 1.0, usage=True)
        yield Piece(b"data: [DONE]\n\n", 1.0)


class Completions:
    """POST /v1/completions."""

    def body(self, reply: Reply, usage: Usage | None) -> dict[str, Any]:
        choices = [
            {"index": index, "text": choice.text or "", "logprobs": None, "finish_reason": choice.finish_reason}
            for index, choice in enumerate(reply.choices)
        ]
        body = {**_stamp(reply, "text_completion"), "choices": choices}
        return body if usage is None else {**body, "usage": chat_usage(usage)}

    def stream(self, reply: Reply, usage: Usage | None, chunks: int) -> Iterator[Piece]:
        stamp = _stamp(reply, "text_completion")
        progress = _Progress(reply)
        for index, choice in enumerate(reply.choices):
            parts = split(choice.text or "", chunks)
            for number, text in enumerate(parts or [""]):
                finish = choice.finish_reason if number >= len(parts) - 1 else None
                entry = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
                yield Piece(sse({**stamp, "choices": [entry]}), progress.after(text), delta=bool(text))
        if usage is not None:
            yield Piece(sse({**stamp, "choices": [], "usage": chat_usage(usage)}), 1.0, usage=True)
        yield Piece(b"data: [DONE]\n\n", 1.0)


class Responses:
    """POST /v1/responses."""

    def body(self, reply: Reply, usage: Usage | None) -> dict[str, Any]:
        cut = any(choice.finish_reason == "length" for choice in reply.choices)
        output = [item for choice in reply.choices for item in self._items(reply, choice)]
        body = self._response(reply, "incomplete" if cut else "completed", output, usage)
        return {**body, "incomplete_details": {"reason": "max_output_tokens"}} if cut else body

    def stream(self, reply: Reply, usage: Usage | None, chunks: int) -> Iterator[Piece]:
        progress = _Progress(reply)
        number = 0

        def event(kind: str, text: str = "", *, tells: bool = False, **fields: Any) -> Piece:
            nonlocal number
            data = {"type": kind, "sequence_number": number, **fields}
            number += 1
            share = 1.0 if tells else progress.after(text)
            return Piece(sse(data, kind), share, delta=bool(text), usage=tells and usage is not None)

        yield event("response.created", response=self._response(reply, "in_progress", [], None))
        whole = self.body(reply, usage)
        for index, item in enumerate(whole["output"]):
            where = {"output_index": index, "item_id": item["id"]}
            if item["type"] == "function_call":
                started = {**item, "arguments": "", "status": "in_progress"}
                yield event("response.output_item.added", item["name"], output_index=index, item=started)
                for text in split(item["arguments"], chunks):
                    yield event("response.function_call_arguments.delta", text, delta=text, **where)
                yield event("response.function_call_arguments.done", arguments=item["arguments"], **where)
            else:
                part = item["content"][0]
                text_at = {**where, "content_index": 0}
                started = {**item, "content": [], "status": "in_progress"}
                yield event("response.output_item.added", output_index=index, item=started)
                yield event("response.content_part.added", part={**part, "text": ""}, **text_at)
                for text in split(part["text"], chunks):
                    yield event("response.output_text.delta", text, delta=text, logprobs=[], **text_at)
                yield event("response.output_text.done", text=part["text"], logprobs=[], **text_at)
                yield event("response.content_part.done", part=part, **text_at)
            yield event("response.output_item.done", output_index=index, item=item)
        yield event(f"response.{whole['status']}", tells=True, response=whole)

    def _items(self, reply: Reply, choice: Choice) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        if choice.text is not None:
            part = {"type": "output_text", "text": choice.text, "annotations": [], "logprobs": []}
            identity = {"id": f"msg_{reply.call.call_id}", "type": "message", "role": "assistant"}
            items.append({**identity, "status": "completed", "content": [part]})
        for c in choice.tool_calls:
            item = {"id": f"fc_{c.id}", "type": "function_call", "call_id": c.id, "name": c.name}
            items.append({**item, "arguments": c.arguments, "status": "completed"})
        return items

    def _response(self, reply: Reply, status: str, output: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        told = None
        if usage is not None:
            told = {
                "input_tokens": usage.input_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.output_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.input_tokens + usage.output_tokens,
            }
        return {
            "id": reply.call.call_id,
            "object": "response",
            "created_at": reply.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": reply.call.body.get("instructions"),
            "model": reply.call.model,
            "output": output,
            "parallel_tool_calls": True,
            "temperature": reply.call.body.get("temperature"),
            "tool_choice": reply.call.body.get("tool_choice") or "auto",
            "tools": reply.call.body.get("tools") or [],
            "top_p": reply.call.body.get("top_p"),
            "usage": told,
        }


STREAMED: Final[Mapping[Api, StreamingDialect]] = {
    "chat": Chat(),
    "completions": Completions(),
    "responses": Responses(),
}
DIALECTS: Final[Mapping[Api, Dialect]] = {**STREAMED, "embeddings": Embeddings()}
ID_PREFIXES: dict[Api, str] = {"chat": "chatcmpl", "completions": "cmpl", "responses": "resp", "embeddings": "embd"}
