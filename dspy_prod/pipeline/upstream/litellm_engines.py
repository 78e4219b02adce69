"""DSPy's LiteLLM engines, sending what a plain `dspy.LM` sends."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from math import ceil, inf
from typing import Any, Final

from dspy._vendor.lm15.types import StreamEvent
from dspy.clients._litellm import get_litellm
from dspy.clients.engines.lifecycle import aclosing_stream, closing_stream
from dspy.clients.engines.litellm_engine import AsyncLiteLLMEngine, LiteLLMEngine, _ChatStream
from dspy.clients.engines.litellm_errors import litellm_errors
from dspy.clients.lm import _is_openai_reasoning_model
from dspy.lm15 import Request, Response

from dspy_prod.pipeline.upstream.litellm_usage import told, told_end

_TIMEOUTS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Time-outs given to LiteLLM for an attempt's remaining time: few, as each distinct one opens a new connection."""


def wire_timeout(timeout: Any, until: float) -> Any:
    """LiteLLM's time-out: not less than the attempt has left, as the driver bounds it exactly.

    Without it a worker thread, and the hold of an attempt that was given up, would last as long as the upstream hangs.

    Args:
        timeout: the LM's own `timeout`, also as an `httpx.Timeout`.
        until: monotonic time at which the attempt is given up.
    """
    if timeout is not None and not isinstance(timeout, (int, float)):
        return timeout
    own = None if timeout is None else float(ceil(timeout))
    if until == inf:
        return own
    left = until - time.monotonic()
    rung = next((rung for rung in _TIMEOUTS if rung >= left), None)
    if rung is None or own is None:
        return own if rung is None else rung
    return min(own, rung)


class _Extended:
    """Adds arguments outside the canonical request, and the name under which every provider knows `max_tokens`."""

    client_options: dict[str, Any]

    def extended(self, extras: dict[str, Any]) -> Any:
        """The engine with arguments of LiteLLM's own vocabulary, which DSPy's engine refuses at construction."""
        self.client_options.update(extras)
        return self

    def _arguments(self, request: Request, *, streaming: bool = False) -> dict[str, Any]:
        data: dict[str, Any] = super()._arguments(request, streaming=streaming)  # type: ignore[misc]
        # DSPy's conversion says max_completion_tokens, which watsonx, replicate, zai and others do not take.
        if "max_completion_tokens" in data and not _is_openai_reasoning_model(request.model):
            data["max_tokens"] = data.pop("max_completion_tokens")
        return data

    def _response(self, raw: Any, request: Request) -> Response:
        response: Response = super()._response(raw, request)  # type: ignore[misc]
        return told(response, raw)


class ExtendedLiteLLMEngine(_Extended, LiteLLMEngine):
    """The synchronous engine."""

    def stream(self, request: Request) -> Iterator[StreamEvent]:
        """DSPy's stream, which cannot be asked for its source, ending with the usage that the provider told.

        Raises:
            lm15 errors, translated from LiteLLM's.
        """
        data = self._arguments(request, streaming=True)
        litellm = get_litellm(feature="LiteLLM engine streaming")
        with litellm_errors(model=request.model):
            source = litellm.completion(**data)
        codec = _ChatStream(request)
        with closing_stream(_Closing(source)):
            chunks = iter(source)
            while True:
                with litellm_errors(model=request.model):
                    try:
                        chunk = next(chunks)
                    except StopIteration:
                        break
                yield from codec.feed(chunk)
            yield told_end(codec.finish(litellm), source)


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


class AsyncExtendedLiteLLMEngine(_Extended, AsyncLiteLLMEngine):
    """The asynchronous engine."""

    async def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """The same in a task, see `ExtendedLiteLLMEngine.stream`."""
        data = self._arguments(request, streaming=True)
        litellm = get_litellm(feature="LiteLLM engine streaming")
        with litellm_errors(model=request.model):
            source = await litellm.acompletion(**data)
        codec = _ChatStream(request)
        async with aclosing_stream(source):
            chunks = aiter(source)
            while True:
                with litellm_errors(model=request.model):
                    try:
                        chunk = await anext(chunks)
                    except StopAsyncIteration:
                        break
                for event in codec.feed(chunk):
                    yield event
            yield told_end(codec.finish(litellm), source)
