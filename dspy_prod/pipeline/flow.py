"""The one flow of a call, written once for sync, async and streaming.

It is a generator that *yields* effects (`Warm`, `Wait`, `Send`) and receives their results, as httpx's `auth_flow`
does; two small drivers perform them. It never sleeps and does no I/O of its own. The order is the library's contract:

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

from collections.abc import Callable, Generator
from math import inf
from typing import Any, Final, TypeAlias

from dspy.lm15 import Response
from dspy.utils.exceptions import LMError

from dspy_prod.errors import CircuitOpenError, RateLimitedError, RejectedError
from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.effects import Send, Wait, Warm
from dspy_prod.pipeline.outcome import judge
from dspy_prod.pipeline.plan import Attempt, longest_wait, only_here, plan, renewed, shrunk, turns_at, wait_until
from dspy_prod.pipeline.refusals import refused, too_late, waited_too_long
from dspy_prod.pipeline.routes import Route
from dspy_prod.pipeline.settling import failed, give_back, succeeded
from dspy_prod.policies.cache import cacheable
from dspy_prod.policies.retry import Attempts
from dspy_prod.policies.singleflight import ANSWERED, FAILED, LEADS, WAITING, Follower
from dspy_prod.records import NANO
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.base import GRANTED, PENDING, Reservation, Store

STORE_PATIENCE: Final = 5.0
"""Seconds a store gets to look at a reservation, whatever `max_wait` says about the wait after that."""

LATE: Final = 0.01
"""Seconds after its admission from which a call's limiter is told when it really left."""

_LOOK: Final = 0.01

Effect: TypeAlias = "Send | Wait | Warm"
Flow: TypeAlias = Generator[Effect, Any, Response]


def flow(call: Call) -> Flow:
    """Answer a call from the cache, from another identical call, or from upstream."""
    key = call.key
    if key is None:
        return (yield from _send(call))
    pipeline = call.pipeline
    cache = pipeline.cache
    assert cache is not None
    mode = call.context.cache
    if mode == "use":
        entry = cache.load(key) if call.missed else cache.get(key)
        if entry is not None:
            return call.hit(entry)
    if call.streaming or call.alone or mode != "use" or not cache.options.single_flight:
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


def _follow(call: Call, key: bytes, follower: Follower) -> Generator[Effect, Any, Response | None]:
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
                raise too_late(call, "while waiting for an identical call")
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
        raise too_late(call, "while waiting for an identical call")
    return None


def _send(call: Call) -> Flow:
    """Try the routes in order, and keep the answer."""
    pipeline = call.pipeline
    failure: LMError | None = None
    refusal: RejectedError | None = None
    routes = call.routes() if pipeline.degradable else pipeline.routes
    for route in routes:
        attempts = Attempts(route.retry, route.state.retry_budget, pipeline.rand)
        if failure is not None or refusal is not None:
            call.emit("fallback", to=route.model, reason=_reason(failure or refusal))
        while True:
            try:
                response = yield from _attempt(call, route, attempts.number)
            except (CircuitOpenError, RateLimitedError) as error:
                error.model, error.route = route.model, route.name  # a breaker does not know whose route it guards
                call.emit("rejected", model=route.model, route=route.name, reason=error.reason)
                refusal = refusal or error
                break
            except RejectedError as error:
                call.emit("rejected", model=route.model, route=route.name, reason=error.reason)
                if only_here(call, route, routes[0], error):
                    refusal = refusal or error
                    break
                if failure is not None and error.__cause__ is None:
                    raise error from failure
                raise
            except LMError as error:
                verdict = judge(error)
                now = pipeline.clock.monotonic()
                pause = None
                if not _opened(route):  # else the next attempt would wait for nothing
                    pause = attempts.again(
                        verdict.retry and not call.visible,
                        getattr(error, "retry_after", None),
                        longest_wait(call, route, now) - now,
                    )
                if pause is not None:
                    failure = error  # should the next attempt be refused, this is the upstream's last word
                    call.emit("retry", model=route.model, attempt=attempts.number, pause=pause, error=_reason(error))
                    if pause > 0:
                        yield Wait(None, now + pause)
                    continue
                if call.visible or not verdict.fallback:
                    raise
                failure = error
                break
            if call.key is not None:
                _keep(call, route, response)
            return response
    cache = pipeline.cache
    if call.key is not None and cache is not None and cache.options.stale_if_error > 0 and call.context.cache == "use":
        entry = cache.stale(call.key)
        if entry is not None:
            return call.hit(entry, "stale")
    if failure is not None:
        raise failure
    assert refusal is not None
    raise refusal


def _attempt(call: Call, route: Route, number: int) -> Flow:
    """One attempt on one route: check, reserve, take the permit, send, settle."""
    pipeline = call.pipeline
    breaker = route.state.breaker
    if breaker is not None:
        breaker.check()
    if call.deadline != inf and call.late():
        raise too_late(call, "before the request was sent")
    attempt = plan(call, route, number)
    settled = False
    try:
        if not route.upstream.ready:
            yield Warm(route, attempt.request, call.scope, call.deadline)
        if attempt.reservation is not None:
            if pipeline.store.admit(attempt.reservation).state != GRANTED:
                attempt = yield from _admission(attempt)
                if breaker is not None:
                    breaker.check()
            if pipeline.watches_spending:
                _note_spending(attempt)
        if call.deadline != inf and call.late():
            raise too_late(call, "before the request was sent")
        if breaker is not None:
            attempt.permit = breaker.permit()
        leaving = None
        if route.paced and attempt.reservation is not None:
            leaving = _leaving(pipeline.store, attempt.reservation)
        attempt.started = now = pipeline.clock.monotonic()
        attempt.until = until = call.deadline if route.timeout is None else call.attempt_until(route, now)
        attempt.sent = True
        response = yield Send(route, attempt.request, call.scope, until, leaving)
        succeeded(attempt, response)
        settled = True
        return response
    except BaseException as raised:
        if settled or (isinstance(raised, RejectedError) and not attempt.sent and attempt.held is None):
            raise
        error = failed(attempt, raised)
        if error is raised:
            raise
        raise error from (raised.__cause__ or raised)


def _admission(attempt: Attempt) -> Generator[Effect, Any, Attempt]:
    """Wait in line for limiter and budget, holding nothing; gives the attempt as it was granted in the end."""
    call = attempt.call
    store, monotonic = call.pipeline.store, call.pipeline.clock.monotonic
    until = wait_until(attempt, monotonic())
    while True:
        reservation = attempt.reservation
        assert reservation is not None
        began = monotonic()
        turn = turns_at(attempt, began)
        again: Attempt | None = None
        try:
            if reservation.state == PENDING:
                call.emit("waiting", model=attempt.route.model, blocked_on=reservation.blocked_on)
            while reservation.state == PENDING:
                now = monotonic()
                if now < min(until, turn):
                    yield Wait(reservation, min(until, turn))
                    continue
                turn = inf
                if any(account.title == reservation.blocked_on for account in reservation.accounts):
                    again = renewed(attempt)
                if again is not None:
                    store.withdraw(reservation)  # should it be granted meanwhile, so much the better
                elif now < until:
                    continue
                elif not reservation.blocked_on and now < min(call.deadline, began + STORE_PATIENCE):
                    yield Wait(reservation, now + _LOOK)  # no max_wait is up before the store has looked
                elif store.withdraw(reservation):
                    raise waited_too_long(attempt)
        except BaseException as error:
            give_back(attempt, error)
            raise
        finally:
            call.waited += monotonic() - began
        if reservation.state == GRANTED:
            return attempt
        refusal = reservation.refusal
        if again is None and refusal is not None and refusal.reason == "budget_exceeded":
            again = renewed(attempt) or shrunk(attempt, refusal)
        if again is None or again.reservation is None:
            assert refusal is not None
            raise refused(attempt, refusal)
        attempt = again
        store.admit(again.reservation)


def _note_spending(attempt: Attempt) -> None:
    """Notice budgets that pass their soft threshold with this grant."""
    reservation = attempt.reservation
    assert reservation is not None
    for rule, account, spent in zip(attempt.rules, reservation.accounts, reservation.spent, strict=False):
        if rule.soft_passed(account.key, spent):
            attempt.call.emit(
                "budget_soft", budget=account.title, spent_usd=spent / NANO, limit_usd=account.limit / NANO,
                degrade_to=rule.options.degrade_to,
            )  # fmt: skip


def _leaving(store: Store, reservation: Reservation) -> Callable[[], None]:
    """To be called when a call leaves: its limiter hears of it when that is well after the grant.

    A busy machine, or connections that take long to open, would else bunch calls up.
    """

    def leaving() -> None:
        now = store.now()
        if now - reservation.granted_at > LATE:
            store.sent_late(reservation, now)

    return leaving


def _keep(call: Call, route: Route, response: Response) -> None:
    """Put an answer into the cache, unless another route than the key says gave it."""
    cache = call.pipeline.cache
    if call.key is None or cache is None:
        return
    if route is call.pipeline.primary and not call.degraded and cacheable(response):
        cache.put(call.key, response, call.context.ttl)


def _opened(route: Route) -> bool:
    """Whether a failure has opened the circuit."""
    breaker = route.state.breaker
    if breaker is not None:
        try:
            breaker.check()
        except CircuitOpenError:
            return True
    return False


def _reason(error: LMError | None) -> str:
    if isinstance(error, RejectedError):
        return error.reason
    return type(error).__name__
