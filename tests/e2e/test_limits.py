"""Rate limits by the provider's own timestamps, in seconds; `test_limits_minutes.py` does the same over minutes.

A minute is checked here without waiting for it: with a burst as large as the limit, all of a minute may be sent at
once, and what does not fit is refused at once because its wait would be longer than `max_wait`.
"""

from __future__ import annotations

import multiprocessing as mp
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from dspy_prod import RateLimit, RateLimitedError
from dspy_prod.testing import Provider
from dspy_prod.testing.calls import busiest_window
from tests.e2e.children import send
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.elsewhere import Elsewhere
from tests.e2e.support import Crowd, answers, assert_nothing_held, errors, fresh_memory, gaps, make_lm, together
from tests.stopwatch import Stopwatch


@pytest.fixture(params=["threads, memory", "tasks, sqlite"])
def setting(request: pytest.FixtureRequest, sqlite_url: str) -> tuple[Crowd, str]:
    """Each kind of crowd with a kind of store, for tests that take seconds whatever the store."""
    return ("threads", fresh_memory()) if request.param == "threads, memory" else ("tasks", sqlite_url)


def test_a_paced_crowd_never_sends_more_than_a_second_holds(
    serve: MakeProvider, connect: MakeLM, setting: tuple[Crowd, str]
) -> None:
    """With `burst=1` and 1,800 a minute no second holds more than thirty, and the limit is used."""
    crowd, store = setting
    provider = serve(latency=(0.0, 0.2))
    lm = connect(provider, limit=RateLimit(rpm=1800, burst=1), store=store)
    with Stopwatch() as took:
        outcomes = together(crowd, lm, 20, calls=3)
    assert len(answers(outcomes)) == 60
    assert provider.requests_in_window(took.surely(1.0)) <= 30
    assert took.seconds <= 60 / 30 * 1.25 + 0.2, f"60 calls at 30 a second took {took.seconds:.1f} s"
    assert_nothing_held(lm.pipeline.store)


def test_an_idle_limit_saves_nothing_up(serve: MakeProvider, connect: MakeLM, sqlite_url: str) -> None:
    """After an idle second a crowd is paced as if there had been none."""
    provider = serve(latency=lambda call: 1.0 if call.index == 0 else 0.0)
    lm = connect(provider, limit=RateLimit(rpm=1800, burst=1), store=sqlite_url)
    lm("a call of one second, in which nothing else is sent")
    with Stopwatch() as took:
        together("threads", lm, 30, calls=1)
    arrivals = [call.received_at for call in provider.calls[1:]]
    assert provider.requests_in_window(took.surely(1.0)) <= 30
    assert max(arrivals) - min(arrivals) >= 29 / 30 - took.longest
    assert sorted(gaps(arrivals))[len(arrivals) // 2] >= 0.8 / 30


def test_a_burst_is_a_slice_of_the_minute() -> None:
    """With `burst=10` at ten a second, ten go at once and the next ten a second later."""
    provider = Elsewhere("--seconds", "60")
    try:
        lm = make_lm(provider.url, limit=RateLimit(rpm=600, burst=10))
        with Stopwatch() as took:
            together("threads", lm, 25)
        arrivals = sorted(call["received_at"] for call in provider.told("calls"))
    finally:
        provider.stop()
    assert len(arrivals) == 25
    assert arrivals[9] - arrivals[0] - took.lost < 0.5
    assert busiest_window([(at, 1) for at in arrivals], took.surely(1.0)) <= 10
    assert arrivals[10] - arrivals[0] >= 1.0 - took.longest


@pytest.mark.parametrize("crowd", ["threads", "tasks"])
def test_no_minute_holds_more_requests_than_the_limit(
    serve: MakeProvider, connect: MakeLM, store_url: str, crowd: Crowd
) -> None:
    """Of a hundred callers at once exactly a minute's forty are sent; the others are told when to come again."""
    provider = serve(latency=(0.0, 0.3))
    lm = connect(provider, limit=RateLimit(rpm=40, burst=40, max_wait=2.0), store=store_url)
    with Stopwatch() as took:
        outcomes = together(crowd, lm, 100)
    refusals = errors(outcomes, RateLimitedError)
    assert (len(provider.calls), len(refusals)) == (40, 60)
    for refusal in refusals:
        assert 50.0 < refusal.retry_after <= 62.5
        assert refusal.dimension in ("requests", "pacing")
    assert took.seconds < 2.0, "a wait that cannot be served is refused at once"
    assert_nothing_held(lm.pipeline.store)


def test_no_minute_holds_more_tokens_than_the_limit(
    serve: MakeProvider, connect: MakeLM, setting: tuple[Crowd, str]
) -> None:
    """Estimates four times too high are corrected as answers come, so the minute's tokens are used, and no more."""
    crowd, store = setting
    provider = serve(usage=(50, 950), latency=(0.0, 0.25))
    limit = RateLimit(rpm=6000, burst=6000, tpm=40_000, max_wait=2.5)
    lm = connect(provider, limit=limit, max_tokens=3800, store=store)
    outcomes = together(crowd, lm, 64)
    errors(outcomes, RateLimitedError)
    assert 40_000 - 4000 <= provider.tokens_in_window(60.0) <= 40_000, "all but one reservation can be used"
    assert provider.max_in_flight <= 40_000 / 3800, "more was reserved than the minute holds"
    assert_nothing_held(lm.pipeline.store)


@pytest.mark.parametrize("crowd", ["threads", "tasks"])
def test_concurrency_is_never_exceeded_and_always_used(
    serve: MakeProvider, connect: MakeLM, store_url: str, crowd: Crowd
) -> None:
    """Of sixty callers seven are in flight at a time, and nobody is lost."""
    provider = serve(latency=(0.0, 0.08), concurrency=7)
    lm = connect(provider, limit=RateLimit(concurrency=7), store=store_url)
    assert len(answers(together(crowd, lm, 60))) == 60
    assert provider.max_in_flight == 7
    assert_nothing_held(lm.pipeline.store)


# -- processes -------------------------------------------------------------------------------------------------------
SPAWN = mp.get_context("spawn")
Send = Callable[..., "Counter[str]"]


@pytest.fixture
def send_from_two() -> Any:
    """Send from two processes that share a store; how the calls ended."""
    children: list[Any] = []

    def run(provider: Provider, store: str, limit: dict[str, Any], callers: int, calls: int) -> Counter[str]:
        barrier, results = SPAWN.Barrier(2), SPAWN.Queue()
        for _ in range(2):
            arguments = (provider.url, store, limit, callers, calls, barrier, results)
            children.append(SPAWN.Process(target=send, args=arguments, daemon=True))
            children[-1].start()
        ended: Counter[str] = Counter()
        for _ in range(2):
            ended.update(results.get(timeout=90))
        return ended

    yield run
    for child in children:
        if child.is_alive():
            child.kill()
        child.join(10)


def test_two_processes_are_paced_as_one(serve: MakeProvider, sqlite_url: str, send_from_two: Send) -> None:
    """Two processes on one SQLite file keep a limit of twenty a second together, and lose nobody."""
    provider = serve(latency=(0.0, 0.1))
    with Stopwatch() as took:
        ended = send_from_two(provider, sqlite_url, {"rpm": 1200, "burst": 1}, 8, 3)
    assert ended == {"answer": 48}
    assert provider.requests_in_window(took.surely(1.0)) <= 20
    assert len(provider.calls) == 48
    arrivals = [call.received_at for call in provider.calls]
    assert max(arrivals) - min(arrivals) - took.lost < 48 / 20 * 1.5, "the limit was not used"


def test_two_processes_share_a_minute(serve: MakeProvider, sqlite_url: str, send_from_two: Send) -> None:
    """Forty requests a minute are forty for both processes together."""
    provider = serve(latency=(0.0, 0.1))
    ended = send_from_two(provider, sqlite_url, {"rpm": 40, "burst": 40, "max_wait": 2.0}, 40, 1)
    assert ended == {"answer": 40, "RateLimitedError": 40}
    assert len(provider.calls) == 40
