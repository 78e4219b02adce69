"""What one attempt reserves: its request for that route, bounds on tokens and money, and the accounts it draws on."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any, Final

from dspy.lm15 import Request

from dspy_prod.errors import BudgetExceededError, RateLimitedError, RejectedError, UnpricedModelError
from dspy_prod.options import PRIORITIES
from dspy_prod.pipeline.call import IDS, Call
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.pricing.bounds import hosted_fees
from dspy_prod.records import CallRecord
from dspy_prod.stores.base import Account, Refusal, Reservation

if TYPE_CHECKING:
    from dspy_prod.pipeline.routes import Route

DEFAULT_MAX_WAIT: Final = 60.0
"""Longest wait for admission in seconds, when neither a `max_wait` nor a deadline says otherwise."""

_LEASE_GRACE: Final = 30.0
_UNBOUNDED_LEASE: Final = 900.0
_STREAM_LEASE: Final = 3600.0  # a stream may outlast any timeout
_MIN_SHRUNK_TOKENS: Final = 16


class Plan:
    """One attempt before it is made.

    Attributes:
        reservation: None when nothing has to be reserved.
        bound: the most the attempt can cost in nano-USD, None when no budget needed to know.
        rules: the budgets behind `reservation.accounts`, in the same order.
    """

    __slots__ = ("bound", "number", "request", "reservation", "route", "rules")

    def __init__(
        self,
        route: Route,
        request: Request,
        number: int,
        reservation: Reservation | None,
        bound: int | None,
        rules: tuple[BudgetRule, ...],
    ) -> None:
        self.route = route
        self.request = request
        self.number = number
        self.reservation = reservation
        self.bound = bound
        self.rules = rules


def plan(call: Call, route: Route, number: int) -> Plan:
    """What attempt `number` on this route needs.

    Raises:
        UnpricedModelError: a budget applies and the cost cannot be bounded.
        BudgetExceededError: a budget requires a scope that the context does not name.
        RateLimitedError: `max_tokens` alone is above the limit.
    """
    pipeline = call.pipeline
    request = call.request
    if route.model != request.model:
        request = replace(request, model=route.model)
    if route.defaults:
        request = _with_defaults(request, route.defaults)
    rules = _rules(pipeline.budgets, route) if route.rules else pipeline.budgets
    limited = route.limited or route.state.identity.throttled
    if not rules and not limited:
        return Plan(route, request, number, None, None, ())
    tokens = 0
    bound: int | None = None
    accounts: tuple[Account, ...] = ()
    tpm = route.limit.tpm if limited else None
    if rules or tpm is not None:
        inputs, outputs = route.bounds(request)
        if tpm is not None:
            if request.config.max_tokens is not None and request.config.max_tokens > tpm:
                raise _never_fits(route, request.config.max_tokens, tpm)
            tokens = route.limiter_tokens(inputs, outputs)
        if rules:
            bound = _bound(route, request, inputs, outputs)
            wall = pipeline.clock.time()
            context = call.context
            if len(rules) == 1:
                accounts = (rules[0].account(context, route.model, wall),)
            else:
                accounts = tuple([rule.account(context, route.model, wall) for rule in rules])
    reservation = _reservation(call, route, tokens, accounts, bound, limited, number, rules)
    return Plan(route, request, number, reservation, bound, rules)


def renewed(call: Call, old: Plan) -> Plan | None:
    """The same attempt on the accounts of now, when the window of a budget has ended since; else None."""
    reservation = old.reservation
    if reservation is None or call.late():
        return None
    wall = call.pipeline.clock.time()
    accounts = [rule.account(call.context, old.route.model, wall).key for rule in old.rules]
    if accounts == [account.key for account in reservation.accounts]:
        return None
    return plan(call, old.route, old.number)


def turns_at(call: Call, plan: Plan, now: float) -> float:
    """Monotonic time at which the next window of a budget begins, `inf` when none will."""
    ends_at = min((rule.ends_at for rule in plan.rules), default=inf)
    return inf if ends_at == inf else now + ends_at - call.pipeline.clock.time()


def only_here(call: Call, route: Route, first: Route, error: RejectedError) -> bool:
    """Whether a refusal concerns this route alone, so that the next one is worth a try."""
    if isinstance(error, UnpricedModelError):
        return route is not first  # a fallback that no budget can bound must not hide why it was needed
    if not isinstance(error, BudgetExceededError):
        return False
    shared = call.pipeline.budgets
    rules = _rules(shared, route)
    own = [rule.options.title for rule in rules if rule.options.scope == "model" or rule not in shared]
    return any(error.budget == title or error.budget.startswith(f"{title}=") for title in own)


def wait_until(call: Call, plan: Plan, now: float) -> float:
    """Monotonic time up to which admission may take."""
    return _wait_until(call, plan.route, plan.rules, now)


def longest_wait(call: Call, route: Route, now: float) -> float:
    """Monotonic time up to which a call may pause before it tries this route again (Retry-After included)."""
    return _wait_until(call, route, (), now)


def shrunk(call: Call, plan: Plan, refusal: Refusal) -> Plan | None:
    """The same plan with `max_tokens` clamped to what its budget has left, when the budget wants that."""
    route, old = plan.route, plan.reservation
    if refusal.reason != "budget_exceeded" or old is None:
        return None
    refusing = [
        rule for rule, account in zip(plan.rules, old.accounts, strict=True) if account.title == refusal.dimension
    ]
    if not any(rule.options.shrink_last for rule in refusing):
        return None
    rates = route.rates()
    inputs, outputs = route.bounds(plan.request)
    if rates is None or inputs is None or outputs is None:
        return None
    left = refusal.limit - refusal.spent - refusal.held
    config = plan.request.config
    fits = min(outputs, rates.max_output_for(left, inputs, tier=config.service_tier))
    if fits < _MIN_SHRUNK_TOKENS or (config.max_tokens is not None and fits >= config.max_tokens):
        return None
    request = replace(plan.request, config=replace(config, max_tokens=fits))
    bound = route.most(request, inputs, fits)
    tokens = min(old.tokens, inputs + fits)
    limited = old.limit_key is not None
    again = _reservation(call, route, tokens, tuple(old.accounts), bound, limited, plan.number, plan.rules)
    return Plan(route, request, plan.number, again, bound, plan.rules)


def bound_or_none(route: Route, request: Request) -> int | None:
    """The most a request can cost in nano-USD, None when that is not known."""
    if route.rates() is None:
        return None
    inputs, outputs = route.bounds(request)
    return None if inputs is None or outputs is None else route.most(request, inputs, outputs)


def _reservation(
    call: Call,
    route: Route,
    tokens: int,
    accounts: tuple[Account, ...],
    bound: int | None,
    limited: bool,
    number: int,
    rules: tuple[BudgetRule, ...],
) -> Reservation:
    pipeline = call.pipeline
    context = call.context
    store = pipeline.store
    limit = route.limit
    lease = _STREAM_LEASE if call.streaming else _UNBOUNDED_LEASE
    horizon = store.now() + DEFAULT_MAX_WAIT
    if call.deadline != inf or route.timeout is not None or limit.max_wait is not None or pipeline.budget_waits:
        now = pipeline.clock.monotonic()
        horizon = store.now() + (_wait_until(call, route, rules, now) - now)
        until = call.attempt_until(route, now)
        if until != inf:
            # The hold outlives the longest wait plus the longest attempt.
            longest = max(0.0, until - now) if call.streaming or not route.timeout else route.timeout
            lease = max(0.0, horizon - store.now()) + longest + _LEASE_GRACE
    id = IDS.make()

    def stub() -> CallRecord:
        return call.record(
            route, id, number, "abandoned", bound, pipeline.clock.time(), estimated=True,
            accounts=tuple([account.key for account in accounts]),
        )  # fmt: skip

    fair = "" if limit.fair_by is None else (getattr(context, limit.fair_by) or "")
    key, settings = (route.limit_key, limit) if limited else (None, None)
    return Reservation(
        id, key, settings, tokens, accounts, bound or 0, PRIORITIES[context.priority], fair, horizon, lease,
        stub if accounts else None,
    )  # fmt: skip


def _wait_until(call: Call, route: Route, rules: tuple[BudgetRule, ...], now: float) -> float:
    longest = inf if route.limit.max_wait is None else route.limit.max_wait
    for rule in rules:
        if rule.options.max_wait is not None:
            longest = min(longest, rule.options.max_wait)
    if longest == inf:
        return call.deadline if call.deadline != inf else now + DEFAULT_MAX_WAIT
    return min(call.deadline, now + longest)


def _rules(budgets: tuple[BudgetRule, ...], route: Route) -> tuple[BudgetRule, ...]:
    """The budgets of the pipeline and the route's own, each account once."""
    titles = {rule.options.title for rule in budgets}
    return (*budgets, *[rule for rule in route.rules if rule.options.title not in titles])


def _bound(route: Route, request: Request, inputs: int | None, outputs: int | None) -> int:
    if inputs is not None and outputs is not None and route.rates() is not None:
        return route.most(request, inputs, outputs)
    if route.rates() is None:
        problem = (
            f"no price is known for {route.model!r}; pass "
            f"prices={{{route.model!r}: dspy_prod.Price(input=..., output=...)}} (USD per million tokens)"
        )
    elif inputs is None and hosted_fees(request):
        problem = "the request uses a tool that the provider runs and bills apart; call it without a budget"
    elif inputs is None:
        problem = (
            "the request has media parts, or context that the server keeps, and the model's input limit is unknown; "
            f"pass prices={{{route.model!r}: dspy_prod.Price(..., max_input_tokens=...)}}"
        )
    else:
        problem = (
            "neither max_tokens nor the model's own output limit is known; pass max_tokens=... to the LM or "
            f"prices={{{route.model!r}: dspy_prod.Price(..., max_output_tokens=...)}}"
        )
    raise UnpricedModelError(
        f"A budget applies, but this call's cost cannot be bounded: {problem}", model=route.model, route=route.name
    )


def _never_fits(route: Route, explicit: int, tpm: float) -> RateLimitedError:
    return RateLimitedError(
        f"max_tokens={explicit} is above tpm={tpm:g} of {route.model}; no minute could ever hold this call. "
        "Lower max_tokens or raise tpm",
        model=route.model,
        route=route.name,
        dimension="tokens",
    )


def _with_defaults(request: Request, defaults: dict[str, Any]) -> Request:
    """Fill generation settings that the call leaves open with the fallback LM's own."""
    config = request.config
    missing = {name: value for name, value in defaults.items() if getattr(config, name, value) in (None, ())}
    return replace(request, config=replace(config, **missing)) if missing else request
