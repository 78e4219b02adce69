"""What a provider told of its usage arrives exactly through LiteLLM; what it did not tell arrives as unknown."""

from __future__ import annotations

import asyncio
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import pytest
from dspy.lm15 import StreamEndEvent, Usage

from dspy_prod.pipeline.upstream.litellm_engines import AsyncExtendedLiteLLMEngine, ExtendedLiteLLMEngine
from dspy_prod.pipeline.upstream.litellm_usage import told_end
from dspy_prod.testing.server import LoopbackServer
from dspy_prod.testing.wire import Connection, HttpRequest, head
from tests.e2e.support import request

Way = Literal["sync", "async"]
WAYS: list[Way] = ["sync", "async"]
Counts = tuple[int | None, int | None]
UNKNOWN: Counts = (None, None)


class Script(NamedTuple):
    """What a provider answers: the bytes of one response."""

    model: str
    content_type: str
    body: bytes


Answer = Callable[[Script], str]


@pytest.fixture
def answer() -> Iterator[Answer]:
    """Answer every request with a script; the base URL of the server that does."""
    servers: list[LoopbackServer] = []

    def start(script: Script) -> str:
        async def serve(connection: Connection, _: HttpRequest) -> None:
            headers = {"content-type": script.content_type}
            connection.write(head(200, headers, length=len(script.body)) + script.body)
            await connection.drain()

        servers.append(LoopbackServer(serve))
        return f"http://127.0.0.1:{servers[-1].port}"

    yield start
    for server in servers:
        server.stop()


def options(url: str, script: Script) -> dict[str, Any]:
    """Arguments by which LiteLLM sends a request to the server and signs it."""
    if script.model.startswith("bedrock/"):
        secrets = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        return {"aws_bedrock_runtime_endpoint": url, "aws_region_name": "eu-central-1", **secrets}
    return {"api_base": url, "api_key": "test"}


def streamed(way: Way, url: str, script: Script) -> Counts:
    """(input, output) tokens at the end of a stream."""
    asked = request(model=script.model)
    extras = options(url, script)

    async def in_task() -> list[Any]:
        engine = AsyncExtendedLiteLLMEngine().extended(extras)
        return [event async for event in engine.stream(asked)]

    events = list(ExtendedLiteLLMEngine().extended(extras).stream(asked)) if way == "sync" else asyncio.run(in_task())
    assert events[-1].type == "end"
    return events[-1].usage.input_tokens, events[-1].usage.output_tokens


def whole(way: Way, url: str, script: Script) -> Counts:
    """(input, output) tokens of a whole answer."""
    asked = request(model=script.model)
    extras = options(url, script)
    if way == "sync":
        response = ExtendedLiteLLMEngine().extended(extras).complete(asked)
    else:
        response = asyncio.run(AsyncExtendedLiteLLMEngine().extended(extras).complete(asked))
    return response.usage.input_tokens, response.usage.output_tokens


# -- OpenAI's dialect ------------------------------------------------------------------------------------------------
TOOL_CALL = {"index": 0, "id": "call", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def usage(inputs: int, outputs: int) -> dict[str, int]:
    return {"prompt_tokens": inputs, "completion_tokens": outputs, "total_tokens": inputs + outputs}


def piece(delta: dict[str, Any] | None, counts: dict[str, int] | None = None, finish: str | None = None) -> Any:
    """A chunk; without a delta it has no choices."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    chunk = {"id": "chat", "object": "chat.completion.chunk", "created": 1, "model": "any", "choices": choices}
    return chunk if counts is None else {**chunk, "usage": counts}


def text(content: str, counts: dict[str, int] | None = None, finish: str | None = None) -> Any:
    return piece({"content": content}, counts, finish)


def end(counts: dict[str, int] | None = None) -> Any:
    return piece({}, counts, "stop")


def openai(*chunks: Any) -> Script:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
    return Script("openai/any", "text/event-stream", "".join(lines).encode())


OPENAI: dict[str, tuple[Script, Counts]] = {
    "after-the-end": (openai(text("one"), text(" two"), end(), piece(None, usage(11, 7))), (11, 7)),
    "with-the-end": (openai(text("one"), text(" two"), end(usage(11, 7))), (11, 7)),
    "with-the-last-text": (openai(text("one"), text(" two", usage(11, 7)), end()), (11, 7)),
    "with-the-last-text-that-ends": (openai(text("one"), text(" two", usage(11, 7), "stop")), (11, 7)),
    "running": (openai(text("one", usage(11, 1)), text(" two", usage(11, 7)), end(usage(11, 7))), (11, 7)),
    "zeros-until-the-end": (openai(text("one", usage(0, 0)), text(" two", usage(0, 0)), end(usage(11, 7))), (11, 7)),
    "one-token": (openai(text("one"), end(), piece(None, usage(1, 1))), (1, 1)),
    "tool-call": (openai(piece({"tool_calls": [TOOL_CALL]}), end(), piece(None, usage(11, 7))), (11, 7)),
    "reasoning": (openai(piece({"reasoning_content": "hm"}), text("one"), end(usage(11, 7))), (11, 7)),
    "empty-answer": (openai(text(""), end(), piece(None, usage(11, 0))), (11, 0)),
    "none": (openai(text("one"), text(" two"), end()), UNKNOWN),
    "none-of-a-tool-call": (openai(piece({"tool_calls": [TOOL_CALL]}), end()), UNKNOWN),
    "none-of-an-empty-answer": (openai(text(""), end()), UNKNOWN),
    "zeros": (openai(text("one"), end(), piece(None, usage(0, 0))), UNKNOWN),
    "input-only": (openai(text("one"), end(), piece(None, {"prompt_tokens": 11})), UNKNOWN),
    "output-only": (openai(text("one"), end(), piece(None, {"completion_tokens": 7})), UNKNOWN),
    "before-the-end-of-the-text": (openai(text("one", usage(11, 1)), text(" two"), end()), UNKNOWN),
    "before-more-reasoning": (openai(text("one", usage(11, 1)), piece({"reasoning_content": "hm"}), end()), UNKNOWN),
    "before-reasoning-by-its-other-name": (
        openai(text("one", usage(11, 1)), piece({"reasoning": "hm"}), end()),
        UNKNOWN,
    ),
    "before-a-tool-call": (openai(text("one", usage(11, 1)), piece({"tool_calls": [TOOL_CALL]}), end()), UNKNOWN),
}


# -- other dialects, which LiteLLM reads with an iterator of each provider ---------------------------------------------
def anthropic(
    told_at_start: dict[str, int] | None, told_at_end: dict[str, int] | None, stop: str | None = "end_turn"
) -> Script:
    def told(counts: dict[str, int] | None) -> dict[str, Any]:
        return {} if counts is None else {"usage": counts}

    message = {"id": "m", "type": "message", "role": "assistant", "model": "any", "content": [], "stop_reason": None}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**message, **told(told_at_start)}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "one"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " two"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": stop}, **told(told_at_end)},
        {"type": "message_stop"},
    ]
    lines = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]
    return Script("anthropic/claude-3-haiku-20240307", "text/event-stream", "".join(lines).encode())


def gemini(*counts: dict[str, int] | None) -> Script:
    lines = []
    for number, each in enumerate(counts, 1):
        candidate: dict[str, Any] = {"index": 0, "content": {"role": "model", "parts": [{"text": "one "}]}}
        if number == len(counts):
            candidate["finishReason"] = "STOP"
        chunk = {"candidates": [candidate], **({} if each is None else {"usageMetadata": each})}
        lines.append(f"data: {json.dumps(chunk)}\r\n\r\n")
    return Script("gemini/gemini-2.0-flash", "text/event-stream", "".join(lines).encode())


def google(inputs: int, outputs: int) -> dict[str, int]:
    return {"promptTokenCount": inputs, "candidatesTokenCount": outputs, "totalTokenCount": inputs + outputs}


def ollama(model: str, counts: dict[str, int]) -> Script:
    def line(text: str, **more: Any) -> str:
        content = {"message": {"role": "assistant", "content": text}} if "chat" in model else {"response": text}
        return json.dumps({"model": "any", "created_at": "2026-01-01T00:00:00Z", **content, "done": False, **more})

    lines = [line("one"), line(" two"), line("", done=True, done_reason="stop", **counts)]
    return Script(model, "application/x-ndjson", "".join(f"{each}\n" for each in lines).encode())


def bedrock(counts: dict[str, int] | None) -> Script:
    events: list[tuple[str, dict[str, Any]]] = [
        ("messageStart", {"role": "assistant"}),
        ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "one two"}}),
        ("contentBlockStop", {"contentBlockIndex": 0}),
        ("messageStop", {"stopReason": "end_turn"}),
    ]
    if counts is not None:
        events.append(("metadata", {"usage": counts, "metrics": {"latencyMs": 1}}))
    body = b"".join(framed(kind, json.dumps(event).encode()) for kind, event in events)
    return Script("bedrock/anthropic.claude-3-haiku-20240307-v1:0", "application/vnd.amazon.eventstream", body)


def framed(kind: str, payload: bytes) -> bytes:
    """A message of an AWS event stream: lengths, headers, payload, and a checksum of each half."""
    told = {":event-type": kind, ":content-type": "application/json", ":message-type": "event"}
    headers = b"".join(
        bytes([len(name)]) + name.encode() + b"\x07" + struct.pack(">H", len(value)) + value.encode()
        for name, value in told.items()
    )
    prelude = struct.pack(">II", 16 + len(headers) + len(payload), len(headers))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + headers + payload
    return message + struct.pack(">I", zlib.crc32(message))


AT_START = {"input_tokens": 11, "output_tokens": 1}
OTHERS: dict[str, tuple[Script, Counts]] = {
    "anthropic": (anthropic(AT_START, {"output_tokens": 7}), (11, 7)),
    "anthropic-cached": (
        anthropic(
            {**AT_START, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 50}, {"output_tokens": 7}
        ),
        (161, 7),
    ),
    "anthropic-all-at-the-end": (anthropic(None, {"input_tokens": 11, "output_tokens": 7}), (11, 7)),
    "anthropic-one-token": (anthropic(AT_START, {"output_tokens": 1}), (11, 1)),
    "anthropic-start-only": (anthropic(AT_START, None), UNKNOWN),
    "anthropic-none": (anthropic(None, None), UNKNOWN),
    "gemini": (gemini(google(11, 1), google(11, 7)), (11, 7)),
    "gemini-at-the-end": (gemini(None, None, google(11, 7)), (11, 7)),
    "gemini-none": (gemini(None, None), UNKNOWN),
    "ollama": (ollama("ollama/any", {"prompt_eval_count": 11, "eval_count": 7}), (11, 7)),
    "ollama-none": (ollama("ollama/any", {}), UNKNOWN),
    "ollama-chat": (ollama("ollama_chat/any", {"prompt_eval_count": 11, "eval_count": 7}), (11, 7)),
    "ollama-chat-none": (ollama("ollama_chat/any", {}), UNKNOWN),
    "bedrock": (bedrock({"inputTokens": 11, "outputTokens": 7, "totalTokens": 18}), (11, 7)),
    "bedrock-none": (bedrock(None), UNKNOWN),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("script", "counts"), OPENAI.values(), ids=OPENAI)
def test_the_usage_of_an_openai_stream(answer: Answer, script: Script, counts: Counts, way: Way) -> None:
    """Wherever an OpenAI-compatible provider tells it, and only if it tells both counts of the whole answer."""
    assert streamed(way, f"{answer(script)}/v1", script) == counts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("script", "counts"), OTHERS.values(), ids=OTHERS)
def test_the_usage_of_another_providers_stream(answer: Answer, script: Script, counts: Counts, way: Way) -> None:
    """The same in dialects that LiteLLM translates."""
    assert streamed(way, answer(script), script) == counts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("content", "told", "counts"),
    [
        ("one", usage(11, 7), (11, 7)),
        ("", usage(11, 0), (11, 0)),
        ("one", None, UNKNOWN),
        ("one", {"prompt_tokens": 11}, UNKNOWN),
        ("one", {"completion_tokens": 7}, UNKNOWN),
    ],
    ids=["told", "empty-answer", "none", "input-only", "output-only"],
)
def test_the_usage_of_a_whole_answer(
    answer: Answer, content: str, told: dict[str, int] | None, counts: Counts, way: Way
) -> None:
    """A count that the provider left out is a zero to LiteLLM, and unknown to us."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    body = {"id": "chat", "object": "chat.completion", "created": 1, "model": "any", "choices": [choice]}
    if told is not None:
        body["usage"] = told
    script = Script("openai/any", "application/json", json.dumps(body).encode())
    assert whole(way, f"{answer(script)}/v1", script) == counts


@pytest.mark.parametrize("way", WAYS)
def test_no_usage_is_believed_of_a_provider_that_tells_none(answer: Answer, way: Way) -> None:
    """LiteLLM counts the tokens of such a provider's whole answers too."""
    script = Script("petals/any", "application/json", json.dumps({"outputs": "one two"}).encode())
    assert whole(way, answer(script), script) == UNKNOWN


def test_no_usage_is_believed_of_a_stream_that_does_not_show_its_chunks() -> None:
    """Another version of LiteLLM may not keep them: then every stream is an estimate rather than perhaps too cheap."""
    stated = StreamEndEvent(finish_reason="stop", usage=Usage(input_tokens=11, output_tokens=7))
    assert told_end(stated, object()).usage == Usage()
