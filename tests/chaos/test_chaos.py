"""Under every fault at once, each call ends in an answer or a typed error, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from dspy.clients.engines.lm15_engine import AsyncLM15Engine, LM15Engine, timeouts_for
from dspy.lm15 import Config, Message, Request, RouterConfig

from dspy_prod import Budget, Cache, CircuitBreaker, RateLimit, Retry
from dspy_prod.testing import Provider
from tests.chaos.workload import FAULTS, Workload, faulty, settle_down
from tests.e2e.support import CHEAP, MODEL, PRICES, fresh_memory, make_lm, until
from tests.stopwatch import Stopwatch

POLICIES: dict[str, Any] = {
    "retry": Retry(attempts=3, backoff=0.01, max_backoff=0.05),
    "breaker": CircuitBreaker(failure_threshold=8, recovery_timeout=0.2, jitter=0.1, success_threshold=2),
    "limit": RateLimit(concurrency=16, max_wait=5),
    "budget": Budget(usd=1000),
    "cache": Cache(max_entries=300),
}


@pytest.fixture
def providers() -> Iterator[list[Provider]]:
    """A primary where three calls in ten go wrong in one of all ways, and a fallback where one does."""
    with (
        Provider(prices=PRICES, latency=(0.0, 0.02), chunk_delay=0.001, faults=faulty(0.3, 1)) as primary,
        Provider(prices=PRICES, latency=(0.0, 0.02), chunk_delay=0.001, faults=faulty(0.1, 2)) as spare,
    ):
        yield [primary, spare]
        assert primary.errors == spare.errors == []


def native(providers: list[Provider], store: str) -> Any:
    """An LM on DSPy's native engine, which bounds itself in time."""
    primary, spare = providers
    fallback = make_lm(spare.url, model=CHEAP, timeout=0.4, store=store)
    return make_lm(primary.url, timeout=0.4, store=store, fallbacks=[fallback], **POLICIES)


def borrowed(providers: list[Provider], store: str) -> Any:
    """An LM on engine objects, whose attempts run in worker threads when they are bounded."""
    primary, spare = providers
    fallback = make_lm(spare.url, model=CHEAP, timeout=0.4, store=store)
    config = RouterConfig(
        api_keys={"openai-chat": "test"},
        base_urls={"openai-chat": primary.url},
        timeouts=timeouts_for(0.4),
        max_connections=200,
    )
    engines = {"engine": LM15Engine(config), "async_engine": AsyncLM15Engine(config)}
    return make_lm("", store=store, fallbacks=[fallback], api_key=None, api_base=None, **engines, **POLICIES)


def assert_paid_for(lm: Any, billed: int) -> None:
    """The ledger knows the price of every attempt, and is never below what the providers billed."""
    store = lm.pipeline.store
    assert store.flush(30)
    total = sum((row[2].cost_nano for row in store.totals()), 0)
    assert sum(row[2].unknown_cost for row in store.totals()) == 0
    assert total >= billed > 0


# Python closes the parts of an abandoned asynchronous generator each on its own, and then complains of the overlap.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize(
    ("make", "store", "loops", "calls"),
    [
        pytest.param(native, "sqlite", 2, 200, marks=pytest.mark.long, id="native-sqlite"),
        pytest.param(native, "memory", 2, 100, id="native-memory"),
        pytest.param(borrowed, "memory", 1, 60, id="borrowed-memory"),
        pytest.param(native, "sqlite", 2, 600, marks=pytest.mark.slow, id="native-sqlite-longer"),
        pytest.param(native, "memory", 2, 300, marks=pytest.mark.slow, id="native-memory-longer"),
        pytest.param(borrowed, "memory", 1, 150, marks=pytest.mark.slow, id="borrowed-memory-longer"),
    ],
)
def test_chaos_leaves_nothing_behind(
    tmp_path: Path, providers: list[Provider], make: Any, store: str, loops: int, calls: int
) -> None:
    """Hundreds of calls in threads and tasks leave no hold, permit, queue, flight or thread, and no bill unpaid."""
    lm = make(providers, fresh_memory() if store == "memory" else f"sqlite:///{tmp_path}/state.db")
    Workload(lm, 20, seed=0, loops=loops).run(30)  # what starts once has started
    settle_down(lm, providers)
    before = threading.active_count()
    work = Workload(lm, calls, seed=3, loops=loops)
    with Stopwatch() as took:
        work.run(90)
    settle_down(lm, providers)
    until(lambda: threading.active_count() <= before, timeout=10, what="ending the threads")
    # Of the calls that had the time, nearly all are answered, by a retry or the fallback. How many have it is up to the
    # machine: on one that has other things to do, attempts time out that would not else, which opens circuits and keeps
    # others in line. There, a tenth of all is enough for the rest to mean something.
    answered = work.outcomes["answer"] + work.outcomes["stream"]
    ended = sum(work.outcomes[early] for early in ("cancelled", "abandoned", "DeadlineExceededError", "LMTimeoutError"))
    assert answered > calls / 10, work.outcomes
    if took.lost < took.wall / 20:  # and a little lost time costs more than its share: a call has several attempts
        assert answered > (0.9 - 2 * took.lost / took.wall) * (calls - ended), (work.outcomes, took)
    assert work.outcomes["cancelled"] > 0
    assert work.outcomes["abandoned"] > 0
    assert_paid_for(lm, sum(provider.bill.nano for provider in providers))
    lm.close()


@pytest.mark.parametrize("end", ["collected", "shut down"])
def test_streams_that_nobody_closes_speak_against_nobody(end: str) -> None:
    """Streams that the garbage collector or the end of their loop closes are cancelled; the breaker counts none."""
    left: list[Any] = []

    async def abandon(lm: Any) -> None:
        for number in range(30):
            request = Request(MODEL, (Message.user(f"question {number}"),), config=Config(max_tokens=10))
            events = lm._async_engine_spec.stream(request)
            async for _ in events:
                break
            never_closed = [events]
            never_closed.append(never_closed)
            if end == "shut down":
                left.append(events)
        gc.collect()

    with Provider(prices=PRICES, answer="one two three four five six", chunk_delay=0.005) as provider:
        lm = make_lm(provider.url, breaker=CircuitBreaker(failure_threshold=1))
        asyncio.run(abandon(lm))
        left.clear()
        settle_down(lm, [provider])
        assert [record.outcome for record in lm.ledger.records()] == ["cancelled"] * 30
        assert lm.pipeline.primary.breaker.snapshot().total_failures == 0


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_thousand_calls_in_chaos(tmp_path: Path, providers: list[Provider]) -> None:
    """20,000 calls end as 300 do, and memory stays flat."""
    lm = native(providers, f"sqlite:///{tmp_path}/state.db")
    process = psutil.Process(os.getpid())
    rounds: list[tuple[float, int, int]] = []
    outcomes: Counter[str] = Counter()
    met: Counter[str] = Counter()
    billed = 0
    threads = 0
    for number in range(10):
        began = time.monotonic()
        work = Workload(lm, 2_000, seed=number)
        work.run(600)
        settle_down(lm, providers, timeout=60)
        took = time.monotonic() - began
        outcomes += work.outcomes
        for provider in providers:
            billed += provider.bill.nano
            met.update(call.fault for call in provider.calls if call.fault is not None)
            provider.reset()
        assert lm.pipeline.store.flush(30)
        gc.collect()
        threads = threads or threading.active_count()
        assert threading.active_count() <= threads
        rounds.append((took, process.memory_info().rss, threading.active_count()))
        print(f"round {number}: {took:.1f} s, {rounds[-1][1] / 1e6:.1f} MB, {dict(work.outcomes)}")
    assert sum(outcomes.values()) == 20_000
    assert met.keys() == {fault.name for fault in FAULTS}
    assert_paid_for(lm, billed)
    # From the third round on, when all pools and caches are full.
    growth = rounds[-1][1] - rounds[2][1]
    print(f"all: {dict(outcomes)}; growth {growth / 1e6:.1f} MB; billed {billed / 1e9:.6f} USD")
    assert growth < 20_000_000
    lm.close()
