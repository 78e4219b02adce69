"""A task that is left in the middle (its loop is closed, nobody holds it) gives back what it has, in a run too."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

import dspy_prod
from dspy_prod import RateLimit, Retry, Run
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.testing import FaultPlan, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import assert_nothing_held, fresh_memory, outcome, until

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def leave(lm: Any, run: Run, waits: Callable[[], object]) -> None:
    """Leave a call once it waits."""

    async def begun() -> None:
        with dspy_prod.call_context(run=run):
            task = asyncio.ensure_future(lm.acall("left"))
        await asyncio.to_thread(until, waits)
        task._log_destroy_pending = False  # type: ignore[attr-defined]

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begun())
    loop.close()


def is_collected(condition: Callable[[], object]) -> None:
    """Wait until it holds, with the garbage collector coming by."""

    def seen() -> bool:
        gc.collect()
        return REAPER.flush() and bool(condition())

    until(seen, timeout=10)


def test_its_seat_is_the_next_ones(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """What waited in line had its seat until the run was over: nobody else was sent."""
    provider = serve()
    provider.hold()
    lm, run = connect(provider, limit=RateLimit(concurrency=1), store=store_url), Run("it", usd=5, store=store_url)
    store = lm.pipeline.store
    first = threading.Thread(target=lambda: outcome(lambda: lm("has the seat")), daemon=True)
    first.start()
    provider.wait_until(lambda p: p.in_flight == 1)
    leave(lm, run, lambda: store.waiting() == 1)
    provider.release()
    first.join(10)
    is_collected(lambda: store.holds() == 0)
    assert lm("has it now")
    assert run.used().held_usd == 0.0
    assert_nothing_held(store)


@pytest.mark.parametrize("within", [1, 2])
def test_no_run_holds_it_in_a_pause(serve: MakeProvider, connect: MakeLM, store_url: str, within: int) -> None:
    provider = serve(faults=FaultPlan.script([Status(503, retry_after=25)]))
    lm = connect(provider, retry=Retry(attempts=5), store=store_url)
    outer, inner = Run("outer", usd=5, store=fresh_memory()), Run("inner", usd=5, store=store_url)
    paused = threading.Event()
    remove = dspy_prod.add_listener(lambda event: paused.set() if event.name == "retry" else None)
    with dspy_prod.call_context(run=outer) if within == 2 else nullcontext():
        leave(lm, inner, lambda: paused.is_set() and len(inner._watchers) == 1)
    remove()
    is_collected(lambda: not len(inner._watchers) and not len(outer._watchers))


def test_an_outage_is_no_longer_waited_for(serve: MakeProvider, connect: MakeLM) -> None:
    """It counted as one that listens, so that a silence which nobody had heard for hours had begun hours ago."""
    provider = serve(faults=Status(503, retry_after=25))
    lm, run = connect(provider), Run("it", usd=5, outage=600, store=fresh_memory())
    leave(lm, run, lambda: run.outages.models)
    is_collected(lambda: run.outages.models == ())
