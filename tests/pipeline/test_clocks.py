"""An LM by a clock that is moved by hand: no wait spins, and what happens on the machine takes the machine's time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import dspy_prod
from dspy_prod import DeadlineExceededError, RateLimit, Retry, call_context
from dspy_prod.pipeline.engine import ProdEngine
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Moment, moment_on
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.testing import FakeClock, Provider, Status
from tests.e2e.support import request, until

MODEL = "openai/gpt-4o-mini"
AHEAD = 1_000_000.0
"""Seconds that a clock shows more, or less, than the machine's."""


@pytest.fixture
def made() -> Iterator[list[dspy_prod.LM]]:
    """LMs to be closed."""
    lms: list[dspy_prod.LM] = []
    yield lms
    for lm in lms:
        lm.close()


def clock_at(offset: float) -> FakeClock:
    """A clock that shows another time than the machine's."""
    clock = FakeClock()
    clock._monotonic = max(1_000.0, time.monotonic() + offset)
    return clock


def ask(lm: dspy_prod.LM, way: str) -> Any:
    """What one call gives, whichever way it is made."""
    if way == "sync":
        return lm("hi")
    if way == "async":
        return asyncio.run(lm.acall("hi"))
    engine = ProdEngine(lm.pipeline, b"a clock")
    deltas = [event for event in engine.stream(request(model=lm.model)) if event.type == "delta"]
    return ["".join(getattr(event.delta, "text", "") for event in deltas)]


@pytest.mark.parametrize("offset", [-AHEAD, AHEAD])
@pytest.mark.parametrize("way", ["sync", "async", "stream"])
def test_a_time_out_and_a_deadline_are_seconds_from_now_whatever_the_clock_shows(
    offset: float, way: str, made: list[dspy_prod.LM], provider: Provider
) -> None:
    """Both were compared with the machine's clock: one of them failed at once, before anything was sent."""
    lm = dspy_prod.LM(
        MODEL, api_base=provider.url, api_key="x", store="memory://", clock=clock_at(offset), cache=False, timeout=30
    )
    made.append(lm)
    with call_context(deadline=20):
        assert ask(lm, way) == ["ok"]


@pytest.mark.parametrize("way", ["sync", "async", "stream"])
def test_an_attempt_that_hangs_ends_in_the_machines_time(way: str, made: list[dspy_prod.LM]) -> None:
    """Nobody moves the clock, and the socket waits for no clock of ours."""
    with Provider(latency=30) as silent:
        lm = dspy_prod.LM(
            MODEL, api_base=silent.url, api_key="x", store="memory://", clock=clock_at(AHEAD), cache=False,
            retry=Retry(attempts=1),
        )  # fmt: skip
        made.append(lm)
        with pytest.raises(DeadlineExceededError), call_context(deadline=0.2):
            ask(lm, way)


@pytest.mark.parametrize("way", ["sync", "async", "stream"])
def test_a_pause_before_a_retry_ends_when_the_clock_is_moved(way: str, made: list[dspy_prod.LM]) -> None:
    """It would else last sixty seconds, or, with a clock that is ahead, for ever."""
    clock, pauses = clock_at(AHEAD), []
    remove = dspy_prod.add_listener(lambda event: pauses.append(event) if event.name == "retry" else None)
    try:
        with Provider(faults=[Status(503, retry_after=40)]) as provider:
            lm = dspy_prod.LM(MODEL, api_base=provider.url, api_key="x", store="memory://", clock=clock, cache=False)
            made.append(lm)
            found: list[Any] = []
            thread = threading.Thread(target=lambda: found.append(ask(lm, way)), daemon=True)
            thread.start()
            until(lambda: bool(pauses))
            while thread.is_alive():  # the wait begins a moment after the event
                clock.advance(50)
                thread.join(0.05)
            assert found == [["ok"]]
    finally:
        remove()


def _waits(lm: dspy_prod.LM) -> bool:
    limiter = lm.pipeline.store.limiter(lm.pipeline.primary.limit_key)
    return limiter is not None and limiter.waiting == 1


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_who_waits_in_line_is_served_when_the_clock_is_moved(
    kind: str, tmp_path: Any, made: list[dspy_prod.LM], provider: Provider
) -> None:
    """The timers of the store slept for up to five seconds, and the waiter looked at its clock without a pause."""
    clock = clock_at(AHEAD)
    store: Any = "memory://" if kind == "memory" else SqliteStore(str(tmp_path / "a.db"), clock=clock)
    lm = dspy_prod.LM(
        MODEL, api_base=provider.url, api_key="x", store=store, clock=clock, cache=False,
        limit=RateLimit(rpm=1, max_wait=100),
    )  # fmt: skip
    made.append(lm)
    lm("first")
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(lm("second")), daemon=True)
    thread.start()
    until(lambda: _waits(lm))
    used = time.process_time()
    thread.join(0.5)
    assert thread.is_alive()
    assert time.process_time() - used < 0.25  # a wait that looked at its clock all the time would use all of it
    began = time.monotonic()
    clock.advance(70)
    thread.join(30)
    assert found == [["ok"]]
    assert time.monotonic() - began < 2.5  # the timers look every five seconds by themselves


def test_a_moment_of_one_clock_is_as_many_seconds_from_now_on_another() -> None:
    """A deadline may come from a context of the machine's clock, or of a test's."""
    clock, other = clock_at(AHEAD), clock_at(-AHEAD)
    moment = Moment.of(clock, clock.monotonic() + 5)
    assert moment_on(clock, moment) == clock.monotonic() + 5
    assert moment_on(other, moment) == other.monotonic() + 5
    assert moment_on(SYSTEM_CLOCK, moment) == pytest.approx(time.monotonic() + 5, abs=1)
    with (
        call_context(deadline=9, clock=clock),
        call_context(deadline=5, clock=other),
        call_context(deadline=7) as inner,
    ):
        assert moment_on(other, inner.deadline) == other.monotonic() + 5


def test_a_clock_forgets_who_waits_no_more() -> None:
    """Each wait tells the clock about itself; a test that makes a million calls would keep them all."""
    clock = FakeClock()
    told: list[int] = []
    end = clock.on_advance(lambda: told.append(1))
    clock.advance(1)
    end()
    clock.advance(1)
    assert told == [1]
    assert not clock._told
