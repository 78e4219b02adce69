"""From an embedder's settings to its pipeline: the routes that send batches, and which other models may stand in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspy_prod.errors import ConfigError
from dspy_prod.lm.assembling import store_of
from dspy_prod.lm.sealing import seal, unseal
from dspy_prod.lm.settings import Settings, split
from dspy_prod.options import Cache, Price
from dspy_prod.pipeline.batching import EmbeddingRoute
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.pipeline.routes import PRIMARY
from dspy_prod.pipeline.scope import identity_of, serial_of
from dspy_prod.pipeline.upstream.destination import destination, digest, without_credentials
from dspy_prod.pipeline.upstream.embedding import EmbeddingUpstream
from dspy_prod.policies.sharing import quoted_rules, shared_rule
from dspy_prod.policies.vectors import VectorCache
from dspy_prod.pricing.book import PriceBook
from dspy_prod.pricing.lookup import base_of
from dspy_prod.runtime.switch import disabled
from dspy_prod.telemetry.events import BUS


@dataclass(frozen=True)
class Elsewhere:
    """The same model at another address.

    Args:
        model: its model string there.
        clients, extras: as in `Settings`.
        own: the settings of an embedder that was given: its limit, prices and budgets hold for its route.
    """

    model: str
    clients: Mapping[str, Any] = field(repr=False)
    extras: Mapping[str, Any] = field(repr=False)
    own: Settings | None = None

    def sealed(self) -> Elsewhere:
        """The same, fit to be written: see `Settings.sealed`."""
        own = None if self.own is None else self.own.sealed()
        return Elsewhere(self.model, seal(self.clients), seal(self.extras), own)

    def unsealed(self) -> Elsewhere:
        """The same, with the secrets this process remembers for it."""
        own = None if self.own is None else self.own.unsealed()
        return Elsewhere(self.model, unseal(self.clients), unseal(self.extras), own)


def name_of(model: Any) -> str:
    """What a model is called in the ledger and in `prices=`: its string, or the name of a function."""
    if isinstance(model, str):
        return model
    own = getattr(model, "cache_key", None) or getattr(model, "__qualname__", None) or type(model).__qualname__
    return f"function/{str(own).rpartition('<locals>.')[2]}"


def known_as(model: Any) -> tuple[str, bool]:
    """(by what a model's circuit and limiter are known, whether that holds in other processes too).

    Two functions may have one name. One that stands in a module under its name is the same in every process, and so is
    one with a `cache_key`; a lambda, a function within a function and an object are equal to themselves only.
    """
    name = name_of(model)
    if isinstance(model, str) or getattr(model, "cache_key", None):
        return name, True
    module, own = getattr(model, "__module__", None), getattr(model, "__qualname__", None)
    if isinstance(module, str) and isinstance(own, str):
        found: Any = sys.modules.get(module)
        for part in own.split("."):
            found = getattr(found, part, None)
        if found is model:
            return f"{name} of {module}", True
    owner = getattr(model, "__self__", None)  # a method is another object each time it is asked for
    return f"{name} of {serial_of(model if owner is None else owner)}", False


def arguments_for(model: Any, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(client settings, further arguments) of those that are for the model; a function gets all of them as they are."""
    if not isinstance(model, str):
        return {}, dict(given)
    canonical, clients, extras = split(given)
    return clients, {**canonical, **extras}


def prices_of(model: Any, prices: Any) -> Any:
    """`prices=`: a mapping as an LM takes it, or a single `Price` for this model."""
    return {name_of(model): prices} if isinstance(prices, Price) else prices


def build(model: Any, settings: Settings, fallbacks: Sequence[Elsewhere]) -> Pipeline:
    """Build what an embedder's batches run through.

    Raises:
        ConfigError: settings that contradict each other or another's.
        StoreUnavailableError: the store cannot be opened.
    """
    if disabled():
        settings, fallbacks = settings.off(), ()
    store = store_of(settings)
    prices = PriceBook(settings.prices, settings.clock)

    def route(name: str, upstream: EmbeddingUpstream) -> EmbeddingRoute:
        return EmbeddingRoute(
            name, upstream, retry=settings.retry, breaker=settings.breaker,
            limit=settings.limit if name == PRIMARY else None, prices=prices, store=store, clock=settings.clock,
            bus=BUS,
        )  # fmt: skip

    def spare(one: Elsewhere) -> EmbeddingRoute:
        upstream = EmbeddingUpstream(one.model, None, dict(one.clients), dict(one.extras))
        own = one.own
        if own is None:
            return route(one.model, upstream)
        return EmbeddingRoute(
            one.model, upstream, retry=own.retry, breaker=own.breaker, limit=own.limit,
            prices=PriceBook({**settings.prices, **own.prices}, settings.clock), store=store, clock=settings.clock,
            bus=BUS, rules=quoted_rules(store, own.budgets),
        )  # fmt: skip

    function: Callable[..., Any] | None = None if isinstance(model, str) else model
    primary = EmbeddingUpstream(
        name_of(model), function, dict(settings.clients), dict(settings.extras), known_as(model)
    )
    cache: Cache | None = None if disabled() else settings.cache
    return Pipeline(
        route(PRIMARY, primary),
        tuple([spare(one) for one in fallbacks]),
        store=store,
        budgets=tuple([shared_rule(store, budget) for budget in settings.budgets]),
        cache=cache,
        keeps=VectorCache,
        route_maker=None,
        clock=settings.clock,
        bus=BUS,
    )


def identity(model: Any, settings: Settings) -> bytes:
    """The beginning of every cache key of an embedder: the model, where it is, and what it is told."""
    clients, extras = settings.clients, settings.extras
    parts = ["vectors", name_of(model), destination(clients, name_of(model), extras)]
    return identity_of([*parts, digest(without_credentials(extras))], "auto" if isinstance(model, str) else model)


def elsewhere(model: Any, settings: Settings, fallbacks: Any) -> tuple[Elsewhere, ...]:
    """`fallbacks=`: the same model at other addresses.

    A vector of another model is no substitute, not even one of the same length: nothing can be said of how near the
    two are. Such a fallback would spoil an index without any error.

    Raises:
        ConfigError: a fallback is another model, or makes vectors of another length.
    """
    if isinstance(fallbacks, str):
        raise ConfigError("fallbacks= takes a list, e.g. fallbacks=['azure/text-embedding-3-small']")
    found = []
    for given in fallbacks:
        other = _elsewhere(model, settings, given)
        for what, ours, its in (
            ("is another model", _bare(model, settings.extras), _bare(other.model, other.extras)),
            ("has other dimensions=", settings.extras.get("dimensions"), other.extras.get("dimensions")),
        ):
            if ours != its:
                raise ConfigError(
                    f"fallbacks=: {other.model!r} {what} ({its!r}, not {ours!r}). Vectors of different models cannot "
                    "be compared, even where they are equally long; name the same model at another provider, or an "
                    f"Embedder(..., base_model={ours!r}) where a deployment has a name of its own"
                )
        found.append(other)
    return tuple(found)


def _elsewhere(model: Any, settings: Settings, given: Any) -> Elsewhere:
    own = getattr(given, "settings", None)
    if isinstance(given, str) and isinstance(model, str):
        same = given.split("/", 1)[0] == model.split("/", 1)[0]
        timeout = {name: value for name, value in settings.clients.items() if name == "timeout"}
        dimensions = {name: value for name, value in settings.extras.items() if name == "dimensions"}
        return Elsewhere(
            given, settings.clients if same else timeout, dict(settings.extras) if same else dimensions
        )  # fmt: skip
    if isinstance(own, Settings) and isinstance(getattr(given, "model", None), str) and isinstance(model, str):
        return Elsewhere(given.model, own.clients, own.extras, own)
    raise ConfigError(
        f"fallbacks= takes model names and dspy_prod.Embedder objects of the same model, not {type(given).__name__}; "
        "a function has none"
    )


def _bare(model: str, extras: Mapping[str, Any]) -> str:
    return (base_of(extras) or model).rpartition("/")[2]
