"""Settling an attempt, exactly once on every path: success, error, cancellation, Ctrl-C, abandoned stream.

Nothing here waits, blocks or raises. On a path that the garbage collector may run (`GeneratorExit`) the work is handed
to the reaper.
"""

from __future__ import annotations

from typing import Any

from dspy.clients.errors import wrap_error
from dspy.lm15 import Response, Usage
from dspy.utils.exceptions import LMTimeoutError

from dspy_prod.errors import RejectedError
from dspy_prod.pipeline.call import IDS, Call
from dspy_prod.pipeline.outcome import CANCELLED, Verdict, judge, own_deadline
from dspy_prod.pipeline.plan import Plan, bound_or_none
from dspy_prod.pipeline.refusals import too_late
from dspy_prod.pipeline.upstream.deadline import StalledError
from dspy_prod.pipeline.upstream.ends import AttemptTimeoutError
from dspy_prod.pipeline.upstream.headers import remaining
from dspy_prod.policies.breaker.breaker import Permit
from dspy_prod.pricing.rates import Rates
from dspy_prod.records import usd
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.base import Reservation, Settlement


def succeeded(
    call: Call, plan: Plan, reservation: Reservation | None, permit: Permit | None, started: float, response: Response
) -> None:
    """Settle an attempt that was answered."""
    pipeline = call.pipeline
    route = plan.route
    state = route.state
    clock = pipeline.clock
    usage = response.usage
    latency = clock.monotonic() - started
    request = plan.request
    rates = route.rates_for(request, call.extras) if route.upstream.fell_back else route.rates()
    cost = None if rates is None else route.prices.price_response(rates, response, request)
    estimated = False
    if cost is None and rates is not None:  # the provider did not tell the usage: the bound stands
        cost = plan.bound if plan.bound is not None else bound_or_none(route, plan.request)
        estimated = cost is not None
    started_at = clock.time() - latency
    if reservation is None:
        record = call.record(
            route, IDS.make(), plan.number, "ok", cost, started_at, estimated=estimated, usage=usage, latency=latency
        )
        pipeline.store.append(record)
    else:
        record = call.record(
            route, reservation.id, plan.number, "ok", cost, started_at, estimated=estimated, usage=usage,
            latency=latency, accounts=_keys(reservation) if reservation.accounts else (),
        )  # fmt: skip
        pipeline.store.settle(
            reservation, Settlement(reservation.id, cost, _used(rates, usage), True, estimated, record)
        )
        if cost is not None and plan.bound is not None and cost > plan.bound:
            call.emit("budget_overrun", model=route.model, cost_usd=usd(cost), bound_usd=usd(plan.bound))
    if permit is not None:
        assert state.breaker is not None
        state.breaker.success(permit, latency - call.paused)
    if state.retry_budget.drawn:
        state.retry_budget.success()
    if usage.output_tokens is not None and (route.learning or request.config.max_tokens is None):
        state.learn(usage.output_tokens)
    call.remember(record, route, response)
    if pipeline.bus.wants_content:
        call.emit_content(plan.request, response)


def failed(
    call: Call,
    plan: Plan,
    reservation: Reservation | None,
    permit: Permit | None,
    started: float,
    until: float,
    raised: BaseException,
    attempted: bool,
) -> tuple[BaseException, Verdict]:
    """Settle an attempt that raised; which error that is for the caller, and what it means.

    When the consumer left, perhaps inside the garbage collector, all of it is the reaper's work: listeners and the
    breaker take locks too.

    Args:
        until: monotonic time at which the driver was told to end it.
        attempted: the attempt was handed to the driver, so the provider may have seen it.
    """
    latency = call.pipeline.clock.monotonic() - started
    if isinstance(raised, GeneratorExit):

        def settle() -> None:
            _failed(call, plan, reservation, permit, started, latency, until, raised, attempted)

        REAPER.post(settle)
        return raised, CANCELLED
    return _failed(call, plan, reservation, permit, started, latency, until, raised, attempted)


def _failed(
    call: Call,
    plan: Plan,
    reservation: Reservation | None,
    permit: Permit | None,
    started: float,
    latency: float,
    until: float,
    raised: BaseException,
    attempted: bool,
) -> tuple[BaseException, Verdict]:
    route = plan.route
    worked = latency - call.paused
    error, late = raised, None
    if isinstance(raised, AttemptTimeoutError):
        late = raised.late
        if until >= call.deadline and not isinstance(raised, StalledError):
            error = too_late(call, "while the upstream was working")
            verdict = own_deadline(worked, route.timeout)
        else:
            error = LMTimeoutError(
                f"no answer within timeout={route.timeout:g} s", model=route.model, provider=route.upstream.provider
            )
            verdict = judge(error)
    else:
        verdict = judge(error)
    if not attempted:
        verdict = verdict._replace(sent=False, owed=False)
    if permit is not None:
        breaker = route.state.breaker
        assert breaker is not None
        if verdict.failure:
            breaker.failure(permit, worked, cause_of(error), getattr(error, "retry_after", None))
        else:
            breaker.release(permit)
    if verdict.throttled:
        _throttled(call, plan, error)
    if late is None:
        _settle_failure(call, plan, reservation, latency, verdict, error)
    else:
        late.on_end(lambda response, failure: _ended_late(call, plan, reservation, started, verdict, response, failure))
    return error, verdict


def give_back(call: Call, reservation: Reservation, error: BaseException) -> None:
    """Return a reservation that is not used; it may still be waiting, or be granted meanwhile."""
    store = call.pipeline.store

    def work() -> None:
        if not store.withdraw(reservation):
            store.settle(reservation, Settlement(reservation.id, 0, 0, False, False, None))

    if isinstance(error, GeneratorExit):
        REAPER.post(work)  # perhaps inside the garbage collector
    else:
        work()


def cause_of(error: BaseException) -> str:
    """Class and status of an error: what may be shown of it without showing a secret."""
    status = getattr(error, "status", None)
    name = type(error).__name__
    return f"{name} {status}" if status is not None else name


def _settle_failure(
    call: Call, plan: Plan, reservation: Reservation | None, latency: float, verdict: Verdict, error: BaseException
) -> None:
    cost: int | None = 0
    if verdict.owed:
        cost = plan.bound if plan.bound is not None else bound_or_none(plan.route, plan.request)
    store = call.pipeline.store
    record = None
    if verdict.sent or (isinstance(error, Exception) and not isinstance(error, RejectedError)):
        record = call.record(
            plan.route, IDS.make() if reservation is None else reservation.id, plan.number, verdict.outcome, cost,
            call.pipeline.clock.time() - latency, estimated=verdict.owed and cost is not None, latency=latency,
            error=error, accounts=_keys(reservation),
        )  # fmt: skip
        call.remember(record, plan.route)
    if reservation is not None:
        tokens = None if verdict.owed else 0
        store.settle(reservation, Settlement(reservation.id, cost, tokens, verdict.sent, verdict.owed, record))
    elif record is not None:
        store.append(record)


def _ended_late(
    call: Call,
    plan: Plan,
    reservation: Reservation | None,
    started: float,
    verdict: Verdict,
    response: Any,
    failure: BaseException | None,
) -> None:
    """An abandoned attempt has ended in its worker: perhaps its usage is known after all."""
    route = plan.route
    latency = call.pipeline.clock.monotonic() - started
    rates = route.rates_for(plan.request, call.extras)
    if isinstance(response, Response):
        cost = None if rates is None else route.prices.price_response(rates, response, plan.request)
        if cost is not None or rates is None:
            id = IDS.make() if reservation is None else reservation.id
            record = call.record(
                route, id, plan.number, verdict.outcome, cost, call.pipeline.clock.time() - latency,
                usage=response.usage, latency=latency, accounts=_keys(reservation),
            )  # fmt: skip
            store = call.pipeline.store
            if reservation is None:
                store.append(record)
            else:
                store.settle(reservation, Settlement(id, cost, _used(rates, response.usage), True, False, record))
            call.remember(record, route, response)
            return
    if isinstance(failure, Exception):
        error = wrap_error(failure, model=route.model, provider=route.upstream.provider)
        if error is not failure:
            error.__cause__ = failure  # what it means depends on its causes
        end = judge(error)
        verdict = verdict._replace(owed=end.owed, sent=end.sent)
    _settle_failure(call, plan, reservation, latency, verdict, AttemptTimeoutError())


def _throttled(call: Call, plan: Plan, error: BaseException) -> None:
    route = plan.route
    retry_after = getattr(error, "retry_after", None)
    if route.limit.adaptive:
        route.state.throttled = True
        call.pipeline.store.throttled(route.limit_key, route.limit, retry_after)
        told = remaining(getattr(error, "rate_limit_headers", None), call.pipeline.clock.time())
        if told:
            call.pipeline.store.resync(route.limit_key, route.limit, told)
    call.emit("throttled", model=route.model, route=route.name, retry_after=retry_after)


def _keys(reservation: Reservation | None) -> tuple[str, ...]:
    if reservation is None or not reservation.accounts:
        return ()
    return tuple([account.key for account in reservation.accounts])


def _used(rates: Rates | None, usage: Usage) -> int | None:
    if rates is not None:
        return rates.tokens(usage)
    inputs: int | None = usage.input_tokens
    outputs: int | None = usage.output_tokens
    if inputs is None or outputs is None:
        return None
    return inputs + outputs
