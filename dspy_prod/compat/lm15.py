"""lm15, the client library inside DSPy: stream events, JSON forms, and transports that can be hooked."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from traceback import walk_tb
from typing import Any, Final, TypeAlias

from dspy.clients.engines.lm15_engine import AsyncLM15Engine, LM15Engine
from dspy.lm15 import (
    CacheConfig,
    OpenAIChatLM,
    ProviderError,
    Request,
    Response,
    RouterConfig,
    StreamDeltaEvent,
    StreamEndEvent,
    StreamErrorEvent,
    StreamStartEvent,
)

from dspy_prod.compat.foreign import names
from dspy_prod.compat.lm15_reading import bounded_head

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

_GENERATED: Final = ("choices", "output", "content", "candidates")
"""Where providers put what was generated; beside it they tell what it took."""


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


def _read_bare(read: Callable[[Any], Response], answer: Any) -> Response:
    """The same of an answer as it came by HTTP."""

    def of(given: Any) -> Response:
        if isinstance(given, dict):
            given = _HttpResponse(status=200, reason="OK", headers=[], body=json.dumps(given).encode())
        return read(given)

    return read_or_billed(of, answer, answer.json)


def read_chat(request: Request, text: str) -> Response:
    """The answer that a body in the dialect of OpenAI's chat API gives.

    Raises:
        Exception: none can be made of it.
    """
    heard = _HttpResponse(status=200, reason="OK", headers=[], body=text.encode())
    return _read_bare(
        lambda answer: OpenAIChatLM(api_key="none", transport=None).parse_response(request, answer), heard
    )


# -- transports ------------------------------------------------------------------------------------------------------
_StdlibTransport: Any
_StdlibAsyncTransport: Any
_BrokenTransport: type[Exception]
[_StdlibTransport, _StdlibAsyncTransport, _BrokenTransport, *_] = names(
    "dspy._vendor.lm15.transports",
    "StdlibTransport",
    "StdlibAsyncTransport",
    "TransportError",
    "StdlibTransport._open",
    "StdlibTransport._read_head",
    "StdlibTransport._make_release",
    "StdlibAsyncTransport._read_head",
    "StdlibAsyncTransport._make_release",
    "StdlibAsyncTransport._send_request",
    "StdlibAsyncTransport._do_stream",
)
names("dspy._vendor.lm15.providers.openai_chat", "OpenAIChatLM.parse_stream_events")
_LONGEST: Final = 500


def _elsewhere(response: Any, body: bytes) -> ProviderError:
    """The error for a redirect, which is not followed: lm15 takes its page for an answer."""
    said = " ".join(body.decode(errors="replace").split())
    if len(said) > _LONGEST:
        said = said[:_LONGEST].rpartition(" ")[0]  # half a key that the page repeats would not be known for one
    return ProviderError(f"HTTP {response.status} {response.reason}: {said}", status=response.status)


def _page(chunks: Iterator[bytes]) -> bytes:
    """What can be read of an error's page. Its status says what counts, though the page may break off."""
    parts: list[bytes] = []
    try:
        parts.extend(chunks)
    except _BrokenTransport:
        pass
    return b"".join(parts)


async def _apage(chunks: AsyncIterator[bytes]) -> bytes:
    """The same for tasks."""
    parts: list[bytes] = []
    try:
        async for part in chunks:
            parts.append(part)
    except _BrokenTransport:
        pass
    return b"".join(parts)


class HookedTransport(_StdlibTransport):
    """The synchronous transport, each request bounded and each socket wrapped by what a subclass names."""

    retired = False
    time_left: Callable[[], float | None]
    """Seconds that a request which begins now may take to connect; None: as the transport was told."""
    wrapped: Callable[[socket.socket], Any]
    refused: Callable[[list[tuple[str, str]], int], None]
    """Hears the headers and the status of an HTTP error."""

    def retire(self) -> None:
        """Keep no connection any more: idle ones are closed now, each of the others by whoever uses it, after that.

        `close` closes them all, also beneath a thread that waits for an answer: it then waits on, for as long as a
        read may take, on a descriptor that may be another connection's by now.
        """
        self.retired = True
        self._close_idle()

    def _close_idle(self) -> None:
        for origin in list(self._pool._idle):
            while (connection := self._pool.checkout(origin)) is not None:
                self._pool.discard(connection)

    def _make_release(self, conn: Any, keep_alive: bool) -> Callable[[bool], None]:
        release = super()._make_release(conn, keep_alive)

        def released(whole: bool) -> None:
            release(whole)
            if self.retired:
                self._close_idle()

        return released

    def stream(self, request: Any) -> Any:
        left = self.time_left()
        if left is not None:
            request.connect_timeout = min(request.connect_timeout or self._connect_timeout, left)
        response = super().stream(request)
        if response.status >= 300:
            self.refused(response.headers, response.status)
            response.read = lambda: _page(iter(response))
            if response.status < 400:
                with response:
                    raise _elsewhere(response, response.read())
        return response

    def _read_head(self, conn: Any, **kwargs: Any) -> Any:
        return bounded_head(super()._read_head(conn, **kwargs), conn)

    def _open(self, *args: Any, **kwargs: Any) -> Any:
        try:
            connection = super()._open(*args, **kwargs)
        except BaseException:
            del args, kwargs  # an error reporter would show them, and the address may hold a password
            raise
        connection.sock = self.wrapped(connection.sock)
        return connection


class HookedAsyncTransport(_StdlibAsyncTransport):
    """The asynchronous transport, which calls what a subclass names when a request goes out and when it is refused."""

    retired = False
    leaves: Callable[[], None]
    refused: Callable[[list[tuple[str, str]], int], None]

    async def retire(self) -> None:
        """The same for the tasks of a loop."""
        self.retired = True
        await self._close_idle()

    async def _close_idle(self) -> None:
        for origin in list(self._pool._idle):
            while (connection := await self._pool.checkout(origin)) is not None:
                await self._pool.discard(connection)

    def _make_release(self, conn: Any, keep_alive: bool) -> Callable[[bool], Awaitable[None]]:
        release = super()._make_release(conn, keep_alive)

        async def released(whole: bool) -> None:
            await release(whole)
            if self.retired:
                await self._close_idle()

        return released

    async def _send_request(self, *args: Any, **kwargs: Any) -> None:
        self.leaves()
        await super()._send_request(*args, **kwargs)

    async def _read_head(self, conn: Any, **kwargs: Any) -> Any:
        return bounded_head(await super()._read_head(conn, **kwargs), conn)

    async def _do_stream(self, request: Any) -> Any:
        response = await super()._do_stream(request)
        if response.status >= 300:
            self.refused(response.headers, response.status)
            response.read = lambda: _apage(aiter(response))
            if response.status < 400:
                try:
                    raise _elsewhere(response, await response.read())
                finally:
                    await response.aclose()
        return response


# -- engines ---------------------------------------------------------------------------------------------------------
class _Providers(dict[str, Any]):
    """The providers an engine has spoken to, each of which is hooked when it is first met: calls pay nothing."""

    def __init__(self, ended: Callable[[StreamEndEvent], StreamEndEvent]) -> None:
        super().__init__()
        self._ended = ended

    def __setitem__(self, name: str, provider: Any) -> None:
        reader = getattr(provider, "_inner", provider)  # an asynchronous one reads events by its synchronous twin
        read, parse, ended = reader.parse_response, reader.parse_stream_events, self._ended

        def answered(request: Request, response: Any) -> Response:
            return _read_bare(lambda answer: read(request, answer), response)

        def parsed(request: Request, raw: Any) -> Iterator[StreamEvent]:
            for event in parse(request, raw):
                yield ended(event) if event is not None and event.type == "end" else event

        reader.parse_response, reader.parse_stream_events = answered, parsed
        super().__setitem__(name, provider)


class HookedLM15Engine(LM15Engine):
    """The synchronous engine, whose streams end as a subclass says: it is shown each event that ends one."""

    ended: Callable[[StreamEndEvent], StreamEndEvent]

    def __init__(self, config: RouterConfig | None = None, *, model_type: str = "chat") -> None:
        super().__init__(config, model_type=model_type)
        self._providers = _Providers(self.ended)


class HookedAsyncLM15Engine(AsyncLM15Engine):
    """The same for tasks."""

    ended: Callable[[StreamEndEvent], StreamEndEvent]

    def __init__(self, config: RouterConfig | None = None, *, model_type: str = "chat") -> None:
        super().__init__(config, model_type=model_type)
        self._providers = _Providers(self.ended)
