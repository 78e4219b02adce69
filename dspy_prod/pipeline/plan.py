"""What one attempt reserves: its request for that route, bounds on tokens and money, and the accounts it draws on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final

from dspy.lm15 import Request

from dspy_prod.context.scoring import is_raising
from dspy_prod.errors import BudgetExceededError, RateLimitedError, RejectedError, StoppedError, UnpricedModelError
from dspy_prod.options import PRIORITIES
from dspy_prod.pipeline.attempt import Attempt
from dspy_prod.pipeline.call import Asker, Call
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.pricing.book import remedy
from dspy_prod.pricing.bounds import hosted_fees
from dspy_prod.records import CallRecord
from dspy_prod.runtime.ids import IDS
from dspy_prod.stores.base import Account, Refusal, Reservation, Store

if TYPE_CHECKING:
    from dspy_prod.pipeline.routes import Route

DEFAULT_MAX_WAIT: Final = 60.0
"""Longest wait for admission in seconds, when neither a `max_wait` nor a deadline says otherwise."""

_LEASE_GRACE: Final = 30.0
_UNBOUNDED_LEASE: Final = 900.0
_STREAM_LEASE: Final = 3600.0  # a stream may outlast any timeout
_MIN_SHRUNK_TOKENS: Final = 16


def plan(call: Call, route: Route, number: int, patience: float = inf) -> Attempt:
    """What attempt `number` on this route needs.

    Args:
        patience: seconds it may wait for its limiter.

    Raises:
        UnpricedModelError: a budget applies and the cost cannot be bounded.
        BudgetExceededError: a budget requires a scope that the context does not name, or caps a call below its cost.
        RateLimitedError: `max_tokens` alone is above the limit.
    """
    pipeline = call.pipeline
    request = call.request
    if route.model != request.model:
        request = replace(request, model=route.model)
    if route.defaults:
        request = _with_defaults(request, route.defaults)
    if route.fitting is not None:
        request = fitted(call, route, request)
    rules = rules_on(pipeline.budgets, route) if route.rules else pipeline.budgets
    if call.context.aside:
        rules = tuple([rule for rule in rules if not rule.personal])
    limited = route.limited or route.state.identity.throttled
    caps = caps_on(pipeline.caps, route) if pipeline.capped else ()
    attempt = Attempt(call, route, request, number, None, rules, pipeline.clock.monotonic())
    attempt.patience = patience
    if not rules and not limited and not caps:
        return attempt
    tokens = 0
    accounts: tuple[Account, ...] = ()
    tpm = route.limit.tpm if limited else None
    if rules or caps or tpm is not None:
        inputs, outputs = route.bounds(request)
        if tpm is not None:
            if request.config.max_tokens is not None and request.config.max_tokens > tpm:
                raise _never_fits(route, request.config.max_tokens, tpm)
            tokens = route.limiter_tokens(inputs, outputs)
        if rules or caps:
            attempt.bound = bound = route.most(request, inputs, outputs)
            if bound is None:
                raise _unbounded(route, request, inputs)
            for cap in caps:
                assert call.purse is not None
                call.purse.check(cap, bound, call.to_pay, model=route.model, route=route.name)
        if rules:
            wall = pipeline.clock.time()
            context = call.context
            if len(rules) == 1:
                accounts = (rules[0].account(context, route.model, wall),)
            else:
                accounts = tuple([rule.account(context, route.model, wall) for rule in rules])
    if rules or limited:
        attempt.reservation = _reservation(attempt, tokens, accounts, limited)
    return attempt


def fitted(call: Call, route: Route, request: Request) -> Request:
    """The request without what the model of a fallback refuses."""
    assert route.fitting is not None
    request, left_out = route.fitting.fitted(request)
    if left_out:
        call.emit("arguments_left_out", model=route.model, route=route.name, arguments=left_out)
    return request


def renewed(old: Attempt) -> Attempt | None:
    """The same attempt on the accounts of now, when the window of a budget has ended since; else None."""
    call, reservation = old.call, old.reservation
    if reservation is None or call.late():
        return None
    wall = call.pipeline.clock.time()
    accounts = [rule.account(call.context, old.route.model, wall).key for rule in old.rules]
    if accounts == [account.key for account in reservation.accounts]:
        return None
    return plan(call, old.route, old.number, old.patience)


def turns_at(attempt: Attempt, now: float) -> float:
    """Monotonic time at which the next window of a budget begins, `inf` when none will."""
    ends_at = min((rule.ends_at for rule in attempt.rules), default=inf)
    return inf if ends_at == inf else now + ends_at - attempt.call.pipeline.clock.time()


def only_here(call: Call, route: Route, first: Route, error: RejectedError) -> bool:
    """Whether a refusal concerns this route alone, so that the next one is worth a try. It is noted whose it is."""
    if isinstance(error, StoppedError):
        return error.scope == "model"
    if isinstance(error, UnpricedModelError):
        call.own_fate().left_out(route)
        return route is not first  # a fallback that no budget can bound must not hide why it was needed
    if not isinstance(error, BudgetExceededError):
        return False
    shared = call.pipeline.budgets
    rules = rules_on(shared, route)
    own = [rule for rule in rules if rule.options.scope == "model" or rule not in shared]
    own += caps_on(call.pipeline.caps, route)  # another model may be cheaper
    for rule in own:
        title = rule.options.title
        if error.budget == title or error.budget.startswith(f"{title}="):
            fate = call.own_fate()
            fate.shaped_by(rule)
            fate.left_out(route)
            return True
    return False


def wait_until(attempt: Attempt, now: float) -> float:
    """Monotonic time up to which admission may take."""
    return _wait_until(attempt, now)


def pause_until(call: Asker, now: float) -> float:
    """Monotonic time up to which a call may pause before it tries a route again (Retry-After included)."""
    return call.deadline if call.deadline != inf else now + DEFAULT_MAX_WAIT


def note_short(call: Call, until: float, since: float) -> None:
    """Note that a call that waits `since` then may not wait for what might be done at `until`, if that is so."""
    if until >= pause_until(call, since):
        call.own_fate().was_short(until, since)


def shrunk(old: Attempt, refusal: Refusal) -> Attempt | None:
    """The same attempt with `max_tokens` clamped to what its budget has left, when the budget wants that."""
    route, reservation = old.route, old.reservation
    if refusal.reason != "budget_exceeded" or reservation is None:
        return None
    pairs = zip(old.rules, reservation.accounts, strict=True)
    spent = [rule for rule, account in pairs if account.title == refusal.dimension]
    if not any(rule.options.shrink_last for rule in spent):
        return None
    inputs, outputs = route.bounds(old.request)
    if route.rates() is None or inputs is None or outputs is None:
        return None
    left = refusal.limit - refusal.spent - refusal.held
    config = old.request.config
    fits = min(outputs, route.affords(old.request, left, inputs))
    if fits < _MIN_SHRUNK_TOKENS or (config.max_tokens is not None and fits >= config.max_tokens):
        return None
    for rule in spent:
        old.call.own_fate().shaped_by(rule)
    request = replace(old.request, config=replace(config, max_tokens=fits))
    bound, now = route.most(request, inputs, fits), old.call.pipeline.clock.monotonic()
    again = Attempt(old.call, route, request, old.number, bound, old.rules, now, patience=old.patience)
    tokens, limited = min(reservation.tokens, inputs + fits), reservation.limit_key is not None
    again.reservation = _reservation(again, tokens, tuple(reservation.accounts), limited)
    return again


def bound_of(attempt: Attempt) -> int:
    """The most an attempt can cost in nano-USD.

    Raises:
        UnpricedModelError: nobody knows.
    """
    bound = worst(attempt)
    if bound is None:
        raise _unbounded(attempt.route, attempt.request, attempt.route.bounds(attempt.request)[0])
    return bound


def worst(attempt: Attempt) -> int | None:
    """The most an attempt can cost in nano-USD, None when that is not known."""
    route, request = attempt.route, attempt.request
    return route.most(request, *route.bounds(request)) if attempt.bound is None else attempt.bound


def _reservation(attempt: Attempt, tokens: int, accounts: tuple[Account, ...], limited: bool) -> Reservation:
    call, route, bound = attempt.call, attempt.route, attempt.bound
    pipeline = call.pipeline
    context = call.context
    limit = route.limit
    horizon, lease = times(attempt, pipeline.store)
    if attempt.patience != inf:
        horizon = min(horizon, pipeline.store.now() + attempt.patience)
    id = IDS.make()
    fair = "" if limit.fair_by is None or context.aside else (getattr(context, limit.fair_by) or "")
    key, settings = (route.limit_key, limit) if limited else (None, None)
    return Reservation(
        id, key, settings, tokens, accounts, bound or 0, PRIORITIES[context.priority], fair, horizon, lease,
        partial(_stub, call, route, id, attempt.number, bound, accounts) if accounts else None,
    )  # fmt: skip


def _stub(
    call: Call, route: Route, id: str, number: int, bound: int | None, accounts: tuple[Account, ...]
) -> CallRecord:
    """The record of an attempt that nobody settles."""
    return call.record(
        route, id, number, "abandoned", bound, call.pipeline.clock.time(), estimated=True,
        accounts=tuple([account.key for account in accounts]),
    )  # fmt: skip


def times(attempt: Attempt, store: Store) -> tuple[float, float]:
    """(the store's time after which a grant is of no use, seconds for which what is held outlives the attempt)."""
    call, route, pipeline = attempt.call, attempt.route, attempt.call.pipeline
    limit = route.limit
    lease = _STREAM_LEASE if call.streaming else _UNBOUNDED_LEASE
    horizon = store.now() + DEFAULT_MAX_WAIT
    if (
        call.deadline != inf
        or route.timeout is not None
        or limit.max_wait is not None
        or pipeline.budget_waits
        or is_raising()
    ):
        now = pipeline.clock.monotonic()
        horizon = store.now() + (_wait_until(attempt, now) - now)
        until = call.attempt_until(route, now)
        if until != inf:
            # The hold outlives the longest wait plus the longest attempt.
            longest = max(0.0, until - now) if call.streaming or not route.timeout else route.timeout
            lease = (0.0 if horizon == inf else max(0.0, horizon - store.now())) + longest + _LEASE_GRACE
    return horizon, lease


def _wait_until(attempt: Attempt, now: float) -> float:
    """A retry waits for its limiter as long as it may pause: `max_wait` is about calls that have not been sent.

    What is scored waits as long as it takes: a score must not depend on who else was busy.
    """
    if is_raising():
        return attempt.call.deadline
    call, limit = attempt.call, attempt.route.limit
    longest = inf if limit.max_wait is None or attempt.number > 1 else limit.max_wait
    for rule in attempt.rules:
        if rule.options.max_wait is not None:
            longest = min(longest, rule.options.max_wait)
    if longest == inf:
        return call.deadline if call.deadline != inf else now + DEFAULT_MAX_WAIT
    return min(call.deadline, now + longest)


def rules_on(budgets: tuple[BudgetRule, ...], route: Route) -> tuple[BudgetRule, ...]:
    """The budgets of the pipeline and the route's own, each account once."""
    titles = {rule.options.title for rule in budgets}
    return (*budgets, *[rule for rule in route.rules if not rule.caps and rule.options.title not in titles])


def caps_on(caps: tuple[BudgetRule, ...], route: Route) -> tuple[BudgetRule, ...]:
    """What caps a call on this route: for all routes, and for this one alone."""
    return (*caps, *[rule for rule in route.rules if rule.caps and rule not in caps])


def _unbounded(route: Route, request: Request, inputs: int | None) -> UnpricedModelError:
    if route.rates() is None:
        problem = f"no price is known for {route.model!r}; {remedy(route.model)}"
    elif inputs is None and hosted_fees(request):
        problem = "the request uses a tool that the provider runs and bills apart; call it without a budget"
    elif inputs is None:
        problem = (
            "the request has media of unknown length, or context that the server keeps, and the model's input limit is "
            "unknown; "
            f"pass prices={{{route.model!r}: dspy_prod.Price(..., max_input_tokens=...)}}"
        )
    else:
        problem = (
            "neither max_tokens nor the model's own output limit is known; pass max_tokens=... to the LM or "
            f"prices={{{route.model!r}: dspy_prod.Price(..., max_output_tokens=...)}}"
        )
    return UnpricedModelError(
        f"A budget applies, but this call's cost cannot be bounded: {problem}", model=route.model, route=route.name
    )


def _never_fits(route: Route, explicit: int, tpm: float) -> RateLimitedError:
    return RateLimitedError(
        f"max_tokens={explicit} is above tpm={tpm:g} of {route.model}; no minute could ever hold this call. "
        "Lower max_tokens or raise tpm",
        model=route.model,
        route=route.name,
        dimension="tokens",
        never=True,
    )


def _with_defaults(request: Request, defaults: dict[str, Any]) -> Request:
    """Fill generation settings that the call leaves open with the fallback LM's own."""
    config = request.config
    missing = {name: value for name, value in defaults.items() if getattr(config, name, value) in (None, ())}
    return replace(request, config=replace(config, **missing)) if missing else request
