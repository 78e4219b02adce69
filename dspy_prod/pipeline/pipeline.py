"""What a call runs through: routes, budgets, cache and store, put together once and shared by copies of an LM."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

from dspy.lm15 import Response

from dspy_prod.context.current import CallContext
from dspy_prod.options import Cache
from dspy_prod.pipeline.routes import Route
from dspy_prod.pipeline.upstream.destination import digest
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.policies.cache import ResponseCache
from dspy_prod.policies.entries import Entry
from dspy_prod.policies.fleet import fleet_of
from dspy_prod.policies.singleflight import Flights
from dspy_prod.runtime.clock import Clock
from dspy_prod.runtime.forking import RegistryLock, reset_after_fork
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.base import Kind, Store
from dspy_prod.telemetry.events import EventBus


class Pipeline:
    """See the module's docstring.

    Attributes:
        routes: the primary and then the fallbacks.
        rules: the budgets of all calls; a route may have further ones of its own.
        budgets: those of them that have accounts.
        caps: those of them that cap single calls.
        capped: whether anything caps single calls, on whatever route.
        degradable: whether a budget may switch to a cheaper model; never where no other model would do.
        watches_spending: whether a budget has a soft threshold.
        kind: the context of the latest answer from memory, and where those in it are noted.
        fleet: what all workers of the store and namespace know of circuits and of what operators have said.
        budget_waits: whether a budget has a `max_wait` of its own.
    """

    def __init__(
        self,
        primary: Route,
        fallbacks: tuple[Route, ...],
        *,
        store: Store,
        budgets: tuple[BudgetRule, ...],
        cache: Cache | None,
        route_maker: Callable[[str], Route] | None,
        clock: Clock,
        bus: EventBus,
        rand: Callable[[], float] = random.random,
        keeps: type[ResponseCache] = ResponseCache,
    ) -> None:
        self.primary = primary
        self.fallbacks = fallbacks
        self.routes = (primary, *fallbacks)
        self.store = store
        self.fleet = fleet_of(store)
        self._route_maker = route_maker
        self.rules = budgets
        for rule in self.every_budget():
            rule.follow(self)  # before it is looked at, so that no change goes by between the two
        self.budgets_changed()
        shared = None if cache is None else _shared_cache(store, cache, keeps)
        self.cache: ResponseCache | None = None if shared is None else shared.cache
        self.flights: Flights = Flights() if shared is None else shared.flights(self.routes)
        self._shared = shared
        self.clock = clock
        self.bus = bus
        self.rand = rand
        self.kind: tuple[CallContext | None, Kind | None] = (None, None)
        self._made: dict[str, Route] = {}
        self._capabilities: Any = None
        REAPER.start()
        REAPER.finish_before(type(store))  # with its module it has registered its own end

    def every_budget(self) -> tuple[BudgetRule, ...]:
        """The budgets of all calls, and those of single routes."""
        return (*self.rules, *(rule for route in self.fallbacks for rule in route.rules))

    def budgets_changed(self) -> None:
        """The options of a budget are others than before."""
        every = self.every_budget()
        self.budgets = tuple([rule for rule in self.rules if not rule.caps])
        self.caps = tuple([rule for rule in self.rules if rule.caps])
        self.capped = any(rule.caps for rule in every)
        self.degradable = self._route_maker is not None and any(rule.options.degrade_to for rule in self.budgets)
        self.budget_waits = any(rule.options.max_wait is not None for rule in every)
        self.watches_spending = any(rule.options.soft for rule in every)

    def route_to(self, model: str) -> Route:
        """A route to another model, made once."""
        route = self._made.get(model)
        if route is None:
            assert self._route_maker is not None
            route = self._made[model] = next(
                (route for route in self.fallbacks if route.model == model), None
            ) or self._route_maker(model)
        return route

    def every_route(self) -> tuple[Route, ...]:
        """All routes, with those that budgets degraded to so far."""
        return (*self.routes, *(route for route in self._made.values() if route not in self.fallbacks))

    @property
    def capabilities(self) -> Any:
        """What the primary model can do, as DSPy knows it (`dspy.clients.capabilities.Capabilities`). Asked once."""
        known = self._capabilities
        if known is None:
            known = self._capabilities = self.primary.upstream.capabilities()
        return known

    def without_usage(self, response: Response) -> Response:
        """The answer of another call, as its follower gets it: nothing was used for it."""
        return Entry(response, 0.0, 0.0, 0).response

    def close(self) -> None:
        """Close the pooled connections of all routes."""
        for route in self.every_route():
            route.upstream.close()

    async def aclose(self) -> None:
        """Close this event loop's connections and the synchronous ones."""
        for route in self.every_route():
            await route.upstream.aclose()


class SharedCache:
    """Cache and flights, shared by all pipelines with the same store and cache options that keep the same."""

    def __init__(self, options: Cache, store: Store, keeps: type[ResponseCache] = ResponseCache) -> None:
        self.cache = keeps(options, store)
        self._flights: weakref.WeakValueDictionary[Any, Flights] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        reset_after_fork(self)

    def flights(self, routes: tuple[Route, ...]) -> Flights:
        """The flights of calls that would be sent the same on the same ways, and as insistently, so that one's answer
        or error is the other's too: a fallback that is told something else gives the answer to another request, and
        what one LM has no patience for, or may not ask by its own limit or circuit, another one may get.
        """
        key = tuple([(*_sent(each), each.timeout, each.retry, each.limit, each.breaker) for each in routes])
        with self._lock:
            found = self._flights.get(key)
            if found is None:
                found = self._flights[key] = Flights()
            return found

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self.cache._after_fork()
        for flights in list(self._flights.values()):
            flights._after_fork()


def _sent(route: Route) -> tuple[Any, ...]:
    """What a route adds to a request, and who sends it where. Nothing of it is written or shown."""
    upstream = route.upstream
    own = [digest(settings) if settings else "" for settings in (route.defaults, upstream.extras)]
    senders = _sender(upstream.spec), _sender(upstream.async_spec)
    return route.limit_key, upstream.model_type, *senders, *own


def _sender(spec: Any) -> Any:
    # An `id` will do: the pipeline that flies keeps its engine alive.
    return spec if spec is None or isinstance(spec, str) else (type(spec).__qualname__, id(spec))


def clear_answers(store: Store) -> None:
    """Forget every cached answer of a store and namespace: in the file, and in memory under any cache options."""
    with _CACHES_LOCK:
        found = [shared for (owner, _), shared in _CACHES.items() if owner == id(store)]
    for shared in found:
        shared.cache.clear()
    store.cache_clear()


_CACHES: weakref.WeakValueDictionary[tuple[int, Any], SharedCache] = weakref.WeakValueDictionary()
_CACHES_LOCK = RegistryLock()
_MAX_KEPT = 16
"""Caches with different options that a memory store keeps."""


def _shared_cache(store: Store, options: Cache, keeps: type[ResponseCache]) -> SharedCache:
    key = (id(store), (options, keeps))
    with _CACHES_LOCK:
        shared = _CACHES.get(key)
        if shared is None:
            shared = _CACHES[key] = SharedCache(options, store, keeps)
            companions = getattr(store, "companions", None)
            if companions is not None:  # no file keeps the answers for the next LM
                while len(companions) >= _MAX_KEPT:
                    del companions[next(iter(companions))]
                companions[options, keeps] = shared
        return shared
