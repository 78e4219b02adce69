"""Identical concurrent calls share one upstream call, over threads and tasks of any loop."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMServerError

from dspy_prod import DeadlineExceededError, Retry, call_context
from dspy_prod.testing import Provider, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import until, upstream
from tests.integration.support import Caller, Loop, Task, following, quiet
from tests.stopwatch import Stopwatch

CROWD = 64


def ask(lm: Any, *, deadline: float | None = None) -> Any:
    """The question everybody asks."""
    with call_context(deadline=deadline):
        return lm("the same question")


async def aask(lm: Any, *, deadline: float | None = None) -> Any:
    """The question everybody asks, in a task."""
    with call_context(deadline=deadline):
        return await lm.acall("the same question")


def assemble(stack: ExitStack, kind: str, lm: Any) -> list[Caller | Task]:
    """The crowd: threads, tasks of one loop, or both with a second loop."""
    if kind == "threads":
        return [Caller(lambda: ask(lm)) for _ in range(CROWD)]
    if kind == "tasks":
        loop = stack.enter_context(Loop())
        return [loop.start(aask(lm)) for _ in range(CROWD)]
    first, second = stack.enter_context(Loop()), stack.enter_context(Loop())
    threads = [Caller(lambda: ask(lm)) for _ in range(CROWD // 2)]
    tasks = [loop.start(aask(lm)) for _ in range(CROWD // 4) for loop in (first, second)]
    return [*threads, *tasks]


@pytest.mark.parametrize("kind", ["threads", "tasks", "mixed"])
def test_a_crowd_makes_one_upstream_call(serve: MakeProvider, connect: MakeLM, kind: str) -> None:
    """64 identical concurrent calls are one call at the provider, and everybody gets its answer."""
    provider = serve(answer="the answer")
    lm = connect(provider, cache=True)
    provider.hold()
    with ExitStack() as stack:
        crowd = assemble(stack, kind, lm)
        until(lambda: following(lm) == CROWD - 1 and len(provider.calls) == 1, timeout=30)
        provider.release()
        assert [caller.outcome() for caller in crowd] == [["the answer"]] * CROWD
    assert len(provider.calls) == 1
    records = lm.ledger.records()
    assert sorted(record.outcome for record in records) == ["cached"] * (CROWD - 1) + ["ok"]
    assert sum(record.cost_nano for record in records) == provider.bill.nano
    assert quiet(lm)


def test_a_cancelled_leader_passes_the_lead(serve: MakeProvider, connect: MakeLM) -> None:
    """When the leading task is cancelled, one follower asks once more, and nobody else is cancelled."""
    provider = serve(answer="the answer")
    lm = connect(provider, cache=True)
    provider.hold()
    with Loop() as loop:
        leader = loop.start(aask(lm))
        until(lambda: len(provider.calls) == 1)
        tasks = [loop.start(aask(lm)) for _ in range(16)]
        threads = [Caller(lambda: ask(lm)) for _ in range(16)]
        until(lambda: following(lm) == 32)
        leader.cancel()
        assert isinstance(leader.outcome(), asyncio.CancelledError)
        until(lambda: len(provider.calls) == 2)
        provider.release()
        assert [caller.outcome() for caller in (*tasks, *threads)] == [["the answer"]] * 32
    assert len(provider.calls) == 2
    assert quiet(lm)


def test_a_cancelled_follower_disturbs_nobody(serve: MakeProvider, connect: MakeLM) -> None:
    """When followers are cancelled, the leader and the other followers are answered by the one call."""
    provider = serve(answer="the answer")
    lm = connect(provider, cache=True)
    provider.hold()
    with Loop() as loop:
        crowd = [loop.start(aask(lm)) for _ in range(8)]
        until(lambda: following(lm) == 7 and len(provider.calls) == 1)
        leavers = [loop.start(aask(lm)) for _ in range(8)]
        until(lambda: following(lm) == 15)
        for leaver in leavers:
            leaver.cancel()
        assert all(isinstance(leaver.outcome(), asyncio.CancelledError) for leaver in leavers)
        assert following(lm) == 7
        provider.release()
        assert [caller.outcome() for caller in crowd] == [["the answer"]] * 8
    assert len(provider.calls) == 1


@pytest.mark.parametrize("kind", ["thread", "task"])
def test_a_leader_out_of_time_passes_the_lead(serve: MakeProvider, connect: MakeLM, kind: str) -> None:
    """When the leader's deadline passes, the next follower asks once more; the others wait for that one."""
    provider = serve(answer="the answer")
    lm = connect(provider, cache=True)
    provider.hold()
    with Loop() as loop:
        leader = Caller(lambda: ask(lm, deadline=0.5)) if kind == "thread" else loop.start(aask(lm, deadline=0.5))
        until(lambda: len(provider.calls) == 1)
        crowd = [*[Caller(lambda: ask(lm)) for _ in range(8)], *[loop.start(aask(lm)) for _ in range(8)]]
        assert isinstance(leader.outcome(), DeadlineExceededError)
        until(lambda: len(provider.calls) == 2 and following(lm) == 15)
        provider.release()
        assert [caller.outcome() for caller in crowd] == [["the answer"]] * 16
    assert len(provider.calls) == 2
    assert quiet(lm)


@pytest.mark.parametrize("kind", ["thread", "task"])
def test_a_follower_keeps_its_own_deadline(serve: MakeProvider, connect: MakeLM, kind: str) -> None:
    """A follower gives up within 0.1 s of its own deadline, however long the leader may take."""
    provider = serve(answer="the answer")
    lm = connect(provider, cache=True)
    provider.hold()
    with Loop() as loop:
        leader = Caller(lambda: ask(lm))
        until(lambda: len(provider.calls) == 1)
        with Stopwatch() as took:
            hurried = Caller(lambda: ask(lm, deadline=0.3)) if kind == "thread" else loop.start(aask(lm, deadline=0.3))
            error = hurried.outcome()
        assert isinstance(error, DeadlineExceededError)
        assert "identical call" in str(error)
        assert took.wall >= 0.3
        assert took.seconds < 0.6  # 0.1 s and what two noisy cores take to start a thread
        provider.release()
        assert leader.outcome() == ["the answer"]
    assert len(provider.calls) == 1


def test_a_crowd_before_a_failing_upstream_ends_within_one_leader_s_time(serve: MakeProvider, connect: MakeLM) -> None:
    """Of 64 identical calls only the leader retries; all hear its last error when it does, each as its own object."""
    provider = serve(faults=Status(500, delay=0.5))
    lm = connect(provider, cache=True, retry=Retry(attempts=3, backoff=0.001))
    with Stopwatch() as took, ExitStack() as stack:
        crowd = assemble(stack, "mixed", lm)
        until(lambda: following(lm) == CROWD - 1)
        assert len(provider.calls) <= 2, "the crowd was to follow from the start"
        errors = [caller.outcome() for caller in crowd]
    assert [(type(error), error.status) for error in errors] == [(LMServerError, 500)] * CROWD
    assert len({id(error) for error in errors}) == CROWD
    assert len(provider.calls) == 3
    leader = sum(record.latency for record in upstream(lm))
    assert leader <= took.wall
    assert took.seconds < leader + 1.0
    assert quiet(lm)


# -- candidates ------------------------------------------------------------------------------------------------------
def counting() -> Any:
    """An answer that tells one upstream call from the next."""
    return lambda call: f"[[ ## answer ## ]]\nanswer {call.index}\n\n[[ ## completed ## ]]"


def worst(args: Any, prediction: Any) -> float:
    """A reward that is never enough, so that every rollout is made."""
    return 0.0


@pytest.mark.parametrize("kind", ["BestOfN", "Refine"])
def test_rollouts_are_different_calls_and_repeating_them_is_not(
    serve: MakeProvider, connect: MakeLM, kind: str
) -> None:
    """BestOfN and Refine with N=5 ask the provider for 5 different answers; a second run is answered by the cache."""
    provider = serve(answer=counting() if kind == "BestOfN" else None)
    lm = connect(provider, cache=True, max_tokens=1000)
    module = getattr(dspy, kind)(dspy.Predict("question -> answer"), N=5, reward_fn=worst, threshold=1.0)
    with dspy.context(lm=lm):
        first = module(question="why?")
    made = len(provider.calls)
    own = [call for call in provider.calls if "advice" not in call.prompt or "module_names" not in call.prompt]
    assert len(own) == 5
    with dspy.context(lm=lm):
        second = module(question="why?")
    assert len(provider.calls) == made
    assert second.answer == first.answer


def test_candidates_are_different_calls_and_repeating_them_is_not(serve: MakeProvider, connect: MakeLM) -> None:
    """`n=5` asks the provider five times, and the same again is answered by the cache with the same five."""
    provider = serve(answer=lambda call: f"answer {call.index}")
    lm = connect(provider, cache=True)
    first = lm("why?", n=5, temperature=1.0)
    assert sorted(first) == [f"answer {index}" for index in range(5)]
    assert lm("why?", n=5, temperature=1.0) == first
    assert asyncio.run(lm.acall("why?", n=5, temperature=1.0)) == first
    assert len(provider.calls) == 5


# -- streams ---------------------------------------------------------------------------------------------------------
def stream(lm: Any) -> Any:
    """A streaming call of the program everybody runs; its prediction."""

    async def run() -> Any:
        program = dspy.streamify(dspy.Predict("question -> answer"))
        with dspy.context(lm=lm):
            return [item async for item in program(question="why?")][-1]

    return asyncio.run(run())


def whole(lm: Any) -> Any:
    """The same call without streaming."""
    with dspy.context(lm=lm):
        return dspy.Predict("question -> answer")(question="why?")


def test_streams_neither_lead_nor_follow(serve: MakeProvider, connect: MakeLM) -> None:
    """Two streams and two plain calls of the same question, all at once, are two streams and one plain call."""
    provider: Provider = serve(answer=counting())
    lm = connect(provider, cache=True)
    provider.hold()
    crowd = [Caller(lambda: stream(lm)) for _ in range(2)]
    until(lambda: len(provider.calls) == 2)
    crowd += [Caller(lambda: whole(lm)) for _ in range(2)]
    until(lambda: len(provider.calls) == 3 and following(lm) == 1)
    provider.release()
    answers = [caller.outcome().answer for caller in crowd]
    assert len(provider.calls) == 3
    assert [call.stream for call in provider.calls] == [True, True, False]
    assert sorted(answers) == ["answer 0", "answer 1", "answer 2", "answer 2"]


def test_a_complete_stream_fills_the_cache(serve: MakeProvider, connect: MakeLM) -> None:
    """What was streamed to its end is kept, and answers plain and streaming calls alike."""
    provider = serve(answer=counting())
    lm = connect(provider, cache=True)
    assert [stream(lm).answer, whole(lm).answer, stream(lm).answer] == ["answer 0"] * 3
    assert len(provider.calls) == 1


def test_an_abandoned_stream_does_not_fill_the_cache(serve: MakeProvider, connect: MakeLM) -> None:
    """A stream whose consumer leaves halfway leaves nothing behind that could be taken for an answer."""
    provider = serve(answer="one two three four five", chunk_delay=0.01)
    lm = connect(provider, cache=True)
    request = dspy.lm15.Request(lm.model, (dspy.lm15.Message.user("why?"),))
    events = lm._engine_spec.stream(request)
    next(events)
    next(events)
    events.close()
    assert lm(request).text == "one two three four five"
    assert len(provider.calls) == 2
    assert quiet(lm)


@pytest.mark.parametrize("engine", ["lm15", "litellm"])
def test_hits_are_listed_at_what_the_provider_billed(serve: MakeProvider, connect: MakeLM, engine: str) -> None:
    """On either engine; DSPy's own cache tells the cost of its first answer too."""
    provider = serve(answer="the answer")
    lm = connect(provider, cache=True, engine=engine)
    for _ in range(3):
        ask(lm)
    asyncio.run(aask(lm))
    records = lm.ledger.records()
    assert [record.cost_nano for record in records] == [0, 0, 0, provider.bill.nano]
    assert {record.list_nano for record in records} == {provider.bill.nano}
