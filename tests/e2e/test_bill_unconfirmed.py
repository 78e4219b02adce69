"""Where the provider did not tell what a call cost, the ledger is never below its bill, and says that it guesses."""

from __future__ import annotations

import asyncio
import gc
from typing import Any, Literal

import dspy
import pytest
from dspy.utils.exceptions import LMError, LMTimeoutError

from dspy_prod import Budget, BudgetExceededError
from dspy_prod.testing import (
    ErrorInStream,
    Fault,
    Hang,
    MalformedJson,
    MissingUsage,
    Provider,
    Reset,
    Status,
    TruncatedStream,
    WrongUsage,
)
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import account, assert_nothing_held, charged, outcome, records, request, until, upstream

Way = Literal["sync", "async", "sync stream", "async stream"]
WAYS: list[Way] = ["sync", "async", "sync stream", "async stream"]
ENGINES = ["lm15", "litellm"]
TEXT = "one two three four five six seven eight nine ten " * 4


def run(lm: Any, way: Way) -> Any:
    """One call, to its end; what it raised, or the last that arrived."""

    async def in_task() -> Any:
        try:
            if way == "async":
                return await lm.acall("a question")
            return [event async for event in lm._async_engine_spec.stream(request())][-1]
        finally:
            await lm.pipeline.aclose()

    if way == "sync":
        return outcome(lambda: lm("a question"))
    if way == "sync stream":
        return outcome(lambda: list(lm._engine_spec.stream(request()))[-1])
    return outcome(lambda: asyncio.run(in_task()))


def assert_unconfirmed(lm: Any, provider: Provider, what: str) -> None:
    """One attempt, charged in full as an estimate, and shown apart until somebody resolves it by the bill."""
    assert_nothing_held(lm.pipeline.store)
    (record,) = upstream(lm)
    assert record.outcome == what
    assert record.estimated
    assert record.cost_nano is not None
    provider.wait_until(lambda each: each.bill.nano > 0)  # it bills when it notices that its client has left
    assert record.cost_nano >= provider.bill.nano
    assert account(lm) == (record.cost_nano, 0, record.cost_nano)
    assert [row.id for row in lm.ledger.unconfirmed()] == [record.id]
    assert lm.ledger.resolve(record.id, provider.bill.usd)
    assert account(lm) == (provider.bill.nano, 0, 0)
    assert lm.ledger.unconfirmed() == []


FAULTS: list[Fault] = [
    Reset("before", billed=True),
    Reset("after_headers"),
    Reset("during"),
    TruncatedStream(),
    MalformedJson(),
    ErrorInStream(),
    Hang(seconds=0.05, billed=True),
]


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_that_broke_is_charged_its_bound(
    serve: MakeProvider, connect: MakeLM, engine: str, way: Way, fault: Fault
) -> None:
    """Generated but not delivered is billed all the same, through whichever engine the break is seen."""
    provider = serve(faults=fault, answer=TEXT)
    lm = connect(provider, engine=engine, budget=Budget(usd=1.0))
    assert isinstance(run(lm, way), LMError)
    assert_unconfirmed(lm, provider, "error")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_without_usage_is_charged_its_bound(
    serve: MakeProvider, connect: MakeLM, engine: str, way: Way
) -> None:
    """The caller has an answer, the ledger an estimate."""
    provider = serve(faults=MissingUsage(), answer=TEXT)
    lm = connect(provider, engine=engine, budget=Budget(usd=1.0))
    assert not isinstance(run(lm, way), Exception)
    assert_unconfirmed(lm, provider, "ok")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("status", [408, 502, 504])
def test_a_status_that_does_not_say_whether_there_was_work_is_charged(
    serve: MakeProvider, connect: MakeLM, way: Way, status: int
) -> None:
    """A gateway that gave up does not know what the model behind it did."""
    provider = serve(faults=Status(status))
    lm = connect(provider, budget=Budget(usd=1.0))
    assert isinstance(run(lm, way), LMError)
    (record,) = upstream(lm)
    assert record.estimated
    assert record.cost_nano == account(lm).unconfirmed > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_charged_when_no_connection_was_made(connect: MakeLM, engine: str, way: Way) -> None:
    """A refused connection cannot have cost anything."""
    provider = Provider()
    with provider:
        lm = connect(provider, engine=engine, budget=Budget(usd=1.0))
    assert isinstance(run(lm, way), LMError)
    assert charged(lm) == 0
    assert account(lm) == (0, 0, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stream_closed_early_is_charged(serve: MakeProvider, connect: MakeLM, engine: str, store_url: str) -> None:
    """Whoever stops reading pays for what was generated meanwhile, even if its usage never came."""
    provider = serve(answer=TEXT, chunks=20, chunk_delay=0.02)
    lm = connect(provider, engine=engine, budget=Budget(usd=1.0), store=store_url)
    events = lm._engine_spec.stream(request())
    assert next(events).type == "start"
    assert next(events).type == "delta"
    events.close()
    provider.wait_until(lambda p: p.calls[0].finished_at is not None, timeout=30)
    assert_unconfirmed(lm, provider, "cancelled")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_asynchronous_stream_closed_early_is_charged(
    serve: MakeProvider, connect: MakeLM, engine: str, store_url: str
) -> None:
    """The same in a task."""
    provider = serve(answer=TEXT, chunks=20, chunk_delay=0.02)
    lm = connect(provider, engine=engine, budget=Budget(usd=1.0), store=store_url)

    async def scene() -> None:
        events = lm._async_engine_spec.stream(request())
        assert (await anext(events)).type == "start"
        await events.aclose()
        await lm.pipeline.aclose()

    asyncio.run(scene())
    provider.wait_until(lambda p: p.calls[0].finished_at is not None, timeout=30)
    assert_unconfirmed(lm, provider, "cancelled")


def test_a_stream_left_to_the_garbage_collector_is_charged(
    serve: MakeProvider, connect: MakeLM, store_url: str
) -> None:
    """A stream that nobody closes is settled when it is collected, also as part of a cycle."""
    provider = serve(answer=TEXT, chunks=20, chunk_delay=0.02)
    lm = connect(provider, budget=Budget(usd=1.0), store=store_url)
    events = lm._engine_spec.stream(request())
    next(events)
    cycle = [events]
    cycle.append(cycle)
    del events, cycle
    gc.collect()
    provider.wait_until(lambda p: p.calls[0].finished_at is not None, timeout=30)
    assert_unconfirmed(lm, provider, "cancelled")


def test_an_asynchronous_stream_left_to_the_garbage_collector_is_charged(
    serve: MakeProvider, connect: MakeLM, store_url: str
) -> None:
    """The event loop closes what its tasks forgot, and so does the end of the loop."""
    provider = serve(answer=TEXT, chunks=20, chunk_delay=0.02)
    lm = connect(provider, budget=Budget(usd=1.0), store=store_url)

    async def scene() -> None:
        events = lm._async_engine_spec.stream(request())
        await anext(events)

    asyncio.run(scene())
    gc.collect()
    provider.wait_until(lambda p: p.calls[0].finished_at is not None, timeout=30)
    until(lambda: lm.pipeline.store.holds() == 0, 5, "the settlement")
    assert_unconfirmed(lm, provider, "cancelled")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_a_cancelled_task_is_charged(
    serve: MakeProvider, connect: MakeLM, engine: str, store_url: str, streaming: bool
) -> None:
    """Cancelling a task does not cancel what the provider has begun."""
    provider = serve(latency=5.0, answer=TEXT)
    lm = connect(provider, engine=engine, budget=Budget(usd=1.0), store=store_url)

    async def call() -> None:
        if not streaming:
            await lm.acall("a question")
        async for _ in lm._async_engine_spec.stream(request()):
            pass

    async def scene() -> None:
        task = asyncio.create_task(call())
        await asyncio.to_thread(provider.wait_until, lambda p: p.in_flight == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await lm.pipeline.aclose()

    asyncio.run(scene())
    provider.wait_until(lambda p: p.calls[0].finished_at is not None, timeout=30)
    assert_unconfirmed(lm, provider, "cancelled")


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_timed_out_attempt_is_charged(serve: MakeProvider, connect: MakeLM, store_url: str, way: Way) -> None:
    """An attempt that we gave up is billed by the provider, and charged by us."""
    provider = serve(latency=5.0)
    lm = connect(provider, timeout=0.2, budget=Budget(usd=1.0), store=store_url)
    assert isinstance(run(lm, way), LMTimeoutError)
    provider.wait_until(lambda p: p.calls[0].finished_at is not None, timeout=30)
    assert_unconfirmed(lm, provider, "timeout")


@pytest.mark.parametrize("way", WAYS)
def test_every_attempt_of_a_retried_call_is_charged_apart(serve: MakeProvider, connect: MakeLM, way: Way) -> None:
    """A reset attempt keeps its estimate although the next one succeeds at a known price."""
    provider = serve(faults=[Reset("after_headers")], answer=TEXT)
    lm = connect(provider, retry={"attempts": 2, "backoff": 0.01}, budget=Budget(usd=1.0))
    assert not isinstance(run(lm, way), Exception)
    first, second = records(lm)
    assert (first.outcome, first.estimated, second.outcome, second.estimated) == ("error", True, "ok", False)
    assert first.cost_nano is not None
    assert second.cost_nano is not None
    assert first.cost_nano >= provider.bill.rows[0].nano
    assert second.cost_nano == provider.bill.rows[1].nano
    assert account(lm) == (first.cost_nano + second.cost_nano, 0, first.cost_nano)


def test_a_bill_above_the_bound_is_recorded_and_blocks(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """A provider that bills more than `max_tokens` allows is recorded exactly, and the next call is refused."""
    provider = serve(faults=WrongUsage(input_tokens=10, output_tokens=40_000))
    lm = connect(provider, budget=Budget(usd=0.02), store=store_url)
    lm("a question")
    assert provider.bill.usd > 0.02
    assert charged(lm) == provider.bill.nano == account(lm).spent
    with pytest.raises(BudgetExceededError):
        lm("another question")
    assert len(provider.calls) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stream_that_its_user_left_is_held_until_it_is_recorded(
    serve: MakeProvider, connect: MakeLM, engine: str, store_url: str
) -> None:
    """DSPy closes the stream behind `streamify` a moment after its reader has gone: until then its money is held."""
    provider = serve(answer="[[ ## answer ## ]]\n" + "word " * 40, chunks=40, chunk_delay=0.02)
    lm = connect(provider, engine=engine, store=store_url, budget=Budget(usd=1))
    program = dspy.streamify(
        dspy.Predict("question -> answer"), stream_listeners=[dspy.streaming.StreamListener("answer")]
    )

    async def read_a_word() -> None:
        stream = program(question="a question")
        async for _ in stream:
            break
        await stream.aclose()

    async def left() -> None:
        with dspy.context(lm=lm):
            await asyncio.wait([asyncio.create_task(read_a_word())])  # apart: DSPy's stream cancels whoever closes it
        while True:
            held, found = lm.costs().held_usd, lm.ledger.records()
            if found:
                break
            assert held > 0, "neither held nor recorded"
            await asyncio.sleep(0)
        await lm.pipeline.aclose()

    asyncio.run(left())
    (record,) = lm.ledger.records()
    assert (record.outcome, record.estimated) == ("cancelled", True)
    provider.wait_until(lambda each: each.in_flight == 0, timeout=30)  # it bills when it notices
    assert (record.cost_nano or 0) >= provider.bill.nano > 0
    assert lm.costs().held_usd == 0
