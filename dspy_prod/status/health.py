"""Health: one answer to "is it all right?" for an LM, or for all of them; and the home of costs and previews.

Reading health asks the stores, so it may block for some milliseconds (and never much longer than `FLUSH_TIMEOUT` for
each store); on an event loop call it through `asyncio.to_thread`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.pipeline.routes import Route
from dspy_prod.policies.cache import CacheStats
from dspy_prod.privacy.names import bare_url
from dspy_prod.privacy.outward import outward
from dspy_prod.runtime.living import living
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.runtime.threads import missing
from dspy_prod.status.controls import stopped
from dspy_prod.status.costs import FLUSH_TIMEOUT, Place, costs, costs_by, summary
from dspy_prod.status.models import BreakerHealth, CacheHealth, Health, LimiterHealth, Status, StopHealth, StoreHealth
from dspy_prod.status.preview import preview
from dspy_prod.status.spending import CostSummary, Preview, filled
from dspy_prod.stores.base import LimiterSnapshot, Store
from dspy_prod.telemetry.tap import TAP, TrackingHealth

BUDGET_WARNING: Final = 90.0
"""Percent of a budget above which health warns."""

LIMITER_WARNING: Final = 0.1
"""Share of a minute's tokens or requests below which health warns."""

_PLAIN: Final = (bool, int, float, type(None))
T = TypeVar("T")


def health(pipelines: Iterable[Pipeline] | None = None) -> Health:
    """The state of some pipelines, or of every LM alive in this process; each store and route is counted once.

    Never raises for an unusable store: that is what it reports.

    Example:
        ```python
        print(dspy_prod.health().status)  # of every LM of this process; lm.health() is that of one
        ```
    """
    REAPER.flush(FLUSH_TIMEOUT)
    found = list(dict.fromkeys(live() if pipelines is None else pipelines))
    look = _Look()
    places = look.stores(found)
    routes = routes_of(found)
    breakers = [look.breaker(route) for _, route in routes if route.breaker is not None]
    limiters = look.limiters(routes)
    cache = look.cache(found)
    holds = sum(look.read(place.store, place.store.holds, 0) for place in places)
    waiting = sum(look.read(place.store, place.store.waiting, 0) for place in places)
    stops = look.stops(places)
    tracking = look.tracking()
    look.threads()
    spent = look.costs(places, found)  # last, of the stores that have answered everything else
    status: Status = "degraded" if look.failures else "warning" if look.warnings else "healthy"
    return Health(
        status=status,
        reasons=[outward(reason) for reason in (*look.failures, *look.warnings)],
        breakers=breakers,
        limiters=limiters,
        cache=cache,
        costs=spent,
        holds=holds,
        waiting=waiting,
        stores=look.seen(),
        tracking=tracking,
        stops=stops,
    )


class _Look:
    """One look at everything. Collects what is wrong."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.warnings: list[str] = []
        self._looked_at: list[tuple[Store, dict[str, int | float | str | bool | None]]] = []
        self._unusable: set[int] = set()

    def stores(self, pipelines: list[Pipeline]) -> list[Place]:
        """The usable stores behind the pipelines, each once."""
        places: dict[Any, Place] = {}
        for pipeline in pipelines:
            store = pipeline.store
            key = (store.url, store.namespace) if store.durable else id(store)
            if key not in places:
                places[key] = Place(store, pipeline.clock)
        for place in places.values():
            self._store(place.store)
        return [place for place in places.values() if id(place.store) not in self._unusable]

    def _store(self, store: Store) -> None:
        fault = ""
        try:
            if not store.flush(FLUSH_TIMEOUT):
                failing, waiting = problems_of(store).get("failing"), store.unwritten()
                fault = f"about {waiting:,} records wait to be written; costs are behind" if waiting else ""
                if failing or not waiting:
                    why = str(failing or "it does not take writes; check its disk and permissions")
                    fault = f"{why} ({fault})" if fault else why
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        if fault:
            self._give_up(store, fault)
        problems = problems_of(store)
        self._looked_at.append((store, problems))
        dropped = sum(
            int(value) for name, value in problems.items() if "dropped" in name and isinstance(value, (int, float))
        )
        if dropped:
            self.failures.append(f"The store {store.url} has dropped {dropped} operations; its ledger is not complete")

    def threads(self) -> None:
        """What runs without the thread it needs."""
        for name, reason in missing().items():
            self.failures.append(f"The thread {name} could not be started ({reason}); it is tried again")

    def read(self, store: Store, ask: Callable[[], T], default: T) -> T:
        """What a usable store answers; it may still break between two questions."""
        if id(store) in self._unusable:
            return default
        try:
            return ask()
        except Exception as error:
            self._give_up(store, f"{type(error).__name__}: {error}")
            return default

    def _give_up(self, store: Store, fault: str) -> None:
        self._unusable.add(id(store))
        self.failures.append(f"The store {store.url} is unavailable: {fault}")

    def seen(self) -> list[StoreHealth]:
        """The stores, and whether they have answered every question."""
        return [
            StoreHealth(
                url=bare_url(store.url), namespace=store.namespace, durable=store.durable,
                available=id(store) not in self._unusable, problems=problems,
            )
            for store, problems in self._looked_at
        ]  # fmt: skip

    def breaker(self, route: Route) -> BreakerHealth:
        """One circuit."""
        assert route.breaker is not None
        now = route.breaker.snapshot()
        if now.state in ("open", "half_open", "forced_open"):
            state = now.state.replace("_", "-" if now.state == "half_open" else " ")
            later = f"; it may be tried in {now.retry_after:.0f} s" if now.retry_after else ""
            cause = f" ({now.cause})" if now.cause else ""
            self.failures.append(f"The circuit of {route.model} is {state}{cause}{later}")
        return filled(BreakerHealth, now, route=route.name, model=route.model, shared=route.breaker.shares)

    def stops(self, places: list[Place]) -> list[StopHealth]:
        """What operators have stopped."""
        found = stopped([place.store for place in places])
        self.warnings.extend(f"An operator has stopped calls: {stop.told()}" for stop in found)
        return found

    def limiters(self, routes: list[tuple[Store, Route]]) -> list[LimiterHealth]:
        """The limiters of all routes that have one, each once."""
        found: dict[tuple[int, str], LimiterHealth] = {}
        for store, route in routes:
            key = (id(store), route.limit_key)
            if key not in found and (route.limited or route.state.throttled):
                found[key] = self._limiter(store, route)
        return list(found.values())

    def _limiter(self, store: Store, route: Route) -> LimiterHealth:
        limit = route.limit
        unused = LimiterSnapshot(
            route.limit_key, limit.rpm, limit.rpm, limit.tpm, limit.tpm, 0, limit.concurrency, 0, 0.0, 1.0
        )
        now = self.read(store, lambda: store.limiter(route.limit_key), None) or unused
        requests = _used(now.requests_available, now.requests_max)
        tokens = _used(now.tokens_available, now.tokens_max)
        for what, used in (("requests", requests), ("tokens", tokens)):
            if used is not None and 1.0 - used < LIMITER_WARNING:
                self.warnings.append(f"The rate limit of {route.model} has {100 * (1 - used):.0f} % of its {what} left")
        if now.paused_for > 0:
            self.warnings.append(f"The provider of {route.model} asked to pause for {now.paused_for:.0f} s (429)")
        return filled(
            LimiterHealth, now, route=route.name, model=route.model,
            requests_utilisation=requests, tokens_utilisation=tokens,
        )  # fmt: skip

    def tracking(self) -> TrackingHealth | None:
        """How the tracking in MLflow goes, None when it is off."""
        if TAP.active is None:
            return None
        from dspy_prod.tracking import status

        found: TrackingHealth | None = status()
        if found is not None and found.failing is not None:
            self.warnings.append(
                f"MLflow at {found.uri} cannot be reached, {found.waiting} traces wait: {found.failing}"
            )
        elif found is not None and found.lost:
            self.warnings.append(f"{found.lost} traces did not reach MLflow at {found.uri}")
        if found is not None and found.messages_lost:
            self.warnings.append(f"{found.messages_lost} messages about runs did not reach MLflow at {found.uri}")
        return found

    def cache(self, pipelines: list[Pipeline]) -> CacheHealth | None:
        """All caches together."""
        caches = {id(pipeline.cache): pipeline for pipeline in pipelines if pipeline.cache is not None}
        if not caches:
            return None
        stats = [pipeline.cache.stats() for pipeline in caches.values() if pipeline.cache is not None]
        sums = CacheStats(*map(sum, zip(*stats, strict=True)))
        kept = {id(pipeline.store): pipeline.store for pipeline in caches.values()}
        lookups = sums.hits + sums.misses
        return filled(
            CacheHealth,
            sums,
            size=sums.entries,
            maximum=sums.max_entries,
            utilisation=sums.entries / sums.max_entries,
            hit_rate=sums.hits / lookups if lookups else None,
            stored=sum(self.read(store, store.cache_size, (0, 0))[0] for store in kept.values()),
        )

    def costs(self, places: list[Place], pipelines: list[Pipeline]) -> CostSummary | None:
        """All stores' costs together."""
        places = [place for place in places if id(place.store) not in self._unusable]
        if not places:
            return None
        usable = {id(place.store) for place in places}
        used = [pipeline for pipeline in pipelines if id(pipeline.store) in usable]
        spent = self.read(places[0].store, lambda: summary(places, used), None)
        for budget in spent.budgets if spent is not None else ():
            if budget.used_percent > BUDGET_WARNING:
                self.warnings.append(
                    f"The budget {budget.title!r} is used to {budget.used_percent:.0f} % "
                    f"({budget.spent_usd:.2f} of {budget.limit_usd:.2f} USD)"
                )
        return spent


def live() -> list[Pipeline]:
    """The pipelines of all LMs alive, in a stable order."""
    pipelines = [lm.pipeline for lm in living() if isinstance(lm.pipeline, Pipeline)]
    return sorted(
        pipelines, key=lambda one: (one.store.url, one.store.namespace, one.primary.model, one.primary.limit_key)
    )


def routes_of(pipelines: list[Pipeline]) -> list[tuple[Store, Route]]:
    """(store, route) of every route, each identity once."""
    found: dict[tuple[int, int], tuple[Store, Route]] = {}
    for pipeline in pipelines:
        for route in pipeline.every_route():
            found.setdefault((id(route.state.identity), id(route.breaker)), (pipeline.store, route))
    return list(found.values())


def _used(available: float | None, most: float | None) -> float | None:
    return None if available is None or not most else min(1.0, max(0.0, 1.0 - available / most))


def problems_of(store: Any) -> dict[str, int | float | str | bool | None]:
    """The store's own words about its background work, if it has any: `problems`, a mapping or what gives one."""
    told = getattr(store, "problems", None)
    words = told() if callable(told) else told
    if not isinstance(words, Mapping):
        return {}
    return {str(name): value if type(value) in _PLAIN else outward(str(value)) for name, value in words.items()}


__all__ = ["CostSummary", "Health", "Preview", "costs", "costs_by", "health", "preview"]
