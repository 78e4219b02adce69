"""A run caps what everything inside may use, whatever LMs and stores: the provider's bill says whether it did."""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import (
    Budget,
    BudgetExceededError,
    ConfigError,
    RateLimit,
    Retry,
    Run,
    RunStoppedError,
    UnpricedModelError,
)
from dspy_prod.testing import FaultPlan, Provider, Status
from tests.e2e.children import spend_of_run
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import (
    CENT,
    CHEAP,
    MODEL,
    answers,
    ask,
    assert_equals_bill,
    assert_nothing_held,
    errors,
    fresh_memory,
    outcome,
    records,
    until,
    upstream,
)

A_CENT = {MODEL: (0.0, 100.0), CHEAP: (0.0, 100.0)}
"""Prices at which 100 output tokens cost exactly one cent and the input nothing: bound and cost are equal."""


@pytest.fixture
def run(store_url: str) -> Run:
    """Caps that no test reaches; those that it means are set by `allow`."""
    return Run("it", usd=1e6, calls=10**9, tokens=10**9, store=store_url, namespace="e2e")


def crowd(run: Run, lms: list[Any], callers: int, calls: int) -> list[Any]:
    """What many threads are answered, who take the LMs in turn, all inside the run."""

    def caller(number: int) -> list[Any]:
        with dspy_prod.call_context(run=run):
            return [outcome(lambda: lms[(number + n) % len(lms)](f"{number}.{n}")) for n in range(calls)]  # noqa: B023

    with ThreadPoolExecutor(callers) as pool:
        return [each for made in pool.map(caller, range(callers)) for each in made]


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


# -- stopping ------------------------------------------------------------------------------------------------------
def waits_for_its_limit(serve: MakeProvider, connect: MakeLM) -> tuple[Provider, Any]:
    provider = serve()
    lm = connect(provider, limit=RateLimit(rpm=1, max_wait=600), store=fresh_memory())
    lm("the minute's only one")
    return provider, lm


def waits_for_a_retry(serve: MakeProvider, connect: MakeLM) -> tuple[Provider, Any]:
    provider = serve(faults=FaultPlan.script([None, *[Status(503, retry_after=25)] * 9]))
    lm = connect(provider, retry=Retry(attempts=5), store=fresh_memory())
    lm("answered at once")
    return provider, lm


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("waiting", [waits_for_its_limit, waits_for_a_retry])
def test_stopping_ends_every_wait_at_once(serve: MakeProvider, connect: MakeLM, waiting: Any, way: str) -> None:
    """After Ctrl-C an optimizer's threads slept on in Retry-After and in the limiter: the process lived 75 s longer."""
    provider, lm = waiting(serve, connect)
    run, before = Run("it", usd=5, store=fresh_memory()), len(provider.calls)
    found: list[Any] = []

    def caller() -> None:
        with dspy_prod.call_context(run=run):
            found.append(outcome(lambda: lm("waits") if way == "sync" else asyncio.run(lm.acall("waits"))))

    threads = [threading.Thread(target=caller, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(run._watchers) == 4, what="waiting")
    sent = len(provider.calls)
    run.stop("enough")
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert [type(each) for each in found] == [RunStoppedError] * 4
    assert "sends nothing more: enough" in str(found[0])
    assert len(provider.calls) == sent >= before
    assert run._watchers == set()
    assert run.used().held_usd == 0.0
    assert_nothing_held(lm.pipeline.store)
    with dspy_prod.call_context(run=run), pytest.raises(RunStoppedError):
        lm("another")
    assert len(provider.calls) == sent


def test_stopping_ends_a_wait_for_money(serve: MakeProvider, connect: MakeLM) -> None:
    """One call holds the only cent; who waits for it is told at once, and the one under way is answered."""
    provider = serve(prices=A_CENT, usage=(20, 100), latency=0.5)
    lm = connect(provider, prices=A_CENT, budget=Budget(usd=0.01), store=fresh_memory())
    run = Run("it", calls=100, store=fresh_memory())
    with ThreadPoolExecutor(4) as pool:

        def caller(number: int) -> Any:
            with dspy_prod.call_context(run=run):
                return outcome(lambda: lm(f"question {number}"))

        futures = [pool.submit(caller, number) for number in range(4)]
        until(lambda: len(provider.calls) == 1 and lm.pipeline.store.waiting() == 3)
        run.stop()
        outcomes = [future.result(10) for future in futures]
    assert len(answers(outcomes)) == 1
    assert len(errors(outcomes, RunStoppedError)) == 3
    assert run.used().calls == 1
    assert_nothing_held(lm.pipeline.store)


def test_attempts_under_way_end_by_themselves(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """They are paid for either way, so their answers are kept."""
    provider = serve(latency=0.3)
    lm = connect(provider, store=fresh_memory())
    with ThreadPoolExecutor(4) as pool:

        def ask(number: int) -> Any:
            with dspy_prod.call_context(run=run):
                return lm(f"question {number}")

        futures = [pool.submit(ask, number) for number in range(4)]
        until(lambda: len(provider.calls) == 4)
        run.stop()
        assert len([future.result() for future in futures]) == 4
    assert run.used().usd == pytest.approx(provider.bill.usd)


def test_a_stopped_run_is_told_once(serve: MakeProvider) -> None:
    told: list[Any] = []
    remove = dspy_prod.add_listener(told.append)
    try:
        run = Run("it", calls=1, store=fresh_memory())
        run.stop("enough")
        run.stop("again")
    finally:
        remove()
    assert [(event.name, dict(event.data)) for event in told] == [("run_stopped", {"run": "it", "reason": "enough"})]
    assert run.stopped == "enough"


# -- caps ----------------------------------------------------------------------------------------------------------
def test_a_cap_can_be_raised(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """Going on with more money was impossible: the same name with another amount was an error."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    run.allow(usd=0.05)
    assert len(answers(crowd(run, [lm], 4, 5))) == 5
    run.allow(usd=0.08)
    assert len(answers(crowd(run, [lm], 4, 5))) == 3
    again = Run("it", usd=0.10, store=run.store)
    assert len(answers(crowd(again, [lm], 4, 5))) == 2
    assert provider.bill.nano == 10 * CENT
    assert again.used().usd == run.used().usd == 0.1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"usd": 0}, "usd"),
        ({"usd": -1}, "usd"),
        ({"calls": 0}, "calls"),
        ({"tokens": 1.5}, "tokens"),
        ({"name": ""}, "name"),
    ],
)
def test_an_impossible_cap_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"Run: {said}"):
        Run(**{"store": fresh_memory(), **given})
    with pytest.raises(ConfigError, match="begin one with tokens="):
        Run("it", usd=1, store=fresh_memory()).allow(tokens=5)


def test_a_run_that_could_not_be_capped_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every policy off the cap was void, and nobody was told: the bill was fifteen times as high."""
    monkeypatch.setenv("DSPY_PROD_DISABLED", "1")
    with pytest.raises(ConfigError, match="DSPY_PROD_DISABLED"):
        Run("it", usd=1, store=fresh_memory())


def test_a_run_holds_also_where_every_policy_is_off(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LM was built with its policies off, the run before or after."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    run = Run("it", usd=0.03, store=fresh_memory())
    monkeypatch.setenv("DSPY_PROD_DISABLED", "1")
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    assert len(answers(crowd(run, [lm], 4, 5))) == 3
    assert provider.bill.nano == 3 * CENT


def test_nested_contexts_keep_the_caps(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """A name within a run is what the ledger says; the money is the run's."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    run.allow(usd=0.01)
    with dspy_prod.call_context(run=run), dspy_prod.call_context(run="inner", user="u1"):
        lm("a cent")
        with pytest.raises(BudgetExceededError):
            lm("another")
    assert [record.run for record in upstream(lm)] == ["inner"]


def test_a_run_follows_dspy_into_its_threads(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    provider = serve(prices=A_CENT, usage=(20, 100), answer="[[ ## answer ## ]]\nfine\n\n[[ ## completed ## ]]")
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    run.allow(usd=0.05)
    devset = [dspy.Example(question=str(number), answer="fine").with_inputs("question") for number in range(20)]
    evaluate = dspy.Evaluate(devset=devset, metric=lambda example, pred, trace=None: 1.0, num_threads=8)
    with dspy.context(lm=lm), dspy_prod.call_context(run=run), pytest.raises(BudgetExceededError):
        evaluate(dspy.Predict("question -> answer"))
    assert provider.bill.nano == 5 * CENT


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
    told: list[Any] = []
    remove = dspy_prod.add_listener(told.append)
    try:
        with dspy_prod.call_context(run=run):
            connect(serve(), store=fresh_memory())("a question")
    finally:
        remove()
    assert [event.data["run"] for event in told if event.name == "call_finished"] == ["it"]


SPAWN = mp.get_context("spawn")


def test_a_killed_run_goes_on_within_its_cap(serve: MakeProvider, connect: MakeLM, sqlite_url: str) -> None:
    """What a killed process had in flight counts in full; what was settled counts once."""
    provider = serve(prices=A_CENT, usage=(20, 100), latency=0.02)
    url = f"{sqlite_url}?lease=1"
    child = SPAWN.Process(target=spend_of_run, args=(provider.url, url, A_CENT, 1.0, 8), daemon=True)
    child.start()
    until(lambda: provider.bill.nano >= 30 * CENT)
    child.kill()
    child.join(10)
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    run = Run("it", usd=1.0, store=url, namespace="e2e")
    outcomes = crowd(run, [lm], 8, 20)
    assert provider.bill.nano <= 100 * CENT
    assert provider.bill.nano >= 85 * CENT, "only what was in flight or drawn ahead is lost"
    assert len(errors(outcomes, BudgetExceededError)) > 0
    assert len(records(lm)) > 0
