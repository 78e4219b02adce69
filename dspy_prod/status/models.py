"""What `health`, `costs` and `preview` answer with: frozen pydantic models, ready for JSON.

Money is in USD, durations in seconds, days are UTC. Nothing here holds a secret, a prompt or an answer.
"""

from __future__ import annotations

import datetime as dt
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field

from dspy_prod.telemetry.tap import Frozen, TrackingHealth

F = TypeVar("F", bound=Frozen)

Status = Literal["healthy", "warning", "degraded"]
"""`degraded`: a circuit is not closed, or the store is not usable; `warning`: something runs out soon."""

Reason = Literal[
    "circuit_open", "rate_limited", "budget_exceeded", "deadline_exceeded", "unpriced_model", "store_unavailable",
    "run_stopped", "outage",
]  # fmt: skip
"""The words of `RejectedError.reason`."""


class BudgetStatus(Frozen):
    """One account of one budget, in its current window. `spent + held + remaining = limit` until the limit is reached.

    Attributes:
        title: the budget's name, with the scope's value when it has one, e.g. `"day/tenant=acme"`.
        name: the budget's name alone. who: the scope's value alone, after that of the run for a
            run's budget; None for the one account of a global budget.
        per, scope: as in `Budget`.
        limit_usd: what may be spent in the window.
        spent_usd: what was charged, unconfirmed charges included.
        held_usd: reserved by calls in flight.
        unconfirmed_usd: the part of `spent_usd` that is an upper bound because the provider did not tell.
        remaining_usd: what a new call can still reserve.
        used_percent: `spent_usd` in percent of `limit_usd`.
        window: id of the window, e.g. `"2026-11-23"`; `"total"` or `"run"` when it never ends.
        ends_at: when the window ends; None when it never does.
    """

    title: str
    name: str
    who: str | None
    per: str
    scope: str
    limit_usd: float
    spent_usd: float
    held_usd: float
    unconfirmed_usd: float
    remaining_usd: float
    used_percent: float
    window: str
    ends_at: dt.datetime | None


class CostSummary(Frozen):
    """What a store and namespace has spent, and what is left of the tightest global budget.

    The budget fields describe the global budget with the highest `used_percent`, in its own window (which need not be
    a day); they are None without one.

    Attributes:
        today_usd: cost since midnight UTC, unconfirmed cost included; calls of unknown cost are not in it.
        budget_usd, used_percent, remaining_usd: of the tightest global budget.
        held_usd: reserved on it by calls in flight; 0 without one.
        unconfirmed_usd: the part of `today_usd` that is an upper bound because the provider did not tell.
        average_daily_7d_usd: mean of the last 7 calendar days with today; empty days count from the first record on.
        projected_monthly_usd: `average_daily_7d_usd` times the days of the current month.
        history: day → USD, oldest first, of the last 31 days with today; empty days count from the first record on.
        unknown_cost_calls: today's attempts whose cost is not known, because their model has no known price.
        unwritten: about how many records are in none of these figures yet, because the store cannot write them at the
            moment, or not so fast; 0 when all are complete.
        budgets: every global budget of the LM, then of each budget with a scope the accounts (at most 10) that are used
            most, the worst first.
    """

    today_usd: float
    budget_usd: float | None
    used_percent: float | None
    remaining_usd: float | None
    held_usd: float
    unconfirmed_usd: float
    average_daily_7d_usd: float
    projected_monthly_usd: float
    history: dict[dt.date, float]
    unknown_cost_calls: int
    unwritten: int = 0
    budgets: list[BudgetStatus]


class CostRow(Frozen):
    """Sums over records that have one value in common.

    Attributes:
        value: the day (`YYYY-MM-DD`), model, user, ... they have in common.
        rest: the row collects values beyond the number a store keeps apart per day; its value is `"(other)"`.
        usd: known cost, unconfirmed cost included.
        unconfirmed_usd: the part of `usd` that is an upper bound.
        unknown_cost: attempts whose cost is not known; they are not in `usd`.
        attempts: upstream attempts. cached: answers from the cache. failed: attempts that did not end in an answer.
        input_tokens, output_tokens: usage the providers told.
    """

    value: str
    usd: float
    unconfirmed_usd: float
    unknown_cost: int
    attempts: int
    cached: int
    failed: int
    input_tokens: int
    output_tokens: int
    rest: bool = False


class BreakerHealth(Frozen):
    """The circuit breaker of one route, in this process.

    Attributes:
        route: `"primary"`, or the fallback's model. model: the model it guards.
        state: `closed`, `open`, `half_open`, `forced_open` or `disabled`. An open circuit stays `open` until a call
            comes after its interval.
        failures, successes: calls in the window. failure_rate: their share of failures, None when it is empty.
        consecutive_failures: failures in a row.
        retry_after: seconds until a call may be sent; 0 when it may now, None when unknown.
        cause: what opened it, else empty. opened_count: how often it opened.
        total_failures, total_successes: since the process started.
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


class Health(Frozen):
    """The state of one LM, or of all of them.

    Attributes:
        status: `degraded` when a circuit is open, half-open or forced open, or a store is unavailable or has dropped
            something; `warning` when a budget is used above 90 %, a limiter has less than 10 % of its tokens or
            requests left, a provider asked to pause, or MLflow does not take the traces; else `healthy`.
        reasons: why it is not healthy, in plain words.
        breakers, limiters: one for each route.
        cache: None when no cache is on.
        costs: None when no store could be read.
        holds: reservations not yet settled. waiting: calls of this process in line.
        stores: one for each store and namespace.
        tracking: None when `dspy_prod.tracking` is off.
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

    @property
    def store(self) -> StoreHealth | None:
        """The (first) store; None when no LM is alive."""
        return self.stores[0] if self.stores else None


class Preview(Frozen):
    """What a call would cost at most, and whether and when it would be sent. Nothing was sent or reserved.

    Attributes:
        model: the model that would be asked; another than the LM's when a fallback or a cheaper model would answer.
        bound_usd: the most that one attempt for each of the `n` answers can cost; 0 when the cache would answer, None
            when it is not known. Retries of attempts that were billed come on top.
        input_tokens_bound, output_tokens_bound: the bounds behind it; None when not known.
        affordable: whether the budgets cover `bound_usd`; True when there is none, None when the cost is not known.
        wait: seconds until it could be sent; None when that depends on other calls or it would be refused for good.
        reason: why it would be refused, as in `RejectedError.reason`; None when it would not.
        detail: the refusal or the wait in plain words, with the remedy; else empty.
        cached: whether the cache would answer.
        budgets: the accounts the call would draw on.
    """

    model: str
    bound_usd: float | None
    input_tokens_bound: int | None
    output_tokens_bound: int | None
    affordable: bool | None
    wait: float | None
    reason: Reason | None
    detail: str
    cached: bool
    budgets: list[BudgetStatus]


def filled(answer: type[F], source: NamedTuple, **more: Any) -> F:
    """An answer with the fields that its source has by the same names, and some more."""
    told = {name: value for name, value in source._asdict().items() if name in answer.model_fields}
    return answer(**told, **more)
