"""Settling an attempt, exactly once on every path: success, error, cancellation, Ctrl-C, abandoned stream.

Nothing here waits, blocks or raises. On a path that the garbage collector may run (`GeneratorExit`) the work is handed
to the reaper.

Ctrl-C may come while this runs, most likely in a listener. So `failed` may be called again, with what was raised first
or with what came up meanwhile: it does what is left. What an attempt came to is decided once (`Attempt.came_to`); a
store settles by the id of what it holds and keeps records by theirs, and a breaker hears of a permit once.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf
from typing import Any

from dspy.lm15 import Response, Usage
from dspy.utils.exceptions import LMTimeoutError

from dspy_prod.errors import RejectedError
from dspy_prod.pipeline.attempt import Attempt, CameTo
from dspy_prod.pipeline.outcome import Verdict, judge, own_deadline
from dspy_prod.pipeline.plan import worst
from dspy_prod.pipeline.refusals import too_late
from dspy_prod.pipeline.upstream.deadline import StalledError
from dspy_prod.pipeline.upstream.ends import AttemptTimeoutError, billed_by
from dspy_prod.pipeline.upstream.errors import public_error
from dspy_prod.pipeline.upstream.headers import remaining
from dspy_prod.pipeline.upstream.usage import believed
from dspy_prod.policies.entries import EMPTY_USAGE
from dspy_prod.pricing.rates import Rates
from dspy_prod.records import MOST_TOKENS, CallRecord, usd
from dspy_prod.runtime.ids import IDS
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.base import PENDING, Settlement


def succeeded(attempt: Attempt, response: Response) -> None:
    """Settle an attempt that was answered."""
    call, route, request = attempt.call, attempt.route, attempt.request
    pipeline, state = call.pipeline, route.state
    usage = believed(response)
    latency = pipeline.clock.monotonic() - attempt.started
    rates, cost = route.price(request, call.scope, response, usage)
    estimated = False
    if cost is None and rates is not None:  # the provider did not tell the usage: the bound stands
        cost = worst(attempt)
        estimated = bool(cost)  # what can cost nothing at most has cost nothing
    record = _record(attempt, "ok", cost, latency, estimated, usage)
    tokens = None if attempt.reservation is None and attempt.taken is None else _used(rates, usage)
    _book(attempt, record, cost, tokens, True, estimated)
    if cost is not None and attempt.bound is not None and cost > attempt.bound:
        call.emit("budget_overrun", model=route.model, cost_usd=usd(cost), bound_usd=usd(attempt.bound))
    if attempt.permit is not None:
        assert state.breaker is not None
        state.breaker.success(attempt.permit, max(0.0, latency - call.paused))
    if state.retry_budget.drawn:
        state.retry_budget.success()
    if record.output_tokens is not None and (route.learning or request.config.max_tokens is None):
        state.learn(record.output_tokens)
    call.list_nano = cost
    call.remember(record, route, response)
    if pipeline.bus.wants_content:
        call.emit_content(request, response)


def failed(attempt: Attempt, raised: BaseException) -> BaseException:
    """Settle an attempt that raised, or what an interrupt left of settling it; which error that is for the caller.

    When the consumer left, perhaps inside the garbage collector, all of it is the reaper's work: listeners and the
    breaker take locks too.
    """
    latency = attempt.call.pipeline.clock.monotonic() - attempt.started
    if isinstance(raised, GeneratorExit):

        def settle() -> None:
            _failed(attempt, raised, latency)

        REAPER.post(settle)
        return raised
    return _failed(attempt, raised, latency)


def _failed(attempt: Attempt, raised: BaseException, latency: float) -> BaseException:
    if attempt.came_to is not None:
        _finish(attempt, attempt.came_to)
        return raised
    call, route, reservation = attempt.call, attempt.route, attempt.reservation
    if reservation is not None and reservation.state == PENDING:  # granted meanwhile, it is settled as what is held
        call.pipeline.store.withdraw(reservation)
    worked = max(0.0, latency - call.paused)
    error, late = raised, attempt.late
    if isinstance(raised, AttemptTimeoutError):
        met = late is not None or not attempt.stayed  # one that goes on in its worker may yet meet it
        over = max(attempt.until, attempt.started + latency) >= call.deadline  # a busy machine wakes late
        if over and not isinstance(raised, StalledError):
            error = too_late(call, "while the upstream was working" if met else "before the upstream was reached")
            error.working = True
            verdict = own_deadline(worked, route.timeout)
        else:
            lacking = "answer" if met else "connection"
            error = LMTimeoutError(
                f"no {lacking} within timeout={route.timeout:g} s", model=route.model, provider=route.upstream.provider
            )
            verdict = judge(error)
    else:
        verdict = judge(error)
    if late is None:
        verdict = _as_far_as_it_went(attempt, verdict)
    if attempt.permit is not None:
        breaker = route.state.breaker
        assert breaker is not None
        if verdict.failure:
            breaker.failure(attempt.permit, worked, _cause_of(error), getattr(error, "retry_after", None))
        else:
            breaker.release(attempt.permit)
    if verdict.throttled and not attempt.throttles:
        attempt.throttles = True
        _throttled(attempt, error)
    if late is None:
        answer = attempt.answer or billed_by(raised) if verdict.owed else None
        if answer is None or not _settle_told(attempt, verdict, answer, latency, error):
            _settle_failure(attempt, verdict, error, latency)
    else:
        if call.purse is not None:
            _pay(attempt, worst(attempt) or 0)  # until it has ended
        REAPER.keep(attempt, lambda: _ended_with_process(attempt, verdict, error))
        late.on_end(lambda response, failure: _ended_late(attempt, verdict, error, response, failure))
    if error is not raised:  # it says all by itself; behind what was raised may be what the caller was handling
        error.own_causes = 0  # type: ignore[attr-defined]
    return error


def _as_far_as_it_went(attempt: Attempt, verdict: Verdict) -> Verdict:
    """The verdict when it has ended: for what reached nobody, or only who sent it on, nothing is owed."""
    if attempt.send is None or attempt.stayed:
        return verdict._replace(sent=False, owed=False)
    return verdict._replace(sent=True, owed=False) if attempt.send.moved else verdict


def _finish(attempt: Attempt, came_to: CameTo) -> None:
    """Do what is left of settling: an interrupt came after it was decided what the attempt came to."""
    call, route, record = attempt.call, attempt.route, came_to[0]
    if not attempt.booked:
        _put(attempt, came_to)
        if record is not None:  # the store may have settled what was held, and not come to its record
            call.pipeline.store.append(record)
    if attempt.permit is not None:
        breaker = route.state.breaker
        assert breaker is not None
        if record is not None and record.outcome == "ok":
            breaker.success(attempt.permit, max(0.0, record.latency - call.paused))
        else:  # what failed has told it before
            breaker.release(attempt.permit)
    if record is not None and not any(each is record for each in call.records):
        call.remember(record, route, attempt.answer)


def _cause_of(error: BaseException) -> str:
    """Class and status of an error: what may be shown of it without showing a secret."""
    status = getattr(error, "status", None)
    name = type(error).__name__
    return f"{name} {status}" if status is not None else name


def _settle_failure(
    attempt: Attempt, verdict: Verdict, error: BaseException, latency: float, late: bool = False
) -> None:
    cost = worst(attempt) if verdict.owed else 0
    record = None
    if verdict.sent or attempt.stayed or late or _is_told(error):
        estimated = verdict.owed and cost is not None
        record = _record(attempt, verdict.outcome, cost, latency, estimated, error=error)
    _book(attempt, record, cost, None if verdict.owed else 0, verdict.sent, verdict.owed)
    if record is not None:
        attempt.call.remember(record, attempt.route)


def _is_told(error: BaseException) -> bool:
    """Whether the ledger tells of an error also where nothing was sent."""
    return isinstance(error, Exception) and not isinstance(error, RejectedError)


def _ended_late(
    attempt: Attempt, verdict: Verdict, told: BaseException, response: Any, failure: BaseException | None
) -> None:
    """An abandoned attempt has ended in its worker: perhaps its usage is known after all.

    Args:
        told: the error that its caller had.
    """
    if not REAPER.take(attempt):  # the process is ending, and has not waited for it
        return
    if attempt.came_to is not None:
        _finish(attempt, attempt.came_to)
        return
    call, route = attempt.call, attempt.route
    latency = call.pipeline.clock.monotonic() - attempt.started
    if isinstance(response, Response) and _settle_told(attempt, verdict, response, latency, told):
        return
    if isinstance(failure, Exception):
        error = public_error(failure, route.upstream, inf)
        if error is not failure:
            error.__cause__ = failure  # what it means depends on its causes
        end = judge(error)
        verdict = verdict._replace(owed=verdict.owed and end.owed, sent=verdict.sent and end.sent)
        billed = billed_by(failure) if end.owed else None
        if billed is not None and _settle_told(attempt, verdict, billed, latency, told):
            return
    _settle_failure(attempt, _as_far_as_it_went(attempt, verdict), told, latency, late=True)


def _ended_with_process(attempt: Attempt, verdict: Verdict, told: BaseException) -> None:
    """The process ends, and with it a worker that nobody waits for: its seat is not to be taken until the lease ends.

    It may yet send until the very end, so that it has not got that far says nothing.

    Args:
        told: the error that its caller had.
    """
    latency = attempt.call.pipeline.clock.monotonic() - attempt.started
    answer = attempt.answer if verdict.owed else None
    if answer is None or not _settle_told(attempt, verdict, answer, latency, told):
        _settle_failure(attempt, verdict, told, latency, late=True)


def _settle_told(attempt: Attempt, verdict: Verdict, response: Response, latency: float, error: BaseException) -> bool:
    """Settle a failed attempt by the usage that came with its answer; False when none is to be believed."""
    call, route = attempt.call, attempt.route
    usage = believed(response)
    rates, cost = route.price(attempt.request, call.scope, response, usage)
    if cost is None and rates is not None:
        return False
    record = _record(attempt, verdict.outcome, cost, latency, usage=usage, error=error)
    _book(attempt, record, cost, _used(rates, usage), True, False)
    call.remember(record, route, response)
    return True


def _record(
    attempt: Attempt,
    outcome: str,
    cost: int | None,
    latency: float,
    estimated: bool = False,
    usage: Usage = EMPTY_USAGE,
    error: BaseException | None = None,
) -> CallRecord:
    """The ledger's row, under the id of what was held."""
    call, held = attempt.call, attempt.held
    return call.record(
        attempt.route, IDS.make() if held is None else held.id, attempt.number, outcome, cost,
        call.pipeline.clock.time() - latency, estimated=estimated, usage=usage, latency=latency, error=error,
        accounts=() if held is None or not held.accounts else _once(tuple([account.key for account in held.accounts])),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _once(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The tuple that was first made of these: one for each record would bring the garbage collector the sooner."""
    return keys


def _book(
    attempt: Attempt, record: CallRecord | None, cost: int | None, tokens: int | None, sent: bool, estimated: bool
) -> None:
    """Decide what an attempt came to, and put that in the place of what was held for it."""
    attempt.came_to = came_to = (record, cost, tokens, sent, estimated)
    _put(attempt, came_to)
    attempt.booked = True


def _put(attempt: Attempt, came_to: CameTo) -> None:
    record, cost, tokens, sent, estimated = came_to
    if attempt.call.purse is not None:
        _pay(attempt, cost or 0)
    held, store = attempt.held, attempt.call.pipeline.store
    if held is not None:
        store.settle(held, Settlement(held.id, cost, tokens, sent, estimated, record))
    elif record is not None:
        store.append(record)
    if attempt.taken is not None:
        attempt.taken.settle(cost, tokens, sent, estimated)


def _pay(attempt: Attempt, cost: int) -> None:
    """Charge the purse of a call, where a budget caps single calls."""
    assert attempt.call.purse is not None
    attempt.paid = attempt.call.purse.charge(cost, attempt.paid)


def _throttled(attempt: Attempt, error: BaseException) -> None:
    call, route = attempt.call, attempt.route
    retry_after = getattr(error, "retry_after", None)
    if route.limit.adaptive:
        store = call.pipeline.store
        route.state.throttled = True
        store.throttled(route.limit_key, route.limit, retry_after)
        told = remaining(getattr(error, "rate_limit_headers", None), call.pipeline.clock.time())
        if told:
            store.resync(route.limit_key, route.limit, told)
    call.emit("throttled", model=route.model, route=route.name, retry_after=retry_after)


def _used(rates: Rates | None, usage: Usage) -> int | None:
    if rates is not None:
        return rates.tokens(usage)
    inputs: int | None = usage.input_tokens
    outputs: int | None = usage.output_tokens
    if inputs is None or outputs is None or inputs + outputs > MOST_TOKENS:
        return None
    return inputs + outputs
