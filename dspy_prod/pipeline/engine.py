"""The production engine: DSPy's engine contract on top, the flow beneath.

DSPy owns prompts, candidate fan-out, history and callbacks above it; the upstream engines beneath make one attempt.
The contract is `dspy/clients/engines/base.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing

from dspy.lm15 import Request, Response

from dspy_prod.compat.foreign import running_loop
from dspy_prod.compat.lm15 import StreamEvent
from dspy_prod.context.current import current, stamped
from dspy_prod.errors import RejectedError
from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.clocks import in_machine_time
from dspy_prod.pipeline.drivers import arun, arun_stream, run, run_stream
from dspy_prod.pipeline.flow import Flow, flow
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.pipeline.refusing import note
from dspy_prod.pipeline.scope import SCOPE, Scope, candidate_key, request_key
from dspy_prod.policies.answers import log_of
from dspy_prod.policies.purse import Purse
from dspy_prod.privacy.outward import outward


class _Guarded:
    """What the synchronous and the asynchronous engine share.

    Args:
        pipeline: what calls run through.
        identity: bytes that keep the cache keys of different models, addresses and engines apart.
        caches: whether calls that do not come through an LM use the cache.
    """

    def __init__(self, pipeline: Pipeline, identity: bytes, caches: bool = True) -> None:
        self.pipeline = pipeline
        self.identity = identity
        self.caches = caches

    @property
    def supports_function_calling(self) -> bool:
        """Whether the primary model calls tools."""
        return bool(self.pipeline.capabilities.function_calling)

    @property
    def supports_reasoning(self) -> bool:
        """Whether the primary model reasons natively."""
        return bool(self.pipeline.capabilities.reasoning)

    @property
    def supports_response_schema(self) -> bool:
        """Whether the primary model answers in a given JSON schema."""
        return bool(self.pipeline.capabilities.response_schema)

    @property
    def supported_params(self) -> frozenset[str]:
        """Arguments the primary model takes."""
        return frozenset(self.pipeline.capabilities.params)

    def __repr__(self) -> str:
        return outward(f"{type(self).__name__}({self.pipeline.primary.model!r})")

    def call(self, request: Request, streaming: bool) -> Call:
        """What one request sets out with: the scope it is in, its cache key, where its records go."""
        scope = SCOPE.get()
        pipeline = self.pipeline
        if scope is None:  # the engine is used without its LM
            context = stamped(current())
            uses_cache = self.caches and pipeline.cache is not None and context.cache != "bypass"
            scope = Scope(context, None, None, None, uses_cache)
            scope.log = log_of(context.guards) if context.guards else None
        context, index = scope.context, scope.index
        scope.asked = request
        scope.index = index + 1
        key = None
        missed = False
        if scope.use_cache or scope.log is not None:
            key = scope.base
            missed = scope.missed and not index
            if key is None or not key.startswith(self.identity):  # `lm.kwargs` was changed just now
                key = request_key(self.identity, request, scope, self._tenant(context.tenant))
                missed = False
            if key is not None and index:
                key = candidate_key(key, index)
        used = key if scope.use_cache else None
        call = Call(pipeline, request, context, used, scope, streaming, scope.records, missed)
        if scope.log is not None:
            call.log_key = scope.log.key(key, context.tenant)
            call.log = None if call.log_key is None else scope.log
        if pipeline.capped:
            call.purse = scope.purse = scope.purse or Purse()
            call.to_pay = max(1, call.purse.answers - index)
        return call

    def _tenant(self, tenant: str | None) -> str | None:
        cache = self.pipeline.cache
        return None if cache is None or cache.options.shared else tenant


def _flow(call: Call) -> Flow:
    steps: Flow = in_machine_time(flow(call), call.pipeline.clock)
    return steps


class ProdEngine(_Guarded):
    """The synchronous engine."""

    def complete(self, request: Request) -> Response:
        """Answer one request.

        Raises:
            RejectedError: refused by a policy of this library.
            LMError: the upstream's error, once retries and fallbacks are exhausted.
        """
        call = self.call(request, False)
        call.alone = running_loop() is not None
        try:
            return run(_flow(call))
        except RejectedError as error:
            note(call, error)
            raise

    def stream(self, request: Request) -> Iterator[StreamEvent]:
        """Answer one request event by event; raises as `complete` does."""
        call = self.call(request, True)
        try:
            with closing(run_stream(_flow(call), call)) as events:
                yield from events
        except RejectedError as error:
            note(call, error)
            raise

    def close(self) -> None:
        """Engines are shared by copies of an LM; `LM.close` closes what they own."""


class AsyncProdEngine(_Guarded):
    """The asynchronous engine."""

    async def complete(self, request: Request) -> Response:
        """See `ProdEngine.complete`."""
        call = self.call(request, False)
        try:
            return await arun(_flow(call))
        except RejectedError as error:
            note(call, error)
            raise

    async def stream(self, request: Request) -> AsyncIterator[StreamEvent]:
        """See `ProdEngine.stream`."""
        call = self.call(request, True)
        try:
            async with aclosing(arun_stream(_flow(call), call)) as events:
                async for event in events:
                    yield event
        except RejectedError as error:
            note(call, error)
            raise

    async def aclose(self) -> None:
        """See `ProdEngine.close`."""
