"""How a refusal reads: from the store's arithmetic to an error that names the remedy."""

from __future__ import annotations

from math import inf

from dspy_prod.errors import (
    BudgetExceededError,
    DeadlineExceededError,
    RateLimitedError,
    RejectedError,
    StoreUnavailableError,
)
from dspy_prod.pipeline.attempt import Attempt
from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.routes import Route
from dspy_prod.records import NANO
from dspy_prod.stores.base import Refusal


def refused(attempt: Attempt, refusal: Refusal) -> RejectedError:
    """The error for a store's refusal."""
    route = attempt.route
    if refusal.reason == "budget_exceeded":
        return _no_money(route, refusal, "is spent", "", _next_window(attempt, refusal))
    if refusal.reason == "store_unavailable":
        store = attempt.call.pipeline.store
        return StoreUnavailableError(
            f"The state store {store.url} cannot record this call ({refusal.detail}), so it was not sent. See to the "
            "store, or let calls go on without it for a while: on_store_failure='local' of their Budget and RateLimit",
            model=route.model,
            route=route.name,
            retry_after=refusal.retry_after,
        )
    return _limited(route, refusal.dimension, refusal.retry_after)


def waited_too_long(attempt: Attempt) -> RejectedError:
    """The error for a wait that ended without a grant."""
    call, route, reservation = attempt.call, attempt.route, attempt.reservation
    assert reservation is not None
    if call.late():
        return too_late(call, f"while waiting for {reservation.blocked_on or 'admission'}")
    for account in reservation.accounts:
        if account.title == reservation.blocked_on:
            state = call.pipeline.store.account(account.key)
            refusal = Refusal(
                "budget_exceeded", None, account.title, account.limit, state.spent, state.held, attempt.bound or 0
            )
            return _no_money(route, refusal, "is spent or held by calls in flight", " or raise max_wait")
    return _limited(route, reservation.blocked_on, None)


def too_late(call: Call, when: str) -> DeadlineExceededError:
    """The error for a deadline of our own that has passed."""
    return DeadlineExceededError(
        f"The call's deadline passed {when}; allow more time in call_context(deadline=...)", model=call.request.model
    )


def _next_window(attempt: Attempt, refusal: Refusal) -> float | None:
    """Seconds until the budget's next window, None where it has none or that would not hold the call either."""
    if refusal.amount > refusal.limit or attempt.reservation is None:
        return None
    for rule, account in zip(attempt.rules, attempt.reservation.accounts, strict=False):
        if account.title == refusal.dimension:
            left = rule.ends_in(attempt.call.pipeline.clock.time())
            return None if left == inf else max(0.0, left)
    return None


def _no_money(
    route: Route, refusal: Refusal, state: str, more: str, retry_after: float | None = None
) -> BudgetExceededError:
    used = refusal.spent + (refusal.held if more else 0)
    return BudgetExceededError(
        f"Budget {refusal.dimension!r} cannot cover this call: {used / NANO:.6f} of {refusal.limit / NANO:.6f} USD "
        f"{state} and the call may cost up to {refusal.amount / NANO:.6f} USD. Raise the budget, lower max_tokens, "
        f"wait for its next window{more}",
        model=route.model,
        route=route.name,
        retry_after=retry_after,
        budget=refusal.dimension,
        limit_usd=refusal.limit / NANO,
        spent_usd=refusal.spent / NANO,
        held_usd=refusal.held / NANO,
        bound_usd=refusal.amount / NANO,
    )


def _limited(route: Route, dimension: str, retry_after: float | None) -> RateLimitedError:
    later = "" if retry_after is None else f"; it could be admitted in {retry_after:.1f} s"
    return RateLimitedError(
        f"The rate limit ({dimension or 'requests'}) of {route.model} cannot admit this call within its longest "
        f"wait{later}. Raise max_wait, the call's deadline, or the limit",
        model=route.model,
        route=route.name,
        retry_after=retry_after,
        dimension=dimension,
    )
