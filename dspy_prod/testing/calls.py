"""What the provider saw of each call, and how many calls fell into any sliding window."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Api = Literal["chat", "responses", "completions", "embeddings"]


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or the text parts of a list of parts joined by newlines."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = (p if isinstance(p, str) else p.get("text") or p.get("refusal") or "" for p in content)
        return "\n".join(str(part) for part in parts if part)
    return "" if content is None else str(content)


def parse_object(body: bytes | bytearray) -> dict[str, Any] | None:
    """A request body that is a JSON object, or None."""
    try:
        data = json.loads(body)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


@dataclass(slots=True, eq=False)
class CallView:
    """The request as it arrived; what `answer`, `usage`, `latency` and `faults` callables are given.

    Example:
        ```python
        provider = testing.Provider(answer=lambda call: f"{call.model} was asked: {call.last_message}")
        ```
    """

    index: int
    """Number of the call, from 0, in order of arrival."""
    call_id: str
    """The `id` of its answer and of its bill row."""
    api: Api
    path: str
    model: str
    headers: dict[str, str] = field(repr=False)
    """Request headers, names in lower case."""
    body: dict[str, Any] = field(repr=False)
    stream: bool
    received_at: float
    """When the request had fully arrived, in seconds of `time.monotonic()`."""
    in_flight: int
    """Calls in flight at that moment, this one included."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as role and content, whichever endpoint was called; of embeddings, a message a text."""
        if self.api == "chat":
            return [m for m in self.body.get("messages") or [] if isinstance(m, dict)]
        if self.api == "completions":
            return [{"role": "user", "content": text_of(self.body.get("prompt"))}]
        if self.api == "embeddings":
            given = self.body.get("input")
            texts = [given] if isinstance(given, str) else given or []
            return [{"role": "user", "content": text_of(text)} for text in texts]
        messages: list[dict[str, Any]] = []
        if self.body.get("instructions"):
            messages.append({"role": "system", "content": self.body["instructions"]})
        given = self.body.get("input")
        for item in [given] if isinstance(given, str) else given or []:
            if isinstance(item, str):
                messages.append({"role": "user", "content": item})
            elif item.get("type") == "function_call_output":
                messages.append({"role": "tool", "content": item.get("output")})
            elif item.get("type", "message") == "message":
                messages.append(item)
        return messages

    @property
    def prompt(self) -> str:
        """All message texts, joined by newlines."""
        return "\n".join(text_of(message.get("content")) for message in self.messages)

    @property
    def last_message(self) -> str:
        """The text of the last message."""
        messages = self.messages
        return text_of(messages[-1].get("content")) if messages else ""

    @property
    def n(self) -> int:
        """How many choices are asked for."""
        n = self.body.get("n") if self.api != "responses" else 1
        return n if isinstance(n, int) and n > 0 else 1

    @property
    def max_tokens(self) -> int | None:
        """The most output tokens one choice may have, or None."""
        for name in ("max_completion_tokens", "max_output_tokens", "max_tokens"):
            if isinstance(self.body.get(name), int):
                return int(self.body[name])
        return None

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The offered functions, each with `name` and `parameters`."""
        tools = [tool for tool in self.body.get("tools") or [] if tool.get("type") == "function"]
        return [tool.get("function", tool) for tool in tools]

    @property
    def response_format(self) -> dict[str, Any]:
        """`{"type": "text" | "json_object" | "json_schema", "schema": ... or None}`."""
        if self.api == "responses":
            given = (self.body.get("text") or {}).get("format") or {}
        else:
            given = self.body.get("response_format") or {}
        schema = given.get("schema") or (given.get("json_schema") or {}).get("schema")
        return {"type": given.get("type", "text"), "schema": schema}

    @property
    def include_usage(self) -> bool:
        """Whether a stream's client asked for usage (on the Responses API it always gets it)."""
        return self.api == "responses" or bool((self.body.get("stream_options") or {}).get("include_usage"))

    @property
    def input_chars(self) -> int:
        """Characters of everything a model would read: messages, tool calls in them, tools and schema."""
        total = 0
        for message in self.messages:
            total += len(text_of(message.get("content")))
            if message.get("tool_calls"):
                total += len(json.dumps(message["tool_calls"]))
        for name in ("tools", "response_format", "text"):
            if self.body.get(name):
                total += len(json.dumps(self.body[name]))
        return total


@dataclass(slots=True, eq=False)
class Call(CallView):
    """A call and what became of it. The provider goes on filling it in until `finished_at` is set.

    Example:
        ```python
        with testing.Provider() as provider:
            dspy_prod.LM("openai/gpt-4o-mini", api_base=provider.url, api_key="test", store="memory://")("hello")
            assert provider.calls[0].status == 200
        ```
    """

    status: int | None = None
    """The HTTP status sent, or None while there is none."""
    fault: str | None = None
    """The fault it met, e.g. "Status(503)" or "Hang"."""
    accepted: bool = False
    """Whether the provider took it on: neither refused with an HTTP error nor rate limited."""
    aborted: bool = False
    """Whether the client left before the whole answer was sent."""
    sent_at: float | None = None
    """When the first byte of the answer was sent (monotonic seconds)."""
    finished_at: float | None = None
    """When its last byte was sent, or the client's leaving noticed (monotonic seconds)."""
    input_tokens: int = 0
    """Tokens the provider counts for it, whether billed or not; 0 if it was refused before counting."""
    output_tokens: int = 0
    error: str | None = None
    """What a callable of the test (`answer`, `usage`…) raised; the client got a 500."""

    def weight(self, weights: Literal["billed", "bound"]) -> int:
        """Tokens of this call: "billed" is input + output, "bound" is input + n * max_tokens where that is larger."""
        if weights == "bound" and self.max_tokens is not None:
            return self.input_tokens + max(self.output_tokens, self.n * self.max_tokens)
        return self.input_tokens + self.output_tokens

    def as_dict(self) -> dict[str, Any]:
        """The call as JSON-ready data, as served under `GET /_calls`; the authorization header is masked."""
        names = [*CallView.__slots__, *Call.__slots__]
        data = {name: getattr(self, name) for name in names}
        data["headers"] = {k: "***" if k in ("authorization", "api-key") else v for k, v in self.headers.items()}
        return data


def busiest_window(events: Iterable[tuple[float, int]], seconds: float) -> int:
    """The largest sum of weights in any window `[t, t + seconds)`, for events of (time in seconds, weight)."""
    ordered = sorted(events)
    start = total = best = 0
    for at, weight in ordered:
        total += weight
        while ordered[start][0] <= at - seconds:
            total -= ordered[start][1]
            start += 1
        best = max(best, total)
    return best
