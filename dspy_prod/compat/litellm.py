"""LiteLLM, and DSPy's engines on it, with a say in what is sent and what is made of the answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from typing import Any, Final

from dspy.clients.engines.lifecycle import aclosing_stream, closing_stream
from dspy.clients.engines.litellm_engine import AsyncLiteLLMEngine, LiteLLMEngine
from dspy.clients.engines.litellm_errors import litellm_errors
from dspy.clients.lm15_boundary import response_value
from dspy.lm15 import ProviderError, Request, Response, StreamEndEvent, Usage, response_to_events

from dspy_prod.compat.foreign import names
from dspy_prod.compat.httpx import staying
from dspy_prod.compat.litellm_chunks import Chunks
from dspy_prod.compat.lm15 import StreamEvent, read_as_native, read_or_billed
from dspy_prod.compat.stay import Attending, Stay

[get_litellm] = names("dspy.clients._litellm", "get_litellm")
names("dspy.clients.engines.litellm_engine", "LiteLLMEngine._arguments", "LiteLLMEngine._response")
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


# -- engines ---------------------------------------------------------------------------------------------------------
class _Hooked(Attending):
    model_type: str
    sent: Callable[[dict[str, Any], Request], dict[str, Any]]
    """Gives the arguments LiteLLM is called with, from those DSPy has made of a request."""
    received: Callable[[Response, Any, str], Response]
    """Gives the canonical answer, from DSPy's, LiteLLM's, and its text as it arrived, empty where that is not known."""
    ended: Callable[[StreamEndEvent, Any, str | None], StreamEndEvent]
    """Gives the last event of a stream, from DSPy's, LiteLLM's stream after its end, and the reason that was told.

    That is empty where none was told, and None where it is not known.
    """

    broken: Callable[[Response, Any], Response | None]
    """Gives what is owed for a stream that failed, from all that came of it, and LiteLLM's stream; None where that does
    not tell it."""
    ordinary: Callable[[Request], dict[str, Any] | None]
    """Gives the arguments of an ordinary call, None for a typed request, whose arguments DSPy makes."""
    cleaned: Callable[[bytes], bytes]
    """A page that is no answer without secrets: the native engine's error repeats the beginning of it."""

    def _arguments(self, request: Request, *, streaming: bool = False) -> dict[str, Any]:
        data = self.ordinary(request)
        if data is None:
            data = self.sent(super()._arguments(request, streaming=streaming), request)  # type: ignore[misc]
        elif streaming:
            data = {**data, "stream": True, "stream_options": {"include_usage": True}}
        return data

    @contextmanager
    def _billed(self, source: Any, request: Request, stay: Stay) -> Iterator[None]:
        """Have an error of a stream carry, as `billed`, the usage that the provider had told before it."""
        try:
            yield
        except Exception as error:
            if not (stay.odd or stay.uncounted):
                with suppress(Exception):  # then nobody knows
                    raw = get_litellm(feature="LiteLLM engine streaming").stream_chunk_builder(list(chunks_of(source)))
                    error.billed = self.broken(response_value(raw, "chat", request), source)  # type: ignore[attr-defined]
            raise

    def _response(self, raw: Any, request: Request) -> Response:
        stay = Stay() if self.stay is None else self.stay
        native = self._native(request, stay) if stay.odd else None
        if isinstance(native, Response):
            return native
        text = stay.body.decode(errors="replace") if self.model_type == "chat" else ""
        inherited: Callable[[Any, Request], Response] = super()._response  # type: ignore[misc]
        found = read_or_billed(
            lambda answer: self.received(inherited(answer, request), raw, text), raw, lambda: plain(raw)
        )
        return replace(found, usage=native or Usage()) if stay.odd else found

    def _native(self, request: Request, stay: Stay) -> Response | Usage | None:
        return read_as_native(stay.path, request, stay.body, self.cleaned)

    def _rescued(self, request: Request, stay: Stay, failure: Exception) -> Response:
        """The answer of which LiteLLM could make nothing, as the native engine reads it: what came, and its usage.

        Raises:
            Exception: what the native engine says of it; that it cannot be read, where it came in a dialect that it
                does not speak; or `failure`, LiteLLM's own, where no answer came whole or LiteLLM's user rejects it.
        """
        if stay.came == "whole" and not stay.rejects(failure):
            native = self._native(request, stay)
            if isinstance(native, Response):
                return native
        elif stay.came == "whole":
            with suppress(Exception):  # it is owed all the same
                native = self._native(request, stay)
                failure.billed = native if isinstance(native, Response) else None  # type: ignore[attr-defined]
        raise _unread(stay, failure)


def _unread(stay: Stay, failure: Exception) -> Exception:
    error = failure
    if stay.came == "whole" and not stay.rejects(failure):
        error = ProviderError(f"The provider's answer cannot be read: {failure}")
        error.__cause__ = failure
        error.billed = getattr(failure, "billed", None)
    stay.mark(error)
    return error


@contextmanager
def unread(stay: Stay) -> Iterator[None]:
    """The rest of an attempt, whose error says that an answer had come, and that it is about this, if it came whole.

    Raises:
        ProviderError: the answer came whole, and LiteLLM can make nothing of it.
    """
    with stay:
        try:
            yield
            return
        except Exception as error:
            failure = error
        raise _unread(stay, failure)


class HookedLiteLLMEngine(_Hooked, LiteLLMEngine):
    """The synchronous engine."""

    _dropped = False
    _streaming: Stay | None = None

    def drop(self) -> None:
        """Have a stream that nobody reads any more end at once, also where its provider is silent.

        From any thread. An answer that comes whole is read to its end.
        """
        self._dropped = True
        if (stay := self._streaming) is not None:
            stay.drop()

    def complete(self, request: Request) -> Response:
        """DSPy's, unless LiteLLM stumbles over an answer that came."""
        with self.attend() as stay:
            try:
                with staying(stay):
                    return super().complete(request)
            except Exception as error:
                failure = error
            return self._rescued(request, stay, failure)

    def stream(self, request: Request) -> Iterator[StreamEvent]:
        """DSPy's stream, written here again because it cannot be asked for its source.

        Raises:
            lm15 errors, translated from LiteLLM's.
        """
        if self.model_type != "chat":  # such an answer comes whole, as it does for a plain `dspy.LM`
            yield from response_to_events(self.complete(request))
            return
        with self.attend() as stay:
            self._streaming = stay
            if self._dropped:
                stay.drop()
            try:
                yield from self._events(request, stay)
            except Exception as error:
                stay.mark(error)
                raise

    def _events(self, request: Request, stay: Stay) -> Iterator[StreamEvent]:
        data = self._arguments(request, streaming=True)
        litellm = get_litellm(feature="LiteLLM engine streaming")
        with litellm_errors(model=request.model), staying(stay):
            source = litellm.completion(**data)
        codec = Chunks(request)
        with closing_stream(_Closing(source)), self._billed(source, request, stay):
            chunks = iter(source)
            while True:
                # Several dialects, Gemini's above all, are sent not before their first chunk is asked for.
                with litellm_errors(model=request.model), staying(stay):
                    try:
                        chunk = next(chunks)
                    except StopIteration:
                        break
                    except Exception as error:
                        raise _original(error)  # noqa: B904  (a wrapper is no cause)
                for event in codec.feed(chunk):
                    yield event
                    stay.goes_on()
            yield _counted(self.ended(codec.finish(litellm), source, _reason(stay)), stay)


_TELLING: Final = ("/messages", ":streamGenerateContent", ":streamRawPredict")
"""How paths end where a stream always says why it ended: Anthropic's and Google's."""


def _reason(stay: Stay) -> str | None:
    return stay.reason if stay.path.endswith(_TELLING) else None


def _counted(end: StreamEndEvent, stay: Stay) -> StreamEndEvent:
    return replace(end, usage=Usage()) if stay.odd or stay.uncounted else end


def _original(error: Exception) -> Exception:
    """What a stream broke off for: LiteLLM wraps it in an error of its own, which says 503 whatever it was."""
    original = getattr(error, "original_exception", None)
    return original if isinstance(original, Exception) else error


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
        with self.attend() as stay:
            try:
                with staying(stay):
                    return await super().complete(request)
            except Exception as error:
                failure = error
            return self._rescued(request, stay, failure)

    async def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """The same in a task, see `HookedLiteLLMEngine.stream`."""
        if self.model_type != "chat":
            for event in response_to_events(await self.complete(request)):
                yield event
            return
        with self.attend() as stay:
            try:
                async with aclosing(self._events(request, stay)) as events:
                    async for event in events:
                        yield event
            except Exception as error:
                stay.mark(error)
                raise

    async def _events(self, request: Request, stay: Stay) -> AsyncGenerator[StreamEvent, None]:
        data = self._arguments(request, streaming=True)
        litellm = get_litellm(feature="LiteLLM engine streaming")
        with litellm_errors(model=request.model), staying(stay):
            source = await litellm.acompletion(**data)
        codec = Chunks(request)
        async with aclosing_stream(source):
            chunks = aiter(source)
            with self._billed(source, request, stay):
                while True:
                    with litellm_errors(model=request.model), staying(stay):
                        try:
                            chunk = await anext(chunks)
                        except StopAsyncIteration:
                            break
                        except Exception as error:
                            raise _original(error)  # noqa: B904
                    for event in codec.feed(chunk):
                        yield event
                        stay.goes_on()
                yield _counted(self.ended(codec.finish(litellm), source, _reason(stay)), stay)


def missing_keys(model: str) -> list[str] | None:
    """The environment variables that LiteLLM misses for a model; None when it does not know."""
    litellm = get_litellm(feature="dspy-prod check")
    try:
        told = litellm.validate_environment(model)
    except Exception:  # it raises what it likes for models it does not know
        return None
    return [] if told.get("keys_in_environment") else list(told.get("missing_keys") or ()) or None
