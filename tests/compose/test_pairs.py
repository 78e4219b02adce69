"""What each pair of policies promises together: retry with the others.

The order is that of `pipeline/flow.py`: cache, fallback, retry, breaker check, limiter and budget, permit, attempt.
Each test reads given, when, then. The files beside this one hold the pairs of the other policies.
"""

from __future__ import annotations

import time

import pytest
from dspy.utils.exceptions import (
    ContextWindowExceededError,
    LMInvalidRequestError,
    LMRateLimitError,
    LMServerError,
)

from dspy_prod import (
    Budget,
    BudgetExceededError,
    CircuitBreaker,
    CircuitOpenError,
    RateLimit,
    Retry,
    call_context,
)
from dspy_prod.testing import FakeClock, ScriptedEngine
from tests.compose.support import CENT, Caller, caught, down, idle, in_window, over, records, spare, until
from tests.stopwatch import Stopwatch

QUICK = Retry(attempts=3, backoff=0.001)
TRIPS_AT_ONCE = CircuitBreaker(failure_threshold=1, recovery_timeout=60, jitter=0, success_threshold=1)
ROOMY = RateLimit(rpm=600, burst=600, guard=0)


def test_retry_and_breaker_a_retry_does_not_wait_for_a_circuit_that_its_own_failure_opened() -> None:
    """Given five attempts and a threshold of two, when all fail, then the second failure is the last, at once."""
    engine = ScriptedEngine(down(503, retry_after=30))
    lm = over(engine, retry=Retry(attempts=5), breaker=CircuitBreaker(failure_threshold=2))
    lm.pipeline.primary.state.breaker.failure(lm.pipeline.primary.state.breaker.permit(), 0.0, "before")

    with Stopwatch() as took:
        error = caught(lambda: lm("q"))

    assert took.seconds < 5
    assert engine.calls == 1
    assert type(error) is LMServerError, "the upstream's last word is what the caller hears"
    assert lm.pipeline.primary.breaker.snapshot().state == "open"


def test_retry_and_breaker_every_attempt_counts() -> None:
    """Given three attempts and a threshold of three, when one call fails, then the next is not sent."""
    engine = ScriptedEngine(down())
    lm = over(engine, retry=QUICK, breaker=CircuitBreaker(failure_threshold=3))

    first, second = caught(lambda: lm("a")), caught(lambda: lm("b"))

    assert type(first) is LMServerError
    assert isinstance(second, CircuitOpenError)
    assert second.cause_text == "3 failures in a row, last: LMServerError 500"
    assert engine.calls == 3


def test_retry_and_breaker_a_failed_probe_is_not_retried() -> None:
    """Given a half-open circuit, when the probe fails, then it re-opens and the other attempts are not made."""
    clock = FakeClock()
    engine = ScriptedEngine(down())
    lm = over(engine, retry=QUICK, breaker=TRIPS_AT_ONCE, clock=clock)
    caught(lambda: lm("trips"))
    clock.advance(61)

    error = caught(lambda: lm("probe"))

    assert type(error) is LMServerError
    assert engine.calls == 2
    assert lm.pipeline.primary.breaker.snapshot().opened_count == 2


def test_retry_and_limit_each_attempt_takes_its_own_permit() -> None:
    """Given one seat, when the third attempt succeeds, then three requests are counted and the seat is free."""
    engine = ScriptedEngine([down(), down(), "ok"])
    lm = over(engine, retry=QUICK, limit=RateLimit(rpm=600, burst=600, concurrency=1))

    assert lm("q") == ["ok"]

    assert in_window(lm) == 3
    assert engine.max_in_flight == 1
    assert idle(lm)


def test_retry_and_limit_a_pause_holds_no_seat() -> None:
    """Given one seat and a call that pauses before its retry, when another comes, then it is served meanwhile."""
    engine = ScriptedEngine([down(503, retry_after=1.0), "ok"])
    lm = over(engine, retry=Retry(attempts=2), limit=RateLimit(concurrency=1))
    pausing = Caller(lambda: lm("first"))
    until(lambda: engine.calls == 1 and engine.in_flight == 0)

    with Stopwatch() as took:
        assert lm("second") == ["ok"]

    assert took.seconds < 0.9
    assert pausing.outcome() == ["ok"]


def test_retry_and_limit_a_throttled_call_waits_as_long_as_it_was_told_and_so_do_the_others() -> None:
    """Given no limit of ours, when the upstream says 429 with Retry-After, then everybody of that key waits it out."""
    engine = ScriptedEngine([LMRateLimitError("slow down", status=429, retry_after=0.5), "ok"])
    lm = over(engine, retry=Retry(attempts=2))
    began = time.monotonic()
    throttled = Caller(lambda: lm("first"))
    until(lambda: lm.pipeline.primary.state.throttled)

    assert lm("second") == ["ok"]

    assert time.monotonic() - began >= 0.5
    assert throttled.outcome() == ["ok"]
    assert engine.calls == 3


def test_retry_and_budget_an_attempt_that_may_have_been_billed_is_charged() -> None:
    """Given 504, 500 and then an answer, when it is priced, then 504 costs its bound and 500 nothing."""
    engine = ScriptedEngine([down(504), down(500), "ok"], output_tokens=50)
    lm = over(engine, retry=QUICK, budget=Budget(usd=1))

    assert lm("q") == ["ok"]

    assert [(r.cost_nano, r.estimated, r.attempt) for r in records(lm)] == [
        (CENT, True, 1),
        (0, False, 2),
        (CENT // 2, False, 3),
    ]


def test_retry_and_budget_a_retry_that_cannot_be_paid_is_not_sent() -> None:
    """Given money for one attempt, when it was lost to a 504, then the retry is refused and says why it was needed."""
    engine = ScriptedEngine([down(504), "ok"])
    lm = over(engine, retry=QUICK, budget=Budget(usd=0.015))

    error = caught(lambda: lm("q"))

    assert isinstance(error, BudgetExceededError)
    assert isinstance(error.__cause__, LMServerError)
    assert engine.calls == 1
    assert idle(lm)


def test_retry_and_cache_only_the_answer_is_kept() -> None:
    """Given a call that succeeds at the third attempt, when it is repeated, then the cache answers it."""
    engine = ScriptedEngine([down(), down(), "ok", "never"])
    lm = over(engine, retry=QUICK, cache=True)

    assert [lm("q"), lm("q")] == [["ok"], ["ok"]]

    assert engine.calls == 3
    assert [record.outcome for record in records(lm)] == ["error", "error", "ok", "cached"]


def test_retry_and_fallback_a_route_is_exhausted_before_the_next_begins() -> None:
    """Given a dead primary and a fallback that fails once, when called, then each route gets attempts of its own."""
    primary, second = ScriptedEngine(down()), ScriptedEngine([down(), "spare"])
    lm = over(primary, retry=QUICK, fallbacks=[spare(second)])

    assert lm("q") == ["spare"]

    assert (primary.calls, second.calls) == (3, 2)
    assert [record.attempt for record in records(lm)] == [1, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("error", "answered"),
    [
        (ContextWindowExceededError(message="too long", status=400), True),
        (LMInvalidRequestError("what?", status=400), False),
    ],
    ids=["too-long", "invalid"],
)
def test_retry_and_fallback_what_a_retry_cannot_mend_another_model_may(error: Exception, answered: bool) -> None:
    """Given an error that is not transient, when called, then it is not retried, and only a fitting one falls back."""
    primary, second = ScriptedEngine(error), ScriptedEngine("spare")
    lm = over(primary, retry=QUICK, fallbacks=[spare(second)])

    outcome = lm("q") if answered else caught(lambda: lm("q"))

    assert (outcome == ["spare"]) is answered
    assert (primary.calls, second.calls) == (1, int(answered))


def test_retry_and_deadline_a_pause_that_does_not_fit_is_not_waited() -> None:
    """Given a Retry-After beyond the deadline, when the attempt fails, then the caller hears of it at once."""
    engine = ScriptedEngine(down(503, retry_after=30))
    lm = over(engine, retry=QUICK)

    with Stopwatch() as took, call_context(deadline=5):
        error = caught(lambda: lm("q"))

    assert took.seconds < 2
    assert type(error) is LMServerError
    assert engine.calls == 1
