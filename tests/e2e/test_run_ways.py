"""Whichever way a call is made, the run it belongs to counts what the provider bills, neither less nor twice."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import BudgetExceededError, Run
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.testing import FaultPlan, Hang, MissingUsage, Provider, Reset, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.runs import A_CENT
from tests.e2e.support import CENT, CHEAP, answers, errors, fresh_memory, outcome, request, until, upstream
from tests.e2e.test_bill import ENGINES, WAYS, Way, each_different
from tests.e2e.test_bill import run as asked

ANSWER = "[[ ## answer ## ]]\nfine\n\n[[ ## completed ## ]]"


def assert_counted(run: Run, provider: Provider, unconfirmed: int = 0) -> None:
    """The run has used what was billed, and holds nothing."""
    assert REAPER.flush()
    used = run.used()
    assert used.held_usd == 0.0
    assert used.usd == pytest.approx(provider.bill.usd + unconfirmed / 1e9)
    assert used.calls == len(provider.calls)
    assert run.store.holds() == run.store.waiting() == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_way_to_call_counts_what_it_costs(
    serve: MakeProvider, connect: MakeLM, run: Run, engine: str, way: Way
) -> None:
    """Retries, a fallback, and answers without a fault."""
    faults = FaultPlan.script([None, Status(500), None, Status(503), Status(503), Status(503), None])
    provider = serve(usage=each_different, faults=faults)
    retry = {"attempts": 3, "backoff": 0.001}
    lm = connect(provider, engine=engine, retry=retry, fallbacks=[CHEAP], store=fresh_memory(), max_tokens=500)
    with dspy_prod.call_context(run=run):
        for number in range(3):
            asked(lm, way, f"question {number}")
    assert [record.model for record in upstream(lm)][-1] == CHEAP
    assert len(provider.calls) == 7
    assert_counted(run, provider)
    assert run.used().tokens == sum(row.input_tokens + row.output_tokens for row in provider.bill.rows if row.nano)
    assert {record.run for record in upstream(lm)} == {"it"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", [MissingUsage(), Reset("during")], ids=repr)
def test_what_the_provider_did_not_tell_counts_in_full(
    serve: MakeProvider, connect: MakeLM, run: Run, engine: str, way: Way, fault: Any
) -> None:
    provider = serve(prices=A_CENT, usage=(20, 60), faults=fault)
    lm = connect(provider, prices=A_CENT, engine=engine, store=fresh_memory())
    with dspy_prod.call_context(run=run):
        outcome(lambda: asked(lm, way))
    REAPER.flush()
    used = run.used()
    assert (used.usd, used.unconfirmed_usd, used.held_usd, used.calls) == (0.01, 0.01, 0.0, 1)
    assert used.tokens is not None
    assert used.tokens >= 120


@pytest.mark.parametrize("way", ["close", "collect", "aclose"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_stream_that_is_left_counts_in_full(
    serve: MakeProvider, connect: MakeLM, run: Run, engine: str, way: str
) -> None:
    """Whoever stops reading pays for what was generated meanwhile."""
    provider = serve(prices=A_CENT, usage=(20, 60), answer="word " * 40, chunks=20, chunk_delay=0.02)
    lm = connect(provider, prices=A_CENT, engine=engine, store=fresh_memory())

    async def in_task() -> None:
        events = lm._async_engine_spec.stream(request())
        await anext(events)
        await events.aclose()
        await lm.pipeline.aclose()

    with dspy_prod.call_context(run=run):
        if way == "aclose":
            asyncio.run(in_task())
        else:
            events = lm._engine_spec.stream(request())
            next(events)
            if way == "close":
                events.close()
            del events
            gc.collect()
    provider.wait_until(lambda p: p.calls[0].finished_at is not None, timeout=30)
    until(lambda: run.store.holds() == 0)
    used = run.used()
    assert (used.usd, used.unconfirmed_usd, used.held_usd, used.calls) == (0.01, 0.01, 0.0, 1)


def test_a_stream_that_nobody_began_counts_nothing(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    lm = connect(serve(), store=fresh_memory())
    with dspy_prod.call_context(run=run):
        lm._engine_spec.stream(request()).close()
    assert run.used() == (0.0, 0.0, 0.0, 0, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_of_several_answers_counts(serve: MakeProvider, connect: MakeLM, run: Run, engine: str) -> None:
    """`n=5` is as many requests as the provider sees."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, engine=engine, store=fresh_memory(), temperature=1.0)
    with dspy_prod.call_context(run=run):
        assert len(lm("question", n=5)) == 5
        assert_counted(run, provider)
        run.allow(usd=provider.bill.usd + 0.03)
        assert isinstance(outcome(lambda: lm("question", n=5)), BudgetExceededError)
    assert_counted(run, provider)
    assert provider.bill.usd <= run.caps.usd


def test_who_waits_for_an_identical_call_counts_nothing(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """One of them is sent; the others have its answer, also where nothing is left for them."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    provider.hold()
    lm = connect(provider, prices=A_CENT, cache=True, store=fresh_memory())
    run.allow(usd=0.01, calls=1)

    def same(_: int) -> Any:
        with dspy_prod.call_context(run=run):
            return outcome(lambda: lm("the same"))

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(same, number) for number in range(8)]
        until(lambda: provider.in_flight == 1 and len(run._watchers) == 7)
        provider.release()
        assert [future.result(10) for future in futures] == [["ok"]] * 8
    assert same(0) == ["ok"]
    assert_counted(run, provider)
    assert len(provider.calls) == 1


def test_a_run_follows_dspy_wherever_it_goes(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """Threads of `Parallel` and `asyncify`, tasks, and streams."""
    provider = serve(prices=A_CENT, usage=(20, 100), answer=ANSWER)
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    program = dspy.Predict("question -> answer")

    async def in_tasks() -> list[Any]:
        made = [program.acall(question=f"task {number}") for number in range(4)]
        made += [dspy.asyncify(program)(question=f"asyncified {number}") for number in range(4)]
        made += [asyncio.to_thread(program, question=f"thread {number}") for number in range(4)]
        found = await asyncio.gather(*made, return_exceptions=True)
        async for each in dspy.streamify(program)(question="streamed"):
            found.append(each)
        await lm.pipeline.aclose()
        return found

    with dspy.context(lm=lm), dspy_prod.call_context(run=run):
        examples = [(program, {"question": f"parallel {number}"}) for number in range(4)]
        assert len(answers(dspy.Parallel(num_threads=4)(examples))) == 4
        assert errors(asyncio.run(in_tasks()), BaseException) == []
        assert_counted(run, provider)
        assert len(provider.calls) == 17
        run.allow(usd=0.19)
        more = [(program, {"question": f"more {number}"}) for number in range(9)]
        dspy.Parallel(num_threads=4, max_errors=99)(more)
    assert provider.bill.nano == 19 * CENT
    assert_counted(run, provider)


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_hanging_upstream_ends_at_the_deadline_and_counts_in_full(
    serve: MakeProvider, connect: MakeLM, run: Run, engine: str, way: Way
) -> None:
    """What was sent may be billed; its hold stays until its end is known."""
    provider = serve(prices=A_CENT, usage=(20, 100), faults=FaultPlan.script([None, Hang()]))
    lm = connect(provider, prices=A_CENT, engine=engine, store=fresh_memory(), retry=True)
    with dspy_prod.call_context(run=run):
        asked(lm, way, "warm")
        with dspy_prod.call_context(deadline=0.5):
            assert isinstance(outcome(lambda: asked(lm, way)), dspy_prod.DeadlineExceededError)
    until(lambda: run.store.holds() == 0)
    used = run.used()
    assert (used.usd, used.unconfirmed_usd, used.held_usd, used.calls) == (0.02, 0.01, 0.0, 2)
