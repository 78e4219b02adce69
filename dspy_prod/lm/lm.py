"""`dspy_prod.LM`: the drop-in for `dspy.LM`."""

from __future__ import annotations

import atexit
import copy as copying_module
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import dspy
from dspy.clients.base_lm import BaseLM
from dspy.clients.execution import prepare
from dspy.lm15 import CacheConfig
from dspy.utils.callback import BaseCallback, with_callbacks

from dspy_prod.compat.dspy import engines_of, has_callbacks, set_engines
from dspy_prod.compat.finishing import append, entry_of, finish, keep, keeps_history
from dspy_prod.errors import ConfigError
from dspy_prod.lm.advice import warn_coarse_budgets, warn_idle_fallbacks, warn_steered_budgets
from dspy_prod.lm.arguments import check_tokens
from dspy_prod.lm.assembling import assemble
from dspy_prod.lm.beneath import INSTALLED, MAX_VARIANTS, Beneath, Watching
from dspy_prod.lm.calling import Known, aask, ask, begin, calls_of, per_call
from dspy_prod.lm.copying import checked, copied, pinned
from dspy_prod.lm.history import Arguments, tell
from dspy_prod.lm.operating import Operated
from dspy_prod.lm.plain import AsPlain
from dspy_prod.lm.settings import CANONICAL_KEYS, DSPY, Settings, hide, recall, remember, settings_of, split
from dspy_prod.lm.watching import Watched, arguments_of, settled
from dspy_prod.options import Budget, Cache, CircuitBreaker, Price, RateLimit, Retry
from dspy_prod.pipeline.engine import AsyncProdEngine, ProdEngine
from dspy_prod.pipeline.scope import SCOPE, Scope, identity_of
from dspy_prod.pipeline.upstream.destination import destination, digest, without_credentials
from dspy_prod.policies.sharing import quoted
from dspy_prod.pricing.warmup import WARMUP
from dspy_prod.privacy.outward import outward
from dspy_prod.privacy.unshown import unshown
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.runtime.living import LIVE
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.runtime.recent import Recent
from dspy_prod.stores.base import Store
from dspy_prod.telemetry.tap import NOTHING, TAP

if TYPE_CHECKING:
    from dspy_prod.status.health import Preview


class LM(AsPlain, Operated, dspy.LM):
    """A `dspy.LM` with a circuit breaker, rate limiter, response cache, budget, retries and fallbacks beneath it.

    Takes every argument of `dspy.LM`. These mean more than there, or are new:

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
        store: where state lives: a URL (`"sqlite:///path"`, `"redis://host/0"`, `"memory://"`) or a store object;
            default: `$DSPY_PROD__STORE` or `$DSPY_PROD_STORE`, else the SQLite file `.dspy_prod/state.db`.
        namespace: keeps programs that share a store apart; default: the project directory's name.
        clock: for tests.

    Calling raises what `dspy.LM` raises, and `RejectedError` subclasses for what a policy refuses.

    Example:
        ```python
        lm = dspy_prod.LM("openai/gpt-4o-mini", max_tokens=200, budget=dspy_prod.Budget(usd=5, per="day"))
        dspy.configure(lm=lm)
        print(lm("hello"), lm.costs().today_usd, lm.health().status)
        ```
    """

    kwargs: dict[str, Any]

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
        hide(kwargs)
        store, launch_kwargs, train_kwargs = unshown(store), unshown(launch_kwargs), unshown(train_kwargs)
        given = locals()  # every argument by its name: the table in `settings.py` says what becomes of it
        canonical, clients, extras = split(kwargs)
        if extras and not isinstance(engine, str):
            raise ConfigError(
                f"an engine object carries canonical arguments only; it cannot be given {', '.join(sorted(extras))}"
            )
        settings = checked(Settings(**settings_of(given), clients=clients, extras=extras), "dspy.LM")
        own = {name: given[name] for name in DSPY}
        own["num_retries"] = 0  # retries live in exactly one layer: ours
        super().__init__(**own, cache=cache is not False, **canonical)
        self.kwargs.update({name: value for name, value in kwargs.items() if name not in canonical})
        self._install(settings)
        warn_steered_budgets(self)
        warn_idle_fallbacks(self)
        if isinstance(engine, str):  # else no call may need DSPy's prices
            WARMUP.start()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, Arguments(value) if name == "kwargs" and type(value) is dict else value)

    def _install(self, settings: Settings) -> None:
        """Put a pipeline beneath this LM."""
        check_tokens(self.kwargs)
        self.pipeline = assemble(self.model, self.model_type, settings)
        self.settings = settings = pinned(settings, self.pipeline.store)
        self._variants: Recent[Beneath] = Recent(MAX_VARIANTS)
        self.watched: Watching = Watched(self.model, self.kwargs, settings.engine)
        clients, extras = settings.clients, settings.extras
        parts = [self.model, self.model_type, self.use_developer_role, destination(clients, self.model, extras)]
        self.identity = identity_of([*parts, digest(without_credentials(extras))], settings.engine)
        beneath = self.pipeline, self.identity, self.cache
        set_engines(self, ProdEngine(*beneath), AsyncProdEngine(*beneath))
        warn_coarse_budgets(self)
        LIVE.add(self)

    def __repr__(self) -> str:
        settings: Settings | None = self.__dict__.get("settings")
        if settings is None:
            return "<dspy_prod.LM, not built yet>"  # an error reporter asks
        return outward(f"dspy_prod.LM({self.model!r}, namespace={settings.namespace!r})")

    # -- calling -----------------------------------------------------------------------------------------------------
    def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Answer a prompt, messages or a typed `Request`, exactly as `dspy.LM` does."""
        if TAP.active is not None or has_callbacks(self):
            return self._seen(prompt, messages=messages, **kwargs)
        return self._answer(prompt, messages, kwargs)

    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Asynchronous `__call__`."""
        if TAP.active is not None or has_callbacks(self):
            return await self._aseen(prompt, messages=messages, **kwargs)
        return await self._aanswer(prompt, messages, kwargs)

    @with_callbacks  # type: ignore[untyped-decorator]
    def _seen(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """`__call__` with somebody looking."""
        tap = TAP.active
        with NOTHING if tap is None else tap.lm_call(self.model, {"prompt": prompt, "messages": messages}) as node:
            outputs = self._answer(prompt, messages, kwargs)
            node.answered(outputs)
            return outputs

    @with_callbacks  # type: ignore[untyped-decorator]
    async def _aseen(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Asynchronous `_seen`."""
        tap = TAP.active
        with NOTHING if tap is None else tap.lm_call(self.model, {"prompt": prompt, "messages": messages}) as node:
            outputs = await self._aanswer(prompt, messages, kwargs)
            node.answered(outputs)
            return outputs

    def _answer(self, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> Any:
        lm, kwargs, scope, known = begin(self, prompt, messages, kwargs)
        if known is not None:
            return self._recall(known, scope, prompt, messages, kwargs)
        with scope:
            return finish(self, *ask(lm, scope, prompt, messages, kwargs))

    async def _aanswer(self, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> Any:
        lm, kwargs, scope, known = begin(self, prompt, messages, kwargs)
        if known is not None:
            return self._recall(known, scope, prompt, messages, kwargs)
        with scope:
            return finish(self, *(await aask(lm, scope, prompt, messages, kwargs)))

    def _recall(self, known: Known, scope: Scope, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> list[str]:
        """Give a cached answer, and write it into the history."""
        response, text = known
        outputs = [text]
        if keeps_history():
            kwargs = kwargs if scope.shown is None else scope.shown
            cost, details = 0.0, None  # `tell` says them
            entry = entry_of(
                self, prompt, messages, kwargs, (response,), response, outputs, {}, cost, details, response.model
            )
            if getattr(self.update_history, "__func__", None) is _UPDATE_HISTORY:
                tell(entry, scope.records)
                append(self, entry)
            else:  # somebody else's, which ends with ours
                with scope:
                    self.update_history(entry)
        return outputs

    def update_history(self, entry: dict[str, Any]) -> None:
        """Record a call in DSPy's history, with its real cost and whether the cache answered."""
        scope = SCOPE.get()
        if scope is not None:
            tell(entry, scope.records)
        keep(self, entry)

    # -- copies ------------------------------------------------------------------------------------------------------
    def copy(self, **kwargs: Any) -> LM:
        """A copy that shares breaker, limits, budgets, cache and ledger, with some arguments changed."""
        check_tokens(kwargs)
        budgets = nullcontext() if "budget" in kwargs else quoted()
        twin, settings = copied(settled(self), kwargs)
        if settings is not None:
            twin.kwargs = arguments_of(twin.kwargs, settings)
            with budgets:
                twin._install(settings)
        else:
            for engine in engines_of(twin):
                engine.caches = twin.cache
            LIVE.add(twin)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> LM:
        # Optimizers deep-copy programs; a budget that were copied with them would no longer be one budget.
        twin: LM = copying_module.copy(self)
        memo[id(self)] = twin
        own = {name: value for name, value in self.kwargs.items() if name in CANONICAL_KEYS}
        twin.kwargs = {**self.kwargs, **copying_module.deepcopy(own, memo)}
        twin.history = list(self.history)
        twin.callbacks = list(self.callbacks)
        LIVE.add(twin)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        settled(self)
        state: dict[str, Any] = super().__getstate__()
        state["kwargs"] = {name: value for name, value in self.kwargs.items() if name in CANONICAL_KEYS}
        for name in INSTALLED:
            state.pop(name, None)
        state["settings"] = self.settings.sealed(self.pipeline.store.url)
        state["_token"] = remember(self.settings)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = recall(state.pop("_token", ""))  # in the same process: the same store, keys and clock
        super().__setstate__(state)
        settings = self.settings.unsealed() if known is None else known
        self.kwargs = arguments_of(self.kwargs, settings)
        with quoted():
            self._install(settings)

    def dump_state(self) -> dict[str, Any]:
        """What `load_state` rebuilds this LM from: JSON, without keys."""
        from dspy_prod.lm.state import dump

        return dump(settled(self), BaseLM.dump_state(self))

    @classmethod
    def load_state(cls, state: dict[str, Any], *, allow_custom_lm_class: bool = False) -> LM:
        """The LM that `dump_state` described; keys come from the environment.

        Args:
            state: what `dump_state` gave, after JSON.
            allow_custom_lm_class: whoever wrote the state is trusted. Else an address, headers, credentials, tools,
                prices, budgets, a store or a class of its own are left out, with a warning that names them.
        """
        from dspy_prod.lm.state import load

        state = hide(dict(state))
        return load(cls, state, allow_custom_lm_class)

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

        arguments = {**load_config(path), **hide(overrides)}
        if "model" not in arguments:
            raise ConfigError(f'{path or "environment"}: model: is missing; add model = "openai/gpt-4o-mini"')
        return cls(**arguments)

    # -- operating ---------------------------------------------------------------------------------------------------
    def preview(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Preview:
        """What a call would cost at most, whether it is affordable, and how long it would wait; sends nothing."""
        from dspy_prod.status.health import preview

        lm, kwargs, extras = per_call(settled(self), kwargs)
        return preview(lm.pipeline, calls_of(lm, prepare(lm, prompt, messages, kwargs), extras))


_UPDATE_HISTORY: Final = LM.update_history

LM.__module__ = "dspy_prod.lm"  # the name in saved states and pickles

# What was posted is done before the process ends, also where no pipeline was built.
atexit.register(REAPER.flush, 2.0)
