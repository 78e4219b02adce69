"""What a call would cost at most, and whether and when it would be sent: the flow's own steps, without their effects.

The order is that of `pipeline/flow.py`: cache, then for each route breaker, bounds, runs, limiter and budget. Nothing
is sent or reserved, no record is written, and no lookup is counted.
"""

from __future__ import annotations

from contextlib import suppress
from copy import copy
from math import inf
from typing import NamedTuple

from dspy.lm15 import Request

from dspy_prod.errors import CircuitOpenError, RateLimitedError, RejectedError, StoreUnavailableError
from dspy_prod.pipeline.attempt import Attempt
from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.pipeline.plan import plan, shrunk, wait_until
from dspy_prod.pipeline.refusals import refused, too_late
from dspy_prod.pipeline.routes import Route
from dspy_prod.pipeline.running import foreseen
from dspy_prod.policies.sharing import refresh
from dspy_prod.pricing.bounds import hosted_fees
from dspy_prod.records import NANO
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.status.costs import FLUSH_TIMEOUT, budget_status
from dspy_prod.status.spending import BudgetStatus, Preview
from dspy_prod.stores.base import Reservation


class _Outlook(NamedTuple):
    """What one route would do: `wait` seconds, None when it depends on other calls, and why not."""

    route: Route
    plan: Attempt | None
    wait: float | None
    refusal: RejectedError | None
    detail: str = ""


def preview(pipeline: Pipeline, calls: list[Call]) -> Preview:
    """Look ahead at one call of an LM.

    Args:
        pipeline: what the call would run through.
        calls: the engine calls behind the LM call, one for each of `n` answers.
    """
    REAPER.flush(FLUSH_TIMEOUT)
    if pipeline.rules:
        with suppress(StoreUnavailableError):  # the outlook says it
            refresh(pipeline.store)
    call = calls[0]
    cached = all(map(_cached, calls))
    outlook = (
        _Outlook(call.routes()[0], None, 0.0, None, f"{'The cache' if call.log is None else 'The run'} would answer")
        if cached
        else _first_that_answers(call, len(calls))
    )
    route, planned = outlook.route, outlook.plan
    sent = call.request if planned is None else planned.request
    inputs, outputs = route.bounds(sent)
    bound = 0 if cached else _times(_bound(route, sent), len(calls))
    return Preview(
        model=route.model,
        bound_usd=None if bound is None else bound / NANO,
        input_tokens_bound=_times(inputs, len(calls)),
        output_tokens_bound=_times(outputs, len(calls)),
        affordable=cached or _affordable(pipeline, outlook, bound),
        wait=outlook.wait,
        reason=None if outlook.refusal is None else outlook.refusal.reason,  # type: ignore[arg-type]  # one of its words
        detail=outlook.detail,
        cached=cached,
        budgets=[] if planned is None else _budgets(pipeline, planned),
    )


def _cached(call: Call) -> bool:
    reuse = call.key is not None and call.context.cache == "use"
    if call.log is not None and call.log_key is not None and call.log.has(call.log_key, reuse):
        return True
    cache = call.pipeline.cache
    if call.key is None or cache is None or not reuse:
        return False
    entry = cache.stale(call.key)  # looks without counting a hit or a miss
    return entry is not None and entry.expires_at > call.pipeline.store.now()


def _first_that_answers(call: Call, count: int) -> _Outlook:
    """The first route that would take the call; else the first one's refusal, as the flow raises it."""
    refused_by: _Outlook | None = None
    for route in call.routes():
        outlook = _try(call, route, count)
        if outlook.refusal is None or not isinstance(outlook.refusal, (CircuitOpenError, RateLimitedError)):
            return outlook
        refused_by = refused_by or outlook
    assert refused_by is not None
    return refused_by


def _try(call: Call, route: Route, count: int) -> _Outlook:
    planned: Attempt | None = None
    impossible: RejectedError | None = None
    try:
        planned = plan(call, route, 1)  # known even when the circuit is open: it tells what the call would cost
    except RejectedError as error:
        impossible = error
    try:
        if route.breaker is not None:
            route.breaker.check()
        if call.late():
            raise too_late(call, "before the request was sent")
        if impossible is not None:
            raise impossible
        assert planned is not None
        kept = foreseen(planned, count) if call.context.guards else ""
        outlook = _Outlook(route, planned, 0.0, None)
        if planned.reservation is not None:
            outlook = _admission(call, planned, count)
        if kept:
            return outlook._replace(wait=None, detail=f"Waits until calls in flight free what they keep of {kept!r}")
        return outlook
    except RejectedError as error:
        return _Outlook(route, planned, error.retry_after, error, error.message)


def _admission(call: Call, planned: Attempt, count: int) -> _Outlook:
    """What limiter and budget would say to a reservation that is not made."""
    assert planned.reservation is not None
    pipeline, route, reservation = call.pipeline, planned.route, copy(planned.reservation)
    reservation.amount *= count
    wait, refusal = pipeline.store.preview(reservation)
    if refusal is not None:
        smaller = shrunk(planned, refusal) if count == 1 else None
        if smaller is None:
            raise refused(planned, refusal)
        return _admission(call, smaller, count)
    held = _held_by_others(pipeline, reservation)
    if held:
        return _Outlook(route, planned, None, None, f"Waits until calls in flight free money of the budget {held!r}")
    if wait > 0 and _all_seats_taken(pipeline, reservation):
        return _Outlook(route, planned, None, None, f"Waits until one of the calls in flight to {route.model} ends")
    if wait == inf:
        return _Outlook(route, planned, None, None, f"Waits until calls in flight to {route.model} end")
    now = pipeline.clock.monotonic()
    until = wait_until(planned, now)
    if now + wait > until:
        if until >= call.deadline:
            raise too_late(call, "while waiting for the rate limit")
        raise RateLimitedError(
            f"The rate limit of {route.model} could admit this call in {wait:.1f} s, which is longer than it may wait. "
            "Raise max_wait or the limit",
            model=route.model,
            route=route.name,
            retry_after=wait,
        )
    return _Outlook(route, planned, wait, None, f"Waits for the rate limit of {route.model}" if wait > 0 else "")


def _held_by_others(pipeline: Pipeline, reservation: Reservation) -> str:
    """The budget whose money is not spent but held by calls in flight, or ""."""
    for account in reservation.accounts:
        state = pipeline.store.account(account.key)
        if state.spent + state.held + reservation.amount > account.limit:
            return account.title
    return ""


def _all_seats_taken(pipeline: Pipeline, reservation: Reservation) -> bool:
    """Whether concurrency is what blocks; how long is then known to nobody."""
    if reservation.limit is None or reservation.limit.concurrency is None or reservation.limit_key is None:
        return False
    limiter = pipeline.store.limiter(reservation.limit_key)
    return limiter is not None and limiter.in_flight >= reservation.limit.concurrency


def _affordable(pipeline: Pipeline, outlook: _Outlook, bound: int | None) -> bool | None:
    if outlook.refusal is not None and outlook.refusal.reason == "budget_exceeded":
        return False
    if outlook.refusal is not None and outlook.refusal.reason == "unpriced_model":
        return None
    if not pipeline.budgets:
        return True
    asked = outlook.plan.reservation if outlook.plan is not None else None
    if asked is None or bound is None:
        return None
    try:
        return all(pipeline.store.account(account.key).spent + bound <= account.limit for account in asked.accounts)
    except StoreUnavailableError:
        return None


def _budgets(pipeline: Pipeline, planned: Attempt) -> list[BudgetStatus]:
    if planned.reservation is None:
        return []
    wall = pipeline.clock.time()
    pairs = zip(planned.rules, planned.reservation.accounts, strict=True)
    try:
        return [budget_status(pipeline.store, rule, account, wall) for rule, account in pairs]
    except StoreUnavailableError:
        return []


def _bound(route: Route, request: Request) -> int | None:
    return None if hosted_fees(request) else route.most(request, *route.bounds(request))


def _times(number: int | None, count: int) -> int | None:
    return None if number is None else number * count
