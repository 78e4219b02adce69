"""Nothing delays a call between its admission and the wire, or else its limiter hears of it."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from dspy_prod import RateLimit
from dspy_prod.pipeline.upstream.deadline import BoundedTransport, PacedAsyncTransport
from dspy_prod.testing import FakeClock
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import records, until

LIMIT = RateLimit(rpm=60, burst=1)


def call(lm: Any, way: str) -> None:
    if way == "sync":
        lm("q")
        return

    async def scene() -> None:
        await lm.acall("q")
        await lm.aclose()

    asyncio.run(scene())


def next_in(lm: Any) -> float:
    """Seconds until the next call may go."""
    return float(lm.preview("another").wait)


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_connection_that_opens_slowly_delays_the_calls_after_it(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What counts for the limiter is when the request goes out, not when it was admitted."""
    clock = FakeClock()
    lm = connect(serve(), limit=LIMIT, clock=clock)
    transport: Any = BoundedTransport if way == "sync" else PacedAsyncTransport
    opening = transport._open

    def slowly(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.advance(0.5)
        return opening(self, *args, **kwargs)

    monkeypatch.setattr(transport, "_open", slowly)
    call(lm, way)
    assert next_in(lm) == pytest.approx(1.04, abs=0.02)


@pytest.mark.parametrize("engine", ["lm15", "litellm"])
@pytest.mark.parametrize("way", ["sync", "async"])
def test_the_engine_is_built_before_the_call_is_admitted(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str
) -> None:
    """Importing and building takes long the first time; it must not lie between an admission and its request."""
    lm = connect(serve(), limit=LIMIT, engine=engine)
    upstream, store = lm.pipeline.primary.upstream, lm.pipeline.store
    admit, ready = store.admit, []

    def watched(ask: Any) -> Any:
        ready.append(upstream.ready)
        return admit(ask)

    store.admit = watched
    assert not upstream.ready
    call(lm, way)
    assert ready == [True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("options", [{}, {"timeout": 100}, {"limit": LIMIT}, {"limit": LIMIT, "timeout": 100}])
def test_a_call_that_is_only_collected_is_settled_as_cancelled(
    serve: MakeProvider, connect: MakeLM, options: dict[str, Any]
) -> None:
    """Its coroutine ends in somebody else's context, perhaps under the store's own lock; it must not go on there."""
    provider = serve(latency=20.0)
    lm = connect(provider, **options)

    async def scene() -> None:
        asyncio.ensure_future(lm.acall("q"))  # noqa: RUF006  (nobody keeps it)
        await asyncio.to_thread(provider.wait_until, lambda each: each.in_flight == 1)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(scene())
    loop.close()
    store, upstream = lm.pipeline.store, lm.pipeline.primary.upstream
    with store._lock:  # any allocation under it may run the collector
        del loop
        upstream._native_async.clear()  # its connections keep the loop
        gc.collect()
    # On a busy machine a thread of the loop may still be ending, and hold what is to be collected.
    until(lambda: gc.collect() >= 0 and bool(records(lm)), what="collecting the call")
    (record,) = records(lm)
    assert (record.outcome, record.error) == ("cancelled", "GeneratorExit")
    assert len(provider.calls) == 1
    assert store.holds() == 0
