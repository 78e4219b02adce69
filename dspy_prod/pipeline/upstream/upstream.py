"""One route's way to the model: which engine carries a request, decided before any I/O.

`auto` means DSPy's own rule: the native engine when it can carry the request, else LiteLLM. Arguments that the
canonical request cannot say (Bedrock region, `num_ctx`, `extra_body`, ...) select LiteLLM and travel beside it.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from functools import lru_cache
from math import inf
from typing import Any, Final

from dspy.clients.backend_selection import select_backend
from dspy.clients.engines.lm15_engine import LM15Engine
from dspy.lm15 import Request, RouterConfig, UnsupportedFeatureError, registered_providers
from dspy.utils.exceptions import LMUnsupportedFeatureError

from dspy_prod.compat.dspy import StandIn, capabilities, declared_door, definitions
from dspy_prod.compat.litellm import get_litellm
from dspy_prod.pipeline.upstream.deadline import BoundedTransport, PacedAsyncTransport
from dspy_prod.pipeline.upstream.litellm_engines import (
    AsyncExtendedLiteLLMEngine,
    ExtendedLiteLLMEngine,
    wire_timeout,
)
from dspy_prod.pipeline.upstream.native_engines import AsyncNativeEngine, NativeEngine, connections
from dspy_prod.pipeline.upstream.ordinary import Beside, body_of
from dspy_prod.pipeline.upstream.text_engine import AsyncLiteLLMTextEngine, LiteLLMTextEngine
from dspy_prod.runtime.forking import IMPORTING, reset_after_fork

_PLANNED: Final = 512
"""Request shapes whose route is remembered, those used last."""


class Upstream:
    """The engines behind one route.

    Args:
        model: model string.
        model_type: `chat`, `responses` or `text`.
        spec: `"auto"`, `"lm15"`, `"litellm"`, or an engine object (then `async_spec` is its async counterpart).
        clients: DSPy's client settings: `api_key`, `api_base`, `timeout`, headers, ...
        extras: constant arguments outside the canonical request, for LiteLLM.

    Attributes:
        known_as: by what its circuit and limiter are known, beside its address. known_everywhere: in every process.
    """

    def __init__(
        self,
        model: str,
        model_type: str,
        spec: Any,
        async_spec: Any,
        clients: dict[str, Any],
        extras: dict[str, Any],
    ) -> None:
        self.model = self.known_as = model
        self.known_everywhere = True
        self.model_type = model_type
        self.spec = spec
        self.async_spec = async_spec
        self.clients = clients
        self.extras = extras
        self._providers = registered_providers()
        self._lock = threading.Lock()
        self._selection: Any = None
        self._provider: str | None = ""  # not asked for yet
        self._native: NativeEngine | None = None
        self._native_async: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncNativeEngine] = (
            weakref.WeakKeyDictionary()
        )
        self._carried: Callable[[tuple[Any, ...]], list[bool]] = lru_cache(_PLANNED)(lambda shape: [])
        self.fell_back = False  # some request of a native route went through LiteLLM
        self.ready = not isinstance(spec, str)  # what an attempt needs has been imported and built
        reset_after_fork(self)

    def _after_fork(self) -> None:
        # The pooled connections are the parent's: two processes on one socket would read each other's answers.
        self._lock = threading.Lock()
        self._native = None
        self._native_async = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"Upstream({self.model!r}, {self.engine_name})"  # never the clients: they hold the key

    @property
    def engine_name(self) -> str:
        """What was asked for: `auto`, `lm15`, `litellm`, or the class of the engine object."""
        return self.spec if isinstance(self.spec, str) else type(self.spec).__name__

    @property
    def provider(self) -> str | None:
        """Whose usage counters the answers carry, for prices: DSPy's name of the provider, or `"litellm"`."""
        if self._provider == "":
            if isinstance(self.spec, str):
                selection = self._select()
                self._provider = str(selection.resolution.provider) if selection.native else "litellm"
            else:
                self._provider = self._guess_provider()
        return self._provider

    def sync_engine(self, request: Request, beside: Beside | None, until: float = inf) -> tuple[Any, bool]:
        """(engine, bounded): the engine for one synchronous attempt, and whether it bounds itself in time.

        `until` is when nobody waits for the attempt any more (monotonic).
        """
        if not isinstance(self.spec, str):
            if beside is not None and (beside.extras or beside.refusal is not None):
                raise self._not_said_by_own(beside)
            return self.spec, False
        if self.is_native(request, beside):
            return self._native_engine(), True
        return self._litellm(False, request, beside, until), False

    def async_engine(self, request: Request, beside: Beside | None, until: float = inf) -> Any:
        """The engine for one asynchronous attempt; `until` as in `sync_engine`."""
        if not isinstance(self.spec, str):
            if beside is not None and (beside.extras or beside.refusal is not None):
                raise self._not_said_by_own(beside)
            if self.async_spec is None:
                raise LMUnsupportedFeatureError(
                    "this custom engine has no async counterpart; pass async_engine= to dspy_prod.LM", model=self.model
                )
            return self.async_spec
        if self.is_native(request, beside):
            return self._native_async_engine()
        return self._litellm(True, request, beside, until)

    def warm(self, request: Request, beside: Beside | None) -> None:
        """Import and build what an attempt needs. It may take seconds, and comes before an attempt is admitted."""
        with IMPORTING:
            if self.ready:
                return
            if self.is_native(request, beside):
                self._native_engine().plan(request)
            else:
                get_litellm(feature="LiteLLM engine")
            self.ready = True

    def close(self) -> None:
        """Close the pooled connections of the synchronous engine; engine objects are borrowed and stay open.

        Calls that are under way go on, here and in `aclose`: what they use is closed when they are done.
        """
        with self._lock:
            native, self._native = self._native, None
            loops = [loop for loop in self._native_async if loop.is_closed()]
            for loop in loops:
                self._native_async.pop(loop, None)
        if native is not None:
            native.config.transport.retire()

    async def aclose(self) -> None:
        """Close this event loop's connections and the synchronous ones."""
        with self._lock:
            engine = self._native_async.pop(asyncio.get_running_loop(), None)
        if engine is not None:
            await engine.config.transport.retire()
        self.close()

    # -- selection ---------------------------------------------------------------------------------------------------
    def capabilities(self) -> Any:
        """What the model can do, as DSPy's adapters ask an engine object; such an object says for itself.

        DSPy takes a capability that an engine lacks for False: ours passes on what DSPy itself would say of the model,
        so that JSONAdapter keeps sending schemas and tools go on working. The first question about a model that only
        LiteLLM knows imports LiteLLM, which takes seconds.
        """
        return capabilities(self._stand_in(self.clients))

    def _stand_in(self, clients: dict[str, Any]) -> StandIn:
        return StandIn(self.model, self.model_type, self.spec, clients, self._providers)

    def _select(self) -> Any:
        selection = self._selection
        if selection is None:
            clients = {key: value for key, value in self.clients.items() if key != "timeout"}
            selection = self._selection = select_backend(self._stand_in(clients), {})
        return selection

    def is_native(self, request: Request, beside: Beside | None) -> bool:
        """Whether the native engine carries this request; else LiteLLM does."""
        selection = self._select()
        extras = None if beside is None else beside.extras
        refusal = None if beside is None else beside.refusal
        if refusal is not None and (self.spec == "lm15" or (selection.resolution and selection.resolution.declared)):
            raise self._unsaid(refusal)  # a declaration is the authority on what that server can do
        if not selection.native:
            return False
        if self.extras or extras or refusal is not None:
            if self.spec == "lm15":
                raise self._cannot_carry({**self.extras, **(extras or {})})
            self.fell_back = True
            return False
        if self.spec != "auto" or request.config.cache is not None:
            return True
        known = self._planned(request)
        if not known:
            try:
                self._native_engine().plan(request)
                known.append(True)
            except UnsupportedFeatureError:
                if selection.resolution.declared:
                    raise  # the declaration is the authority on what that server can do
                known.append(False)
                self.fell_back = True
        return known[0]

    def _planned(self, request: Request) -> list[bool]:
        """Whether requests of this shape are carried, to be added while empty; forgotten if that takes the content."""
        if any(part.type != "text" for message in request.messages for part in message.parts):
            return []
        try:
            return self._carried(
                (request.config, request.tools, isinstance(request.system, str), len(request.messages) > 1)
            )
        except TypeError:  # tools, schemas, ...: not hashable
            return []

    def _not_said_by_own(self, beside: Beside) -> LMUnsupportedFeatureError:
        """An engine object carries what a canonical request says, and nothing else."""
        return self._cannot_carry(beside.extras) if beside.extras else self._unsaid(beside.refusal)

    def _unsaid(self, refusal: Exception | None) -> LMUnsupportedFeatureError:
        return LMUnsupportedFeatureError(
            f"engine={self.engine_name} cannot carry this call: {refusal}", model=self.model
        )

    def _cannot_carry(self, extras: dict[str, Any]) -> LMUnsupportedFeatureError:
        names = ", ".join(sorted(extras))
        return LMUnsupportedFeatureError(
            f"engine={self.engine_name} cannot carry {names}; use engine='auto' or 'litellm', or drop the argument",
            model=self.model,
            features=sorted(extras),
        )

    def _guess_provider(self) -> str | None:
        try:
            model_type = "chat" if self.model_type == "text" else self.model_type
            engine = LM15Engine(RouterConfig(env={}), model_type=model_type)
            return str(engine.resolve(self.model).provider)
        except Exception:  # not a model string the native registry knows: the price book falls back to its prefix
            return self.model.split("/", 1)[0] if "/" in self.model else None

    # -- engines -----------------------------------------------------------------------------------------------------
    def _native_engine(self) -> NativeEngine:
        engine = self._native
        if engine is None:
            with self._lock:
                if self._native is None:
                    transport = BoundedTransport(**connections(self.clients.get("timeout")))
                    self._native = NativeEngine(self._config(transport=transport), model_type=self.model_type)
                engine = self._native
        return engine

    def _native_async_engine(self) -> AsyncNativeEngine:
        loop = asyncio.get_running_loop()
        engine = self._native_async.get(loop)
        if engine is None:
            with self._lock:
                for dead in [other for other in self._native_async if other.is_closed()]:
                    self._native_async.pop(dead, None)
                transport = PacedAsyncTransport(**connections(self.clients.get("timeout")))
                engine = AsyncNativeEngine(self._config(transport=transport), model_type=self.model_type)
                self._native_async[loop] = engine
        return engine

    def _config(self, **connection: Any) -> RouterConfig:
        selection = self._select()
        provider, clients = selection.resolution.provider, selection.clients
        url = clients.get("api_base") or clients.get("base_url")
        return RouterConfig(
            api_keys={provider: clients["api_key"]} if clients.get("api_key") is not None else None,
            base_urls={provider: url} if url else None,
            providers=definitions(self._providers),
            **connection,
        )

    def _litellm(self, asynchronous: bool, request: Request, beside: Beside | None, until: float) -> Any:
        selection = self._select()
        options = dict(selection.clients)
        wire_model = None
        if selection.resolution is not None and selection.resolution.declared:
            wire_model, options = declared_door(self._stand_in(options), selection.resolution, options)
        timeout = wire_timeout(self.clients.get("timeout"), until)
        if timeout is not None:
            options["timeout"] = timeout
        body = body_of(beside, request, self.extras)
        if beside is not None and beside.body is not None and beside.body.get("prompt_cache") is not None:
            raise LMUnsupportedFeatureError(
                f"prompt_cache= of {self.model} needs the native engine, and this call goes through LiteLLM, which has "
                "no such bridge; use settings and inputs that the native engine carries, or leave prompt_cache out",
                model=self.model,
                features=["prompt_cache"],
            )
        extras = self.extras if beside is None else {**self.extras, **(beside.extras or {})}
        if self.model_type == "text":
            text_class = AsyncLiteLLMTextEngine if asynchronous else LiteLLMTextEngine
            engine: Any = text_class(options, extras, body)
        else:
            engine_class = AsyncExtendedLiteLLMEngine if asynchronous else ExtendedLiteLLMEngine
            engine = engine_class(model_type=self.model_type, wire_model=wire_model, **options)
            engine = engine.extended(extras) if body is None else engine.saying(body)
        engine.until = until
        return engine
