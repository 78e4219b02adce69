"""What limiter and budget promise together with each other, cache, fallback and deadline. See `test_pairs.py`."""

from __future__ import annotations

from dspy_prod import (
    Budget,
    BudgetExceededError,
    CircuitBreaker,
    DeadlineExceededError,
    Price,
    RateLimit,
    RateLimitedError,
    call_context,
)
from dspy_prod.testing import ScriptedEngine
from tests.compose.support import (
    CENT,
    MODEL,
    SPARE,
    Caller,
    Gate,
    caught,
    down,
    idle,
    in_window,
    over,
    records,
    spare,
    until,
)
from tests.e2e.support import account
from tests.stopwatch import Stopwatch


# -- limiter and budget ----------------------------------------------------------------------------------------------
def test_limit_and_budget_a_call_refused_for_money_takes_no_request() -> None:
    """Given an exhausted budget and a roomy limit, when called, then nothing of the minute is used."""
    engine = ScriptedEngine("ok", output_tokens=100)
    lm = over(engine, limit=RateLimit(rpm=600, burst=600), budget=Budget(usd=0.01))
    lm("spends all")

    assert isinstance(caught(lambda: lm("q")), BudgetExceededError)

    assert in_window(lm) == 1
    assert idle(lm)


def test_limit_and_budget_who_waits_for_a_seat_holds_no_money() -> None:
    """Given a caller in line for a seat, when another tenant's call needs the money, then it is not held back."""
    gate = Gate()
    engine = ScriptedEngine([gate, "ok"])
    lm = over(engine, limit=RateLimit(concurrency=1), budget=Budget(usd=1))
    first = Caller(lambda: lm("has the seat"))
    assert gate.arrived.wait(30)
    second = Caller(lambda: lm("waits"))
    until(lambda: lm.pipeline.store.waiting() == 1)

    assert account(lm).held == CENT, "only the call in flight holds its bound"
    gate.open()
    assert [first.outcome(), second.outcome()] == [["ok"], ["ok"]]
    assert idle(lm)


def test_limit_and_budget_who_waits_for_money_takes_no_seat() -> None:
    """Given money held by a call in flight and two seats, when a second waits for money, then a third, rich, goes."""
    gate = Gate()
    engine = ScriptedEngine([gate, "ok"])
    lm = over(engine, limit=RateLimit(concurrency=2), budget=Budget(usd=0.011, scope="user"))

    def ask(user: str) -> list[str]:
        with call_context(user=user):
            answer: list[str] = lm("q")
            return answer

    first = Caller(lambda: ask("poor"))
    assert gate.arrived.wait(30)
    second = Caller(lambda: ask("poor"))
    until(lambda: lm.pipeline.store.waiting() == 1)
    third = Caller(lambda: ask("rich"))

    assert third.outcome() == ["ok"]
    assert lm.pipeline.store.waiting() == 1

    gate.open()
    assert [first.outcome(), second.outcome()] == [["ok"]] * 2
    assert idle(lm)


# -- with the cache --------------------------------------------------------------------------------------------------
def test_limit_and_cache_a_hit_takes_no_place() -> None:
    """Given a full limiter, when a known question is asked, then it is answered without waiting or counting."""
    gate = Gate()
    lm = over(ScriptedEngine(["known", gate]), cache=True, limit=RateLimit(rpm=600, burst=600, concurrency=1))
    lm("known")
    in_flight = Caller(lambda: lm("slow"))
    assert gate.arrived.wait(30)

    assert [lm("known") for _ in range(20)] == [["known"]] * 20

    assert in_window(lm) == 2
    gate.open()
    in_flight.outcome()


def test_cache_and_budget_a_hit_costs_nothing_and_is_served_without_money() -> None:
    """Given an exhausted budget, when a known question is asked, then it is answered, and recorded at 0."""
    lm = over(ScriptedEngine("ok", output_tokens=100), cache=True, budget=Budget(usd=0.01))
    lm("known")
    assert isinstance(caught(lambda: lm("unknown")), BudgetExceededError)

    assert lm("known") == ["ok"]

    found = [(record.outcome, record.cost_nano) for record in records(lm)]
    assert found == [("ok", CENT), ("refused", 0), ("cached", 0)]


def test_cache_and_fallback_the_answer_of_another_model_is_not_kept_as_the_primary_s() -> None:
    """Given an answer of the fallback, when the question comes again, then the primary is asked again."""
    primary, second = ScriptedEngine([down(), "primary"]), ScriptedEngine("spare")
    lm = over(primary, cache=True, fallbacks=[spare(second)])

    assert [lm("q"), lm("q"), lm("q")] == [["spare"], ["primary"], ["primary"]]

    assert (primary.calls, second.calls) == (2, 1)


# -- with fallbacks --------------------------------------------------------------------------------------------------
def test_limit_and_fallback_who_would_wait_too_long_goes_to_the_next_route() -> None:
    """Given a minute that is used up, when called with `max_wait=0`, then the fallback answers at once."""
    primary, second = ScriptedEngine("primary"), ScriptedEngine("spare")
    lm = over(primary, limit=RateLimit(rpm=1, max_wait=0), fallbacks=[spare(second)])

    with Stopwatch() as took:
        assert [lm("a"), lm("b")] == [["primary"], ["spare"]]

    assert took.seconds < 2
    assert records(lm)[-1].route == SPARE


def test_limit_and_fallback_without_another_route_the_wait_is_told() -> None:
    """Given a minute that is used up and no fallback, when called, then the refusal says when to come again."""
    lm = over(ScriptedEngine("ok"), limit=RateLimit(rpm=1, max_wait=0, guard=1))
    lm("a")

    error = caught(lambda: lm("b"))

    assert isinstance(error, RateLimitedError)
    assert error.retry_after is not None
    assert 55 < error.retry_after <= 65


def test_budget_and_fallback_each_route_is_bound_and_charged_at_its_own_price() -> None:
    """Given a primary lost to a 504 and a cheap fallback, when called, then both are on one budget."""
    prices = {MODEL: Price(input=0, output=100), SPARE: Price(input=0, output=10)}
    primary, second = ScriptedEngine(down(504)), ScriptedEngine("spare", output_tokens=50)
    lm = over(primary, budget=Budget(usd=0.012), prices=prices, fallbacks=[spare(second)])

    assert lm("q") == ["spare"]

    assert [(r.model, r.cost_nano, r.estimated) for r in records(lm)] == [
        (MODEL, CENT, True),
        (SPARE, CENT // 20, False),
    ]


def test_budget_and_fallback_no_other_model_is_tried_for_want_of_money() -> None:
    """Given an exhausted budget, when called, then the refusal is final: the money is the caller's, not the route's."""
    primary, second = ScriptedEngine("ok", output_tokens=100), ScriptedEngine("spare")
    lm = over(primary, budget=Budget(usd=0.01), fallbacks=[spare(second)])
    lm("spends all")

    assert isinstance(caught(lambda: lm("q")), BudgetExceededError)

    assert (primary.calls, second.calls) == (1, 0)


# -- with a deadline -------------------------------------------------------------------------------------------------
def test_deadline_and_limit_a_wait_that_cannot_be_served_is_refused_at_once() -> None:
    """Given a minute that is used up, when the deadline is nearer than its end, then nobody waits in vain."""
    lm = over(ScriptedEngine("ok"), limit=RateLimit(rpm=1))
    lm("a")

    with Stopwatch() as took, call_context(deadline=5):
        error = caught(lambda: lm("b"))

    assert isinstance(error, RateLimitedError)
    assert took.seconds < 1
    assert idle(lm)


def test_deadline_and_budget_a_wait_for_money_ends_with_the_deadline() -> None:
    """Given money that another call holds, when the deadline passes, then the wait ends and returns everything."""
    gate = Gate()
    lm = over(ScriptedEngine([gate, "ok"]), budget=Budget(usd=0.01))
    in_flight = Caller(lambda: lm("holds all"))
    assert gate.arrived.wait(30)

    with Stopwatch() as took, call_context(deadline=0.2):
        error = caught(lambda: lm("waits"))

    assert isinstance(error, DeadlineExceededError)
    assert took.wall >= 0.2
    assert took.seconds < 1
    gate.open()
    in_flight.outcome()
    assert idle(lm)


def test_deadline_and_budget_an_attempt_ended_in_time_is_charged_what_it_turns_out_to_cost() -> None:
    """Given an attempt that outlasts the deadline, when it ends late, then its hold becomes its real price."""
    gate = Gate()
    lm = over(ScriptedEngine(gate, output_tokens=25), budget=Budget(usd=1))

    with call_context(deadline=0.5):
        assert isinstance(caught(lambda: lm("q")), DeadlineExceededError)

    assert lm.pipeline.store.holds() == 1, "an abandoned attempt keeps its hold until it ends"
    gate.open()
    until(lambda: idle(lm))
    (record,) = records(lm)
    assert (record.outcome, record.cost_nano, record.estimated) == ("timeout", CENT // 4, False)


def test_deadline_and_fallback_no_route_is_tried_when_time_is_up() -> None:
    """Given a primary that hangs past the deadline, when it ends, then the fallback is not called any more."""
    gate = Gate()
    second = ScriptedEngine("spare")
    lm = over(ScriptedEngine(gate), breaker=CircuitBreaker(), fallbacks=[spare(second)])

    with call_context(deadline=0.1):
        error = caught(lambda: lm("q"))

    assert isinstance(error, DeadlineExceededError)
    assert second.calls == 0
    gate.open()


def test_deadline_and_fallback_what_is_left_of_the_time_is_the_fallback_s() -> None:
    """Given a primary that fails and a fallback that hangs, when called, then one deadline bounds both."""
    gate = Gate()
    lm = over(ScriptedEngine(down()), fallbacks=[spare(ScriptedEngine(gate))])

    with Stopwatch() as took, call_context(deadline=0.3):
        error = caught(lambda: lm("q"))

    assert isinstance(error, DeadlineExceededError)
    assert took.seconds < 0.6
    gate.open()
    until(lambda: len(records(lm)) == 2)
    assert [(record.route, record.outcome) for record in records(lm)] == [("primary", "error"), (SPARE, "timeout")]
