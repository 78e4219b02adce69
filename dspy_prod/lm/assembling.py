"""From settings to a working pipeline: routes, store, budgets and cache."""

from __future__ import annotations

import logging
import os
from typing import Any, Final

import dspy
from dspy.clients.base_lm import BaseLM
from dspy.utils.dummies import DummyLM

from dspy_prod.errors import ConfigError, StoreUnavailableError
from dspy_prod.lm.settings import Settings, split
from dspy_prod.options import RateLimit
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.pipeline.routes import PRIMARY, Route
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.policies.budget import shared_rule
from dspy_prod.pricing.rates import PriceBook
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import default_store_url, open_store
from dspy_prod.telemetry.events import BUS

_log = logging.getLogger("dspy_prod")

_DEFAULTABLE: Final = ("max_tokens", "temperature", "top_p", "stop", "seed")


def disabled() -> bool:
    """Whether `DSPY_PROD_DISABLED` switches every policy off (the ledger stays on)."""
    return os.environ.get("DSPY_PROD_DISABLED", "").strip().lower() in ("1", "true", "yes", "on")


def assemble(model: str, model_type: str, settings: Settings) -> Pipeline:
    """Build what calls run through.

    Raises:
        ConfigError: settings that contradict each other or another LM's.
        StoreUnavailableError: the store cannot be opened.
    """
    if disabled():
        settings = settings.off()
    store = _store(settings)
    prices = PriceBook(settings.prices)

    def route(name: str, upstream: Upstream, limit: RateLimit | None, defaults: dict[str, Any] | None = None) -> Route:
        if disabled():
            limit = RateLimit(adaptive=False)
        return Route(
            name, upstream, retry=settings.retry, breaker=settings.breaker, limit=limit, prices=prices, store=store,
            clock=settings.clock, bus=BUS, defaults=defaults,
        )  # fmt: skip

    def named(fallback: str) -> Route:
        same = fallback.split("/", 1)[0] == model.split("/", 1)[0] and isinstance(settings.engine, str)
        clients = dict(settings.clients) if same else {k: v for k, v in settings.clients.items() if k == "timeout"}
        engine = settings.engine if isinstance(settings.engine, str) else "auto"
        upstream = Upstream(fallback, model_type, engine, None, clients, dict(settings.extras) if same else {})
        return route(fallback, upstream, None)

    clients, extras = dict(settings.clients), dict(settings.extras)
    primary = route(
        PRIMARY,
        Upstream(model, model_type, settings.engine, settings.async_engine, clients, extras),
        settings.limit,
    )
    fallbacks = tuple(
        named(item) if isinstance(item, str) else _foreign_route(item, settings, prices, store)
        for item in settings.fallbacks
    )
    rules = tuple(shared_rule(store, budget) for budget in settings.budgets)
    return Pipeline(
        primary,
        fallbacks,
        store=store,
        budgets=rules,
        cache=None if disabled() else settings.cache,
        route_maker=named,
        clock=settings.clock,
        bus=BUS,
    )


def upstream_of(lm: dspy.LM) -> Upstream:
    """The bare engine behind a `dspy.LM`, without its cache, retries and history."""
    _, clients, extras = split(lm.kwargs)
    return Upstream(lm.model, lm.model_type, lm._engine_spec, lm._async_engine_spec, clients, extras)


def _foreign_route(fallback: Any, settings: Settings, prices: PriceBook, store: Store) -> Route:
    if isinstance(getattr(fallback, "settings", None), Settings):  # one of ours
        own = fallback.pipeline.primary
        return Route(
            own.model, own.upstream, retry=own.retry, breaker=fallback.settings.breaker, limit=fallback.settings.limit,
            prices=PriceBook({**settings.prices, **fallback.settings.prices}), store=store, clock=settings.clock,
            bus=BUS, defaults=_defaults(fallback),
            rules=tuple(shared_rule(store, budget) for budget in fallback.settings.budgets),
        )  # fmt: skip
    if isinstance(fallback, (dspy.LM, DummyLM)):
        refuse_own_forward(fallback)
        return Route(
            fallback.model, upstream_of(fallback), retry=settings.retry, breaker=settings.breaker, limit=None,
            prices=prices, store=store, clock=settings.clock, bus=BUS, defaults=_defaults(fallback),
        )  # fmt: skip
    kind = type(fallback).__name__
    hint = "; implement an engine and use dspy.LM(..., engine=...)" if isinstance(fallback, BaseLM) else ""
    raise ConfigError(f"fallbacks= takes model names and dspy.LM or dspy_prod.LM objects, not {kind}{hint}")


def refuse_own_forward(lm: BaseLM) -> None:
    """Refuse an LM class whose own `forward` would be bypassed: only its engine is used.

    Raises:
        ConfigError: naming the class and the remedy.
    """
    base = DummyLM if isinstance(lm, DummyLM) else dspy.LM
    if any(getattr(lm, name).__func__ is not getattr(base, name) for name in ("forward", "aforward")):
        raise ConfigError(
            f"{type(lm).__name__} overrides forward or aforward, which no engine reaches; implement an engine and use "
            "dspy_prod.LM(..., engine=...)"
        )


def _defaults(lm: dspy.LM) -> dict[str, Any]:
    found = {name: lm.kwargs[name] for name in _DEFAULTABLE if lm.kwargs.get(name) is not None}
    if lm.kwargs.get("max_completion_tokens") is not None:
        found["max_tokens"] = lm.kwargs["max_completion_tokens"]
    return found


def _store(settings: Settings) -> Store:
    if settings.opened is not None and not getattr(settings.opened, "closed", False):
        return settings.opened
    if settings.store is not None:
        return open_store(settings.store, settings.namespace, clock=settings.clock, on_problem=_on_problem)
    url = default_store_url()
    try:
        return open_store(url, settings.namespace, clock=settings.clock, on_problem=_on_problem)
    except StoreUnavailableError as error:
        if settings.budgets:
            raise
        _log.warning(
            "%s Continuing with store='memory://': limits, cache and ledger are kept in this process only.", error
        )
        return open_store("memory://", settings.namespace, clock=settings.clock, on_problem=_on_problem)


def _on_problem(name: str, data: dict[str, Any]) -> None:
    from dspy_prod.runtime.clock import SYSTEM_CLOCK

    BUS.emit(name, SYSTEM_CLOCK.time(), **data)


__all__ = ["assemble", "disabled", "upstream_of"]
