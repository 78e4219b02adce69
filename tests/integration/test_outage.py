"""An upstream dies under load: how many calls still reach it, who is answered meanwhile, and how it comes back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any, Literal

import dspy
import pytest
from dspy.utils.exceptions import LMServerError

import dspy_prod
from dspy_prod import Cache, CircuitBreaker, CircuitOpenError, RateLimit
from dspy_prod.testing import FakeClock, Provider, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CHEAP, errors, join, outcome, records, until
from tests.integration.support import Caller, Loop, Task, breaker, quiet
from tests.stopwatch import Stopwatch

WORKERS = 32
THRESHOLD = 5
STRICT = CircuitBreaker(failure_threshold=1, success_threshold=2, recovery_timeout=60, jitter=0, probe_lease=30)


@pytest.fixture
def heard() -> Iterator[list[dspy_prod.Event]]:
    """What the breakers tell."""
    events: list[dspy_prod.Event] = []
    remove = dspy_prod.add_listener(lambda event: events.append(event) if event.name.startswith("breaker_") else None)
    yield events
    remove()


class Flights:
    """How many calls are in flight past a breaker, counted beside it: permits taken and not yet given back.

    Attributes:
        at_trips: how many were in flight when it tripped. failed: how many had failed by then, since the trip before;
            more than make it trip where a thread that woke late told of a success between them.
    """

    def __init__(self, breaker: Any) -> None:
        self.now = 0
        self.at_trips: list[int] = []
        self.failed: list[int] = []
        self._failures = 0
        self._open = False
        self._lock = threading.Lock()
        permit = breaker.permit

        def taken() -> Any:
            with self._lock:
                self.now += 1
            try:
                return permit()
            except BaseException:
                with self._lock:
                    self.now -= 1
                raise

        breaker.permit = taken
        for name in ("success", "failure", "release"):
            self._watch(breaker, name)

    def _watch(self, breaker: Any, name: str) -> None:
        settle = getattr(breaker, name)

        def settled(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.now -= 1
                before = self.now
                self._failures += name == "failure"
            settle(*args, **kwargs)
            with self._lock:
                was, self._open = self._open, breaker.state != "closed"
                if self._open and not was:
                    self.at_trips.append(max(before, self.now))
                    self.failed.append(self._failures)
                    self._failures = 0

        setattr(breaker, name, settled)


def healthy(provider: Provider) -> dspy.LM:
    """A plain LM to fall back to."""
    return dspy.LM(CHEAP, api_base=provider.url, api_key="test", max_tokens=100, cache=False)


@pytest.mark.parametrize(
    ("crowd", "how", "line"),
    [
        ("threads", 500, 8),
        ("threads", "hang", 8),
        ("threads", "hang", None),
        ("tasks", 500, None),
        ("tasks", "hang", 8),
    ],
)
def test_a_dead_upstream_is_left_alone(
    serve: MakeProvider,
    connect: MakeLM,
    heard: list[dspy_prod.Event],
    how: Literal[500, "hang"],
    line: int | None,
    crowd: str,
) -> None:
    """32 workers go on without an error; what still reaches the dead upstream was in flight at the trip, or a probe."""
    # Long enough for a busy machine; a call that times out all the same before it dies is a failure like every other.
    timeout = 1.5 if how == "hang" else None
    dead, alive = serve(answer="primary", latency=0.02), serve(answer="spare", latency=0.02)
    lm = connect(
        dead,
        timeout=timeout,
        breaker=CircuitBreaker(
            failure_threshold=THRESHOLD, failure_rate=None, recovery_timeout=0.3, max_recovery_timeout=0.3, jitter=0
        ),
        limit=None if line is None else RateLimit(concurrency=line),
        fallbacks=[healthy(alive)],
    )
    flights = Flights(lm.pipeline.primary.breaker)
    stop = threading.Event()
    outcomes: list[Any] = []

    def work() -> None:
        while not stop.is_set():
            outcomes.append(outcome(lambda: lm("q")))

    async def awork() -> None:
        while not stop.is_set():
            try:
                outcomes.append(await lm.acall("q"))
            except Exception as error:
                outcomes.append(error)

    with Loop() as loop:
        workers: list[Caller | Task] = [
            Caller(work) if crowd == "threads" else loop.start(awork()) for _ in range(WORKERS)
        ]
        until(lambda: len(outcomes) > 2 * WORKERS)
        dead.down(how if how == "hang" else Status(500, delay=0.1))
        until(lambda: len([event for event in heard if event.name == "breaker_half_open"]) >= 2, timeout=20)
        stop.set()
        for worker in workers:
            worker.outcome()
    assert errors(outcomes, Exception) == []
    assert {answer[0] for answer in outcomes} == {"primary", "spare"}
    probes = len([event for event in heard if event.name == "breaker_half_open"])
    assert flights.at_trips
    assert max(flights.at_trips) <= (line or WORKERS) - 1
    reached = len([call for call in dead.calls if call.status != 200])
    assert 0 < reached <= sum(flights.failed) + sum(flights.at_trips) + probes
    tripped = [event.data["cause"] for event in heard if event.name == "breaker_opened"]
    assert tripped[0].startswith(f"{THRESHOLD} failures"), "no more in a row than it takes"
    assert len(alive.calls) > reached
    assert quiet(lm)


def test_one_probe_goes_out_however_many_are_waiting(serve: MakeProvider, connect: MakeLM) -> None:
    """When the open interval ends with 32 callers at the door, one call reaches the upstream until it has answered."""
    clock = FakeClock()
    dead, alive = serve(answer="primary"), serve(answer="spare")
    lm = connect(dead, breaker=STRICT, fallbacks=[healthy(alive)], clock=clock)
    dead.down()
    assert lm("trips") == ["spare"]
    dead.up()
    dead.hold()
    clock.advance(61)
    crowd = [Caller(lambda: lm("q")) for _ in range(WORKERS)]
    until(lambda: len(alive.calls) == 1 + WORKERS - 1, timeout=20)
    assert len(dead.calls) == 2
    dead.release()
    assert sorted(caller.outcome()[0] for caller in crowd) == ["primary"] + ["spare"] * (WORKERS - 1)


def test_it_recovers_through_half_open(serve: MakeProvider, connect: MakeLM, heard: list[dspy_prod.Event]) -> None:
    """Open, a failed probe and a longer interval, half-open, enough successes, closed: in this order and no other."""
    clock = FakeClock()
    dead = serve()
    lm = connect(dead, breaker=STRICT, clock=clock)
    dead.down()
    assert isinstance(outcome(lambda: lm("trips")), LMServerError)
    clock.advance(59)
    assert isinstance(outcome(lambda: lm("too early")), CircuitOpenError)
    clock.advance(1)
    assert isinstance(outcome(lambda: lm("failed probe")), LMServerError)
    dead.up()
    clock.advance(61)
    assert isinstance(outcome(lambda: lm("the interval has doubled")), CircuitOpenError)
    clock.advance(60)
    assert lm("first probe") == ["ok"]
    assert breaker(lm).state == "half_open"
    assert lm("second probe") == ["ok"]
    assert breaker(lm).state == "closed"
    names = [event.name.removeprefix("breaker_") for event in heard]
    assert names == ["opened", "half_open", "opened", "half_open", "closed"]
    assert len(dead.calls) == 4


def test_a_late_success_does_not_close_the_circuit(serve: MakeProvider, connect: MakeLM) -> None:
    """A call sent before the trip and answered after it says nothing about the upstream now."""
    dead = serve()
    lm = connect(dead, breaker=STRICT)
    dead.hold()
    early = Caller(lambda: lm("sent before the trip"))
    until(lambda: len(dead.calls) == 1)
    dead.down()
    assert isinstance(outcome(lambda: lm("trips")), LMServerError)
    dead.release()
    assert early.outcome() == ["ok"]
    assert breaker(lm).state == "open"
    assert breaker(lm).total_successes == 0
    assert isinstance(outcome(lambda: lm("q")), CircuitOpenError)


def test_a_hung_probe_does_not_stick_the_circuit(serve: MakeProvider, connect: MakeLM) -> None:
    """A probe that never comes back is written off when its lease ends, and the next one may close the circuit."""
    clock = FakeClock()
    dead = serve()
    lm = connect(dead, breaker=STRICT, clock=clock)
    dead.down()
    assert isinstance(outcome(lambda: lm("trips")), LMServerError)
    clock.advance(61)
    dead.down("hang")
    hung = Caller(lambda: lm("hangs"))
    until(lambda: len(dead.calls) == 2)
    assert isinstance(outcome(lambda: lm("the probe is out")), CircuitOpenError)
    assert breaker(lm).probes_in_flight == 1
    clock.advance(31)
    assert breaker(lm).state == "open", "the lease has ended"
    dead.up()
    clock.advance(121)
    assert lm("probe") == lm("probe again") == ["ok"]
    assert breaker(lm).state == "closed"
    dead.stop()
    assert isinstance(hung.outcome(), Exception)
    assert breaker(lm).state == "closed", "what the written-off probe says at last changes nothing"


def test_without_a_fallback_the_caller_hears_why_and_when(serve: MakeProvider, connect: MakeLM) -> None:
    """The refusal of an open circuit is immediate, typed, and names route, cause and the time to come again."""
    clock = FakeClock()
    dead = serve()
    lm = connect(dead, breaker=STRICT, clock=clock)
    dead.down(503)
    assert isinstance(outcome(lambda: lm("trips")), LMServerError)
    clock.advance(20)
    for refusal in (outcome(lambda: lm("q")), asyncio.run(_aoutcome(lm))):
        assert isinstance(refusal, CircuitOpenError)
        assert refusal.reason == "circuit_open"
        assert refusal.retry_after == pytest.approx(40, abs=0.01)
        assert (refusal.model, refusal.route) == (lm.model, "primary")
        assert "503" in refusal.cause_text
        assert "40" in str(refusal)
    assert len(dead.calls) == 1
    assert [record.outcome for record in records(lm)] == ["error", "refused"], "the second is like the first"
    assert lm.costs(by="model")[0].attempts == 1, "what was not sent is no attempt"


async def _aoutcome(lm: Any) -> Any:
    try:
        return await lm.acall("q")
    except Exception as error:
        return error


def test_a_stale_answer_bridges_the_outage(serve: MakeProvider, connect: MakeLM) -> None:
    """With `stale_if_error` an expired answer is served at once while the circuit is open, marked as what it is."""
    clock = FakeClock()
    dead = serve(answer="the answer")
    lm = connect(dead, breaker=STRICT, clock=clock, cache=Cache(ttl=10, ttl_jitter=0, stale_if_error=100))
    assert lm("known") == ["the answer"]
    dead.down()
    clock.advance(11)
    assert lm("known") == ["the answer"], "the attempt that trips the circuit is bridged, too"
    assert breaker(lm).state == "open"
    assert [lm("known") for _ in range(10)] == [["the answer"]] * 10
    assert len(dead.calls) == 2
    assert isinstance(outcome(lambda: lm("unknown")), CircuitOpenError)
    assert [record.outcome for record in records(lm)] == ["ok", "error", *["stale"] * 11, "refused"]
    assert lm.history[-1]["cost"] == 0.0
    assert lm.history[-1]["cached"] is True
    dead.up()
    clock.advance(61)
    dead.answer = "news"
    assert lm("known") == ["news"], "a probe brings a fresh one"


def test_callers_in_the_limiter_s_queue_are_not_sent_into_the_outage(serve: MakeProvider, connect: MakeLM) -> None:
    """31 callers wait behind the one whose failure opens the circuit: none of them is sent, none of them is lost."""
    dead, alive = serve(answer="primary"), serve(answer="spare")
    lm = connect(dead, breaker=STRICT, limit=RateLimit(concurrency=1), fallbacks=[healthy(alive)])
    answers: list[Any] = []
    dead.down(Status(500, delay=0.5))
    workers = [threading.Thread(target=lambda: answers.append(lm("q"))) for _ in range(WORKERS)]
    watcher = Caller(lambda: until(lambda: lm.pipeline.store.waiting() >= WORKERS // 2))
    with Stopwatch() as took:
        join(workers)
        assert watcher.outcome() is None
    assert took.seconds < 5
    assert answers == [["spare"]] * WORKERS
    assert len(dead.calls) == 1
    assert quiet(lm)
