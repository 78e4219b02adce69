"""What sends a batch of texts: LiteLLM, as `dspy.Embedder` does, or a function of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from dspy.lm15 import ProviderError, Request, Usage

from dspy_prod.compat.embedding import aembed, embed, found_in, input_tokens
from dspy_prod.compat.litellm import get_litellm
from dspy_prod.compat.stay import Attending
from dspy_prod.pipeline.upstream.litellm_engines import wire_timeout
from dspy_prod.pipeline.upstream.ordinary import Beside
from dspy_prod.pipeline.upstream.rows import rows_of
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.pipeline.upstream.vectors import Vectors, texts_of, vectors
from dspy_prod.pipeline.upstream.workers import Threaded
from dspy_prod.runtime.forking import IMPORTING


class EmbeddingUpstream(Upstream):
    """The way to a model for vectors.

    Args:
        model: LiteLLM's model string, or the name of a function.
        function: takes a list of texts and gives a vector for each; None: LiteLLM.
        clients: `api_key`, `api_base`, `timeout`, ...
        extras: further arguments, such as `dimensions`.
        known: see `Upstream.known_as` and `known_everywhere`; None: the model.
    """

    def __init__(
        self,
        model: str,
        function: Callable[..., Any] | None,
        clients: dict[str, Any],
        extras: dict[str, Any],
        known: tuple[str, bool] | None = None,
    ) -> None:
        super().__init__(model, "embedding", "litellm" if function is None else function, None, clients, extras)
        if known is not None:
            self.known_as, self.known_everywhere = known
        self._function = function

    @property
    def provider(self) -> str | None:
        """See `Upstream`: LiteLLM tells any usage in OpenAI's way."""
        return "litellm" if self._function is None else None

    def is_native(self, request: Request, beside: Beside | None) -> bool:
        """Never: DSPy has no engine of its own for vectors."""
        return False

    def sync_engine(self, request: Request, beside: Beside | None, until: float = inf) -> tuple[Any, bool]:
        """See `Upstream`."""
        return self._engine(until), False

    def async_engine(self, request: Request, beside: Beside | None, until: float = inf) -> Any:
        """See `Upstream`."""
        engine = self._engine(until)
        if isinstance(engine, FunctionVectors) and not engine.is_awaited:
            return Threaded(engine.complete)
        return _Asynchronous(engine)

    def warm(self, request: Request, beside: Beside | None) -> None:
        """See `Upstream`."""
        with IMPORTING:
            get_litellm(feature="dspy_prod.Embedder")
            self.ready = True

    def _engine(self, until: float) -> LiteLLMVectors | FunctionVectors:
        if self._function is not None:
            return FunctionVectors(self._function, {**self.clients, **self.extras})
        arguments = {**self.clients, **self.extras}
        timeout = wire_timeout(self.clients.get("timeout"), until)
        if timeout is not None:
            arguments["timeout"] = timeout
        return LiteLLMVectors(arguments, until)


class LiteLLMVectors(Attending):
    """One attempt by LiteLLM.

    Args:
        arguments: what it is called with beside model and texts.
        until: monotonic time after which nobody waits for it.
    """

    def __init__(self, arguments: Mapping[str, Any], until: float) -> None:
        self._arguments = arguments
        self.until = until

    def complete(self, request: Request) -> Vectors:
        """The vectors of a batch."""
        return self._read(embed(self._said(request), self.attend()), request)

    async def acomplete(self, request: Request) -> Vectors:
        """Asynchronous `complete`."""
        return self._read(await aembed(self._said(request), self.attend()), request)

    def _said(self, request: Request) -> dict[str, Any]:
        return {**self._arguments, "model": request.model, "input": texts_of(request)}

    def _read(self, answer: Any, request: Request) -> Vectors:
        told = input_tokens(answer)
        usage = Usage() if told is None else Usage(input_tokens=told, output_tokens=0)
        model = getattr(answer, "model", None)
        model = model if isinstance(model, str) and model else request.model
        try:
            rows = rows_of(found_in(answer), len(request.messages))
        except (TypeError, ValueError) as unread:
            error = ProviderError(f"The provider's vectors cannot be read: {unread}")
            error.billed = vectors(model, (), usage)
            raise error from unread
        return vectors(model, rows, usage)


class FunctionVectors:
    """One attempt by a function of the user's. It tells no usage: an attempt counts with the bound on its tokens.

    Args:
        function: takes a list of texts and gives a vector for each; it may be asynchronous for `acall`.
        arguments: what it is called with beside the texts.
    """

    def __init__(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        self._function = function
        self._arguments = arguments

    def complete(self, request: Request) -> Vectors:
        """The vectors of a batch."""
        return self._read(self._function(texts_of(request), **self._arguments), request)

    @property
    def is_awaited(self) -> bool:
        """Whether it is an `async def`, for `acomplete`."""
        return inspect.iscoroutinefunction(self._function)

    async def acomplete(self, request: Request) -> Vectors:
        """The same of an asynchronous function."""
        return self._read(await self._function(texts_of(request), **self._arguments), request)

    def _read(self, given: Any, request: Request) -> Vectors:
        return vectors(request.model, rows_of(given, len(request.messages)), Usage())


class _Asynchronous:
    def __init__(self, engine: LiteLLMVectors | FunctionVectors) -> None:
        self._engine = engine

    @property
    def waits(self) -> bool:
        """See `Attending`. A function of the user's says nothing of it."""
        return isinstance(self._engine, LiteLLMVectors) and self._engine.waits

    @property
    def moved(self) -> bool:
        """The same."""
        return isinstance(self._engine, LiteLLMVectors) and self._engine.moved

    async def complete(self, request: Request) -> Vectors:
        return await self._engine.acomplete(request)
