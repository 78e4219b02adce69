"""`dspy_prod.LM`: the drop-in for `dspy.LM`, and `wrap` for an LM that somebody else built."""

from __future__ import annotations

import asyncio
import atexit
import copy as copying_module
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import dspy
from dspy.clients.base_lm import BaseLM
from dspy.clients.execution import finalize, prepare
from dspy.clients.lm import _check_engines, _refuse_client_settings
from dspy.lm15 import CacheConfig, Request
from dspy.utils.callback import BaseCallback, with_callbacks
from dspy.utils.dummies import DummyLM

from dspy_prod.errors import ConfigError
from dspy_prod.lm.advice import warn_coarse_budgets
from dspy_prod.lm.assembling import assemble, refuse_own_forward
from dspy_prod.lm.calling import begin
from dspy_prod.lm.copying import REBUILDS, Variants, changed, check_timeout, pinned
from dspy_prod.lm.executing import arun_call, run_call
from dspy_prod.lm.operations import Operations
from dspy_prod.lm.settings import (
    Settings,
    budget_options,
    default_namespace,
    fallback_list,
    option,
    price_options,
    recall,
    remember,
    retry_option,
    split,
)
from dspy_prod.options import Budget, Cache, CircuitBreaker, Price, RateLimit, Retry
from dspy_prod.pipeline.engine import AsyncProdEngine, ProdEngine
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.pipeline.scope import SCOPE, identity_of
from dspy_prod.pipeline.upstream.upstream import address_of
from dspy_prod.pricing.warmup import WARMUP
from dspy_prod.records import usd
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.runtime.living import LIVE
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.base import Store
from dspy_prod.telemetry.tap import NOTHING, TAP


class LM(Operations, dspy.LM):
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
        _check_engines(engine, async_engine)
        canonical, clients, extras = split(kwargs)
        _refuse_client_settings(engine, {key: value for key, value in clients.items() if key != "timeout"})
        if extras and not isinstance(engine, str):
            raise ConfigError(
                f"an engine object carries canonical arguments only; it cannot be given {', '.join(sorted(extras))}"
            )
        check_timeout(clients.get("timeout"))
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
            fallbacks=fallback_list(fallbacks),
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
        if isinstance(engine, str):  # else no call may need DSPy's prices
            WARMUP.start()

    def _install(self, settings: Settings, pipeline: Pipeline | None = None) -> None:
        """Put a pipeline beneath this LM."""
        self.pipeline = assemble(self.model, self.model_type, settings) if pipeline is None else pipeline
        self.settings = settings = pinned(settings, self.pipeline.store)
        self._variants = Variants()
        self.identity = identity_of(
            [
                *(self.model, self.model_type, self.use_developer_role),
                address_of(dict(settings.clients), self.model),
                repr(dict(settings.extras)),
            ],
            settings.engine,
        )
        self._engine_spec = ProdEngine(self.pipeline, self.identity, self.cache)
        self._async_engine_spec = AsyncProdEngine(self.pipeline, self.identity, self.cache)
        warn_coarse_budgets(self)
        LIVE.add(self)

    def __repr__(self) -> str:
        return f"dspy_prod.LM({self.model!r}, namespace={self.settings.namespace!r})"

    # -- calling -----------------------------------------------------------------------------------------------------
    @with_callbacks  # type: ignore[untyped-decorator]
    def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Answer a prompt, messages or a typed `Request`, exactly as `dspy.LM` does."""
        tap = TAP.active
        with NOTHING if tap is None else tap.lm_call(self.model, {"prompt": prompt, "messages": messages}) as node:
            lm, kwargs, scope, known = begin(self, prompt, messages, kwargs)
            with scope:
                if known is None:
                    call = prepare(lm, prompt, messages, kwargs)
                    known = call, run_call(lm, call)
                outputs = finalize(self, *known)
            node.answered(outputs)
            return outputs

    @with_callbacks  # type: ignore[untyped-decorator]
    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Asynchronous `__call__`."""
        tap = TAP.active
        with NOTHING if tap is None else tap.lm_call(self.model, {"prompt": prompt, "messages": messages}) as node:
            lm, kwargs, scope, known = begin(self, prompt, messages, kwargs)
            with scope:
                if known is None:
                    if isinstance(prompt, Request) or "request" in kwargs:  # may read the files of its media
                        call = await asyncio.to_thread(prepare, lm, prompt, messages, kwargs, asynchronous=True)
                    else:
                        call = prepare(lm, prompt, messages, kwargs, asynchronous=True)
                    known = call, await arun_call(lm, call)
                outputs = finalize(self, *known)
            node.answered(outputs)
            return outputs

    def update_history(self, entry: dict[str, Any]) -> None:
        """Record a call in DSPy's history, with its real cost and whether the cache answered."""
        scope = SCOPE.get()
        if scope is not None:
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
        policies = {key: kwargs.pop(key) for key in list(kwargs) if key in REBUILDS}
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
            copied._install(changed(self.settings, policies, extras))
        else:
            copied._engine_spec.caches = copied._async_engine_spec.caches = copied.cache
            LIVE.add(copied)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> LM:
        # Optimizers deep-copy programs; a budget that were copied with them would no longer be one budget.
        twin: LM = copying_module.copy(self)
        memo[id(self)] = twin
        twin.kwargs = copying_module.deepcopy(self.kwargs, memo)
        twin.history = list(self.history)
        twin.callbacks = list(self.callbacks)
        LIVE.add(twin)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        for name in ("_engine_spec", "_async_engine_spec", "_variants", "pipeline", "identity"):
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
        from dspy_prod.lm.state import dump

        return dump(self, BaseLM.dump_state(self))

    @classmethod
    def load_state(cls, state: dict[str, Any], *, allow_custom_lm_class: bool = False) -> LM:
        """The LM that `dump_state` described; keys come from the environment."""
        from dspy_prod.lm.state import load

        loaded: LM = load(cls, state, allow_custom_lm_class)
        return loaded

    @classmethod
    def from_config(cls, path: str | Path | None = None, **overrides: Any) -> LM:
        """An LM from a TOML file and `DSPY_PROD__...` environment variables (see `dspy_prod.lm.config`).

        Args:
            path: the file; None for environment variables alone.
            overrides: arguments that win over both.

        Raises:
            ConfigError: a key is unknown or impossible; the message names file and key.
        """
        from dspy_prod.lm.config import load_config

        arguments = {**load_config(path), **overrides}
        if "model" not in arguments:
            raise ConfigError(f'{path or "environment"}: model: is missing; add model = "openai/gpt-4o-mini"')
        return cls(**arguments)


LM.__module__ = "dspy_prod.lm"  # the name in saved states and pickles


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
    if not isinstance(lm, (dspy.LM, DummyLM)):
        raise ConfigError(f"wrap takes a dspy.LM, got {type(lm).__name__}; for a custom model implement an engine")
    refuse_own_forward(lm)
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


# Registered after the stores' own ending, which `assemble` imports, and hence done before it.
atexit.register(REAPER.flush, 2.0)
