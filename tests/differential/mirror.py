"""A provider that writes down what arrives, and answers in the dialect of the path that was asked."""

from __future__ import annotations

import json
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

TEXT = "[[ ## answer ## ]]\nblue\n\n[[ ## completed ## ]]"
"""What every answer says: an answer that DSPy's ChatAdapter can read, too."""

INPUT, OUTPUT = 11, 7
"""Tokens that every answer tells."""

_NOISE = frozenset(
    {
        "accept", "accept-encoding", "amz-sdk-invocation-id", "amz-sdk-request", "connection", "content-length", "date",
        "host", "transfer-encoding", "user-agent", "x-amz-content-sha256", "x-amz-date",
    }
)  # fmt: skip


class Arrived(NamedTuple):
    """One request, without what differs from one connection to the next."""

    method: str
    target: str
    headers: dict[str, str]
    body: Any


class Mirror:
    """Listens on loopback until `stop`.

    Attributes:
        url: where.
        arrived: the requests since the last `take`.
    """

    def __init__(self) -> None:
        self.arrived: list[Arrived] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def take(self) -> list[Arrived]:
        """The requests that arrived since the last time."""
        found, self.arrived = self.arrived, []
        return found

    def stop(self) -> None:
        """Close it."""
        self._server.shutdown()
        self._server.server_close()


def _handler(mirror: Mirror) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._answer("application/json", b"{}")

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
            try:
                body = json.loads(data)
            except ValueError:
                body = data.decode("latin-1")
            if not self.path.endswith("/api/show"):  # LiteLLM's question about a model, when its memory of it is gone
                mirror.arrived.append(Arrived(self.command, self.path, _telling(self.headers), body))
            self._answer(*reply(self.path, body))

        def _answer(self, kind: str, data: bytes) -> None:
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def _telling(headers: Any) -> dict[str, str]:
    found = {name.lower(): value for name, value in headers.items()}
    if found.get("authorization", "").startswith("AWS4-HMAC-SHA256"):
        found["authorization"] = found["authorization"].partition("/")[0]  # the rest is dated
    return {
        name: value
        for name, value in sorted(found.items())
        if name not in _NOISE and not name.startswith(("x-stainless", "traceparent"))
    }


def reply(path: str, body: Any) -> tuple[str, bytes]:
    """(content type, body) of the answer."""
    path, _, _ = path.partition("?")
    body = body if isinstance(body, dict) else {}
    streamed = body.get("stream") is True
    if path.endswith("/chat/completions"):
        return _sse(_chat_chunks(body)) if streamed else _json(_chat(body))
    if path.endswith("/completions"):
        return _json(_completion(body)) if not streamed else _sse(_completion_chunks(body))
    if path.endswith("/responses"):
        return _sse(_responses_events(body), named=True) if streamed else _json(_responses(body))
    if path.endswith("/messages"):
        return _sse(_anthropic_events(body), named=True, done=False) if streamed else _json(_anthropic(body))
    if path.endswith(":generateContent"):
        return _json(_gemini())
    if path.endswith(":streamGenerateContent"):
        return _sse([_gemini()], done=False)
    if path.endswith("/converse"):
        return _json(_bedrock())
    if path.endswith("/converse-stream"):
        return "application/vnd.amazon.eventstream", b"".join(_bedrock_events())
    if path.endswith(("/api/chat", "/api/generate")):
        return _ollama(path, streamed or body.get("stream") is None)
    if path.endswith("/api/show"):
        return _json({"model_info": {}, "template": "", "capabilities": ["completion", "tools"]})
    return _json({"error": {"message": f"nothing at {path}"}})


def _json(data: Any) -> tuple[str, bytes]:
    return "application/json", json.dumps(data).encode()


def _sse(events: Any, named: bool = False, done: bool = True) -> tuple[str, bytes]:
    lines = [(f"event: {each['type']}\n" if named else "") + f"data: {json.dumps(each)}\n\n" for each in events]
    return "text/event-stream", ("".join(lines) + ("data: [DONE]\n\n" if done and not named else "")).encode()


_USAGE = {"prompt_tokens": INPUT, "completion_tokens": OUTPUT, "total_tokens": INPUT + OUTPUT}


def _count(body: dict[str, Any]) -> int:
    count = body.get("n") or 1
    return count if isinstance(count, int) else 1


def _chat(body: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": TEXT}
    choices = [{"index": i, "message": message, "finish_reason": "stop"} for i in range(_count(body))]
    return {
        "id": "c1", "object": "chat.completion", "created": 1, "model": body.get("model"), "choices": choices,
        "usage": _USAGE,
    }  # fmt: skip


def _chat_chunks(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    stamp = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": body.get("model")}
    for part in (TEXT[:9], TEXT[9:]):
        delta = {"role": "assistant", "content": part}
        yield {**stamp, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**stamp, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    yield {**stamp, "choices": [], "usage": _USAGE}


def _completion(body: dict[str, Any]) -> dict[str, Any]:
    choices = [{"index": i, "text": TEXT, "finish_reason": "stop", "logprobs": None} for i in range(_count(body))]
    return {
        "id": "t1", "object": "text_completion", "created": 1, "model": body.get("model"), "choices": choices,
        "usage": _USAGE,
    }  # fmt: skip


def _completion_chunks(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {**_completion({**body, "n": 1})}


def _responses(body: dict[str, Any], status: str = "completed") -> dict[str, Any]:
    content = [{"type": "output_text", "text": TEXT, "annotations": []}]
    message = {"type": "message", "id": "m1", "role": "assistant", "status": "completed", "content": content}
    return {
        "id": "r1", "object": "response", "created_at": 1, "status": status, "model": body.get("model"),
        "output": [message] if status == "completed" else [], "parallel_tool_calls": True, "tool_choice": "auto",
        "tools": [], "error": None, "incomplete_details": None, "instructions": None, "metadata": {},
        "temperature": 1.0, "top_p": 1.0,
        "usage": {
            "input_tokens": INPUT, "output_tokens": OUTPUT, "total_tokens": INPUT + OUTPUT,
            "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0},
        },
    }  # fmt: skip


def _responses_events(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    full = _responses(body)
    item = full["output"][0]
    at = {"output_index": 0, "content_index": 0, "item_id": "m1"}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": _responses(body, "in_progress")},
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}},
        {"type": "response.content_part.added", **at, "part": {"type": "output_text", "text": "", "annotations": []}},
        {"type": "response.output_text.delta", **at, "delta": TEXT[:9]},
        {"type": "response.output_text.delta", **at, "delta": TEXT[9:]},
        {"type": "response.output_text.done", **at, "text": TEXT},
        {"type": "response.content_part.done", **at, "part": item["content"][0]},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": full},
    ]
    for number, event in enumerate(events):
        yield {**event, "sequence_number": number}


def _anthropic(body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "a1", "type": "message", "role": "assistant", "model": body.get("model"),
        "content": [{"type": "text", "text": TEXT}], "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {"input_tokens": INPUT, "output_tokens": OUTPUT},
    }  # fmt: skip


def _anthropic_events(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    usage = {"input_tokens": INPUT, "output_tokens": 1}
    yield {"type": "message_start", "message": {**_anthropic(body), "content": [], "stop_reason": None, "usage": usage}}
    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    for part in (TEXT[:9], TEXT[9:]):
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": part}}
    yield {"type": "content_block_stop", "index": 0}
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    yield {"type": "message_delta", "delta": end, "usage": {"input_tokens": INPUT, "output_tokens": OUTPUT}}
    yield {"type": "message_stop"}


def _gemini() -> dict[str, Any]:
    candidate = {"content": {"role": "model", "parts": [{"text": TEXT}]}, "finishReason": "STOP", "index": 0}
    usage = {"promptTokenCount": INPUT, "candidatesTokenCount": OUTPUT, "totalTokenCount": INPUT + OUTPUT}
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "gemini", "responseId": "g1"}


_BEDROCK_USAGE = {"inputTokens": INPUT, "outputTokens": OUTPUT, "totalTokens": INPUT + OUTPUT}


def _bedrock() -> dict[str, Any]:
    message = {"role": "assistant", "content": [{"text": TEXT}]}
    return {
        "output": {"message": message}, "stopReason": "end_turn", "usage": _BEDROCK_USAGE, "metrics": {"latencyMs": 1},
    }  # fmt: skip


def _bedrock_events() -> Iterator[bytes]:
    events: list[tuple[str, dict[str, Any]]] = [
        ("messageStart", {"role": "assistant"}),
        ("contentBlockDelta", {"delta": {"text": TEXT[:9]}, "contentBlockIndex": 0}),
        ("contentBlockDelta", {"delta": {"text": TEXT[9:]}, "contentBlockIndex": 0}),
        ("contentBlockStop", {"contentBlockIndex": 0}),
        ("messageStop", {"stopReason": "end_turn"}),
        ("metadata", {"usage": _BEDROCK_USAGE, "metrics": {"latencyMs": 1}}),
    ]
    for name, payload in events:
        yield _frame(name, json.dumps(payload).encode())


def _frame(kind: str, payload: bytes) -> bytes:
    """One event of Amazon's binary event stream."""
    head = b""
    for name, value in ((":event-type", kind), (":content-type", "application/json"), (":message-type", "event")):
        head += struct.pack("!B", len(name)) + name.encode() + b"\x07" + struct.pack("!H", len(value)) + value.encode()
    prelude = struct.pack("!II", 16 + len(head) + len(payload), len(head))
    message = prelude + struct.pack("!I", zlib.crc32(prelude)) + head + payload
    return message + struct.pack("!I", zlib.crc32(message))


def _ollama(path: str, streamed: bool) -> tuple[str, bytes]:
    def said(text: str, **more: Any) -> dict[str, Any]:
        part = {"message": {"role": "assistant", "content": text}} if path.endswith("chat") else {"response": text}
        return {"model": "llama3", "created_at": "2026-01-01T00:00:00Z", **part, "done": bool(more), **more}

    end = {"done_reason": "stop", "prompt_eval_count": INPUT, "eval_count": OUTPUT}
    if not streamed:
        return _json(said(TEXT, **end))
    lines = [said(TEXT[:9]), said(TEXT[9:]), said("", **end)]
    return "application/x-ndjson", "".join(json.dumps(line) + "\n" for line in lines).encode()
