"""What the breaker promises together with limiter, cache, fallback, budget and deadline. See `test_pairs.py`."""

from __future__ import annotations

from dspy.utils.exceptions import LMRateLimitError, LMServerError

from dspy_prod import (
    Budget,
    BudgetExceededError,
    Cache,
    CircuitBreaker,
    CircuitOpenError,
    DeadlineExceededError,
    RateLimit,
    call_context,
)
from dspy_prod.testing import FakeClock, ScriptedEngine
from tests.compose.support import Caller, Gate, caught, down, idle, in_window, over, records, spare, until
from tests.stopwatch import Stopwatch

TRIPS_AT_ONCE = CircuitBreaker(failure_threshold=1, recovery_timeout=60, jitter=0, success_threshold=1)


def test_breaker_and_limit_an_open_circuit_is_noticed_before_the_line() -> None:
    """Given an open circuit and a full limiter, when called, then the refusal is immediate and takes no place."""
    gate = Gate()
    engine = ScriptedEngine([gate, "never"])
    lm = over(engine, breaker=TRIPS_AT_ONCE, limit=RateLimit(concurrency=1))
    in_flight = Caller(lambda: lm("first"))
    assert gate.arrived.wait(30)
    lm.pipeline.primary.breaker.force_open()

    with Stopwatch() as took:
        error = caught(lambda: lm("second"))

    assert isinstance(error, CircuitOpenError)
    assert took.seconds < 1
    gate.open()
    assert in_flight.outcome() == ["ok"]


def test_breaker_and_limit_those_in_line_when_it_trips_are_not_sent() -> None:
    """Given callers in line behind a call that fails, when that opens the circuit, then they hear of it, unsent."""
    gate = Gate(down())
    engine = ScriptedEngine([gate, "never"])
    lm = over(engine, breaker=TRIPS_AT_ONCE, limit=RateLimit(rpm=600, burst=600, concurrency=1))
    first = Caller(lambda: lm("first"))
    assert gate.arrived.wait(30)
    line = [Caller(lambda: lm("in line")) for _ in range(5)]
    until(lambda: lm.pipeline.store.waiting() == 5)

    gate.open()

    assert type(first.outcome()) is LMServerError
    assert [type(caller.outcome()) for caller in line] == [CircuitOpenError] * 5
    assert engine.calls == 1
    assert in_window(lm) == 1, "what was not sent is given back"
    assert idle(lm)


def test_breaker_and_limit_a_429_feeds_the_limiter_and_not_the_breaker() -> None:
    """Given a threshold of one, when the upstream says 429, then the circuit stays closed."""
    engine = ScriptedEngine([LMRateLimitError("slow down", status=429, retry_after=0.01), "ok"])
    lm = over(engine, breaker=TRIPS_AT_ONCE)

    caught(lambda: lm("q"))

    assert lm.pipeline.primary.breaker.snapshot().state == "closed"
    assert lm("q") == ["ok"]


def test_breaker_and_cache_an_open_circuit_does_not_hide_answers() -> None:
    """Given a cached answer, when the circuit is open, then that question is answered and others are refused."""
    lm = over(ScriptedEngine("ok"), breaker=TRIPS_AT_ONCE, cache=True)
    lm("known")
    lm.pipeline.primary.breaker.force_open()

    assert lm("known") == ["ok"]
    assert isinstance(caught(lambda: lm("unknown")), CircuitOpenError)


def test_breaker_and_cache_a_stale_answer_is_better_than_an_open_circuit() -> None:
    """Given an expired answer within `stale_if_error`, when the circuit is open, then it is served, marked stale."""
    clock = FakeClock()
    lm = over(
        ScriptedEngine("ok"), breaker=TRIPS_AT_ONCE, clock=clock, cache=Cache(ttl=10, ttl_jitter=0, stale_if_error=60)
    )
    lm("q")
    clock.advance(11)
    lm.pipeline.primary.breaker.force_open()

    assert lm("q") == ["ok"]
    assert [record.outcome for record in records(lm)] == ["ok", "stale"]
    clock.advance(60)
    assert isinstance(caught(lambda: lm("q")), CircuitOpenError)


def test_breaker_and_fallback_an_open_primary_is_passed_over_unseen() -> None:
    """Given an open primary, when called, then the fallback answers, and its own breaker counts for itself."""
    primary, second = ScriptedEngine(down()), ScriptedEngine("spare")
    lm = over(primary, breaker=TRIPS_AT_ONCE, fallbacks=[spare(second)])

    assert [lm("a"), lm("b"), lm("c")] == [["spare"]] * 3

    assert (primary.calls, second.calls) == (1, 3)
    assert lm.pipeline.primary.breaker.snapshot().state == "open"
    assert lm.pipeline.fallbacks[0].breaker.snapshot().total_successes == 3


def test_breaker_and_budget_an_open_circuit_reserves_no_money() -> None:
    """Given an open circuit and money that somebody holds, when called, then the circuit is the reason, at once."""
    gate = Gate()
    lm = over(ScriptedEngine([gate, "never"]), breaker=TRIPS_AT_ONCE, budget=Budget(usd=0.01))
    in_flight = Caller(lambda: lm("holds all"))
    assert gate.arrived.wait(30)
    lm.pipeline.primary.breaker.force_open()

    assert isinstance(caught(lambda: lm("second")), CircuitOpenError)

    gate.open()
    in_flight.outcome()
    assert idle(lm)


def test_breaker_and_budget_a_call_without_money_takes_no_probe() -> None:
    """Given a half-open circuit, when a call is refused for money, then the probe is left for one that can pay."""
    clock = FakeClock()
    lm = over(
        ScriptedEngine([down(504), "ok"]), breaker=TRIPS_AT_ONCE, clock=clock, budget=Budget(usd=0.01, scope="user")
    )
    with call_context(user="poor"):
        caught(lambda: lm("q"))
        clock.advance(61)
        assert isinstance(caught(lambda: lm("q")), BudgetExceededError)

    with call_context(user="rich"):
        assert lm("q") == ["ok"]
    assert lm.pipeline.primary.breaker.snapshot().state == "closed"


def test_breaker_and_deadline_a_call_that_runs_out_of_time_speaks_against_the_upstream() -> None:
    """Given a hung upstream, when our own deadline ends the attempt, then the circuit opens."""
    gate = Gate()
    lm = over(ScriptedEngine(gate), breaker=TRIPS_AT_ONCE)

    with call_context(deadline=1.1):  # a shorter one would speak of the caller's haste
        error = caught(lambda: lm("q"))

    assert isinstance(error, DeadlineExceededError)
    assert lm.pipeline.primary.breaker.snapshot().state == "open"
    gate.open()
