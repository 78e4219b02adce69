"""The one flow of a call, written once for sync, async and streaming.

It is a generator that *yields* effects (`Warm`, `Wait`, `Send`) and receives their results, as httpx's `auth_flow`
does; two small drivers perform them. It never sleeps and does no I/O of its own. The order is the library's contract:

    log of the run that keeps its answers, cache lookup, single-flight
      └ fallback: for each route (primary, then fallbacks)
          └ retry: attempts under one deadline and one retry budget, and little patience while a route is left
              └ stops, breaker check ─ wait for limiter and budget together (holding nothing) ─ stops, breaker permit
                  └ one upstream attempt
              ◄─ settle permit, tokens and money with what really happened; append the record; emit events

An open circuit is noticed before any waiting; the permit is taken last, so nobody holds a probe while queueing. Within
a `Run`, an attempt takes of it what it may use before it stands in line, see `running.py`, and all routes are gone
through again while an outage lasts, see `outlasting.py`. No `yield` stands in a cleanup path: settling posts, it never
waits.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable
from functools import partial
from math import inf
from typing import Any, TypeAlias

from dspy.lm15 import Response
from dspy.utils.exceptions import LMError

from dspy_prod.context.scoring import is_raising
from dspy_prod.errors import BudgetExceededError, CircuitOpenError, RateLimitedError, RejectedError
from dspy_prod.pipeline.admission import admission, leaves, note_spending
from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.cut_off import if_cut_off
from dspy_prod.pipeline.effects import Send, Wait, Warm
from dspy_prod.pipeline.failures import Failures, shows_partial, unusable
from dspy_prod.pipeline.keeping import keeping, replayed
from dspy_prod.pipeline.leading import Lead, shared_by
from dspy_prod.pipeline.outcome import flaw_of, judge
from dspy_prod.pipeline.outlasting import answered, flight_of, outlasting
from dspy_prod.pipeline.plan import fitted, only_here, pause_until, plan
from dspy_prod.pipeline.probing import probing
from dspy_prod.pipeline.refusals import too_late
from dspy_prod.pipeline.routes import Route
from dspy_prod.pipeline.running import go_on, stoppable, taking
from dspy_prod.pipeline.settling import failed, succeeded
from dspy_prod.policies.retry import Attempts
from dspy_prod.policies.singleflight import ANSWERED, FAILED, LOOK, WAITING, Follower, home
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.base import GRANTED

Effect: TypeAlias = "Send | Wait | Warm"
Flow: TypeAlias = Generator[Effect, Any, Response]


def flow(call: Call) -> Flow:
    """Answer a call from the cache, from another identical call, or from upstream."""
    if not call.context.guards:
        return _flow(call)
    return stoppable(_flow(call) if call.log is None else replayed(_flow(call), call), call)


def _flow(call: Call) -> Flow:
    key = call.key
    if key is None:
        return (yield from _send(call))
    pipeline = call.pipeline
    cache = pipeline.cache
    assert cache is not None
    mode = call.context.cache
    if mode == "use":
        entry = None if call.missed else cache.get(key)
        if entry is not None:
            return call.hit(entry)
    if call.streaming or call.alone or mode != "use" or not cache.options.single_flight:
        return (yield from _send(call))
    flights = pipeline.flights
    flight = flight_of(key, call.context.guards, is_raising())
    caller = Follower(home(), call)  # before it joins: wherever this is cut off, it says who leads or follows no more
    return (yield from if_cut_off(_together(call, key, flight, caller), partial(flights.hand_over, flight, caller)))


def _together(call: Call, key: bytes, flight: Hashable, caller: Follower) -> Flow:
    """Lead a flight, or follow who leads it. Whoever is cut off here hands over."""
    flights, cache = call.pipeline.flights, call.pipeline.cache
    assert cache is not None
    if flights.join(flight, caller) is not None:
        response = yield from _follow(call, flight, caller)
        if response is not None:
            return response
    lead = Lead(cache, key, caller.home)
    entry = cache.fresh(key)  # an answer may have come since the lookup, or while it followed
    if entry is None and lead.shared:
        flights.begun(flight, lead.end)
        call.lead = lead
        entry = yield from lead.wait(call)
    if entry is not None:
        flights.answer(flight, (entry.response, entry.list_nano, "cached"))
        return call.hit(entry)
    try:
        response = yield from _send(call)
    except RejectedError:
        raise  # our own refusal: the next follower decides for itself
    except LMError as error:
        lead.end(verdict=True)
        fits = shared_by(call)
        flights.fail(flight, error, fits)  # the upstream's verdict holds for everybody who asked the same
        raise
    lead.end(verdict=True)  # what is not kept is no other process's: those that wait ask at once, not in turn
    fits = None if call.fate is None else shared_by(call)
    flights.answer(flight, (response, call.list_nano, call.served), fits)
    if fits is not None:
        flights.hand_over(flight, caller)
    return response


def _follow(call: Call, flight: Hashable, follower: Follower) -> Generator[Effect, Any, Response | None]:
    """Wait for the leader; None means that this call leads now. Whoever is cut off still follows, or leads."""
    pipeline = call.pipeline
    flights = pipeline.flights
    started = pipeline.clock.monotonic()
    try:
        while follower.state == WAITING:
            yield Wait(follower, min(call.deadline, pipeline.clock.monotonic() + LOOK))
            if follower.state == WAITING:
                if pipeline.clock.monotonic() < call.deadline:
                    flights.look_after(flight)
                elif flights.leave(flight, follower):
                    raise too_late(call, "while waiting for an identical call")
    finally:
        call.waited += pipeline.clock.monotonic() - started
    if follower.state == ANSWERED:
        response, list_nano, outcome = follower.value
        call.record_cached(list_nano, outcome)
        return pipeline.without_usage(response)
    if follower.state == FAILED:
        raise follower.raised()
    if pipeline.clock.monotonic() >= call.deadline:
        raise too_late(call, "while waiting for an identical call")
    return None


def _send(call: Call) -> Flow:
    """Ask upstream; in a `Run`, again while an outage lasts."""
    return outlasting(call, _ask) if call.context.guards else _ask(call, Failures())


def _ask(call: Call, failures: Failures) -> Flow:
    """Try the routes in order, and keep the answer.

    While another route is left, one that would have to be waited for is left early, see `Retry.patience`; it has its
    turn again when the others have failed.
    """
    pipeline = call.pipeline
    routes = call.routes() if pipeline.degradable else pipeline.routes
    turn, count = 0, len(routes)
    while turn < count + len(failures.early):
        if turn < count:
            route = routes[turn]
            attempts = Attempts(route.retry, route.state.retry_budget, pipeline.rand)
        else:
            route, attempts = failures.early[turn - count]
        turn += 1
        hurries = turn < count and not is_raising()
        if failures.last is not None:
            call.emit("fallback", to=route.model, reason=_reason(failures.last))
            if attempts.due is not None and not (yield from _resume(call, attempts)):
                continue
        while True:
            waited, patience = call.waited, inf
            if hurries and (route.limit.max_wait is None or attempts.number > 1):
                patience = attempts.patience
            try:
                response = yield from _attempt(call, route, attempts.number, patience)
            except (CircuitOpenError, RateLimitedError) as error:
                error.model, error.route = route.model, route.name  # a breaker does not know whose route it guards
                call.emit("rejected", model=route.model, route=route.name, reason=error.reason)
                failures.add(route, error)
                if patience != inf and isinstance(error, RateLimitedError):
                    failures.early += ((route, attempts),)
                break
            except RejectedError as error:
                budget = error.budget if isinstance(error, BudgetExceededError) else None
                call.emit("rejected", model=route.model, route=route.name, reason=error.reason, budget=budget)
                if only_here(call, route, routes[0], error):
                    failures.add(route, error)
                    break
                failures.mark(error)
                if failures.upstream is not None and error.__cause__ is None:
                    raise error from failures.upstream
                raise
            except (LMError, ImportError) as error:
                failures.add(route, error)
                verdict = judge(error)
                pause = None
                attempts.waited += call.waited - waited
                if not _opened(route):  # else the next attempt would wait for nothing
                    now = pipeline.clock.monotonic()
                    pause = attempts.again(
                        verdict.retry and not call.visible,
                        getattr(error, "retry_after", None),
                        pause_until(call, now) - now,
                        attempts.patience if hurries else inf,
                    )
                    if attempts.why_not == "deadline":
                        call.own_fate().was_short(now + attempts.pause, now)
                    if attempts.why_not == "patience":
                        attempts.due = now + attempts.pause
                        failures.early += ((route, attempts),)
                if pause is not None:
                    call.emit("retry", model=route.model, attempt=attempts.number, pause=pause, error=_reason(error))
                    if pause > 0:
                        attempts.waited += pause
                        yield Wait(None, now + pause)
                    continue
                if call.visible or not (verdict.fallback or route is not routes[0]):
                    raise
                break
            if call.log is not None:  # before anybody else can have it
                yield from if_cut_off(keeping(call, response), partial(_keep, call, route, response))
            if call.key is not None:
                _keep(call, route, response)
            return response
    cache = pipeline.cache
    if call.key is not None and cache is not None and cache.options.stale_if_error > 0 and call.context.cache == "use":
        entry = cache.stale(call.key)
        if entry is not None:
            call.served = "stale"
            return call.hit(entry, "stale")
    raise failures.told()


def _resume(call: Call, attempts: Attempts) -> Generator[Effect, Any, bool]:
    """Wait until a route that was left early may be tried again; False when the call has no time or retry for it."""
    assert attempts.due is not None
    now = call.pipeline.clock.monotonic()
    pause = attempts.again(True, None, pause_until(call, now) - now, least=attempts.due - now)
    attempts.due = None
    if pause is None:
        if attempts.why_not == "deadline":
            call.own_fate().was_short(now + attempts.pause, now)
        return False
    if pause > 0:
        yield Wait(None, now + pause)
    return True


def _attempt(call: Call, route: Route, number: int, patience: float) -> Flow:
    """One attempt on one route: check, reserve, take the permit, send, settle."""
    pipeline = call.pipeline
    breaker = route.state.breaker
    fleet = pipeline.fleet
    if fleet.look().stops:
        fleet.check(call.context, route.model, route.name)
    if breaker is not None:
        breaker.check()
    if call.deadline != inf and call.late():
        raise too_late(call, "before the request was sent")
    runs = call.context.guards
    if runs:
        go_on(runs)
    attempt = plan(call, route, number, patience)
    send: Send | None = None
    settled = False
    try:
        if not route.upstream.ready:
            yield Warm(route, attempt.request, call.scope, call.deadline)
            if route.fitting is not None:  # more is known of its model now
                attempt.request = fitted(call, route, attempt.request)
        if runs:
            yield from taking(attempt)
        if attempt.reservation is not None:
            admitted = pipeline.store.admit(attempt.reservation)
            if admitted.state != GRANTED or admitted.granted_at > pipeline.store.now():
                yield from admission(attempt)
                fleet.look()
                if breaker is not None:
                    breaker.check()
            if pipeline.watches_spending:
                note_spending(attempt)
        if call.deadline != inf and call.late():
            raise too_late(call, "before the request was sent")
        if fleet.look().stops:
            fleet.check(call.context, route.model, route.name)
        if breaker is not None:
            attempt.permit = permit = breaker.permit()
            if permit.asked is not None:
                yield from probing(call, breaker, permit)
        leaving = None
        if route.paced and attempt.reservation is not None:
            leaving = leaves(pipeline.store, attempt.reservation)
        attempt.started = now = pipeline.clock.monotonic()
        attempt.until = until = call.deadline if route.timeout is None else call.attempt_until(route, now)
        attempt.send = send = Send(route, attempt.request, call.scope, until, leaving)
        response = yield send
        attempt.answer = response
        flaw = flaw_of(response)
        if flaw is not None:
            raise unusable(route, flaw, response)
        succeeded(attempt, response)
        settled = True
        if runs:
            answered(runs, call, route)
        return response
    except BaseException as raised:
        if settled:
            raise
        error: BaseException | None = None
        try:
            if send is not None or attempt.open or not isinstance(raised, RejectedError):
                if send is not None and send.ended:
                    attempt.answer = send.partial
                error = failed(attempt, raised)
                if send is not None and send.partial is not None and (call.visible or send.ended):
                    shows_partial(error, send.partial)
        except BaseException:  # interrupted once more; what is done already is not done again
            REAPER.post(partial(failed, attempt, raised))
            raise
        if error is None or error is raised:
            raise
        raise error from (raised.__cause__ or raised)


def _keep(call: Call, route: Route, response: Response) -> None:
    """Put an answer into the cache, unless another route than the key says gave it."""
    cache = call.pipeline.cache
    if call.key is None or cache is None:
        return
    if route is call.pipeline.primary and not call.degraded:
        cache.put(call.key, response, call.context.ttl, call.list_nano)


def _opened(route: Route) -> bool:
    """Whether a failure has opened the circuit."""
    breaker = route.state.breaker
    if breaker is not None:
        try:
            breaker.check()
        except CircuitOpenError:
            return True
    return False


def _reason(error: BaseException | None) -> str:
    if isinstance(error, RejectedError):
        return error.reason
    return type(error).__name__
