"""What single-flight promises together with each other policy. See `test_pairs.py`."""

from __future__ import annotations

from typing import Any

from dspy.utils.exceptions import LMServerError

import dspy_prod
from dspy_prod import (
    Budget,
    BudgetExceededError,
    Cache,
    CircuitBreaker,
    DeadlineExceededError,
    RateLimit,
    Retry,
    call_context,
)
from dspy_prod.testing import ScriptedEngine
from tests.compose.support import (
    CENT,
    Caller,
    Gate,
    caught,
    down,
    following,
    idle,
    in_window,
    over,
    records,
    spare,
    until,
)
from tests.stopwatch import Stopwatch


def crowd(lm: dspy_prod.LM, gate: Gate, size: int = 8, **context: Any) -> list[Caller]:
    """Callers of one question: the first has reached the upstream, the others follow it."""

    def ask() -> Any:
        with call_context(**context):
            return lm("q")

    leader = Caller(ask)
    assert gate.arrived.wait(30)
    before = following(lm)
    followers = [Caller(ask) for _ in range(size - 1)]
    until(lambda: following(lm) == before + size - 1)
    return [leader, *followers]


def test_single_flight_and_retry_only_the_leader_tries_again() -> None:
    """Given eight identical calls, when the upstream fails once, then the leader's retry answers all of them."""
    gate = Gate(down())
    engine = ScriptedEngine([gate, "ok"])
    lm = over(engine, cache=True, retry=Retry(attempts=3, backoff=0.001))
    callers = crowd(lm, gate)

    gate.open()

    assert [caller.outcome() for caller in callers] == [["ok"]] * 8
    assert engine.calls == 2


def test_single_flight_and_breaker_a_crowd_fails_once() -> None:
    """Given a threshold of two and eight identical calls, when the upstream fails, then the circuit stays closed."""
    gate = Gate(down())
    engine = ScriptedEngine([gate, "ok"])
    lm = over(engine, cache=True, breaker=CircuitBreaker(failure_threshold=2))
    callers = crowd(lm, gate)

    gate.open()

    outcomes = [caller.outcome() for caller in callers]
    assert [type(outcome) for outcome in outcomes] == [LMServerError] * 8
    assert len({id(outcome) for outcome in outcomes}) == 8, "each caller raises an error of its own"
    assert lm.pipeline.primary.breaker.snapshot().total_failures == 1
    assert lm("q") == ["ok"], "an error is not kept"


def test_single_flight_and_limit_a_crowd_takes_one_place() -> None:
    """Given one seat, when eight ask the same, then one request is counted and nobody waits in line."""
    gate = Gate()
    lm = over(ScriptedEngine(gate), cache=True, limit=RateLimit(rpm=600, burst=600, concurrency=1))
    callers = crowd(lm, gate)

    assert lm.pipeline.store.waiting() == 0
    gate.open()

    assert [caller.outcome() for caller in callers] == [["ok"]] * 8
    assert in_window(lm) == 1
    assert idle(lm)


def test_single_flight_and_budget_a_crowd_is_paid_once() -> None:
    """Given money for one call, when eight ask the same, then all are answered and one is charged."""
    gate = Gate()
    lm = over(ScriptedEngine(gate, output_tokens=100), cache=True, budget=Budget(usd=0.01))
    callers = crowd(lm, gate)

    gate.open()

    assert [caller.outcome() for caller in callers] == [["ok"]] * 8
    assert sorted(record.cost_nano or 0 for record in records(lm)) == [0] * 7 + [CENT]


def test_single_flight_and_budget_a_leader_without_money_passes_the_lead() -> None:
    """Given a leader whose own budget refuses it, when it fails, then the next asks for itself and is answered."""
    holds_all = Gate()
    lm = over(
        ScriptedEngine([holds_all, "ok"], output_tokens=100),
        cache=Cache(shared=True),
        budget=Budget(usd=0.01, scope="tenant", max_wait=10),
    )

    def ask(tenant: str, question: str) -> Any:
        with call_context(tenant=tenant):
            return lm(question)

    spender = Caller(lambda: ask("poor", "another question"))
    assert holds_all.arrived.wait(30)
    leader = Caller(lambda: ask("poor", "q"))
    until(lambda: lm.pipeline.store.waiting() == 1)
    follower = Caller(lambda: ask("rich", "q"))
    until(lambda: following(lm) == 1)

    holds_all.open()

    assert spender.outcome() == ["ok"]
    assert isinstance(leader.outcome(), BudgetExceededError)
    assert follower.outcome() == ["ok"]
    assert idle(lm)


def test_single_flight_and_fallback_a_crowd_falls_back_together() -> None:
    """Given a primary that fails, when eight ask the same, then the fallback is called once and not kept."""
    gate = Gate(down())
    primary, second = ScriptedEngine([gate, "primary"]), ScriptedEngine("spare")
    lm = over(primary, cache=True, fallbacks=[spare(second)])
    callers = crowd(lm, gate)

    gate.open()

    assert [caller.outcome() for caller in callers] == [["spare"]] * 8
    assert (primary.calls, second.calls) == (1, 1)
    assert lm("q") == ["primary"]


def test_single_flight_and_deadline_a_follower_leaves_at_its_own_time() -> None:
    """Given a slow leader, when a follower's deadline passes, then it alone gives up, on time."""
    gate = Gate()
    engine = ScriptedEngine(gate)
    lm = over(engine, cache=True)
    callers = crowd(lm, gate, 4)

    with Stopwatch() as took, call_context(deadline=0.2):
        error = caught(lambda: lm("q"))

    assert isinstance(error, DeadlineExceededError)
    assert took.wall >= 0.2
    assert took.seconds < 0.6
    gate.open()
    assert [caller.outcome() for caller in callers] == [["ok"]] * 4
    assert engine.calls == 1


def test_single_flight_and_deadline_a_leader_out_of_time_passes_the_lead() -> None:
    """Given a leader with a deadline and patient followers, when it passes, then one of them asks once more."""
    hangs = Gate("too late")
    engine = ScriptedEngine([hangs, "ok"])
    lm = over(engine, cache=True)

    def hurried() -> Any:
        with call_context(deadline=0.3):
            return lm("q")

    leader = Caller(hurried)
    assert hangs.arrived.wait(30)
    followers = [Caller(lambda: lm("q")) for _ in range(6)]
    until(lambda: following(lm) == 6)

    assert isinstance(leader.outcome(), DeadlineExceededError)
    assert [follower.outcome() for follower in followers] == [["ok"]] * 6
    assert engine.calls == 2
    hangs.open()
    until(lambda: idle(lm))


def test_single_flight_and_cache_bypass_and_refresh_ask_for_themselves() -> None:
    """Given a leader in flight, when a call bypasses or refreshes the cache, then it does not follow."""
    gate = Gate("first")
    engine = ScriptedEngine([gate, "bypassed", "refreshed"])
    lm = over(engine, cache=True)
    callers = crowd(lm, gate, 2)

    with call_context(cache="bypass"):
        assert lm("q") == ["bypassed"]
    with call_context(cache="refresh"):
        assert lm("q") == ["refreshed"]
    gate.open()

    assert [caller.outcome() for caller in callers] == [["first"]] * 2
    assert engine.calls == 3
