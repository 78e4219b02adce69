"""An upstream engine that answers from a script: for tests that need no HTTP."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

from dspy.lm15 import Message, Request, Response, TextPart, Usage, response_to_events

Answer: TypeAlias = "str | Response | BaseException | Callable[[Request], Any]"


class ScriptedEngine:
    """Synchronous and asynchronous engine in one script; use `.asynchronous` as `async_engine=`.

    Args:
        answers: what each call gets, in order: a text, a `Response`, an exception to raise, or a function of the
            request that returns one of these. The last one repeats.
        input_tokens, output_tokens: usage of answers given as text.
        latency: seconds each call takes.

    Attributes:
        requests: the requests received, in order.
        in_flight, max_in_flight: calls being answered now and at most.

    Example:
        ```python
        engine = testing.ScriptedEngine(["first", ValueError("second"), "third"])
        lm = dspy_prod.LM("any/model", engine=engine, store="memory://")
        assert lm("hello") == ["first"] and engine.calls == 1
        ```
    """

    supports_function_calling = True
    supports_response_schema = True
    supported_params = frozenset({"temperature", "max_tokens", "response_format", "tools", "tool_choice"})

    def __init__(
        self,
        answers: Answer | Iterable[Answer] = "ok",
        *,
        input_tokens: int = 10,
        output_tokens: int = 5,
        latency: float = 0.0,
    ) -> None:
        single = isinstance(answers, (str, Response, BaseException)) or callable(answers)
        self._answers: list[Any] = [answers] if single else list(cast("Iterable[Answer]", answers))
        if not self._answers:
            raise ValueError("a script needs at least one answer")
        self._usage = Usage(input_tokens=input_tokens, output_tokens=output_tokens)
        self._latency = latency
        self._lock = threading.Lock()
        self.requests: list[Request] = []
        self.in_flight = 0
        self.max_in_flight = 0
        self.asynchronous = _AsyncScript(self)

    @property
    def calls(self) -> int:
        """How many requests were received."""
        return len(self.requests)

    def complete(self, request: Request) -> Response:
        """Answer one request."""
        with self._answering(request) as answer:
            if self._latency:
                time.sleep(self._latency)
            return self._answer(answer, request)

    def stream(self, request: Request) -> Iterator[Any]:
        """Answer one request event by event."""
        yield from response_to_events(self.complete(request))

    def close(self) -> None:
        """Nothing to close."""

    @contextmanager
    def _answering(self, request: Request) -> Iterator[Any]:
        with self._lock:
            answer = self._answers[min(len(self.requests), len(self._answers) - 1)]
            self.requests.append(request)
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            yield answer
        finally:
            with self._lock:
                self.in_flight -= 1

    def _answer(self, answer: Any, request: Request) -> Response:
        if not isinstance(answer, (str, Response, BaseException)):
            answer = answer(request)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, Response):
            return answer
        return Response(
            id=None,
            model=request.model,
            message=Message.assistant([TextPart(answer)]),
            finish_reason="stop",
            usage=self._usage,
        )


class _AsyncScript:
    supports_function_calling = True
    supports_response_schema = True
    supported_params = ScriptedEngine.supported_params

    def __init__(self, script: ScriptedEngine) -> None:
        self._script = script

    async def complete(self, request: Request) -> Response:
        script = self._script
        with script._answering(request) as answer:
            if script._latency:
                await asyncio.sleep(script._latency)
            return script._answer(answer, request)

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        for event in response_to_events(await self.complete(request)):
            yield event

    async def aclose(self) -> None:
        """Nothing to close."""
