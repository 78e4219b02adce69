"""Calls of every kind: what MLflow shows is what the ledger says, which is what the provider bills."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import dspy
import pytest
from dspy.streaming import StreamListener

import dspy_prod
from dspy_prod import Production, tracking
from dspy_prod.testing import FaultPlan, Hang, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CHEAP, outcome, request, until
from tests.tracking.conftest import assert_same_costs, traces_in

ANSWER = "[[ ## answer ## ]]\n{}\n\n[[ ## completed ## ]]"


def program() -> Production:
    """A program whose calls are grouped into one trace each."""
    return Production(dspy.Predict("question -> answer"), name="asked")


def calls(lm: Any, prod: Production, share: int) -> None:
    """256 calls, or one in `share` of them: sync, repeated, plain, in Parallel, async, streamed."""
    with dspy.context(lm=lm), dspy_prod.call_context(user="u1", session="s1", tags={"feature": "triage"}):
        for number in range(60 // share):
            outcome(lambda: prod(question=f"sync {number}"))  # noqa: B023  (called at once)
        for number in range(20 // share):
            outcome(lambda: prod(question=f"sync {number}"))  # noqa: B023  (from the cache)
        for number in range(26 // share):
            outcome(lambda: lm(f"plain {number}"))  # noqa: B023
        pairs = [(prod, {"question": f"parallel {number}"}) for number in range(50 // share)]
        dspy.Parallel(num_threads=4, disable_progress_bar=True, max_errors=100)(pairs)
        asyncio.run(tasks(lm, prod, share))


async def tasks(lm: Any, prod: Production, share: int) -> None:
    async def one(number: int) -> None:
        try:
            await prod.acall(question=f"task {number}")
        except Exception:
            pass  # what failed is in the ledger, too

    for batch in range(10 // share):
        await asyncio.gather(*[one(batch * 6 + number) for number in range(6)])
    streaming = dspy.streamify(
        dspy.Predict("question -> answer"), stream_listeners=[StreamListener(signature_field_name="answer")]
    )
    for number in range(40 // share):
        try:
            async for _ in streaming(question=f"stream {number}"):
                pass
        except Exception:
            pass
    await lm.aclose()


def aborted(lm: Any, share: int) -> None:
    """44 calls that nobody waits for, or one in `share` of them: past a deadline, and streams closed early."""
    with dspy.context(lm=lm):
        for number in range(22 // share):
            with dspy_prod.call_context(deadline=0.05):
                outcome(lambda: lm(f"late {number}"))  # noqa: B023
        asyncio.run(abandoned(lm, share))


async def abandoned(lm: Any, share: int) -> None:
    async def one(number: int) -> None:
        await lm.acall(f"cancelled {number}")

    for number in range(22 // share):
        task = asyncio.create_task(one(number))
        await asyncio.sleep(0.03)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await lm.aclose()


@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("autolog", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lean", "autolog"])
def test_every_trace_costs_what_the_ledger_and_the_bill_say(
    serve: MakeProvider, connect: MakeLM, track: Callable[..., None], uri: str, autolog: bool, share: int
) -> None:
    """Retried, fallen back, cached, parallel, async, streamed or given up: no trace is missing or costs another sum."""

    def answer(call: Any) -> str:
        return ANSWER.format(len(call.last_message))

    track(autolog=autolog)
    provider = serve(answer=answer, faults=FaultPlan.mix({Status(500): 0.2}, seed=5))
    spare = serve(answer=answer)
    fallback = dspy.LM(CHEAP, api_base=spare.url, api_key="test", max_tokens=100)
    lm = connect(provider, cache=True, retry={"attempts": 2, "backoff": 0.001}, breaker=False, fallbacks=[fallback])
    calls(lm, program(), share)
    slow = serve(answer=answer, latency=0.4)
    impatient = connect(slow, retry=False, breaker=False)
    aborted(impatient, share)
    slow.wait_until(lambda each: each.in_flight == 0, timeout=30)
    assert tracking.flush(90)
    records = lm.ledger.records(), impatient.ledger.records()
    made = sum(number // share for number in (60, 20, 26, 50, 40)) + 6 * (10 // share)
    assert len({record.call_id for rows in records for record in rows}) >= made
    health = dspy_prod.health().tracking
    assert health is not None
    assert (health.lost, health.waiting, health.failing) == (0, 0, None)
    assert_same_costs(uri, [*records[0], *records[1]])
    confirmed = sum(record.cost_nano or 0 for record in records[0])
    assert confirmed == provider.bill.nano + spare.bill.nano
    assert sum(record.cost_nano or 0 for record in records[1]) >= slow.bill.nano
    shown = sum((trace.info.cost or {}).get("total_cost", 0.0) for trace in traces_in(uri))
    assert shown == pytest.approx(sum(record.cost_nano or 0 for rows in records for record in rows) / 1e9, abs=1e-9)
    assert_attempts_are_told(uri, [*records[0], *records[1]])


def assert_attempts_are_told(uri: str, records: list[Any]) -> None:
    """Each record has one span, with what one wants to know about it; only attempts carry costs."""
    by_id = {record.id: record for record in records if record.outcome != "refused"}  # of that there is no attempt
    seen: set[str] = set()
    for trace in traces_in(uri):
        for span in trace.data.spans:
            record_id = span.attributes.get("dspy_prod.record_id")
            if record_id is None:
                assert span.attributes.get("mlflow.llm.cost") is None
                continue
            assert record_id not in seen
            seen.add(record_id)
            record = by_id[record_id]
            assert trace.info.trace_id == record.trace_id
            told = span.attributes
            assert told["mlflow.llm.model"] == record.model
            assert told["dspy_prod.route"] == record.route
            assert told["dspy_prod.attempt"] == record.attempt
            assert told["dspy_prod.cache_hit"] is record.cached
            assert told["dspy_prod.outcome"] == record.outcome
            assert told.get("dspy_prod.user") == record.user
            assert told["mlflow.llm.cost"]["total_cost"] == pytest.approx((record.cost_nano or 0) / 1e9, abs=1e-12)
            if record.outcome == "ok" and not record.estimated:
                assert told["mlflow.chat.tokenUsage"]["input_tokens"] == record.input_tokens
    assert seen == set(by_id)


def test_a_trace_tells_who_asked_and_a_record_finds_its_trace(
    serve: MakeProvider, connect: MakeLM, track: Callable[..., None], uri: str
) -> None:
    """User, session, tenant, variant, prompt version and tags are where MLflow looks for them, in workers too."""
    track()
    lm = connect(serve(answer=ANSWER.format("yes")))
    context = dspy_prod.call_context(
        user="u1", session="s1", tenant="acme", experiment="cot", variant="b", prompt_version="asked/3", tags={"k": "v"}
    )
    with dspy.context(lm=lm), context:
        dspy.Parallel(num_threads=2, disable_progress_bar=True)([(program(), {"question": f"q{n}"}) for n in range(2)])
    assert tracking.flush(60)
    traces = {trace.info.trace_id: trace for trace in traces_in(uri)}
    assert len(traces) == 2
    for record in lm.ledger.records():
        trace = traces[record.trace_id]
        assert lm.ledger.records(trace_id=trace.info.trace_id) == [record]
        assert trace.info.trace_metadata["mlflow.trace.user"] == "u1"
        assert trace.info.trace_metadata["mlflow.trace.session"] == "s1"
        tags = trace.info.tags
        assert {name: tags[f"dspy_prod.{name}"] for name in ("tenant", "experiment", "variant", "prompt_version")} == {
            "tenant": "acme", "experiment": "cot", "variant": "b", "prompt_version": "asked/3",
        }  # fmt: skip
        assert tags["dspy_prod.tag.k"] == "v"
        assert json.loads(tags["mlflow.linkedPrompts"]) == [{"name": "asked", "version": "3"}]
        assert tags["mlflow.traceName"] == "asked"
        assert "q" in trace.info.request_preview
        assert "yes" in trace.info.response_preview


def test_a_price_that_is_not_known_is_not_zero(
    serve: MakeProvider, connect: MakeLM, track: Callable[..., None], uri: str
) -> None:
    """Neither we nor MLflow put a price to a model that the ledger has none for."""
    track()
    lm = connect(serve(), model="openai/nobody-knows", prices={})
    lm("q")
    assert [record.cost_usd for record in lm.ledger.records()] == [None]
    assert tracking.flush(60)
    (trace,) = traces_in(uri)
    assert trace.info.cost is None


def test_a_late_answer_is_added_to_its_trace(
    serve: MakeProvider, connect: MakeLM, track: Callable[..., None], uri: str
) -> None:
    """An attempt that outlives its call is paid later; the trace, shipped long before, shows its cost in the end."""
    track()
    provider = serve(faults=[Hang(billed=True)])
    lm = connect(provider, engine="litellm", retry=False)
    lm.pipeline.primary.upstream.warm(request(), None)  # importing LiteLLM takes longer than the call has
    with dspy_prod.call_context(deadline=0.1):
        assert isinstance(outcome(lambda: lm("q")), dspy_prod.DeadlineExceededError)
    assert tracking.flush(60)
    (early,) = traces_in(uri)
    until(lambda: lm.ledger.records(), 20, "the end of the attempt")
    assert tracking.flush(60)
    (trace,) = traces_in(uri)
    assert trace.info.trace_id == early.info.trace_id
    (record,) = lm.ledger.records()
    assert record.trace_id == trace.info.trace_id
    assert record.cost_nano
    assert trace.info.cost["total_cost"] == pytest.approx(record.cost_nano / 1e9)
