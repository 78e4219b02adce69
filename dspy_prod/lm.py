"""`dspy_prod.LM`: the drop-in for `dspy.LM`, and `wrap` for an LM that somebody else built."""

from __future__ import annotations

import asyncio
import copy as copying
import datetime as dt
import inspect
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dspy
import orjson
from dspy.clients._deprecation import _adapter_call
from dspy.clients.backend_selection import CLIENT_KEYS
from dspy.clients.base_lm import BaseLM
from dspy.clients.call_result import CallResult
from dspy.clients.execution import PreparedCall, aexecute, execute, finalize, prepare
from dspy.clients.lm import _check_engines, _refuse_client_settings
from dspy.dsp.utils.settings import settings as dspy_settings
from dspy.lm15 import CacheConfig, Request
from dspy.utils.callback import BaseCallback, with_callbacks
from dspy.utils.dummies import DummyLM

from dspy_prod.assemble import assemble, disabled
from dspy_prod.clock import SYSTEM_CLOCK, Clock
from dspy_prod.context import current
from dspy_prod.errors import ConfigError
from dspy_prod.options import Budget, Cache, CircuitBreaker, Price, RateLimit, Retry
from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.engine import AsyncProdEngine, ProdEngine
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.pipeline.scope import SCOPE, Scope, raw_key
from dspy_prod.pipeline.upstream import address_of
from dspy_prod.records import usd
from dspy_prod.settings import (
    Settings,
    budget_options,
    default_namespace,
    option,
    price_options,
    recall,
    remember,
    retry_option,
    split,
)
from dspy_prod.stores.base import Store

if TYPE_CHECKING:
    from dspy_prod.ledger import Ledger
    from dspy_prod.status import Health, Preview

_POLICIES = frozenset(
    {"retry", "breaker", "limit", "budget", "fallbacks", "prices", "store", "namespace", "clock", "num_retries"}
)
_REBUILDS = _POLICIES | {"model", "model_type", "engine", "async_engine"} | CLIENT_KEYS


class LM(dspy.LM):
    """A `dspy.LM` with a circuit breaker, rate limiter, response cache, budget, retries and fallbacks beneath it.

    Takes every argument of `dspy.LM` and, besides:

    Args:
        cache: `True` (as in DSPy: no expiry, bounded), `False`, or a `Cache`; per call too.
        num_retries: DSPy's word for `Retry(attempts=num_retries + 1)`; do not give both.
        engine: `"auto"`, `"lm15"`, `"litellm"`, or an engine object (with `async_engine=`) that runs upstream.
        timeout: seconds per attempt.
        retry: a `Retry`; default: 3 attempts. `False`: no retries.
        breaker: a `CircuitBreaker`; default: on. `False`: none.
        limit: a `RateLimit`; default: none, but 429 and Retry-After are honoured.
        budget: a `Budget` or a list of them; default: none.
        fallbacks: model names or `dspy.LM` / `dspy_prod.LM` objects, tried in order; each is a route of its own.
        prices: `{model: Price}`, for models whose price DSPy does not know or knows wrongly.
        store: where state lives: a URL (`"sqlite:///path"`, `"memory://"`) or a store object; default: the SQLite file
            `.dspy_prod/state.db`, or `$DSPY_PROD_STORE`.
        namespace: keeps programs that share a store apart; default: the project directory's name.

    Calling raises what `dspy.LM` raises, and `RejectedError` subclasses for what a policy refuses.
    """

    _cache_responses = False  # DSPy's own cache stays off; ours is beneath

    def __init__(
        self,
        model: str,
        model_type: Literal["chat", "text", "responses"] = "chat",
        temperature: float | None = None,
        max_tokens: int | None = None,
        cache: bool | Cache | Mapping[str, Any] = True,
        callbacks: list[BaseCallback] | None = None,
        num_retries: int | None = None,
        provider: Any = None,
        finetuning_model: str | None = None,
        launch_kwargs: dict[str, Any] | None = None,
        train_kwargs: dict[str, Any] | None = None,
        use_developer_role: bool = False,
        engine: Any = "auto",
        async_engine: Any = None,
        prompt_cache: CacheConfig | None = None,
        *,
        retry: Retry | Mapping[str, Any] | bool | None = None,
        breaker: CircuitBreaker | Mapping[str, Any] | bool | None = None,
        limit: RateLimit | Mapping[str, Any] | bool | None = None,
        budget: Budget | Sequence[Budget] | Mapping[str, Any] | None = None,
        fallbacks: Sequence[str | dspy.LM] = (),
        prices: Mapping[str, Price] | None = None,
        store: str | Store | None = None,
        namespace: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
        **kwargs: Any,
    ) -> None:
        if isinstance(fallbacks, (str, dspy.LM)):
            raise ConfigError("fallbacks= takes a list, e.g. fallbacks=['anthropic/claude-haiku-4-5']")
        _check_engines(engine, async_engine)
        canonical, clients, extras = split(kwargs)
        _refuse_client_settings(engine, {key: value for key, value in clients.items() if key != "timeout"})
        if extras and not isinstance(engine, str):
            raise ConfigError(
                f"an engine object carries canonical arguments only; it cannot be given {', '.join(sorted(extras))}"
            )
        _check_timeout(clients.get("timeout"))
        settings = Settings(
            engine=engine,
            async_engine=async_engine,
            clients=clients,
            extras=extras,
            retry=retry_option(retry, num_retries),
            breaker=option(CircuitBreaker, breaker, "breaker", default=CircuitBreaker()),
            limit=option(RateLimit, limit, "limit", default=None),
            cache=option(Cache, cache, "cache", default=Cache()) or Cache(),
            budgets=budget_options(budget),
            fallbacks=tuple(fallbacks),
            prices=price_options(prices),
            store=store,
            namespace=namespace or default_namespace(),
            clock=clock,
        )
        super().__init__(
            model,
            model_type,
            temperature,
            max_tokens,
            cache is not False,
            callbacks,
            0,  # retries live in exactly one layer: ours
            provider,
            finetuning_model,
            launch_kwargs,
            train_kwargs,
            use_developer_role,
            prompt_cache=prompt_cache,
            **canonical,
        )
        self._install(settings)

    def _install(self, settings: Settings, pipeline: Pipeline | None = None) -> None:
        """Put a pipeline beneath this LM."""
        self.pipeline = assemble(self.model, self.model_type, settings) if pipeline is None else pipeline
        self.settings = settings = _pinned(settings, self.pipeline.store)
        self._identity = orjson.dumps(
            [self.model, self.model_type, address_of(dict(settings.clients), self.model), repr(dict(settings.extras))]
        )
        self._engine_spec = ProdEngine(self.pipeline, self._identity)
        self._async_engine_spec = AsyncProdEngine(self.pipeline, self._identity)
        _warn_coarse_budgets(self)
        LIVE.add(self)

    def __repr__(self) -> str:
        return f"dspy_prod.LM({self.model!r}, namespace={self.settings.namespace!r})"

    # -- calling -----------------------------------------------------------------------------------------------------
    @with_callbacks  # type: ignore[untyped-decorator]
    def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Answer a prompt, messages or a typed `Request`, exactly as `dspy.LM` does."""
        lm, kwargs, extras = self._per_call(kwargs)
        scope = lm._scope(prompt, messages, kwargs, extras)
        hit = lm._hit(scope, prompt, messages, kwargs)
        if hit is not None:
            return finalize(self, *hit)
        if messages is not None:
            _warn_messages(self, messages)
        token = SCOPE.set(scope)
        try:
            call = prepare(lm, prompt, messages, kwargs)
            return finalize(self, call, execute(lm, call))
        finally:
            SCOPE.reset(token)

    @with_callbacks  # type: ignore[untyped-decorator]
    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Asynchronous `__call__`."""
        lm, kwargs, extras = self._per_call(kwargs)
        scope = lm._scope(prompt, messages, kwargs, extras)
        hit = lm._hit(scope, prompt, messages, kwargs)
        if hit is not None:
            return finalize(self, *hit)
        if messages is not None:
            _warn_messages(self, messages)
        token = SCOPE.set(scope)
        try:
            call = await asyncio.to_thread(prepare, lm, prompt, messages, kwargs, asynchronous=True)
            return finalize(self, call, await aexecute(lm, call))
        finally:
            SCOPE.reset(token)

    def _per_call(self, kwargs: dict[str, Any]) -> tuple[LM, dict[str, Any], dict[str, Any] | None]:
        """(the LM to use, its canonical arguments, extras beside them) for one call's arguments."""
        if not kwargs:
            return self, kwargs, None
        plain = True
        for key in kwargs:
            if key not in _PLAIN_CALL_KEYS:
                plain = False
                break
        if plain:
            return self, kwargs, None
        cache = kwargs.get("cache")
        request = {"request": kwargs.pop("request")} if "request" in (kwargs := dict(kwargs)) else {}
        if isinstance(cache, (Cache, Mapping)):
            return self.copy(cache=cache)._per_call({**kwargs, **request, "cache": True})
        kwargs.pop("cache", None)
        canonical, clients, extras = split(kwargs)
        if cache is not None:
            canonical["cache"] = cache
        canonical.update(request)
        if not clients:
            return self, canonical, extras or None
        if "timeout" in clients:
            _check_timeout(clients["timeout"])
        return self.copy(**clients), canonical, extras or None

    def _scope(self, prompt: Any, messages: Any, kwargs: dict[str, Any], extras: dict[str, Any] | None) -> Scope:
        context = current()
        merged = {**self.kwargs, **kwargs} if kwargs else self.kwargs
        rollout = merged.get("rollout_id")
        uses_cache = merged.pop("cache", self.cache) if kwargs else self.cache
        base = None
        use_cache = bool(uses_cache) and context.cache != "bypass" and self.pipeline.cache is not None
        if use_cache and not isinstance(prompt, Request) and "request" not in merged:
            tenant = None if self.settings.cache.shared else context.tenant
            base = raw_key(self._identity, prompt, messages, {**merged, **extras} if extras else merged, tenant)
        return Scope(context, base, extras, rollout, use_cache)

    def _hit(
        self, scope: Scope, prompt: Any, messages: Any, kwargs: dict[str, Any]
    ) -> tuple[PreparedCall, CallResult] | None:
        """A fresh answer from memory, before any of DSPy's work; None when the engine has to look."""
        base = scope.base
        if base is None or scope.context.cache != "use":
            return None
        cache = self.pipeline.cache
        assert cache is not None
        entry = cache.fresh(base)
        if entry is None:
            scope.missed = True
            return None
        if self.model_type == "responses":
            return None
        text = entry.text
        if text is None or kwargs.get("n", 1) not in (1, None) or self.kwargs.get("n", 1) not in (1, None):
            return None
        if dspy_settings.send_stream is not None:
            return None  # a listener wants events: the engine replays the answer for it
        response = entry.response
        Call(self.pipeline, _ANY_REQUEST, scope.context, base, None, False, scope.records).record_cached()
        usage: dict[str, Any] = {}
        result = CallResult((response,), [text], usage, 0.0, response, response.model, True)
        return PreparedCall(prompt, messages, kwargs, usage, None, True, 1, True), result

    def update_history(self, entry: dict[str, Any]) -> None:
        """Record a call in DSPy's history, with its real cost and whether the cache answered."""
        scope = SCOPE.get()
        if scope is None:
            entry["cached"] = True
        else:
            records = scope.records
            if len(records) == 1:
                record = records[0]
                entry["cost"], entry["cached"], entry["route"] = record.cost_usd, record.cached, record.route
            else:
                costs = [record.cost_nano for record in records]
                entry["cost"] = None if None in costs else usd(sum(cost for cost in costs if cost is not None))
                entry["cached"] = bool(records) and all(record.cached for record in records)
                entry["route"] = records[-1].route if records else None
        super().update_history(entry)

    # -- copies ------------------------------------------------------------------------------------------------------
    def copy(self, **kwargs: Any) -> LM:
        """A copy that shares breaker, limits, budgets, cache and ledger, with some arguments changed."""
        policies = {key: kwargs.pop(key) for key in list(kwargs) if key in _REBUILDS}
        if isinstance(kwargs.get("cache"), (Cache, Mapping)):
            policies["cache"] = kwargs.pop("cache")
            kwargs["cache"] = True
        canonical, _, extras = split({key: value for key, value in kwargs.items() if not hasattr(self, key)})
        attributes = {key: value for key, value in kwargs.items() if hasattr(self, key)}
        copied: LM = BaseLM.copy(self, **attributes, **canonical)
        for name in ("model", "model_type"):
            if name in policies:
                setattr(copied, name, policies.pop(name))
                policies["_rebuild"] = True
        if policies or extras:
            copied._install(_changed(self.settings, policies, extras))
        else:
            LIVE.add(copied)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> LM:
        # Optimizers deep-copy programs; a budget that were copied with them would no longer be one budget.
        twin: LM = copying.copy(self)
        memo[id(self)] = twin
        twin.kwargs = copying.deepcopy(self.kwargs, memo)
        twin.history = list(self.history)
        twin.callbacks = list(self.callbacks)
        LIVE.add(twin)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        for name in ("_engine_spec", "_async_engine_spec", "pipeline", "_identity"):
            state.pop(name, None)
        state["settings"] = replace(self.settings.sealed(), store=self.pipeline.store.url)
        state["_token"] = remember(self.settings)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = recall(state.pop("_token", ""))  # in the same process: the same store, keys and clock
        super().__setstate__(state)
        self._install(self.settings.unsealed() if known is None else known)

    def dump_state(self) -> dict[str, Any]:
        """What `load_state` rebuilds this LM from: JSON, without keys."""
        from dspy_prod.state import dump

        return dump(self, BaseLM.dump_state(self))

    @classmethod
    def load_state(cls, state: dict[str, Any], *, allow_custom_lm_class: bool = False) -> LM:
        """The LM that `dump_state` described; keys come from the environment."""
        from dspy_prod.state import load

        return load(cls, state, allow_custom_lm_class)

    @classmethod
    def from_config(cls, path: str | Path | None = None, **overrides: Any) -> LM:
        """An LM from a TOML file and `DSPY_PROD__...` environment variables (see `dspy_prod.config`).

        Args:
            path: the file; None for environment variables alone.
            overrides: arguments that win over both.

        Raises:
            ConfigError: a key is unknown or impossible; the message names file and key.
        """
        from dspy_prod.config import load_config

        arguments = {**load_config(path), **overrides}
        if "model" not in arguments:
            raise ConfigError(f'{path or "environment"}: model: is missing; add model = "openai/gpt-4o-mini"')
        return cls(**arguments)

    # -- operating ---------------------------------------------------------------------------------------------------
    @property
    def ledger(self) -> Ledger:
        """The records of every attempt, in this LM's store and namespace."""
        from dspy_prod.ledger import Ledger

        return Ledger(self.pipeline.store, self.pipeline.clock)

    def costs(self, by: str | None = None) -> Any:
        """What was spent: a `CostSummary`, or sums by `"day"`, `"model"`, `"user"`, `"tenant"`, `"tag:<key>"`, ..."""
        from dspy_prod.status import costs, costs_by

        return costs(self.pipeline) if by is None else costs_by(self.pipeline.store, by)

    def health(self) -> Health:
        """State of breaker, limiter, cache and costs, and one overall status."""
        from dspy_prod.status import health

        return health([self.pipeline])

    def preview(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Preview:
        """What a call would cost at most, whether it is affordable, and how long it would wait; sends nothing."""
        from dspy_prod.status import preview

        lm, kwargs, extras = self._per_call(kwargs)
        return preview(lm.pipeline, lm, prepare(lm, prompt, messages, kwargs), extras)

    def cache_clear(self) -> None:
        """Forget every cached answer of this store and namespace."""
        if self.pipeline.cache is not None:
            self.pipeline.cache.clear()

    def close(self) -> None:
        """Flush the ledger and close pooled connections. The LM stays usable."""
        from dspy_prod.pipeline.reaper import REAPER

        REAPER.flush()
        self.pipeline.store.flush(5.0)
        self.pipeline.close()

    async def aclose(self) -> None:
        """Asynchronous `close`, for this event loop's connections too."""
        await self.pipeline.aclose()
        await asyncio.to_thread(self.close)


def wrap(lm: dspy.LM, **policies: Any) -> LM:
    """The same LM with policies beneath it.

    Args:
        lm: a `dspy.LM` somebody else built, or DSPy's `DummyLM`; its cache and retries are replaced by ours.
        policies: policy arguments of `dspy_prod.LM`.

    Raises:
        ConfigError: another kind of LM, or one with a `forward` of its own, which would be bypassed.
    """
    if isinstance(lm, LM):
        return lm.copy(**policies)
    base = next((known for known in (dspy.LM, DummyLM) if isinstance(lm, known)), None)
    if base is None:
        raise ConfigError(f"wrap takes a dspy.LM, got {type(lm).__name__}; for a custom model implement an engine")
    if any(getattr(lm, name).__func__ is not getattr(base, name) for name in ("forward", "aforward")):
        raise ConfigError(
            f"{type(lm).__name__} overrides forward or aforward, which no engine reaches; implement an engine and use "
            "dspy_prod.LM(..., engine=...)"
        )
    arguments = dict(lm.kwargs)
    tokens = arguments.pop("max_tokens", None)
    arguments["max_tokens"] = arguments.pop("max_completion_tokens", None) if tokens is None else tokens
    if "retry" not in policies:
        arguments["num_retries"] = lm.num_retries
    for name in ("provider", "finetuning_model", "launch_kwargs", "train_kwargs", "use_developer_role"):
        if hasattr(lm, name):
            arguments[name] = getattr(lm, name)
    arguments["cache"] = lm.cache and getattr(lm, "_cache_responses", True)
    arguments["callbacks"] = list(lm.callbacks)
    if "engine" not in policies:
        arguments["engine"], arguments["async_engine"] = lm._engine_spec, lm._async_engine_spec
    return LM(lm.model, lm.model_type, **{**arguments, **policies})


LIVE: weakref.WeakSet[LM] = weakref.WeakSet()
"""The LMs alive in this process, for `dspy_prod.health()`."""

_ANY_REQUEST: Any = None  # a hit in memory never looks at the request
_PLAIN_CALL_KEYS = frozenset(
    {
        "temperature",
        "max_tokens",
        "max_completion_tokens",
        "top_p",
        "n",
        "rollout_id",
        "response_format",
        "tools",
        "tool_choice",
        "stop",
        "seed",
        "logprobs",
        "reasoning_effort",
    }
)


def _pinned(settings: Settings, store: Store) -> Settings:
    """The settings with the store they found, so that copies find the same one from another directory too."""
    if settings.opened is store or (settings.store is None and not store.durable):  # memory, for want of a file
        return settings
    return replace(settings, opened=store)


def _changed(settings: Settings, policies: dict[str, Any], extras: dict[str, Any]) -> Settings:
    changes: dict[str, Any] = {}
    if "retry" in policies or "num_retries" in policies:
        changes["retry"] = retry_option(policies.get("retry"), policies.get("num_retries"))
    if "breaker" in policies:
        changes["breaker"] = option(CircuitBreaker, policies["breaker"], "breaker", default=CircuitBreaker())
    if "limit" in policies:
        changes["limit"] = option(RateLimit, policies["limit"], "limit", default=None)
    if "cache" in policies:
        changes["cache"] = option(Cache, policies["cache"], "cache", default=Cache())
    if "budget" in policies:
        changes["budgets"] = budget_options(policies["budget"])
    if "prices" in policies:
        changes["prices"] = price_options(policies["prices"])
    if "fallbacks" in policies:
        changes["fallbacks"] = tuple(policies["fallbacks"])
    for name in ("store", "namespace", "clock", "engine", "async_engine"):
        if name in policies:
            changes[name] = policies[name]
    if "engine" in policies and "async_engine" not in policies:
        changes["async_engine"] = None
    clients = {key: value for key, value in policies.items() if key in CLIENT_KEYS}
    if clients:
        merged = {**settings.clients, **clients}
        changes["clients"] = {key: value for key, value in merged.items() if value is not None}
    if extras:
        changes["extras"] = {k: v for k, v in {**settings.extras, **extras}.items() if v is not None}
    if not changes.keys().isdisjoint(("store", "namespace", "clock")):
        changes["opened"] = None
    changed = replace(settings, **changes)
    _check_engines(changed.engine, changed.async_engine)
    connection = {key: value for key, value in changed.clients.items() if key != "timeout"}
    _refuse_client_settings(changed.engine, connection, where="LM.copy")
    return changed


def _check_timeout(timeout: Any) -> None:
    if isinstance(timeout, dt.timedelta):
        raise ConfigError("timeout= takes seconds, as in dspy.LM; pass timeout=delta.total_seconds()")
    if isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and not 0 < timeout < float("inf"):
        raise ConfigError(f"timeout={timeout!r} must be a positive number of seconds")


def _warn_messages(lm: LM, messages: Any) -> None:
    """DSPy's own deprecation of `messages=`, attributed to the caller instead of to this library."""
    origin = _adapter_call.get()
    if origin is not None and origin[0] is lm and origin[1] is messages:
        return
    level = 1
    frame = inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.split(".", 1)[0] not in ("dspy", "dspy_prod"):
            break
        level += 1
        frame = frame.f_back
    warnings.warn(
        "Passing OpenAI-style messages= to an LM is deprecated in DSPy and goes away in DSPy 3.5; "
        "pass a dspy.lm15.Request, or a plain prompt",
        DeprecationWarning,
        stacklevel=level,
    )


def _warn_coarse_budgets(lm: LM) -> None:
    """Warn when one call's bound is a large part of a budget: the last part of it could not be spent."""
    if disabled() or not lm.settings.budgets:
        return
    tokens = lm.kwargs.get("max_tokens") or lm.kwargs.get("max_completion_tokens")
    if tokens is None or not isinstance(lm.settings.engine, str):
        return
    rates = lm.pipeline.primary.rates()
    if rates is None:
        return
    bound = rates.bound(0, int(tokens))
    for budget in lm.settings.budgets:
        if bound > 0.05 * budget.limit_nano:
            warnings.warn(
                f"max_tokens={tokens} lets one call of {lm.model} reserve {usd(bound):.6f} USD, more than 5 % of the "
                f"budget {budget.title!r} ({budget.usd:g} USD); up to one such reservation may stay unspent. "
                "Lower max_tokens, or set shrink_last=True",
                UserWarning,
                stacklevel=4,
            )
