"""Edges of a call's flow: followers on dead loops, streams that are left, deadlines, time-outs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from dspy.utils.exceptions import LMServerError, LMTimeoutError

import dspy_prod
from dspy_prod import CircuitBreaker, DeadlineExceededError, RateLimit, call_context
from dspy_prod.pipeline.upstream.litellm_engines import wire_timeout
from dspy_prod.policies.singleflight import ANSWERED, LEADS, LEFT, Flights, Follower
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.testing import Hang, ScriptedEngine
from tests.compose.support import Gate, caught, down, over
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import request as asked
from tests.e2e.support import until
from tests.integration.support import Caller, breaker, following, quiet

TOUCHY = CircuitBreaker(failure_threshold=1, jitter=0)


def request() -> Any:
    """A canonical request of the model under test."""
    return asked(model="openai/pair")


class Streams(ScriptedEngine):
    """An upstream whose stream does something before, and after, the events of its answer."""

    def __init__(self, before: Callable[[], object] = int, after: Callable[[], object] = int) -> None:
        super().__init__("some words")
        self.before, self.after = before, after

    def stream(self, request: Any) -> Iterator[Any]:
        self.before()
        try:
            yield from super().stream(request)
        finally:
            self.after()


# -- single-flight ---------------------------------------------------------------------------------------------------
def dead(flights: Flights) -> Follower:
    """A follower of flight `k` whose event loop was closed meanwhile."""
    loop = asyncio.new_event_loop()
    follower = flights.join("k")
    assert follower is not None

    def wake() -> None:
        loop.call_soon_threadsafe(int)

    follower.attach(wake)
    loop.close()
    return follower


@pytest.mark.parametrize("how", ["answer", "fail"])
def test_a_follower_on_a_closed_loop_harms_nobody(how: str) -> None:
    """The leader ends its flight without an error, and the follower behind the dead one hears of it."""
    flights = Flights()
    assert flights.join("k") is None
    dead(flights)
    other, woken = flights.join("k"), threading.Event()
    assert other is not None
    other.attach(woken.set)
    if how == "answer":
        flights.answer("k", "yes")
    else:
        flights.fail("k", down())
    assert woken.is_set()
    assert len(flights) == 0


def test_the_lead_passes_over_followers_that_are_dead() -> None:
    """The lead goes to the first follower that can take it; with none left the flight ends."""
    flights = Flights()
    assert flights.join("k") is None
    gone = dead(flights)
    other = flights.join("k")
    assert other is not None
    flights.hand_over("k")
    assert (gone.state, other.state) == (LEFT, LEADS)
    dead(flights)
    flights.hand_over("k")
    assert len(flights) == 0


def test_leaving_while_a_later_flight_is_under_way() -> None:
    """A follower whose flight has ended, but who is not decided yet, leaves without an error."""
    flights = Flights()
    assert flights.join("k") is None
    late = flights.join("k")
    assert late is not None
    del flights._flights["k"]
    assert flights.join("k") is None
    other = flights.join("k")
    assert flights.leave("k", late)
    flights.answer("k", "yes")
    assert other is not None
    assert other.state == ANSWERED


def test_calls_are_answered_beside_a_follower_on_a_closed_loop() -> None:
    """A task is left waiting on a loop that is closed: leader and other followers are answered all the same."""
    gate = Gate("the answer")
    lm = over(ScriptedEngine(gate), cache=True)
    leader = Caller(lambda: lm._engine_spec.complete(request()).text)
    assert gate.arrived.wait(30)
    loop = asyncio.new_event_loop()

    async def start() -> Any:
        task = asyncio.ensure_future(lm._async_engine_spec.complete(request()))
        while following(lm) < 1:  # noqa: ASYNC110  (nobody announces it)
            await asyncio.sleep(0)
        return task

    task = loop.run_until_complete(start())
    loop.close()
    other = Caller(lambda: lm._engine_spec.complete(request()).text)
    until(lambda: following(lm) == 2)
    gate.open()
    assert [leader.outcome(), other.outcome()] == ["the answer"] * 2
    task._log_destroy_pending = False
    assert len(lm.pipeline.flights) == 0


def test_a_synchronous_call_does_not_wait_for_its_own_loop() -> None:
    """A plain call inside a task, identical to one of another task of the loop it holds up, asks by itself."""
    engine = ScriptedEngine("the answer", latency=0.2)
    lm = over(engine, cache=True)

    async def both() -> list[Any]:
        task = asyncio.ensure_future(lm.acall("the same"))
        while engine.in_flight < 1:  # noqa: ASYNC110  (nobody announces it)
            await asyncio.sleep(0)
        return [lm("the same"), await task]

    assert Caller(lambda: asyncio.run(both())).outcome() == [["the answer"]] * 2
    assert engine.calls == 2
    assert quiet(lm)


# -- streams ---------------------------------------------------------------------------------------------------------
class Eager(ScriptedEngine):
    """An upstream that fails as its stream is opened, before the first event is asked for."""

    def stream(self, request: Any) -> Iterator[Any]:
        raise LMServerError("the upstream is down", model=request.model, status=500)


def test_an_error_of_opening_a_stream_under_a_deadline_is_told() -> None:
    """The error arrives at once, as it does without a deadline, instead of a time-out at the deadline."""
    lm = over(Eager())
    started = time.monotonic()
    with call_context(deadline=30):
        assert isinstance(caught(lambda: list(lm._engine_spec.stream(request()))), LMServerError)
    assert time.monotonic() - started < 10


def test_an_upstream_error_inside_somebodys_cleanup_is_an_error() -> None:
    """A stream read while the surrounding code handles a `GeneratorExit` fails as it would anywhere else."""
    lm = over(ScriptedEngine(down()))
    found: list[BaseException] = []

    def surrounding() -> Iterator[int]:
        try:
            yield 1
        finally:
            try:
                list(lm._engine_spec.stream(request()))
            except BaseException as error:
                found.append(error)

    generator = surrounding()
    next(generator)
    generator.close()  # type: ignore[attr-defined]
    assert isinstance(found[0], LMServerError)
    assert [record.outcome for record in lm.ledger.records()] == ["error"]


def test_an_error_of_closing_a_left_stream_says_nothing() -> None:
    """When the consumer leaves and the upstream's stream fails to close, the attempt counts as cancelled."""

    def fail() -> None:
        raise down()

    lm = over(Streams(after=fail), breaker=TOUCHY)
    events: Any = lm._engine_spec.stream(request())
    next(events)
    events.close()
    assert REAPER.flush()
    assert [record.outcome for record in lm.ledger.records()] == ["cancelled"]
    assert breaker(lm).state == "closed"


@pytest.mark.parametrize("how", ["thread", "task"])
def test_listeners_of_a_left_stream_run_on_the_reaper(how: str) -> None:
    """A stream may be closed by the garbage collector: no listener runs on the thread that it interrupted."""
    lm = over(ScriptedEngine("some words"), breaker=TOUCHY)
    heard: list[tuple[dspy_prod.Event, str]] = []
    remove = dspy_prod.add_listener(lambda event: heard.append((event, threading.current_thread().name)))
    try:
        events: Any
        if how == "thread":
            events = lm._engine_spec.stream(request())
            next(events)
            events.close()
        else:

            async def leave() -> None:
                events: Any = lm._async_engine_spec.stream(request())
                await anext(events)
                await events.aclose()

            asyncio.run(leave())
        assert REAPER.flush()
    finally:
        remove()
    (record,) = lm.ledger.records()
    assert record.outcome == "cancelled"
    (call,) = {event.data["call_id"] for event, _ in heard if event.data.get("record_id") == record.id}
    assert {thread for event, thread in heard if event.data.get("call_id") == call} == {"dspy_prod-reaper"}
    assert quiet(lm)


@pytest.mark.parametrize("how", ["thread", "task"])
def test_a_slow_consumer_is_no_slow_upstream(how: str) -> None:
    """The time that events lie in the consumer's hands is none of the breaker's business."""
    slow = CircuitBreaker(slow_call_duration=0.2, minimum_calls=1, slow_call_rate=1.0, jitter=0)
    lm = over(ScriptedEngine("some words"), breaker=slow)

    def dawdle(since: float) -> None:
        until(lambda: time.monotonic() - since > 0.3)

    if how == "thread":
        for _ in lm._engine_spec.stream(request()):
            dawdle(time.monotonic())
    else:

        async def consume() -> None:
            async for _ in lm._async_engine_spec.stream(request()):
                dawdle(time.monotonic())

        asyncio.run(consume())
    assert breaker(lm).slow == 0
    assert breaker(lm).state == "closed"


@pytest.mark.parametrize("deadline", [None, 30])
@pytest.mark.parametrize("how", ["thread", "task"])
def test_timeout_bounds_the_wait_for_the_next_event(how: str, deadline: float | None) -> None:
    """A stream of an engine object that hangs ends with a time-out, long before the deadline if there is one."""
    released = threading.Event()
    engine: Any = Streams(before=lambda: released.wait(30))
    engine.asynchronous = ScriptedEngine(latency=30).asynchronous
    lm = over(engine, timeout=0.2, limit=RateLimit(concurrency=1))

    async def consume() -> None:
        async for _ in lm._async_engine_spec.stream(request()):
            pass

    calls: dict[str, Callable[[], Any]] = {
        "thread": lambda: list(lm._engine_spec.stream(request())),
        "task": lambda: asyncio.run(consume()),
    }
    with call_context(deadline=deadline):
        error = caught(calls[how])
    released.set()
    assert isinstance(error, LMTimeoutError)
    assert not isinstance(error, DeadlineExceededError)
    until(lambda: lm.pipeline.store.holds() == 0)


# -- deadlines -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("deadline", "timeout", "state"), [(0.1, None, "closed"), (1.2, None, "open"), (0.3, 20, "closed")]
)
def test_only_a_fair_deadline_speaks_against_the_upstream(deadline: float, timeout: float | None, state: str) -> None:
    """A caller in a hurry does not open the circuit for everybody; one that gave the upstream its time does."""
    gate = Gate()
    lm = over(ScriptedEngine(gate), breaker=TOUCHY, **({} if timeout is None else {"timeout": timeout}))
    with call_context(deadline=deadline):
        assert isinstance(caught(lambda: lm("a question")), DeadlineExceededError)
    gate.open()
    assert breaker(lm).state == state
    assert breaker(lm).probes_in_flight == 0


@pytest.mark.parametrize(
    ("own", "left", "expected"),
    [(None, None, None), (2.5, None, 3), (None, 0.01, 1), (None, 3.5, 5), (4, 8, 4), (40, 8, 10), (700, 650, 700)],
)
def test_litellm_is_told_a_coarse_timeout(own: float | None, left: float | None, expected: float | None) -> None:
    """LiteLLM's time-out is one of a few, and ends no attempt before the driver does."""
    assert wire_timeout(own, float("inf") if left is None else time.monotonic() + left) == expected


def test_a_timeout_object_stays_as_it_is() -> None:
    """A time-out that is not a number is LiteLLM's to understand."""
    own = httpx.Timeout(3)
    assert wire_timeout(own, time.monotonic() + 1) is own


def test_an_abandoned_litellm_attempt_ends_soon(serve: MakeProvider, connect: MakeLM) -> None:
    """After a deadline of half a second the worker gives up within seconds, and the hold goes with it."""
    provider = serve(faults=[None, Hang(60)])
    lm = connect(provider, engine="litellm", retry=False, limit=RateLimit(concurrency=1))
    lm("another question")  # LiteLLM's import alone may take longer than the deadline
    with call_context(deadline=0.5):
        assert isinstance(caught(lambda: lm("a question")), DeadlineExceededError)
    assert lm.pipeline.store.holds() == 1
    until(lambda: lm.pipeline.store.holds() == 0, timeout=20)
