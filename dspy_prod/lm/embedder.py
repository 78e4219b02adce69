"""`dspy_prod.Embedder`: the drop-in for `dspy.Embedder`."""

from __future__ import annotations

import asyncio
import copy as copying_module
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, cast

import dspy

from dspy_prod.compat.dspy import caches_anything
from dspy_prod.compat.foreign import running_loop
from dspy_prod.context.current import current, stamped
from dspy_prod.errors import ConfigError, RejectedError, UnusableAnswerError
from dspy_prod.lm.copying import checked
from dspy_prod.lm.embedding import arguments_for, build, elsewhere, identity, name_of, prices_of
from dspy_prod.lm.operating import Operated
from dspy_prod.lm.settings import Settings, hide, recall, remember, settings_of
from dspy_prod.options import Budget, Cache, CircuitBreaker, Price, RateLimit, Retry
from dspy_prod.pipeline.clocks import in_machine_time
from dspy_prod.pipeline.drivers import arun, run
from dspy_prod.pipeline.embedding import embedding
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.pipeline.refusing import note
from dspy_prod.pipeline.texts import Asked, keys_of
from dspy_prod.pipeline.upstream.rows import array_of
from dspy_prod.policies.sharing import quoted
from dspy_prod.policies.vectors import VectorCache
from dspy_prod.pricing.warmup import WARMUP
from dspy_prod.privacy.outward import outward
from dspy_prod.privacy.unshown import unshown
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.runtime.living import LIVE
from dspy_prod.runtime.recent import Recent
from dspy_prod.stores.base import Store
from dspy_prod.telemetry.tap import NOTHING, TAP

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt


_MAX_VARIANTS: Final = 16
_MANY: Final = 32
"""Texts from which an asynchronous call looks into the store in a thread of its own."""

_INSTALLED: Final = ("pipeline", "settings", "identity", "_variants")


class Embedder(Operated, dspy.Embedder):
    """A `dspy.Embedder` with a circuit breaker, rate limiter, vector cache, budget and retries beneath it.

    Called as `dspy.Embedder` is, with a text or a list of texts, it gives the same float32 arrays.

        embed = dspy_prod.Embedder("openai/text-embedding-3-small", budget=dspy_prod.Budget(usd=1, per="day"))
        vectors = embed(["hello", "world"])  # shape (2, 1536)

    Args:
        model: LiteLLM's model string, or a function that takes a list of texts and gives a vector for each.
        batch_size: texts of a request at most. Fewer go together where the provider, the budget or `tpm` could not
            take so many.
        caching: `True` (no expiry, bounded), `False`, or a `Cache`. Vectors are kept for each text, so that only new
            ones are asked for.
        retry, breaker, limit, budget, store, namespace: as of `dspy_prod.LM`; what both name, they share.
        num_retries: another word for `Retry(attempts=num_retries + 1)`.
        fallbacks: the same model at other addresses: model strings, or embedders. Another model is refused, because
            its vectors could not be compared.
        prices: `{model: Price}`, or a `Price` for this model. A function costs nothing only if `Price(input=0,
            output=0)` says so; with a budget, one without a price is refused.
        clock: for tests.
        kwargs: arguments for the model, such as `api_key`, `api_base`, `timeout` (seconds per attempt), `dimensions`.

    Calling raises DSPy's errors, and `RejectedError` subclasses for what a policy refuses.
    """

    default_kwargs: dict[str, Any]

    def __init__(
        self,
        model: str | Callable[..., Any],
        batch_size: int = 200,
        caching: bool | Cache | Mapping[str, Any] = True,
        *,
        retry: Retry | Mapping[str, Any] | bool | None = None,
        breaker: CircuitBreaker | Mapping[str, Any] | bool | None = None,
        limit: RateLimit | Mapping[str, Any] | bool | None = None,
        budget: Budget | Sequence[Budget] | Mapping[str, Any] | None = None,
        fallbacks: Sequence[Any] = (),
        prices: Mapping[str, Price] | Price | None = None,
        store: str | Store | None = None,
        namespace: str | None = None,
        num_retries: int | None = None,
        clock: Clock = SYSTEM_CLOCK,
        **kwargs: Any,
    ) -> None:
        hide(kwargs)
        store = unshown(store)
        if not isinstance(model, str) and not callable(model):
            raise ConfigError(f"model= takes a model string or a function, not {type(model).__name__}")
        _check_size(batch_size)
        super().__init__(model, batch_size, caching is not False, **kwargs)
        clients, extras = arguments_for(model, kwargs)
        given = {
            "engine": "auto", "async_engine": None, "retry": retry, "num_retries": num_retries, "breaker": breaker,
            "limit": limit, "cache": caching if isinstance(caching, (Cache, Mapping)) else None, "budget": budget,
            "fallbacks": (), "prices": prices_of(model, prices), "store": store, "namespace": namespace, "clock": clock,
        }  # fmt: skip
        settings = checked(Settings(**settings_of(given), clients=clients, extras=extras), "dspy_prod.Embedder")
        self._fallbacks = elsewhere(model, settings, fallbacks)
        self._install(settings)
        if isinstance(model, str):
            WARMUP.start()

    def _install(self, settings: Settings) -> None:
        """Put a pipeline beneath this embedder."""
        self.settings = settings
        self.pipeline: Pipeline = build(self.model, settings, self._fallbacks)
        self.identity = identity(self.model, settings)
        self._told = dict(self.default_kwargs)
        self._variants: Recent[Embedder] = Recent(_MAX_VARIANTS)
        LIVE.add(cast("Any", self))

    def __repr__(self) -> str:
        settings: Settings | None = self.__dict__.get("settings")
        if settings is None:
            return "<dspy_prod.Embedder, not built yet>"  # an error reporter asks
        return outward(f"dspy_prod.Embedder({name_of(self.model)!r}, namespace={settings.namespace!r})")

    # -- calling -----------------------------------------------------------------------------------------------------
    def __call__(
        self, inputs: str | list[str], batch_size: int | None = None, caching: bool | None = None, **kwargs: Any
    ) -> npt.NDArray[np.float32]:
        """The vectors of some texts.

        Args:
            inputs: a text, or a list of texts.
            batch_size, caching: as of the embedder, for this call.
            kwargs: arguments for the model, over those of the embedder.

        Returns:
            float32: one row for a text, a row for each of a list.

        Raises:
            ValueError: something in the list is no text, or holds half a character, which no provider can receive.
            RejectedError: refused by a policy of this library.
            LMError: the upstream's error, once retries and fallbacks are exhausted.
        """
        one = isinstance(inputs, str)
        asked = self._asked(inputs, batch_size, caching, kwargs)
        if running_loop() is not None:
            asked.joins = False  # it holds up the loop on which another one's answer may depend
        with _seen(asked, self) as node:
            asked.look()
            if len(asked.rows) < len(set(asked.keys)):
                run(in_machine_time(embedding(asked), asked.pipeline.clock))
            return _given(asked, node, one)

    async def acall(
        self, inputs: str | list[str], batch_size: int | None = None, caching: bool | None = None, **kwargs: Any
    ) -> npt.NDArray[np.float32]:
        """Asynchronous `__call__`. A function runs in a thread, or is awaited if it is asynchronous."""
        one = isinstance(inputs, str)
        asked = self._asked(inputs, batch_size, caching, kwargs)
        with _seen(asked, self) as node:
            if len(asked.texts) < _MANY:
                asked.look()
            else:
                await asyncio.to_thread(asked.look)
            if len(asked.rows) < len(set(asked.keys)):
                await arun(in_machine_time(embedding(asked), asked.pipeline.clock))
            return _given(asked, node, one)

    def _asked(self, inputs: Any, batch_size: int | None, caching: bool | None, kwargs: dict[str, Any]) -> Asked:
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("All inputs must be strings.")
        if isinstance(self.model, str):
            _check_encodable(texts)
        size = batch_size or self.batch_size
        _check_size(size)
        embedder = self
        if kwargs or self.default_kwargs != self._told:
            embedder = self._variant({**self.default_kwargs, **hide(kwargs)})
        context = stamped(current())
        pipeline = embedder.pipeline
        caches = (self.caching if caching is None else caching) and caches_anything() and context.cache != "bypass"
        cache = pipeline.cache if caches else None
        if not isinstance(cache, VectorCache):
            return Asked(pipeline, texts, list(range(len(texts))), size, context, None, False)
        tenant = None if cache.options.shared else context.tenant
        keys = keys_of(embedder.identity, tenant, texts)
        joins = cache.options.single_flight and context.cache == "use"
        return Asked(pipeline, texts, keys, size, context, cache, joins)

    def _variant(self, arguments: dict[str, Any]) -> Embedder:
        """This embedder with other arguments for its model; kept, so that the next such call is served by it too."""
        key = repr(sorted(arguments.items()))
        kept = self._variants.find(key)
        if kept is None:
            from dataclasses import replace

            kept = copying_module.copy(self)
            kept.default_kwargs = arguments
            clients, extras = arguments_for(self.model, arguments)
            with quoted():
                kept._install(replace(self.settings, clients=clients, extras=extras, opened=self.pipeline.store))
            kept = self._variants.keep(key, kept)
        return kept

    # -- copies ------------------------------------------------------------------------------------------------------
    def __deepcopy__(self, memo: dict[int, Any]) -> Embedder:
        # Optimizers deep-copy programs; a budget that were copied with them would no longer be one budget.
        twin = copying_module.copy(self)
        twin.default_kwargs = dict(self.default_kwargs)
        memo[id(self)] = twin
        LIVE.add(cast("Any", twin))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in _INSTALLED}
        state["settings"] = self.settings.sealed(self.pipeline.store.url)
        state["_token"] = remember(self.settings)
        state["default_kwargs"] = state["_told"] = {}  # they are in the settings, where secrets are sealed
        state["_fallbacks"] = tuple([one.sealed() for one in self._fallbacks])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = recall(state.pop("_token", ""))
        sealed: Settings = state.pop("settings")
        self.__dict__.update(state)
        settings = sealed.unsealed() if known is None else known
        self._fallbacks = tuple([one.unsealed() for one in self._fallbacks])
        self.default_kwargs = {**settings.extras, **settings.clients}
        with quoted():
            self._install(settings)


@contextmanager
def _seen(asked: Asked, embedder: Embedder) -> Iterator[Any]:
    """Have whoever looks see the call, and note a refusal."""
    tap = TAP.active
    with NOTHING if tap is None else tap.embedding_call(name_of(embedder.model), {"input": asked.texts}) as node:
        if tap is not None:
            asked.context = stamped(current())  # what comes of it belongs to this node
        try:
            yield node
        except RejectedError as error:
            note(asked.latest or asked.call(asked.texts), error)
            raise


def _given(asked: Asked, node: Any, one: bool) -> npt.NDArray[np.float32]:
    """The array that a caller gets."""
    try:
        found = array_of(asked.answer())
    except ValueError as error:
        raise UnusableAnswerError(
            f"The vectors of {asked.pipeline.primary.model} cannot be used together: {error}. If the model has "
            "changed, clear what is cached with cache_clear()",
            model=asked.pipeline.primary.model,
        ) from error
    node.answered({"vectors": len(asked.texts), "dimension": int(found.shape[-1])})
    return cast("npt.NDArray[np.float32]", found[0]) if one else found


def _check_encodable(texts: Sequence[str]) -> None:
    """Refuse what no provider can receive, as DSPy does for an LM's prompt."""
    for place, text in enumerate(texts):
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"inputs[{place}] contains half a character (U+{ord(text[error.start]):04X}), which no provider can "
                "receive; repair the text first, e.g. text.encode('utf-8', 'replace').decode('utf-8')"
            ) from None


def _check_size(size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(f"batch_size={size!r} must be a number of texts, 1 or more")
