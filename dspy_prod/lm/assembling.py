"""From settings to a working pipeline: routes, store, budgets and cache."""

from __future__ import annotations

import logging
from typing import Any, Final

import dspy
from dspy.clients.base_lm import BaseLM
from dspy.utils.dummies import DummyLM

from dspy_prod.compat.dspy import engines_of
from dspy_prod.errors import ConfigError, StoreUnavailableError
from dspy_prod.lm.settings import Settings, hide, split
from dspy_prod.options import RateLimit
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.pipeline.routes import PRIMARY, Route
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.policies.sharing import quoted_rules, shared_rule
from dspy_prod.pricing.book import PriceBook
from dspy_prod.privacy.unshown import unshown
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.runtime.switch import disabled
from dspy_prod.stores.addresses import default_store_url
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import open_store
from dspy_prod.telemetry.events import BUS

_log = logging.getLogger("dspy_prod")

_DEFAULTABLE: Final = ("max_tokens", "temperature", "top_p", "stop", "seed")


def assemble(model: str, model_type: str, settings: Settings) -> Pipeline:
    """Build what calls run through.

    Raises:
        ConfigError: settings that contradict each other or another LM's.
        StoreUnavailableError: the store cannot be opened.
    """
    if disabled():
        settings = settings.off()
    store = store_of(settings)
    prices = PriceBook(settings.prices, settings.clock)

    def route(
        upstream: Upstream, limit: RateLimit | None = None, *, name: str = "", like: Settings = settings, **more: Any
    ) -> Route:
        if disabled():
            limit = RateLimit(adaptive=False)
        return Route(
            name or upstream.model, upstream, retry=like.retry, breaker=like.breaker, limit=limit, store=store,
            clock=settings.clock, bus=BUS, **{"prices": prices, **more},
        )  # fmt: skip

    def named(fallback: str) -> Route:
        same = fallback.split("/", 1)[0] == model.split("/", 1)[0] and isinstance(settings.engine, str)
        clients = dict(settings.clients) if same else {k: v for k, v in settings.clients.items() if k == "timeout"}
        engine = settings.engine if isinstance(settings.engine, str) else "auto"
        return route(Upstream(fallback, model_type, engine, None, clients, dict(settings.extras) if same else {}))

    def given(fallback: Any) -> Route:
        if isinstance(fallback, str):
            return named(fallback)
        own = getattr(fallback, "settings", None)
        if not isinstance(own, Settings):
            return route(_foreign(fallback), defaults=_defaults(fallback))
        return route(
            fallback.pipeline.primary.upstream,
            own.limit,
            like=own,
            prices=PriceBook({**settings.prices, **own.prices}, settings.clock),
            defaults=_defaults(fallback),
            rules=quoted_rules(store, own.budgets),
        )

    for other in (*settings.fallbacks, *[budget.degrade_to for budget in settings.budgets]):
        if isinstance(other, str) and not other.rpartition("/")[2].strip():
            raise ConfigError(f"fallbacks= and degrade_to= name models, such as 'openai/gpt-4o-mini'; got {other!r}")
    clients, extras = dict(settings.clients), dict(settings.extras)
    primary = Upstream(model, model_type, settings.engine, settings.async_engine, clients, extras)
    return Pipeline(
        route(primary, settings.limit, name=PRIMARY),
        tuple(given(fallback) for fallback in settings.fallbacks),
        store=store,
        budgets=tuple(shared_rule(store, budget) for budget in settings.budgets),
        cache=None if disabled() else settings.cache,
        route_maker=named,
        clock=settings.clock,
        bus=BUS,
    )


def _foreign(lm: Any) -> Upstream:
    """The bare engine behind somebody else's LM, without its cache, retries and history."""
    if not isinstance(lm, (dspy.LM, DummyLM)):
        hint = "; implement an engine and use dspy.LM(..., engine=...)" if isinstance(lm, BaseLM) else ""
        raise ConfigError(
            f"fallbacks= takes model names and dspy.LM or dspy_prod.LM objects, not {type(lm).__name__}{hint}"
        )
    refuse_own_forward(lm)
    _, clients, extras = split(hide(dict(lm.kwargs)))
    return Upstream(lm.model, lm.model_type, *engines_of(lm), clients, extras)


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


def store_of(settings: Settings) -> Store:
    """The store of some settings, opened; memory, where no file can be had and no money is at stake.

    Raises:
        StoreUnavailableError
    """
    if settings.opened is not None and not getattr(settings.opened, "closed", False):
        return settings.opened

    def opened(place: str | Store) -> Store:
        return open_store(place, settings.namespace, clock=settings.clock, on_problem=_on_problem)

    if settings.store is not None:
        return opened(settings.store)
    try:
        return opened(unshown(default_store_url()))
    except StoreUnavailableError as error:
        if settings.budgets:
            raise
        _log.warning(
            "%s Continuing with store='memory://': limits, cache and ledger are kept in this process only.", error
        )
        return opened("memory://")


def _on_problem(name: str, data: dict[str, Any]) -> None:
    BUS.emit(name, SYSTEM_CLOCK.time(), **data)
