"""What is true at the moment: circuits, budgets, limiters, caches, stores, tracking.

Circuits and caches are in memory and looked at when they are asked for. Budgets, limiters and stores have to be asked,
which may take long: that is done by a thread of its own, and who wants to know gets what it has found last. So nobody
who reads metrics waits longer than `PATIENCE` for a store, and while one is slow, `dspy_prod.standing.age` grows.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from dspy_prod.metrics import catalogue
from dspy_prod.metrics.sums import Attributes
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.pipeline.routes import Route
from dspy_prod.policies.cache import ResponseCache
from dspy_prod.privacy.names import bare_url
from dspy_prod.runtime.forking import Stage, reset_after_fork
from dspy_prod.runtime.threads import begin
from dspy_prod.status.costs import budgets_of
from dspy_prod.status.health import live, problems_of, routes_of
from dspy_prod.status.spending import BudgetStatus
from dspy_prod.stores.base import Store
from dspy_prod.telemetry.tap import TAP

_log = logging.getLogger("dspy_prod")

PATIENCE: Final = 0.25
"""Seconds that a reader of metrics waits for stores to answer."""
FRESH: Final = 1.0
"""Seconds for which what was found is not looked for again."""

_STATES: Final = {"closed": 0, "disabled": 0, "half_open": 1, "open": 2, "forced_open": 2}

Gauge = tuple[str, float, Attributes]
"""A metric's name, its value, its attributes."""
Model = Callable[[str], Attributes]


class _Found(NamedTuple):
    at: float
    gauges: tuple[Gauge, ...]


class Standing:
    """See the module's docstring. Safe in threads and in forked children.

    Args:
        model: the attributes of a model.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._misses: weakref.WeakKeyDictionary[ResponseCache, int] = weakref.WeakKeyDictionary()
        for cache in _caches(live()):
            self._misses[cache] = cache.misses  # those of before are not ours to count
        self.began = time.monotonic()
        self._reset()
        reset_after_fork(self, Stage.THREADS)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._found = _Found(-FRESH, ())
        self._reading: threading.Event | None = None
        self._reading_since = 0.0

    # -- at once -------------------------------------------------------------------------------------------------------
    def now(self) -> Iterator[Gauge]:
        """What can be told without asking anybody."""
        pipelines = live()
        yield from self._circuits(pipelines)
        caches = _caches(pipelines)
        if caches:
            yield catalogue.ENTRIES, sum(cache.stats().entries for cache in caches), ()
        yield from _tracked()
        found = self._found
        yield catalogue.AGE, time.monotonic() - (found.at if found.at >= 0 else self.began), ()

    def misses(self) -> int:
        """Lookups in caches that found nothing, since it was last asked."""
        new = 0
        with self._lock:
            for cache in _caches(live()):
                misses = cache.misses
                new += misses - self._misses.get(cache, 0)
                self._misses[cache] = misses
        return new

    def _circuits(self, pipelines: list[Pipeline]) -> Iterator[Gauge]:
        """The worst of those that guard the same model, with several keys perhaps."""
        worst: dict[Attributes, int] = {}
        for _, route in routes_of(pipelines):
            if route.breaker is not None:
                attributes = self._model(route.model)
                worst[attributes] = max(worst.get(attributes, 0), _STATES.get(route.breaker.state, 0))
        for attributes, state in worst.items():
            yield catalogue.BREAKER, state, attributes

    # -- asked in the background ---------------------------------------------------------------------------------------
    def found(self) -> tuple[Gauge, ...]:
        """What stores have answered: just now, if they are quick, else when they last did."""
        with self._lock:
            now, reading = time.monotonic(), self._reading
            if reading is None and now - self._found.at >= FRESH:
                reading = threading.Event()
                self._reading, self._reading_since = reading, now
                if begin("dspy_prod-metrics-reader", self._read, reading) is None:
                    self._reading = reading = None
            left = self._reading_since + PATIENCE - now
        if reading is not None and left > 0:
            reading.wait(left)
        return self._found.gauges

    def _read(self, done: threading.Event) -> None:
        gauges: list[Gauge] = []
        at = time.monotonic()
        try:
            pipelines = live()
            for ask in (_stores, self._limiters, _budgets):
                try:
                    gauges += ask(pipelines)
                except Exception as error:  # a store that cannot be used; the age tells that something is missing
                    at = self._found.at
                    _log.debug("Something could not be read for the metrics: %s", type(error).__name__)
            self._found = _Found(at, tuple(gauges))
        finally:
            with self._lock:
                if self._reading is done:
                    self._reading = None
            done.set()

    def _limiters(self, pipelines: list[Pipeline]) -> Iterator[Gauge]:
        seen: set[tuple[int, str]] = set()
        for store, route in routes_of(pipelines):
            key = (id(store), route.limit_key)
            if key not in seen and (route.limited or route.state.throttled):
                seen.add(key)
                yield from self._limiter(store, route)

    def _limiter(self, store: Store, route: Route) -> Iterator[Gauge]:
        model, limit = self._model(route.model), route.limit
        state = store.limiter(route.limit_key)
        left = (limit.rpm, limit.tpm) if state is None else (state.requests_available, state.tokens_available)
        for what, most, free in (("requests", limit.rpm, left[0]), ("tokens", limit.tpm, left[1])):
            if most is not None and free is not None:
                attributes = (*model, ("dspy_prod.dimension", what))
                yield catalogue.LIMITER_LIMIT, most, attributes
                yield catalogue.LIMITER_LEFT, free, attributes
        yield catalogue.LIMITER_WAITING, 0 if state is None else state.waiting, model
        yield catalogue.LIMITER_PAUSED, 0.0 if state is None else state.paused_for, model

    def _after_fork(self) -> None:
        self._reset()


def _stores(pipelines: list[Pipeline]) -> Iterator[Gauge]:
    for store in {id(pipeline.store): pipeline.store for pipeline in pipelines}.values():
        problems = problems_of(store)
        where = (("dspy_prod.store", bare_url(store.url)), ("dspy_prod.namespace", store.namespace))
        yield catalogue.UNWRITTEN, store.unwritten(), where
        yield catalogue.STORE_FAILING, int(bool(problems.get("failing"))), where
        dropped = [value for name, value in problems.items() if "dropped" in name and isinstance(value, (int, float))]
        yield catalogue.DROPPED, sum(dropped), where


def _budgets(pipelines: list[Pipeline]) -> Iterator[Gauge]:
    """Of those with accounts of their own for tenants or users the one that is used most: whose it is, is not told."""
    whole, scoped = budgets_of(pipelines)
    shown: dict[str, BudgetStatus] = {}
    for budget in sorted((*whole, *scoped), key=lambda each: -each.used_percent):
        shown.setdefault(budget.name, budget)
    for name, budget in shown.items():
        scope = budget.scope.partition(":")[0]
        attributes = (("dspy_prod.budget", name), ("dspy_prod.scope", scope))
        yield catalogue.BUDGET_LIMIT, budget.limit_usd, attributes
        yield catalogue.BUDGET_USED, budget.spent_usd, attributes
        yield catalogue.BUDGET_HELD, budget.held_usd, attributes
        yield catalogue.BUDGET_LEFT, budget.remaining_usd, attributes


def _tracked() -> Iterator[Gauge]:
    health: Any = None
    if TAP.active is not None:
        from dspy_prod.tracking import status

        health = status()
    yield catalogue.TRACES_WAITING, 0 if health is None else health.waiting, ()
    yield catalogue.TRACES_LOST, 0 if health is None else health.lost + health.messages_lost, ()


def _caches(pipelines: list[Pipeline]) -> list[ResponseCache]:
    return list({id(cache): cache for pipeline in pipelines if (cache := pipeline.cache) is not None}.values())
