"""The one flow of a call, written once for sync, async and streaming.

It is a generator that *yields* effects (`Attempt`, `Wait`) and receives their results, as httpx's `auth_flow` does; two
small drivers perform them. It never sleeps and does no I/O of its own. The order is the library's contract:

    cache lookup, single-flight
      └ fallback: for each route (primary, then fallbacks)
          └ retry: attempts under one deadline and one retry budget
              └ breaker check ─ wait for limiter and budget together (holding nothing) ─ breaker permit
                  └ one upstream attempt
              ◄─ settle permit, tokens and money with what really happened; append the record; emit events

An open circuit is noticed before any waiting; the permit is taken last, so nobody holds a probe while queueing. No
`yield` stands in a cleanup path: settling posts, it never waits.
"""

from __future__ import annotations

from collections.abc import Generator
from math import inf
from typing import Any, TypeAlias

from dspy.lm15 import Response
from dspy.utils.exceptions import LMError

from dspy_prod.errors import (
    BudgetExceededError,
    CircuitOpenError,
    DeadlineExceededError,
    RateLimitedError,
    RejectedError,
)
from dspy_prod.pipeline.call import Call, Plan
from dspy_prod.pipeline.effects import Attempt, Wait
from dspy_prod.pipeline.outcome import Verdict
from dspy_prod.pipeline.reaper import REAPER
from dspy_prod.pipeline.routes import Route
from dspy_prod.policies.cache import cacheable
from dspy_prod.policies.retry import Attempts
from dspy_prod.policies.singleflight import ANSWERED, FAILED, LEADS, WAITING, Follower
from dspy_prod.stores.base import GRANTED, PENDING, Ticket

Flow: TypeAlias = Generator["Attempt | Wait", Any, Response]


def flow(call: Call) -> Flow:
    """Answer a call from the cache, from another identical call, or from upstream."""
    key = call.key
    if key is None:
        return (yield from _send(call))
    pipeline = call.pipeline
    cache = pipeline.cache
    assert cache is not None
    if call.cache_mode == "use":
        entry = cache.get(key)
        if entry is not None:
            return call.hit(entry)
    if call.streaming or call.cache_mode != "use" or not cache.options.single_flight:
        return (yield from _send(call))
    flights = pipeline.flights
    follower = flights.join(key)
    if follower is not None:
        response = yield from _follow(call, key, follower)
        if response is not None:
            return response
    else:
        entry = cache.fresh(key)  # the previous flight may have landed between the lookup and now
        if entry is not None:
            flights.answer(key, entry.response)
            return call.hit(entry)
    ended = False
    try:
        response = yield from _send(call)
        ended = True
        flights.answer(key, response)
        return response
    except RejectedError:
        raise  # our own refusal: the next follower decides for itself
    except LMError as error:
        ended = True
        flights.fail(key, error)  # the upstream's verdict holds for everybody who asked the same
        raise
    except GeneratorExit:
        ended = True
        REAPER.post(lambda: flights.hand_over(key))
        raise
    finally:
        if not ended:
            flights.hand_over(key)


def _follow(call: Call, key: bytes, follower: Follower) -> Generator[Attempt | Wait, Any, Response | None]:
    """Wait for the leader; None means that this call leads now."""
    pipeline = call.pipeline
    flights = pipeline.flights
    started = pipeline.clock.monotonic()

    def give_up() -> None:
        if not flights.leave(key, follower) and follower.state == LEADS:
            flights.hand_over(key)

    try:
        while follower.state == WAITING:
            yield Wait(follower, call.deadline)
            late = follower.state == WAITING and pipeline.clock.monotonic() >= call.deadline
            if late and flights.leave(key, follower):
                raise call.too_late("while waiting for an identical call")
    except BaseException as error:
        if isinstance(error, GeneratorExit):
            REAPER.post(give_up)
        else:
            give_up()
        raise
    call.waited += pipeline.clock.monotonic() - started
    if follower.state == ANSWERED:
        call.record_cached("cached")
        response: Response = pipeline.without_usage(follower.value)
        return response
    if follower.state == FAILED:
        assert follower.error is not None
        raise follower.error
    if pipeline.clock.monotonic() >= call.deadline:
        flights.hand_over(key)
        raise call.too_late("while waiting for an identical call")
    return None


def _send(call: Call) -> Flow:
    """Try the routes in order, and keep the answer."""
    pipeline = call.pipeline
    failure: LMError | None = None
    refusal: RejectedError | None = None
    routes = call.routes()
    for route in routes:
        attempts = Attempts(route.retry, route.state.retry_budget, pipeline.rand)
        if failure is not None or refusal is not None:
            call.emit("fallback", to=route.model, reason=_reason(failure or refusal))
        while True:
            verdicts: list[Verdict] = []
            try:
                response = yield from _attempt(call, route, attempts.number, verdicts)
            except (CircuitOpenError, RateLimitedError) as error:
                call.emit("rejected", model=route.model, route=route.name, reason=error.reason)
                refusal = refusal or error
                break
            except RejectedError as error:
                call.emit("rejected", model=route.model, route=route.name, reason=error.reason)
                if isinstance(error, BudgetExceededError) and failure is not None:
                    raise error from failure
                raise
            except LMError as error:
                verdict = verdicts[0]
                now = pipeline.clock.monotonic()
                pause = attempts.again(
                    verdict.retry and not call.visible, getattr(error, "retry_after", None), call.deadline - now
                )
                if pause is not None:
                    call.emit("retry", model=route.model, attempt=attempts.number, pause=pause, error=_reason(error))
                    if pause > 0:
                        yield Wait(None, now + pause)
                    continue
                if call.visible or not verdict.fallback:
                    raise
                failure = error
                break
            _keep(call, route, response)
            call.route_name = route.name
            return response
    if call.key is not None and pipeline.cache is not None and pipeline.cache.options.stale_if_error > 0:
        entry = pipeline.cache.stale(call.key)
        if entry is not None and call.cache_mode == "use":
            return call.hit(entry, "stale")
    if failure is not None:
        raise failure
    assert refusal is not None
    raise refusal


def _attempt(call: Call, route: Route, number: int, verdicts: list[Verdict]) -> Flow:
    """One attempt on one route: check, reserve, take the permit, send, settle."""
    pipeline = call.pipeline
    clock = pipeline.clock
    breaker = route.state.breaker
    if breaker is not None:
        breaker.check()
    if call.deadline != inf and clock.monotonic() >= call.deadline:
        raise call.too_late("before the request was sent")
    plan = call.plan(route)
    ticket: Ticket | None = None
    permit = None
    settled = False
    started = clock.monotonic()
    until = inf
    try:
        ask = call.ask(plan, number)
        if ask is not None:
            ticket = pipeline.store.admit(ask)
            if ticket.state != GRANTED:
                plan, ticket = yield from _admission(call, plan, ticket, number)
                if breaker is not None:
                    breaker.check()
            if ticket.spent and pipeline.watches_spending:
                call.note_spending(plan, ticket)
        if breaker is not None:
            permit = breaker.permit()
        started = clock.monotonic()
        until = call.attempt_until(route, started)
        response = yield Attempt(route, plan.request, call.extras, until)
        call.succeeded(plan, ticket, permit, number, started, response)
        settled = True
        return response
    except BaseException as raised:
        if settled:
            raise
        if ticket is not None and ticket.state != GRANTED:
            ticket = None  # nothing is held
        if ticket is None and permit is None and isinstance(raised, RejectedError):
            raise
        error, verdict = call.failed(plan, ticket, permit, number, started, until, raised)
        verdicts.append(verdict)
        if error is raised:
            raise
        raise error from (raised.__cause__ or raised)


def _admission(call: Call, plan: Plan, ticket: Ticket, number: int) -> Generator[Attempt | Wait, Any, tuple[Plan, Ticket]]:
    """Wait in line for limiter and budget, holding nothing."""
    pipeline = call.pipeline
    store = pipeline.store
    clock = pipeline.clock
    began = clock.monotonic()
    until = call.wait_until(plan, began)
    call.emit("waiting", model=plan.route.model, blocked_on=ticket.blocked_on)
    while True:
        try:
            while ticket.state == PENDING:
                yield Wait(ticket, until)
                if ticket.state == PENDING and clock.monotonic() >= until and store.withdraw(ticket):
                    raise call.waited_too_long(plan, ticket)
        except BaseException as error:
            if ticket.state == GRANTED or not _withdraw(store, ticket, error):
                _give_back(call, plan, ticket, error)
            raise
        finally:
            call.waited += clock.monotonic() - began
            began = clock.monotonic()
        if ticket.state == GRANTED:
            return plan, ticket
        refusal = ticket.refusal
        assert refusal is not None
        smaller = call.shrunk(plan, refusal)
        if smaller is None or smaller.request.config.max_tokens == plan.request.config.max_tokens:
            raise call.refused(plan, refusal)
        plan = smaller
        ask = call.ask(plan, number)
        assert ask is not None
        ticket = store.admit(ask)


def _withdraw(store: Any, ticket: Ticket, error: BaseException) -> bool:
    if isinstance(error, GeneratorExit):
        return False  # perhaps inside the garbage collector: left to the reaper
    return bool(store.withdraw(ticket))


def _give_back(call: Call, plan: Plan, ticket: Ticket, error: BaseException) -> None:
    """Return a grant that came too late to be used."""
    from dspy_prod.stores.base import Settlement

    store = call.pipeline.store

    def work() -> None:
        if not store.withdraw(ticket):
            store.settle(ticket, Settlement(ticket.ask.id, 0, 0, False, False, None))

    if isinstance(error, GeneratorExit):
        REAPER.post(work)
    else:
        work()


def _keep(call: Call, route: Route, response: Response) -> None:
    """Put an answer into the cache, unless another route than the key says gave it."""
    cache = call.pipeline.cache
    if call.key is None or cache is None or call.cache_mode == "bypass":
        return
    if route is call.pipeline.primary and not call.degraded and cacheable(response):
        cache.put(call.key, response, call.ttl)


def _reason(error: LMError | None) -> str:
    if isinstance(error, RejectedError):
        return error.reason
    return type(error).__name__


__all__ = ["DeadlineExceededError", "Flow", "flow"]
