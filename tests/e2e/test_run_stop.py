"""A run that is stopped sends nothing more, and keeps nobody waiting: limits, budgets, pauses and hanging upstreams."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import dspy_prod
from dspy_prod import (
    Budget,
    RateLimit,
    Retry,
    Run,
    RunStoppedError,
)
from dspy_prod.testing import FaultPlan, Provider, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.runs import A_CENT
from tests.e2e.support import (
    answers,
    assert_nothing_held,
    errors,
    fresh_memory,
    outcome,
    until,
)


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
