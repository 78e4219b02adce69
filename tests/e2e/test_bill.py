"""The ledger against the provider's bill, attempt by attempt and to the nano-USD, where the provider told."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import dspy
import pytest
from dspy.streaming import StreamListener

from dspy_prod import Budget
from dspy_prod.testing import CallView, Provider, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import (
    CHEAP,
    MODEL,
    account,
    assert_equals_bill,
    assert_nothing_held,
    charged,
    make_lm,
    records,
    request,
    together,
    upstream,
)

Engine = Literal["lm15", "litellm"]
ENGINES: list[Engine] = ["lm15", "litellm"]
Way = Literal["sync", "async", "sync stream", "async stream"]
WAYS: list[Way] = ["sync", "async", "sync stream", "async stream"]


def each_different(call: CallView) -> tuple[int, int, int, int]:
    """Usage (input, output, cached, reasoning) that tells every call's cost apart."""
    return 1000 + 7 * call.index, 50 + call.index, 100 + call.index, 10 + call.index % 3


def run(lm: Any, way: Way, prompt: str = "a question") -> None:
    """One call, to its end."""

    async def in_task() -> None:
        try:
            if way == "async":
                await lm.acall(prompt)
            else:
                async for _ in lm._async_engine_spec.stream(request(prompt)):
                    pass
        finally:
            await lm.pipeline.aclose()

    if way == "sync":
        lm(prompt)
    elif way == "sync stream":
        for _ in lm._engine_spec.stream(request(prompt)):
            pass
    else:
        asyncio.run(in_task())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_way_to_call_is_charged_what_it_costs(
    serve: MakeProvider, connect: MakeLM, engine: Engine, way: Way
) -> None:
    """Whole or streamed, in a thread or a task, cached and reasoning tokens included: the ledger has the bill."""
    provider = serve(usage=each_different)
    lm = connect(provider, engine=engine)
    for number in range(3):
        run(lm, way, f"question {number}")
    assert [record.cost_nano for record in records(lm)] == [row.nano for row in provider.bill.rows]
    assert [record.cost_usd for record in records(lm)] == [row.usd for row in provider.bill.rows]
    assert_equals_bill(lm, provider)
    tokens = [(record.input_tokens, record.output_tokens) for record in records(lm)]
    assert tokens == [(row.input_tokens, row.output_tokens) for row in provider.bill.rows]


@pytest.mark.parametrize(
    ("engine", "way", "status"),
    [
        *[(engine, way, 500) for engine in ENGINES for way in WAYS],
        *[("lm15", way, 429) for way in WAYS],
        ("litellm", "sync", 429),
    ],
)
def test_a_retried_call_has_a_record_for_each_attempt(
    serve: MakeProvider, connect: MakeLM, engine: Engine, way: Way, status: int
) -> None:
    """A refusal costs nothing and is written down; the answer that followed costs what it costs."""
    provider = serve(usage=each_different, faults=[Status(status, retry_after=0)])
    lm = connect(provider, engine=engine, retry={"attempts": 2, "backoff": 0.01}, budget=Budget(usd=1.0))
    run(lm, way)
    first, second = records(lm)
    assert (first.outcome, first.cost_nano, first.estimated, first.status) == ("error", 0, False, status)
    assert (second.outcome, second.cost_nano, second.attempt) == ("ok", provider.bill.nano, 2)
    assert first.call_id == second.call_id
    assert account(lm) == (provider.bill.nano, 0, 0)
    assert_equals_bill(lm, provider)


@pytest.mark.parametrize("way", WAYS)
def test_a_fallback_is_charged_at_its_own_price(serve: MakeProvider, connect: MakeLM, way: Way) -> None:
    """The route that answered is in the record, with its model's price."""
    provider = serve(usage=each_different, faults=lambda call: Status(503) if call.model == "e2e" else None)
    lm = connect(provider, fallbacks=[CHEAP], retry={"attempts": 2, "backoff": 0.01})
    run(lm, way)
    assert [(record.model, record.route, record.attempt, record.outcome) for record in records(lm)] == [
        (MODEL, "primary", 1, "error"),
        (MODEL, "primary", 2, "error"),
        (CHEAP, CHEAP, 1, "ok"),
    ]
    assert {row.model for row in provider.bill.rows} == {"e2e-cheap"}
    assert_equals_bill(lm, provider)


def test_an_answer_from_the_cache_costs_nothing(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """The second identical call is free, marked as cached in ledger and history, and takes nothing from the budget."""
    provider = serve(usage=each_different)
    lm = connect(provider, cache=True, budget=Budget(usd=1.0), store=store_url)
    answers = [lm("a question"), lm("a question"), asyncio.run(lm.acall("a question"))]
    assert answers[0] == answers[1] == answers[2]
    assert len(provider.calls) == 1
    assert [(record.cached, record.outcome) for record in records(lm)] == [
        (False, "ok"),
        (True, "cached"),
        (True, "cached"),
    ]
    assert [record.cost_nano for record in records(lm)] == [provider.bill.nano, 0, 0]
    assert [entry["cost"] for entry in lm.history] == [provider.bill.usd, 0.0, 0.0]
    assert account(lm) == (provider.bill.nano, 0, 0)


@pytest.mark.parametrize("crowd", ["threads", "tasks"])
def test_a_crowd_with_failures_is_charged_to_the_nano(
    serve: MakeProvider, connect: MakeLM, store_url: str, crowd: Any
) -> None:
    """Sixty calls at once, a third of the attempts refused: the ledger has every billed attempt exactly once."""
    provider = serve(usage=each_different, faults=lambda call: Status(500) if call.index % 3 == 0 else None)
    lm = connect(
        provider, store=store_url, budget=Budget(usd=5.0), breaker=False,
        retry={"attempts": 20, "backoff": 0.01, "budget": None},
    )  # fmt: skip
    together(crowd, lm, 20, calls=3)
    assert len(records(lm)) == len(provider.calls) > 80
    assert len(provider.bill.rows) == 60
    assert_equals_bill(lm, provider)
    assert account(lm) == (provider.bill.nano, 0, 0)
    assert_nothing_held(lm.pipeline.store)


def test_dspy_parallel_is_charged_in_full(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """Forty examples through `dspy.Parallel` in eight threads, and all of them are in the ledger."""
    provider = serve(usage=each_different)
    lm = connect(provider, store=store_url)
    program = dspy.Predict("question -> answer")
    with dspy.context(lm=lm):
        pairs = [(program, dspy.Example(question=f"question {n}").with_inputs("question")) for n in range(40)]
        results = dspy.Parallel(num_threads=8, disable_progress_bar=True)(pairs)
    assert len([result for result in results if result is not None]) == 40
    assert len(records(lm)) == len(provider.calls) == 40
    assert_equals_bill(lm, provider)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_of_n_candidates_is_charged(serve: MakeProvider, connect: MakeLM, engine: Engine) -> None:
    """`n=3` makes three attempts of one call, and the history shows their sum."""
    provider = serve(usage=each_different)
    lm = connect(provider, engine=engine)
    assert len(lm("a question", n=3)) == 3
    assert len(upstream(lm)) == len(provider.calls)
    assert_equals_bill(lm, provider)
    assert lm.history[-1]["cost"] == pytest.approx(provider.bill.usd, abs=1e-9)


def test_streamify_is_charged_what_it_costs(serve: MakeProvider, connect: MakeLM) -> None:
    """A program streamed the DSPy way is charged like any other, with its chunks seen by the listener."""
    provider = serve(usage=each_different, chunks=8)
    lm = connect(provider)
    program = dspy.streamify(
        dspy.Predict("question -> answer"), stream_listeners=[StreamListener(signature_field_name="answer")]
    )

    async def consume() -> list[Any]:
        with dspy.context(lm=lm):
            chunks = [chunk async for chunk in program(question="a question")]
        await lm.pipeline.aclose()
        return chunks

    chunks = asyncio.run(consume())
    assert isinstance(chunks[-1], dspy.Prediction)
    assert provider.calls[0].stream
    assert_equals_bill(lm, provider)


def test_two_engines_and_two_stores_agree(serve: MakeProvider, sqlite_url: str) -> None:
    """The same calls cost the same whichever engine sends them and wherever they are written down."""
    sums = set()
    for engine in ENGINES:
        for store in (sqlite_url, "memory://two-engines"):
            provider: Provider = serve(usage=(1234, 77, 200, 11))
            lm = make_lm(provider.url, engine=engine, store=store, namespace=f"{engine} apart")
            run(lm, "sync")
            run(lm, "sync stream")
            sums.add((charged(lm), provider.bill.nano))
            lm.close()
    assert len(sums) == 1
    assert len(set(sums.pop())) == 1
