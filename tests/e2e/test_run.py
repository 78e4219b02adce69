"""A run caps what everything inside may use, whatever LMs and stores: the provider's bill says whether it did."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import (
    Budget,
    BudgetExceededError,
    RateLimit,
    Retry,
    Run,
    RunStoppedError,
    UnpricedModelError,
)
from dspy_prod.testing import FaultPlan, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.runs import A_CENT, crowd
from tests.e2e.support import (
    CENT,
    CHEAP,
    answers,
    ask,
    assert_equals_bill,
    assert_nothing_held,
    errors,
    fresh_memory,
    outcome,
    records,
    upstream,
)


def test_lms_with_stores_of_their_own_share_a_dollar(
    serve: MakeProvider, connect: MakeLM, run: Run, tmp_path: Path
) -> None:
    """Two LMs in two stores each spent the whole cap: the bill was twice as high as what had been allowed."""
    provider = serve(prices=A_CENT, usage=(20, 100), latency=(0.0, 0.02))
    lms = [
        connect(provider, prices=A_CENT, store=fresh_memory()),
        connect(provider, prices=A_CENT, model=CHEAP, store=f"sqlite:///{tmp_path}/other.db"),
        connect(provider, prices=A_CENT, store=fresh_memory(), budget=Budget(usd=50), limit=RateLimit(rpm=1e6)),
    ]
    run.allow(usd=1.0)
    outcomes = crowd(run, lms, 16, 10)
    assert provider.bill.nano == 100 * CENT
    assert len(answers(outcomes)) == 100
    for refusal in errors(outcomes, BudgetExceededError):
        assert refusal.spent_usd + refusal.bound_usd > refusal.limit_usd == 1.0
    assert run.used() == (1.0, 0.0, 0.0, 100, 100 * 120)
    assert sum(len(upstream(lm)) for lm in lms) == 100
    for lm in lms:
        assert_nothing_held(lm.pipeline.store)
    assert_nothing_held(run.store)


def test_attempts_are_counted_and_not_calls(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """A cap on calls let five answers of one call through as one, and stopped a run for what the cache had answered."""
    provider = serve(faults=FaultPlan.script([Status(500), None, Status(500)] * 10))
    lm = connect(provider, retry=Retry(attempts=3, backoff=0.001), cache=True, store=fresh_memory())
    run.allow(calls=9)
    with dspy_prod.call_context(run=run):
        outcomes = [outcome(lambda: lm(f"question {number}")) for number in range(9)]  # noqa: B023
        assert len(provider.calls) == 9
        assert len(answers(outcomes)) == 3
        assert isinstance(outcomes[-1], BudgetExceededError)
        assert "9 of 9 calls are used" in str(outcomes[-1])
        assert lm("question 0") == outcomes[0], "the cache goes on answering"
    used = run.used()
    assert used.calls == 9
    assert used.tokens == sum(row.input_tokens + row.output_tokens for row in provider.bill.rows if row.nano)


def test_tokens_are_held_by_their_bound_and_settled_by_what_was_used(
    serve: MakeProvider, connect: MakeLM, run: Run
) -> None:
    provider = serve(usage=(20, 30), latency=(0.0, 0.02))
    lm = connect(provider, max_tokens=100, store=fresh_memory())
    run.allow(tokens=2_000)
    outcomes = crowd(run, [lm], 16, 10)
    told = sum(row.input_tokens + row.output_tokens for row in provider.bill.rows)
    assert told <= 2_000
    assert told >= 2_000 - 400, "nobody is refused while tokens are only held"
    assert run.used().tokens == told
    assert "tokens are used" in str(errors(outcomes, BudgetExceededError)[0])


@pytest.mark.parametrize("way", ["sync", "async"])
def test_what_is_not_owed_is_given_back(serve: MakeProvider, connect: MakeLM, run: Run, way: str) -> None:
    """Refused requests cost nothing; an attempt counts as soon as it is sent."""
    provider = serve(faults=FaultPlan.script([Status(400), Status(401), Status(429), None]))
    lm = connect(provider, store=fresh_memory(), breaker=False)
    with dspy_prod.call_context(run=run):
        outcomes = [ask(lm, way) for _ in range(4)]
    assert len(answers(outcomes)) == 1
    used = run.used()
    assert used.calls == 4
    assert used.usd == pytest.approx(provider.bill.usd)
    assert used.held_usd == used.unconfirmed_usd == 0.0
    assert used.tokens == sum(row.input_tokens + row.output_tokens for row in provider.bill.rows if row.nano)


def test_what_nobody_can_price_is_refused_within_a_cap_on_dollars(
    serve: MakeProvider, connect: MakeLM, run: Run
) -> None:
    provider = serve()
    lm = connect(provider, model="openai/unknown", prices={}, store=fresh_memory())
    with dspy_prod.call_context(run=run), pytest.raises(UnpricedModelError, match="prices="):
        lm("a question")
    with dspy_prod.call_context(run=Run("calls", calls=5, store=run.store)):
        lm("a question")
    assert len(provider.calls) == 1
    assert run.used() == (0.0, 0.0, 0.0, 0, 0)


# -- what is left of it --------------------------------------------------------------------------------------------
def test_the_ledger_can_be_asked_by_run_and_tag(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    provider = serve()
    lm = connect(provider, store=store_url, cache=True)
    for name, tags in (("one", {"a": "1"}), ("two", {"a": "2", "b": 'quo"te'}), ("two", {"a": "1", 'x"a': "2"})):
        with dspy_prod.call_context(run=name, tags=tags):
            for _ in range(2):
                lm(f"{name} {tags}")
    lm("in no run")
    ledger = lm.ledger
    assert {record.run for record in ledger.records()} == {"one", "two", None}
    assert [record.cached for record in ledger.records(run="one")] == [True, False]
    assert len(ledger.records(run="two")) == 4
    assert len(ledger.records(tags={"a": "1"})) == 4
    assert len(ledger.records(run="two", tags={"a": "1"})) == 2
    assert len(ledger.records(tags={"a": "2"})) == 2
    assert len(ledger.records(tags={"a": "2", "b": 'quo"te'})) == 2
    assert ledger.records(tags={"b": "quo"}) == ledger.records(tags={"a": "3"}) == ledger.records(run="three") == []
    rows = {row.value: row for row in lm.costs(by="run")}
    assert set(rows) == {"one", "two"}
    assert rows["two"].attempts == 2
    assert rows["two"].usd == pytest.approx(sum(record.cost_usd or 0 for record in ledger.records(run="two")))
    assert_equals_bill(lm, provider)


def test_events_tell_the_run(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """Every event of a call in it: what is tried again, refused, answered by another model or from the cache."""
    faults = FaultPlan.script([Status(503), None, Status(503), Status(429), None])
    provider = serve(faults=faults)
    options: dict[str, Any] = {"retry": Retry(attempts=2, backoff=0.001), "fallbacks": [CHEAP], "cache": True}
    lm = connect(provider, store=fresh_memory(), **options)
    told: list[Any] = []
    remove = dspy_prod.add_listener(told.append, content=True)
    try:
        with dspy_prod.call_context(run=run):
            for question in ("one", "one", "two"):
                outcome(lambda: lm(question))  # noqa: B023
            run.stop()
            outcome(lambda: lm("three"))
        records(lm)
    finally:
        remove()
    assert {event.name for event in told} >= {
        *("call_finished", "call_content", "attempt_failed", "retry", "rejected", "fallback", "throttled"),
    }  # fmt: skip
    assert {event.data.get("run") for event in told if "call_id" in event.data} == {"it"}
    assert {record.run for record in records(lm)} == {"it"}


def test_a_preview_asks_the_run_too(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """It said that a call was affordable which the run refused."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    unpriced = connect(provider, model="openai/unknown", prices={}, store=fresh_memory())
    run.allow(usd=0.02)
    with dspy_prod.call_context(run=run):
        lm("a cent")
        assert (lm.preview("question").affordable, lm.preview("question").reason) == (True, None)
        many = lm.preview("question", n=2)
        assert (many.affordable, many.reason) == (False, "budget_exceeded")
        assert (unpriced.preview("question").affordable, unpriced.preview("question").reason) == (
            None, "unpriced_model",
        )  # fmt: skip
        provider.hold()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(crowd, run, [lm], 1, 1)
            provider.wait_until(lambda p: p.in_flight == 1)
            waits = lm.preview("question")
            assert (waits.affordable, waits.reason, waits.wait) == (True, None, None)
            assert "'run it: usd'" in waits.detail
            provider.release()
            future.result(10)
        run.stop()
        assert lm.preview("question").reason == "run_stopped"
    assert lm.preview("question").reason is None
    assert len(provider.calls) == 2


def test_a_refusal_is_recorded_under_its_run(serve: MakeProvider, connect: MakeLM) -> None:
    """Of two runs that were stopped, one was recorded for both."""
    lm = connect(serve(), store=fresh_memory())
    for name in ("one", "two"):
        run = Run(name, calls=1, store=fresh_memory())
        run.stop()
        with dspy_prod.call_context(run=run):
            assert isinstance(outcome(lambda: lm("question")), RunStoppedError)
    assert [(record.run, record.reason) for record in records(lm)] == [
        ("one", "run_stopped: one"),
        ("two", "run_stopped: two"),
    ]


def test_a_stopped_run_is_a_reason_of_its_own(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """A report said that the upstream had failed."""
    lm = connect(serve(), store=fresh_memory())
    program = dspy_prod.Production(dspy.Predict("question -> answer"), name="it", fallback_response="later")
    run.stop()
    with dspy.context(lm=lm), dspy_prod.call_context(run=run):
        prediction = program(question="anything")
    assert (prediction.answer, dspy_prod.call_report(prediction).reason) == ("later", "run_stopped")
