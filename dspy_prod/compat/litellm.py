"""LiteLLM, and DSPy's engines on it, with a say in what is sent and what is made of the answer."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from math import inf
from typing import Any, Final

from dspy.clients.engines.lifecycle import aclosing_stream, closing_stream
from dspy.clients.engines.litellm_engine import AsyncLiteLLMEngine, LiteLLMEngine
from dspy.clients.engines.litellm_errors import litellm_errors
from dspy.lm15 import Request, Response, StreamEndEvent, response_to_events

from dspy_prod.compat.foreign import names
from dspy_prod.compat.httpx import staying
from dspy_prod.compat.lm15 import StreamEvent, read_chat, read_or_billed

[get_litellm] = names("dspy.clients._litellm", "get_litellm")
_ChatStream: Any
[_ChatStream, *_] = names(
    "dspy.clients.engines.litellm_engine", "_ChatStream", "LiteLLMEngine._arguments", "LiteLLMEngine._response"
)
[plain] = names("dspy.clients.legacy_outputs", "plain")


def answered_by(raw: Any) -> str | None:
    """LiteLLM's name of the provider behind one of its answers."""
    hidden = getattr(raw, "_hidden_params", None) or {}
    provider: str | None = hidden.get("custom_llm_provider")
    return provider


def chunks_of(stream: Any) -> Iterable[Any]:
    """What the provider has sent of a stream of LiteLLM's; nothing where it is not kept."""
    return getattr(stream, "chunks", None) or ()


def reason_told(stream: Any) -> str | None:
    """Why the provider said that a stream of LiteLLM's ended; "" when it did not; None when that is not known."""
    if not hasattr(stream, "received_finish_reason"):
        return None
    return str(stream.received_finish_reason or getattr(stream, "intermittent_finish_reason", None) or "").lower()


# -- reading answers -------------------------------------------------------------------------------------------------
_EVENTFUL: Final = frozenset({"role", "content", "reasoning_content", "reasoning", "tool_calls"})
_CITED: Final = ("cited_text", "text", "supported_text", "document_title", "title", "url")


class _Stream(_ChatStream):
    """DSPy's reader of chunks. That one refuses what it has no event for, such as Anthropic's blocks of thought.

    Their text comes beside them. Of a whole answer such things stay in `provider_data`, and so they do here.
    """

    def feed(self, chunk: Any) -> Iterator[StreamEvent]:
        eventful = _eventful(chunk)
        yield from super().feed(eventful)
        if eventful is not chunk:
            self.chunks[-1] = chunk  # of which the whole answer is made in the end


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


# -- engines ---------------------------------------------------------------------------------------------------------
class Ear:
    """Hears an answer as it arrived, before LiteLLM makes anything of it: what its argument `logger_fn` is told.

    Attributes:
        text: the body of the answer.
    """

    __slots__ = ("text",)

    def __init__(self) -> None:
        self.text: str | None = None

    def __call__(self, details: dict[str, Any]) -> None:
        if (
            self.text is None and details.get("log_event_type") == "post_api_call"
        ):  # its errors are told after the answer
            text = details.get("original_response")
            self.text = text if isinstance(text, str) else None

    def take(self) -> str:
        """What was heard; LiteLLM keeps its listener until the next call, which must not keep the answer."""
        text, self.text = self.text, None
        return text or ""


class _Hooked:
    model_type: str
    until: float = inf
    """When nobody waits for the answer any more (monotonic)."""
    ear: Ear | None = None
    sent: Callable[[dict[str, Any], Request], dict[str, Any]]
    """Gives the arguments LiteLLM is called with, from those DSPy has made of a request."""
    received: Callable[[Response, Any, str], Response]
    """Gives the canonical answer, from DSPy's, LiteLLM's, and its text as it arrived, empty where nobody heard it."""
    ended: Callable[[StreamEndEvent, Any], StreamEndEvent]
    """Gives the last event of a stream, from DSPy's and LiteLLM's stream after its end."""

    ordinary: Callable[[Request], dict[str, Any] | None]
    """Gives the arguments of an ordinary call, None for a typed request, whose arguments DSPy makes."""

    def _arguments(self, request: Request, *, streaming: bool = False) -> dict[str, Any]:
        data = self.ordinary(request)
        if data is None:
            data = self.sent(super()._arguments(request, streaming=streaming), request)  # type: ignore[misc]
        elif streaming:
            data = {**data, "stream": True, "stream_options": {"include_usage": True}}
        if not streaming and self.model_type == "chat" and "logger_fn" not in data:
            data["logger_fn"] = self.ear = Ear()
        return data

    def _response(self, raw: Any, request: Request) -> Response:
        text = "" if self.ear is None else self.ear.take()
        inherited: Callable[[Any, Request], Response] = super()._response  # type: ignore[misc]
        return read_or_billed(
            lambda answer: self.received(inherited(answer, request), raw, text), raw, lambda: plain(raw)
        )

    def _read_as_native(self, request: Request, failure: Exception) -> Response:
        """The answer of which LiteLLM could make nothing, as the native engine reads it: what came, and its usage.

        Raises:
            Exception: what the native engine says of it; or `failure`, LiteLLM's own, where no answer was heard, or one
                in another dialect.
        """
        heard = "" if self.ear is None else self.ear.take()
        body: Any = None
        with suppress(ValueError, RecursionError):
            body = json.loads(heard)
        if isinstance(body, dict) and ("choices" in body or body.get("object") == "chat.completion"):
            return read_chat(request, heard)
        raise failure


class HookedLiteLLMEngine(_Hooked, LiteLLMEngine):
    """The synchronous engine."""

    def complete(self, request: Request) -> Response:
        """DSPy's, unless LiteLLM stumbles over an answer that came."""
        try:
            with staying(self.until):
                return super().complete(request)
        except Exception as error:
            failure = error
        return self._read_as_native(request, failure)

    def stream(self, request: Request) -> Iterator[StreamEvent]:
        """DSPy's stream, written here again because it cannot be asked for its source.

        Raises:
            lm15 errors, translated from LiteLLM's.
        """
        if self.model_type != "chat":  # such an answer comes whole, as it does for a plain `dspy.LM`
            yield from response_to_events(self.complete(request))
            return
        data = self._arguments(request, streaming=True)
        litellm = get_litellm(feature="LiteLLM engine streaming")
        with litellm_errors(model=request.model), staying(self.until):
            source = litellm.completion(**data)
        codec = _Stream(request)
        with closing_stream(_Closing(source)):
            chunks = iter(source)
            while True:
                # Several dialects, Gemini's above all, are sent not before their first chunk is asked for.
                with litellm_errors(model=request.model), staying(self.until):
                    try:
                        chunk = next(chunks)
                    except StopIteration:
                        break
                yield from codec.feed(chunk)
            yield self.ended(codec.finish(litellm), source)


class _Closing:
    """Closes LiteLLM's synchronous stream, which cannot itself be closed: what it reads from can.

    Else the provider goes on, and bills, until the garbage collector comes by; which may then wait for ever for the
    lock of the connection pool, if it interrupts whoever holds that.
    """

    def __init__(self, source: Any) -> None:
        self._source = source

    def close(self) -> None:
        part = self._source
        while part is not None and not hasattr(part, "close"):
            part = getattr(part, "completion_stream", None) or getattr(part, "streaming_response", None)
        if part is not None:
            part.close()


class HookedAsyncLiteLLMEngine(_Hooked, AsyncLiteLLMEngine):
    """The asynchronous engine."""

    async def complete(self, request: Request) -> Response:
        """The same in a task."""
        try:
            with staying(self.until):
                return await super().complete(request)
        except Exception as error:
            failure = error
        return self._read_as_native(request, failure)

    async def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """The same in a task, see `HookedLiteLLMEngine.stream`."""
        if self.model_type != "chat":
            for event in response_to_events(await self.complete(request)):
                yield event
            return
        data = self._arguments(request, streaming=True)
        litellm = get_litellm(feature="LiteLLM engine streaming")
        with litellm_errors(model=request.model), staying(self.until):
            source = await litellm.acompletion(**data)
        codec = _Stream(request)
        async with aclosing_stream(source):
            chunks = aiter(source)
            while True:
                with litellm_errors(model=request.model), staying(self.until):
                    try:
                        chunk = await anext(chunks)
                    except StopAsyncIteration:
                        break
                for event in codec.feed(chunk):
                    yield event
            yield self.ended(codec.finish(litellm), source)


def missing_keys(model: str) -> list[str] | None:
    """The environment variables that LiteLLM misses for a model; None when it does not know."""
    litellm = get_litellm(feature="dspy-prod check")
    try:
        told = litellm.validate_environment(model)
    except Exception:  # it raises what it likes for models it does not know
        return None
    return [] if told.get("keys_in_environment") else list(told.get("missing_keys") or ()) or None
