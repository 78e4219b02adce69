"""An outage in a run: calls wait for it instead of failing, up to a limit, and what is scored is never an outage."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMAuthError, LMError, LMInvalidRequestError, LMServerError, LMUnsupportedModelError

import dspy_prod
from dspy_prod import (
    CircuitBreaker,
    DeadlineExceededError,
    OutageError,
    Retry,
    Run,
    RunStoppedError,
)
from dspy_prod.testing import FaultPlan, Hang, Reset, Status, TruncatedStream
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import (
    CHEAP,
    answers,
    assert_nothing_held,
    fresh_memory,
    join,
    outcome,
    records,
    request,
    together,
    until,
)

WAYS = ["sync", "async", "stream", "astream"]


QUICK = CircuitBreaker(recovery_timeout=0.5, jitter=0)
"""A circuit that probes soon: an outage ends no earlier than the circuit lets somebody see that it has."""


def a_run(outage: float = 30.0, **caps: Any) -> Run:
    return Run("it", outage=outage, store=fresh_memory(), **{"usd": 5, **caps})


def ask(lm: Any, way: str = "sync", text: str = "a question") -> Any:
    """One call; what it answered or raised."""
    if way == "sync":
        return outcome(lambda: lm(text))
    if way == "async":
        return outcome(lambda: asyncio.run(lm.acall(text)))
    if way == "stream":
        return outcome(lambda: [event.type for event in lm._engine_spec.stream(request(text))])

    async def drain() -> list[str]:
        return [event.type async for event in lm._async_engine_spec.stream(request(text))]

    return outcome(lambda: asyncio.run(drain()))


@pytest.fixture
def heard() -> Iterator[list[dspy_prod.Event]]:
    """What is told of outages."""
    events: list[dspy_prod.Event] = []
    remove = dspy_prod.add_listener(lambda event: events.append(event) if "outage" in event.name else None)
    yield events
    remove()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", [Status(500), Status(503), Status(429), Status(502), Reset("before"), Status(504)])
def test_a_call_waits_until_its_upstream_is_back(
    serve: MakeProvider, connect: MakeLM, heard: list[dspy_prod.Event], way: str, fault: Any
) -> None:
    provider = serve(faults=FaultPlan.window(fault, 0, 2))
    lm, run = connect(provider), a_run()
    with dspy_prod.call_context(run=run):
        found = ask(lm, way)
    assert not isinstance(found, BaseException), repr(found)
    assert len(provider.calls) == 3
    assert [event.name for event in heard] == ["outage_waiting", "outage_over"]
    assert heard[0].data["run"] == "it"
    assert heard[0].data["models"] == [lm.model]
    assert heard[1].data["seconds"] > 0
    assert run.outages.models == ()
    assert run.used().held_usd == 0.0
    assert_nothing_held(lm.pipeline.store)


def test_evaluate_loses_no_score_to_an_outage(serve: MakeProvider, connect: MakeLM) -> None:
    provider = serve()
    lm, run = connect(provider, retry=Retry(attempts=2, backoff=0.01), breaker=QUICK), a_run(60)
    devset = [dspy.Example(question=f"question {number}", answer="x").with_inputs("question") for number in range(30)]
    asked = [0]

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        asked[0] += 1
        if asked[0] == 8:
            provider.down(500)
            threading.Timer(1.0, provider.up).start()
        return 1.0

    evaluate = dspy.Evaluate(devset=devset, metric=metric, num_threads=4, max_errors=1, display_progress=False)
    with dspy.context(lm=lm), dspy_prod.call_context(run=run):
        result = evaluate(dspy.Predict("question -> answer"))
    assert result.score == 100.0
    assert asked[0] == 30
    assert any(record.outcome == "error" for record in records(lm)), "the outage was no outage"


def test_without_patience_an_error_is_given_back_at_once(serve: MakeProvider, connect: MakeLM) -> None:
    provider = serve(faults=Status(500))
    lm = connect(provider)
    with dspy_prod.call_context(run=a_run(outage=0)):
        assert isinstance(ask(lm), LMServerError)
    assert len(provider.calls) == 1


@pytest.mark.parametrize("way", WAYS)
def test_after_the_limit_it_fails_and_says_what_was_down(serve: MakeProvider, connect: MakeLM, way: str) -> None:
    provider = serve(faults=Status(503))
    lm, run = connect(provider), a_run(outage=0.8)
    began = time.time()
    with dspy_prod.call_context(run=run):
        error = ask(lm, way)
    assert isinstance(error, OutageError), repr(error)
    assert time.time() - began >= 0.8
    assert error.reason == "outage"
    assert error.run == "it"
    assert error.models == (lm.model,)
    assert began <= error.since <= began + 0.7
    assert error.seconds >= 0.8
    assert "LMServerError 503" in str(error)
    assert "Run(outage=...)" in str(error)
    assert isinstance(error.__cause__, LMServerError)
    refused = [record for record in records(lm) if record.outcome == "refused"]
    assert [record.reason for record in refused] == ["outage: it"]


def test_every_waiting_call_of_the_run_ends_and_nothing_is_sent_after(serve: MakeProvider, connect: MakeLM) -> None:
    provider = serve(faults=Status(500))
    lm, run = connect(provider, breaker=False), a_run(outage=1.0)
    with dspy_prod.call_context(run=run):
        began = time.monotonic()
        found = in_run(run, lm, callers=6)
        took = time.monotonic() - began
        assert [type(each) for each in found] == [OutageError] * 6
        assert took < 3
        sent = len(provider.calls)
        late = ask(lm)
    assert isinstance(late, OutageError), "who comes later asks once and is told at once"
    assert len(provider.calls) == sent + 1
    assert run.outages.models == ()


def in_run(run: Run, lm: Any, callers: int) -> list[Any]:
    """Outcomes of so many threads of the run."""
    found: list[Any] = []

    def caller(number: int) -> None:
        with dspy_prod.call_context(run=run):
            found.append(outcome(lambda: lm(f"question {number}")))

    join([threading.Thread(target=caller, args=(number,), daemon=True) for number in range(callers)])
    return found


def test_the_next_answer_ends_an_outage_that_was_given_up(serve: MakeProvider, connect: MakeLM) -> None:
    provider = serve(faults=Status(500))
    lm, run = connect(provider), a_run(outage=0.3)
    with dspy_prod.call_context(run=run):
        assert isinstance(ask(lm), OutageError)
        provider.faults = None
        assert isinstance(ask(lm), list)
        provider.faults = FaultPlan.window(Status(500), 0, 1)
        assert isinstance(ask(lm, text="another"), list)


def test_an_answer_wakes_all_who_wait_for_the_same_upstream(serve: MakeProvider, connect: MakeLM) -> None:
    """One of them finds it back; nobody sleeps out a pause of ten seconds."""
    provider = serve()
    provider.down(Status(500, retry_after=8))
    lm, run = connect(provider), a_run()
    found: list[Any] = []

    def caller(number: int) -> None:
        with dspy_prod.call_context(run=run):
            found.append(outcome(lambda: lm(f"question {number}")))

    threads = [threading.Thread(target=caller, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(run._watchers) == 4, what="waiting")
    provider.up()
    began = time.monotonic()
    with dspy_prod.call_context(run=run):
        assert isinstance(ask(lm, text="who finds it back"), list)
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - began < 4
    assert len(answers(found)) == 4


@pytest.mark.parametrize("way", WAYS)
def test_stopping_ends_the_wait_for_a_retry_after_at_once(serve: MakeProvider, connect: MakeLM, way: str) -> None:
    provider = serve(faults=Status(503, retry_after=25))
    lm, run = connect(provider), a_run(outage=600)
    found: list[Any] = []

    def caller() -> None:
        with dspy_prod.call_context(run=run):
            found.append(ask(lm, way))

    thread = threading.Thread(target=caller, daemon=True)
    thread.start()
    until(lambda: run.outages.models, what="waiting")
    until(lambda: run._watchers, what="listening")
    began = time.monotonic()
    run.stop("Ctrl-C")
    thread.join(5)
    assert time.monotonic() - began < 0.5
    assert isinstance(found[0], RunStoppedError), repr(found[0])
    assert len(provider.calls) == 1
    assert run.outages.models == ()


@pytest.mark.parametrize("way", WAYS)
def test_a_deadline_ends_the_wait(serve: MakeProvider, connect: MakeLM, way: str) -> None:
    provider = serve(faults=Status(503))
    lm, run = connect(provider), a_run(outage=600)
    began = time.monotonic()
    with dspy_prod.call_context(run=run, deadline=0.7):
        error = ask(lm, way)
    assert isinstance(error, DeadlineExceededError), repr(error)
    assert time.monotonic() - began < 2
    assert run.outages.models == ()


def test_a_task_that_is_cancelled_waits_no_longer(serve: MakeProvider, connect: MakeLM) -> None:
    provider = serve(faults=Status(503, retry_after=25))
    lm, run = connect(provider), a_run(outage=600)

    async def leave() -> None:
        with dspy_prod.call_context(run=run):
            with pytest.raises((asyncio.TimeoutError, TimeoutError)):
                await asyncio.wait_for(lm.acall("a question"), 0.5)
        assert run.outages.models == ()
        assert not run._watchers

    asyncio.run(leave())
    assert_nothing_held(lm.pipeline.store)


def test_an_open_circuit_is_waited_for_until_it_probes(serve: MakeProvider, connect: MakeLM) -> None:
    provider = serve(faults=FaultPlan.window(Status(500), 0, 2))
    breaker = CircuitBreaker(failure_threshold=2, success_threshold=1, recovery_timeout=1.0, jitter=0)
    lm, run = connect(provider, breaker=breaker), a_run()
    found = [outcome(lambda: lm("opens it")), outcome(lambda: lm("opens it"))]
    assert all(isinstance(each, LMServerError) for each in found)
    with dspy_prod.call_context(run=run):
        began = time.monotonic()
        assert isinstance(ask(lm), list)
    assert 0.5 <= time.monotonic() - began < 8
    assert len(provider.calls) == 3


def test_an_upstream_that_hangs_is_an_outage(serve: MakeProvider, connect: MakeLM) -> None:
    provider = serve(faults=FaultPlan.window(Hang(), 0, 2))
    lm, run = connect(provider, timeout=0.4), a_run()
    with dspy_prod.call_context(run=run):
        assert isinstance(ask(lm), list)
    assert len(provider.calls) == 3


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Status(400), LMInvalidRequestError),
        (Status(400, error_code="context_length_exceeded"), LMError),
        (Status(401), LMAuthError),
        (Status(403), LMAuthError),
        (Status(404), LMUnsupportedModelError),
        (Status(429, message="You exceeded your current quota", error_code="insufficient_quota"), LMError),
    ],
)
def test_what_would_fail_for_ever_is_raised_at_once(
    serve: MakeProvider, connect: MakeLM, heard: list[dspy_prod.Event], fault: Status, kind: type[LMError]
) -> None:
    provider = serve(faults=fault)
    lm = connect(provider)
    began = time.monotonic()
    with dspy_prod.call_context(run=a_run()):
        error = ask(lm)
    assert isinstance(error, kind), repr(error)
    assert not isinstance(error, OutageError)
    assert time.monotonic() - began < 5
    assert len(provider.calls) == 1
    assert heard == []


@pytest.mark.parametrize("way", ["stream", "astream"])
def test_a_stream_that_broke_after_its_first_words_is_not_begun_again(
    serve: MakeProvider, connect: MakeLM, way: str
) -> None:
    provider = serve(faults=TruncatedStream(after=2))
    lm = connect(provider)
    with dspy_prod.call_context(run=a_run()):
        error = ask(lm, way)
    assert isinstance(error, LMError)
    assert not isinstance(error, OutageError)
    assert len(provider.calls) == 1


def test_a_fallback_that_answers_leaves_nothing_to_wait_for(
    serve: MakeProvider, connect: MakeLM, heard: list[dspy_prod.Event]
) -> None:
    provider = serve(faults=lambda call: None if "cheap" in call.model else Status(500))
    lm = connect(provider, fallbacks=[CHEAP])
    with dspy_prod.call_context(run=a_run()):
        assert isinstance(ask(lm), list)
    assert heard == []


def test_with_fallbacks_every_route_has_to_be_silent(serve: MakeProvider, connect: MakeLM) -> None:
    provider = serve(faults=FaultPlan.window(Status(500), 0, 5))
    lm, run = connect(provider, fallbacks=[CHEAP]), a_run()
    with dspy_prod.call_context(run=run):
        assert isinstance(ask(lm), list)
    assert len(provider.calls) == 6
    provider.faults = lambda call: Status(401) if "cheap" in call.model else Status(500)
    with dspy_prod.call_context(run=run):
        assert isinstance(ask(lm, text="another"), LMAuthError)


def test_a_request_that_alone_fails_is_given_back_while_others_are_answered(
    serve: MakeProvider, connect: MakeLM
) -> None:
    """Some requests make an upstream fail: they would wait for an outage that is none."""
    provider = serve(faults=lambda call: Status(500) if "poison" in call.prompt else None)
    lm, run = connect(provider), a_run(outage=60)
    done = threading.Event()

    def others() -> None:
        number = 0
        with dspy_prod.call_context(run=run):
            while not done.is_set():
                number += 1
                lm(f"question {number}")
                done.wait(0.02)

    thread = threading.Thread(target=others, daemon=True)
    thread.start()
    began = time.monotonic()
    with dspy_prod.call_context(run=run):
        error = ask(lm, text="poison")
    done.set()
    thread.join(10)
    assert isinstance(error, LMServerError), repr(error)
    assert time.monotonic() - began < 20


def test_an_outage_within_two_runs_counts_for_both(serve: MakeProvider, connect: MakeLM) -> None:
    """The one that has less patience gives up."""
    provider = serve(faults=Status(500))
    lm = connect(provider)
    outer, inner = a_run(outage=60), Run("inner", calls=100, outage=0.5, store=fresh_memory())
    with dspy_prod.call_context(run=outer), dspy_prod.call_context(run=inner):
        error = ask(lm)
    assert isinstance(error, OutageError)
    assert error.run == "inner"


def test_the_cap_holds_while_an_outage_is_waited_out(serve: MakeProvider, connect: MakeLM) -> None:
    """Attempts in an outage are attempts: what a run may send does not grow with its patience."""
    provider = serve(faults=Status(500))
    lm, run = connect(provider), a_run(outage=60, calls=3)
    with dspy_prod.call_context(run=run):
        error = ask(lm)
    assert isinstance(error, dspy_prod.BudgetExceededError)
    assert len(provider.calls) == 3


def test_identical_calls_wait_for_one(serve: MakeProvider, connect: MakeLM) -> None:
    provider = serve(faults=FaultPlan.window(Status(500), 0, 2))
    lm, run = connect(provider, cache=True), a_run()

    def caller() -> None:
        with dspy_prod.call_context(run=run):
            found.append(outcome(lambda: lm("the same")))

    found: list[Any] = []
    join([threading.Thread(target=caller, daemon=True) for _ in range(4)])
    assert len(answers(found)) == 4
    assert len(provider.calls) == 3


def test_outside_a_run_nothing_waits(serve: MakeProvider, connect: MakeLM) -> None:
    provider = serve(faults=Status(500))
    lm = connect(provider)
    assert all(isinstance(each, LMServerError) for each in together("threads", lm, 3))
    assert len(provider.calls) == 3
