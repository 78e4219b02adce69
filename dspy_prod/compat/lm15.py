"""lm15, the client library inside DSPy: stream events, JSON forms, and engines that can be hooked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from traceback import walk_tb
from typing import Any, Final, TypeAlias

from dspy.clients.engines.lm15_engine import AsyncLM15Engine, LM15Engine
from dspy.lm15 import (
    AnthropicLM,
    CacheConfig,
    GeminiLM,
    OpenAIChatLM,
    OpenAILM,
    ProviderError,
    Request,
    Response,
    RouterConfig,
    StreamDeltaEvent,
    StreamEndEvent,
    StreamErrorEvent,
    StreamStartEvent,
    Usage,
)

from dspy_prod.compat.asides import asides_in, counted, counted_beside, done_in
from dspy_prod.compat.foreign import names
from dspy_prod.compat.refusals import partial_without_asides, set_apart, without_asides

StreamEvent: TypeAlias = StreamStartEvent | StreamDeltaEvent | StreamEndEvent | StreamErrorEvent

[StreamAccumulator] = names("dspy._vendor.lm15.result", "StreamAccumulator")

request_to_dict: Callable[[Request], dict[str, Any]]
response_to_dict: Callable[..., dict[str, Any]]
response_from_dict: Callable[[dict[str, Any]], Response]
cache_config_to_dict: Callable[[CacheConfig], dict[str, Any]]
cache_config_from_dict: Callable[..., CacheConfig]
[request_to_dict, response_to_dict, response_from_dict, cache_config_to_dict, cache_config_from_dict] = names(
    "dspy._vendor.lm15.serde",
    "request_to_dict",
    "response_to_dict",
    "response_from_dict",
    "cache_config_to_dict",
    "cache_config_from_dict",
)

_ARGUMENTS: Final = """
    model messages tools tool_choice parallel_tool_calls functions function_call max_completion_tokens max_tokens
    temperature top_p top_k stop seed frequency_penalty presence_penalty logprobs top_logprobs response_format
    service_tier store user safety_identifier user_id reasoning reasoning_effort verbosity metadata logit_bias
    prediction stream stream_options
"""


def canonical_arguments() -> frozenset[str]:
    """The arguments of the chat API that a canonical request can say."""
    try:
        tables = names(
            "dspy._vendor.lm15.providers.openai_chat",
            "_INGEST_CONFIG_KEYS",
            "_INGEST_EXTENSIONS_KEYS",
            "_INGEST_CALL_MODE_KEYS",
        )
    except ImportError:  # the tables moved; the list as of DSPy 3.4.1 still holds
        return frozenset(_ARGUMENTS.split())
    return frozenset().union(*tables)


CANONICAL: Final = canonical_arguments()


error_of_status: Callable[..., ProviderError]
[error_of_status] = names("dspy._vendor.lm15.errors", "map_http_error")


_READERS: Final = frozenset({"parse_response", "parse_stream_events", "_response", "response_value", "feed", "finish"})
"""Functions that make something canonical of an answer, in lm15 and in DSPy's engines."""


def raised_by_reader(error: BaseException) -> bool:
    """Whether an answer had come, and the error says what it is that cannot be read of it."""
    return any(frame.f_code.co_name in _READERS for frame, _ in walk_tb(error.__traceback__))


_HttpResponse: Any
[_HttpResponse] = names("dspy._vendor.lm15.providers.base", "HttpResponse")

_GENERATED: Final = ("choices", "output", "content", "candidates", "promptFeedback")
"""Where providers put what was generated, or why nothing was; beside it they tell what it took."""


def read_or_billed(read: Callable[[Any], Response], answer: Any, body: Callable[[], Any]) -> Response:
    """The answer as `read` reads it; an error that it raises carries, as `billed`, what can be read but for its text.

    An answer that nobody can read was generated all the same, and says what it took.

    Args:
        read: makes something canonical of an answer.
        answer: what it is given.
        body: gives the answer as JSON, and takes it in that form too.
    """
    try:
        return read(answer)
    except Exception as error:
        with suppress(Exception):  # then nobody knows
            bare = {name: [] if name in _GENERATED else value for name, value in body().items()}
            error.billed = read(bare)  # type: ignore[attr-defined]
        raise


def _read_bare(
    read: Callable[[Any], Response], answer: Any, cleaned: Callable[[bytes], bytes] | None = None
) -> Response:
    """The same of an answer as it came by HTTP. Of one that cannot be read, the error repeats what `cleaned` leaves."""

    def of(given: Any) -> Response:
        if isinstance(given, dict):
            given = _HttpResponse(status=200, reason="OK", headers=[], body=json.dumps(given).encode())
        return read(given)

    try:
        return read_or_billed(of, answer, answer.json)
    except Exception as error:
        clean = answer if cleaned is None else replace(answer, body=cleaned(answer.body))
        if clean.body == answer.body:
            raise
        billed = getattr(error, "billed", None)
    try:
        return read_or_billed(of, clean, clean.json)
    except Exception as error:
        if billed is not None:  # what was cleaned may tell less
            error.billed = billed  # type: ignore[attr-defined]
        raise


_READ_BY: Final = (
    ("/chat/completions", OpenAIChatLM),
    ("/messages", AnthropicLM),
    (":generateContent", GeminiLM),
    ("/responses", OpenAILM),
)
"""Who reads what was answered, by the end of the path that was asked."""


def read_as_native(
    path: str, request: Request, body: bytes, cleaned: Callable[[bytes], bytes] | None = None
) -> Response | Usage | None:
    """The answer that a body gives to the native engine, with its usage in OpenAI's way, as LiteLLM tells any.

    Args:
        path: where it was asked for, which tells its dialect.
        request: what was asked.
        body: what came.
        cleaned: leaves of a body that cannot be read what an error may repeat, see `_read_bare`.

    Returns:
        The usage alone where LiteLLM had asked for a text by way of a tool; None where the native engine does not
        speak the dialect.

    Raises:
        Exception: none can be made of it.
    """
    dialect: Any = next((each for end, each in _READ_BY if path.endswith(end)), None)
    if dialect is None:
        return None
    reader = dialect(api_key="none", transport=None)
    heard = _HttpResponse(status=200, reason="OK", headers=[], body=body)
    try:
        found = _read_bare(lambda answer: reader.parse_response(request, answer), heard, cleaned)
    except Exception as error:
        billed = getattr(error, "billed", None)
        if billed is not None:
            error.billed = _in_the_way_of_openai(billed, dialect)  # type: ignore[attr-defined]
        raise
    told = _in_the_way_of_openai(found, dialect)
    if not request.tools and any(part.type == "tool_call" for part in found.message.parts):
        return told.usage
    return told


def _in_the_way_of_openai(response: Response, dialect: Any) -> Response:
    """Anthropic counts what comes from the cache beside the input, and Gemini thoughts beside the output."""
    usage = response.usage
    if dialect is AnthropicLM and usage.input_tokens is not None:
        cached = (usage.cache_read_tokens or 0) + (usage.cache_write_tokens or 0)
        usage = replace(usage, input_tokens=usage.input_tokens + cached, total_tokens=None)
    if dialect is GeminiLM and usage.output_tokens is not None:
        usage = replace(usage, output_tokens=usage.output_tokens + (usage.reasoning_tokens or 0), total_tokens=None)
    return response if usage is response.usage else replace(response, usage=usage)


# -- engines ---------------------------------------------------------------------------------------------------------
_BLOCKED: Final = "inband_finish_reason"
"""What lm15 calls a filter's verdict in an event of Gemini's stream. It drops the usage that stands beside it; read as
a whole answer, the event gives the same error, which carries that."""


class _Providers(dict[str, Any]):
    """The providers an engine has spoken to, each of which is hooked when it is first met: calls pay nothing."""

    def __init__(self, ended: Callable[[StreamEndEvent], StreamEndEvent], cleaned: Callable[[bytes], bytes]) -> None:
        super().__init__()
        self._ended, self._cleaned = ended, cleaned

    def __setitem__(self, name: str, provider: Any) -> None:
        reader = getattr(provider, "_inner", provider)  # an asynchronous one reads events by its synchronous twin
        read, parse = reader.parse_response, reader.parse_stream_events
        ended, cleaned, gemini = self._ended, self._cleaned, isinstance(reader, GeminiLM)

        def answered(request: Request, response: Any) -> Response:
            return _read_bare(lambda answer: read(request, answer), response, cleaned)

        def parsed(request: Request, raw: Any) -> Iterator[StreamEvent]:
            ends: list[StreamEndEvent] = []  # what an event counts, it counts with all that it tells
            for event in set_apart(raw.data, parse(request, raw)):
                if event is not None and event.type == "error" and event.error.provider_code == _BLOCKED:
                    answered(request, _HttpResponse(status=200, reason="OK", headers=[], body=raw.data.encode()))
                if event is not None and event.type == "end":
                    ends.append(event)
                else:
                    yield event
            if raw.data:
                yield from asides_in(raw.data)
                yield from done_in(raw.data)
            for end in ends:
                yield from counted(end)
                yield ended(end)
            if gemini and raw.data and not ends:
                yield from counted_beside(raw.data)

        reader.parse_response, reader.parse_stream_events = answered, parsed
        super().__setitem__(name, provider)


class HookedLM15Engine(LM15Engine):
    """The synchronous engine, whose streams end as a subclass says: it is shown each event that ends one."""

    ended: Callable[[StreamEndEvent], StreamEndEvent]
    cleaned: Callable[[bytes], bytes]
    """A page that is no answer without secrets: lm15's error repeats the beginning of it."""

    def __init__(self, config: RouterConfig | None = None, *, model_type: str = "chat") -> None:
        super().__init__(config, model_type=model_type)
        self._providers = _Providers(self.ended, self.cleaned)

    def complete(self, request: Request) -> Response:
        """One answer, of which lm15 may make a stream."""
        with partial_without_asides():
            return without_asides(super().complete(request))


class HookedAsyncLM15Engine(AsyncLM15Engine):
    """The same for tasks."""

    ended: Callable[[StreamEndEvent], StreamEndEvent]
    cleaned: Callable[[bytes], bytes]

    def __init__(self, config: RouterConfig | None = None, *, model_type: str = "chat") -> None:
        super().__init__(config, model_type=model_type)
        self._providers = _Providers(self.ended, self.cleaned)

    async def complete(self, request: Request) -> Response:
        """One answer, of which lm15 may make a stream."""
        with partial_without_asides():
            return without_asides(await super().complete(request))
