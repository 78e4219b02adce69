"""What an attempt needs, before it is made: its request, its accounts, its tokens, and for how long."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

import dspy_prod
from dspy_prod import Budget, Price, RateLimit, call_context
from dspy_prod.errors import BudgetExceededError, CircuitOpenError, RateLimitedError, RejectedError, UnpricedModelError
from dspy_prod.pipeline.attempt import Attempt
from dspy_prod.pipeline.plan import only_here, pause_until, plan, renewed, shrunk, turns_at, wait_until, worst
from dspy_prod.stores.base import GRANTED, PENDING, REFUSED, WITHDRAWN, Refusal, Reservation
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import FakeClock, ScriptedEngine
from tests.compose.support import CENT, MODEL, SPARE, over, spare
from tests.pipeline.support import call_of

MIDNIGHT = 1_800_000_000.0 - 1_800_000_000.0 % 86_400


def lm_of(clock: FakeClock | None = None, **policies: Any) -> dspy_prod.LM:
    clock = FakeClock(MIDNIGHT + 100) if clock is None else clock
    return over(ScriptedEngine("ok"), store=MemoryStore(clock=clock), clock=clock, **policies)


def planned(lm: dspy_prod.LM, **config: Any) -> Attempt:
    return plan(call_of(lm, **config), lm.pipeline.primary, 3)


def reserved(attempt: Attempt) -> Reservation:
    assert attempt.reservation is not None
    return attempt.reservation


# -- what is planned -------------------------------------------------------------------------------------------------
def test_without_budget_and_limit_nothing_is_reserved() -> None:
    """Such a call asks no store."""
    attempt = planned(lm_of())
    assert (attempt.reservation, attempt.held, attempt.bound, attempt.rules) == (None, None, None, ())
    assert (attempt.number, attempt.permit, attempt.until, attempt.send) == (3, None, inf, None)
    assert attempt.started == attempt.call.pipeline.clock.monotonic()


def test_what_is_reserved_covers_the_dearest_answer() -> None:
    """The bound on each account, the tokens at the limiter, the caller's place in line."""
    budgets = [Budget(usd=1, name="all"), Budget(usd=2, per="day", scope="tenant", name="each")]
    lm = lm_of(budget=budgets, limit=RateLimit(rpm=60, tpm=10_000, fair_by="user"))
    with call_context(tenant="acme", user="ann", priority="high"):
        attempt = planned(lm)
    asked = reserved(attempt)
    assert attempt.bound == asked.amount == CENT
    assert [(account.title, account.limit) for account in asked.accounts] == [
        ("all", 100 * CENT),
        ("each=acme", 200 * CENT),
    ]
    assert [rule.options for rule in attempt.rules] == budgets
    assert asked.tokens == sum(size for size in attempt.route.bounds(attempt.request) if size is not None)
    assert (asked.limit_key, asked.limit) == (lm.pipeline.primary.limit_key, lm.pipeline.primary.limit)
    assert (asked.priority, asked.fair, asked.state) == (0, "ann", PENDING)


def test_a_budget_alone_asks_no_limiter() -> None:
    """Money is drawn, tokens are not."""
    asked = reserved(planned(lm_of(budget=Budget(usd=1))))
    assert (asked.limit_key, asked.limit, asked.tokens) == (None, None, 0)


def test_the_record_of_a_caller_that_dies_says_the_worst() -> None:
    """A durable store writes it when nobody settles: charged in full, and marked as estimated."""
    asked = reserved(planned(lm_of(budget=Budget(usd=1, name="all"))))
    assert callable(asked.stub)
    record = asked.stub()
    assert (record.id, record.outcome, record.cost_nano, record.estimated) == (asked.id, "abandoned", CENT, True)
    assert (record.attempt, record.accounts) == (3, tuple(account.key for account in asked.accounts))
    assert reserved(planned(lm_of(limit=RateLimit(rpm=1)))).stub is None, "without money nothing is owed"


def test_a_call_that_no_minute_can_hold_is_refused_at_once() -> None:
    """It would wait for ever."""
    with pytest.raises(RateLimitedError, match="no minute could ever hold"):
        planned(lm_of(limit=RateLimit(tpm=99)))


def test_a_call_that_cannot_be_bounded_meets_no_budget() -> None:
    """A budget holds only while each call's cost stays within its bound."""
    with pytest.raises(UnpricedModelError, match="no price is known"):
        planned(lm_of(budget=Budget(usd=1), prices={}))


def test_a_fallback_sends_its_own_model() -> None:
    """The request is the call's, but for the model and what the call left open."""
    lm = lm_of(fallbacks=[spare(ScriptedEngine("s"))])
    call = call_of(lm)
    attempt = plan(call, lm.pipeline.fallbacks[0], 1)
    assert (call.request.model, attempt.request.model) == (MODEL, SPARE)


# -- how long it may wait --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("limit", "budget", "deadline", "wait"),
    [
        (None, None, None, 60.0),
        (None, None, 200.0, 200.0),
        (5.0, None, None, 5.0),
        (5.0, 3.0, None, 3.0),
        (None, 3.0, 2.0, 2.0),
        (50.0, 30.0, 200.0, 30.0),
    ],
)
def test_the_shortest_wait_holds(
    limit: float | None, budget: float | None, deadline: float | None, wait: float
) -> None:
    """A minute by default; a deadline may be later or earlier, a `max_wait` only earlier."""
    lm = lm_of(limit=RateLimit(rpm=1, max_wait=limit), budget=Budget(usd=1, max_wait=budget))
    clock: Any = lm.pipeline.clock
    with call_context(deadline=deadline, clock=clock):
        attempt = plan(call_of(lm), lm.pipeline.primary, 1)
    now = clock.monotonic()
    assert wait_until(attempt, now) - now == pytest.approx(wait)
    assert reserved(attempt).horizon - lm.pipeline.store.now() == pytest.approx(wait)


def test_a_pause_before_a_retry_is_bounded_by_the_deadline_alone() -> None:
    """With `RateLimit(max_wait=0)` a 503 was never tried again: `max_wait` is about calls that have not been sent."""
    lm = lm_of(limit=RateLimit(rpm=1, max_wait=0), budget=Budget(usd=1, max_wait=1))
    clock: Any = lm.pipeline.clock
    assert pause_until(call_of(lm), 10.0) == 70.0
    with call_context(deadline=5, clock=clock):
        call = call_of(lm)
    assert pause_until(call, 10.0) == call.deadline
    now = clock.monotonic()
    retry = plan(call_of(lm), lm.pipeline.primary, 2)
    assert wait_until(retry, now) - now == 1.0, "the budget's own max_wait holds for every attempt"


def test_impatience_shortens_the_wait_for_a_limit() -> None:
    """While another route is left, what provably takes longer is refused at once."""
    lm = lm_of(limit=RateLimit(rpm=1))
    attempt = plan(call_of(lm), lm.pipeline.primary, 1, 2.0)
    assert reserved(attempt).horizon - lm.pipeline.store.now() == pytest.approx(2.0)


@pytest.mark.parametrize(("per", "left"), [("day", 86_300.0), ("hour", 3_500.0), ("total", inf)])
def test_a_window_ends_when_the_next_begins(per: Any, left: float) -> None:
    """Who waits for money looks again then."""
    attempt = planned(lm_of(budget=Budget(usd=1, per=per)))
    assert turns_at(attempt, 10.0) == pytest.approx(10.0 + left)
    assert turns_at(planned(lm_of()), 10.0) == inf


# -- plans that change -----------------------------------------------------------------------------------------------
def test_an_attempt_is_renewed_when_its_window_has_ended() -> None:
    """Its old accounts are yesterday's; the attempt is the same otherwise."""
    clock = FakeClock(MIDNIGHT + 86_390)
    lm = lm_of(clock, budget=Budget(usd=1, per="day"))
    attempt = planned(lm)
    assert renewed(attempt) is None
    clock.advance(20)
    again = renewed(attempt)
    assert again is not None
    assert (again.call, again.route, again.number) == (attempt.call, attempt.route, 3)
    assert reserved(again).id != reserved(attempt).id
    assert reserved(again).accounts[0].key != reserved(attempt).accounts[0].key


def test_a_late_call_is_not_renewed() -> None:
    """Nobody waits for it any more."""
    clock = FakeClock(MIDNIGHT + 86_390)
    lm = lm_of(clock, budget=Budget(usd=1, per="day"))
    with call_context(deadline=15, clock=clock):
        attempt = planned(lm)
    clock.advance(20)
    assert renewed(attempt) is None
    assert renewed(planned(lm_of())) is None, "nor one that reserves nothing"


def refusal(left: int, dimension: str = "last", reason: Any = "budget_exceeded") -> Refusal:
    return Refusal(reason, None, dimension, 100 * CENT, 100 * CENT - left, 0, CENT)


def test_the_last_call_is_clamped_to_what_is_left() -> None:
    """Half the money: half the tokens, and a reservation of its own for them."""
    lm = lm_of(budget=Budget(usd=1, name="last", shrink_last=True), limit=RateLimit(tpm=10_000))
    attempt = planned(lm)
    less = shrunk(attempt, refusal(CENT // 2))
    assert less is not None
    assert less.request.config.max_tokens == 50
    assert (less.bound, reserved(less).amount) == (CENT // 2, CENT // 2)
    assert reserved(less).tokens == reserved(attempt).tokens - 50
    assert reserved(less).limit_key == reserved(attempt).limit_key
    assert (less.number, less.rules, reserved(less).accounts) == (3, attempt.rules, reserved(attempt).accounts)
    assert attempt.request.config.max_tokens == 100


@pytest.mark.parametrize(
    ("refused", "shrinks"),
    [
        (refusal(CENT // 100 * 15), True),  # 15 tokens are no answer
        (refusal(2 * CENT), True),  # nothing to clamp: others hold the money
        (refusal(CENT // 2, "other"), True),
        (refusal(CENT // 2, reason="rate_limited"), True),
        (refusal(CENT // 2), False),
    ],
)
def test_a_call_is_not_clamped_in_vain(refused: Refusal, shrinks: bool) -> None:
    """Only for the budget that refuses, if it wants that, and only to what is worth sending."""
    budgets = [Budget(usd=1, name="last", shrink_last=shrinks), Budget(usd=1, per="day", name="other")]
    assert shrunk(planned(lm_of(budget=budgets)), refused) is None


def test_a_call_that_reserves_nothing_is_not_clamped() -> None:
    assert shrunk(planned(lm_of()), refusal(CENT // 2)) is None


# -- what it holds and may cost --------------------------------------------------------------------------------------
@pytest.mark.parametrize("state", [PENDING, GRANTED, REFUSED, WITHDRAWN])
def test_only_what_is_granted_is_held(state: int) -> None:
    """What was refused or withdrawn must not be settled."""
    attempt = planned(lm_of(limit=RateLimit(rpm=1)))
    reserved(attempt).state = state
    assert attempt.held is (attempt.reservation if state == GRANTED else None)


def test_the_worst_is_known_without_a_budget_if_there_is_a_price() -> None:
    """A call that may have been billed is recorded with its bound; without a price nothing is known."""
    assert worst(planned(lm_of())) == worst(planned(lm_of(budget=Budget(usd=1)))) == CENT
    assert worst(planned(lm_of(prices={}))) is None
    assert worst(planned(lm_of(prices={MODEL: Price(input=0, output=1)}), max_tokens=None)) is None


# -- refusals that concern one route ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "of_first", "of_fallback"),
    [
        (UnpricedModelError("?"), False, True),
        (BudgetExceededError("?", budget="all"), False, False),
        (BudgetExceededError("?", budget="each=openai/pair"), True, True),
        (BudgetExceededError("?", budget="spare"), False, True),
        (CircuitOpenError("?"), False, False),
    ],
)
def test_a_refusal_of_one_route_leaves_the_others(error: RejectedError, of_first: bool, of_fallback: bool) -> None:
    """A budget per model, or of the fallback's own; but what the whole call may spend ends it."""
    small = dspy_prod.LM(
        SPARE, engine=ScriptedEngine("s"), budget=Budget(usd=1, name="spare"), prices={SPARE: Price(input=1, output=1)},
        store=MemoryStore(),
    )  # fmt: skip
    budgets = [Budget(usd=1, name="all"), Budget(usd=1, scope="model", name="each")]
    lm = lm_of(budget=budgets, fallbacks=[small])
    first, fallback = lm.pipeline.routes
    assert only_here(call_of(lm), first, first, error) is of_first
    assert only_here(call_of(lm), fallback, first, error) is of_fallback
