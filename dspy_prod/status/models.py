"""What `health` answers with: frozen pydantic models, ready for JSON.

Money is in USD, durations in seconds, days are UTC. Nothing here holds a secret, a prompt or an answer.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any, Final, Literal

from pydantic import Field

from dspy_prod.status.spending import CostSummary, budgets_table
from dspy_prod.telemetry.tap import Frozen, TrackingHealth
from dspy_prod.views import Cell, Page, Shown, Table
from dspy_prod.views.cells import Tone

Status = Literal["healthy", "warning", "degraded"]
"""`degraded`: a circuit is not closed, or the store is not usable; `warning`: something runs out soon."""

_TONES: Final[dict[Status, Tone]] = {"healthy": "good", "warning": "warn", "degraded": "bad"}


class BreakerHealth(Frozen):
    """The circuit breaker of one route.

    Attributes:
        route: `"primary"`, or the fallback's model. model: the model it guards.
        state: `closed`, `open`, `half_open`, `forced_open` or `disabled`. An open circuit stays `open` until a call
            comes after its interval.
        failures, successes: calls in the window. failure_rate: their share of failures, None when it is empty.
        consecutive_failures: failures in a row.
        retry_after: seconds until a call may be sent; 0 when it may now, None when unknown.
        cause: what opened it, else empty. opened_count: how often it opened.
        total_failures, total_successes: since the process started, of this process.
        shared: whether all workers share the circuit; what is counted is this worker's in any case.
    """

    route: str
    model: str
    state: str
    failures: int
    successes: int
    consecutive_failures: int
    failure_rate: float | None
    retry_after: float | None
    cause: str
    opened_count: int
    total_failures: int
    total_successes: int
    shared: bool = False


class CircuitHealth(Frozen):
    """A circuit as all workers of a namespace share it, or what an operator has said of one.

    Attributes:
        model: the model it guards. route: its address and model, as operators call it.
        state: as in `BreakerHealth`. cause: what opened it, else empty.
        probes: probes that are out, over all workers.
        retry_after: seconds until a call may be sent; None when unknown.
        by: the operator; empty where the workers moved it.
    """

    model: str
    route: str
    state: str
    cause: str
    probes: int
    retry_after: float | None
    by: str


class StopHealth(Frozen):
    """What an operator has stopped, in every worker.

    Attributes:
        scope: `program`, `model`, `tenant` or `all`. value: which; empty for all.
        reason: why. by: who said so.
        since: when. until: when it goes on by itself; None: when it is resumed.
    """

    scope: str
    value: str
    reason: str
    by: str
    since: dt.datetime
    until: dt.datetime | None

    @property
    def target(self) -> str:
        """In words: `program 'triage'`."""
        return f"{self.scope} {self.value!r}" if self.value else "everything"

    def told(self) -> str:
        """In one line."""
        why = f": {self.reason}" if self.reason else ""
        until = "" if self.until is None else f", until {self.until:%Y-%m-%d %H:%M:%S} UTC"
        return f"{self.target} is stopped{why} (by {self.by}, since {self.since:%Y-%m-%d %H:%M:%S} UTC{until})"


class LimiterHealth(Frozen):
    """The rate limiter of one provider key and model, in the current minute. None where nothing is configured.

    Attributes:
        route, model: as in `BreakerHealth`.
        requests_available, requests_max: requests left, and `rpm`.
        tokens_available, tokens_max: tokens left, and `tpm`.
        requests_utilisation, tokens_utilisation: the share used, 0 to 1.
        in_flight, concurrency_max: calls being answered, and the most allowed.
        waiting: calls in line.
        paused_for: seconds for which the provider asked to send nothing.
        rate_factor: share of the configured rate that is used now; below 1 after a 429.
    """

    route: str
    model: str
    requests_available: float | None
    requests_max: float | None
    requests_utilisation: float | None
    tokens_available: float | None
    tokens_max: float | None
    tokens_utilisation: float | None
    in_flight: int
    concurrency_max: int | None
    waiting: int
    paused_for: float
    rate_factor: float


class CacheHealth(Frozen):
    """The response cache.

    Attributes:
        size, maximum: answers in memory, and the most allowed. utilisation: their quotient.
        bytes, max_bytes: size of those answers, and the most allowed.
        hits, misses: lookups since the process started. hit_rate: share of hits, None before the first lookup.
        stored: answers kept in the store, for other processes and after a restart.
    """

    size: int
    maximum: int
    utilisation: float
    bytes: int
    max_bytes: int
    hits: int
    misses: int
    hit_rate: float | None
    stored: int


class StoreHealth(Frozen):
    """Where the state lives.

    Attributes:
        url: without passwords. namespace: the part of it that is looked at.
        durable: whether the state outlives this process.
        available: whether it could be read and written just now.
        problems: the store's own counters and messages, when it has any.
    """

    url: str
    namespace: str
    durable: bool
    available: bool
    problems: dict[str, int | float | str | bool | None] = Field(default_factory=dict)


class Health(Shown, Frozen):
    """The state of one LM, or of all of them.

    Attributes:
        status: `degraded` when a circuit is open, half-open or forced open, or a store is unavailable or has dropped
            something; `warning` when a budget is used above 90 %, a limiter has less than 10 % of its tokens or
            requests left, a provider asked to pause, an operator has stopped something, or MLflow does not take the
            traces; else `healthy`.
        reasons: why it is not healthy, in plain words.
        breakers, limiters: one for each route.
        cache: None when no cache is on.
        costs: None when no store could be read.
        holds: reservations not yet settled. waiting: calls of this process in line.
        stores: one for each store and namespace.
        tracking: None when `dspy_prod.tracking` is off.
        stops: what operators have stopped.

    Example:
        ```python
        state = lm.health()
        if state.status != "healthy":
            print(state.reasons)
        ```
    """

    status: Status
    reasons: list[str]
    breakers: list[BreakerHealth]
    limiters: list[LimiterHealth]
    cache: CacheHealth | None
    costs: CostSummary | None
    holds: int
    waiting: int
    stores: list[StoreHealth]
    tracking: TrackingHealth | None = None
    stops: list[StopHealth] = Field(default_factory=list)

    @property
    def store(self) -> StoreHealth | None:
        """The (first) store; None when no LM is alive."""
        return self.stores[0] if self.stores else None

    def _view(self) -> Page:
        table = Table(Cell(f"Health: {self.status}", _TONES[self.status]), ("part", "state"), list(self._rows()))
        budgets = [] if self.costs is None else self.costs.budgets
        return Page(table, *([budgets_table(budgets)] if budgets else []))

    def _rows(self) -> Iterator[tuple[str, Any]]:
        """The parts and how they are, what is wrong first."""
        for reason in self.reasons:
            yield "note", Cell(reason, _TONES[self.status])
        for breaker in self.breakers:
            tone: Tone = "" if breaker.state in ("closed", "disabled") else "bad"
            state = f"{breaker.state.replace('_', '-')}, opened {breaker.opened_count} time(s)"
            yield f"breaker {breaker.route}", Cell(state, tone, (breaker.model, breaker.cause))
        for each in self.limiters:
            requests = (each.requests_available, each.requests_max, "requests")
            left = [
                f"{available:,.0f} of {most:,.0f} {what}"
                for available, most, what in (requests, (each.tokens_available, each.tokens_max, "tokens"))
                if available is not None and most is not None
            ]
            paused = f"paused for {each.paused_for:.0f} s" if each.paused_for > 0 else None
            left_of_minute = f"left this minute: {', '.join(left)}" if left else None
            state = f"{each.in_flight} in flight, {each.waiting} waiting"
            yield f"limiter {each.route}", Cell(state, "warn" if paused else "", (each.model, left_of_minute, paused))
        if self.cache is not None:
            rate = "nothing asked yet" if self.cache.hit_rate is None else f"{self.cache.hit_rate:.0%} of lookups hit"
            yield "cache", f"{self.cache.size:,} answers in memory, {self.cache.stored:,} in the store, {rate}"
        for store in self.stores:
            state = "usable" if store.available else "unavailable"
            yield (
                "store",
                Cell(state, "" if store.available else "bad", (f"{store.url}, namespace {store.namespace!r}",)),
            )
        if self.tracking is not None:
            traces = f"{self.tracking.exported:,} traces written, {self.tracking.waiting:,} waiting"
            lost = f", {self.tracking.lost:,} lost" if self.tracking.lost else ""
            yield "MLflow", Cell(traces + lost, "warn" if self.tracking.failing else "", (self.tracking.uri,))
        if self.costs is not None:
            projected = f"projected for the month {self.costs.projected_monthly_usd:.4f} USD"
            yield "today", f"{self.costs.today_usd:.6f} USD; {projected}"
