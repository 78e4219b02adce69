"""Closing an LM while it is called ends no call: a connection in use is closed when its request is done."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from dspy_prod.pipeline.upstream.deadline import BoundedTransport, PacedAsyncTransport
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import records

CALLS = 12
BARE = {"retry": False, "breaker": False, "cache": False, "engine": "lm15"}  # nothing mends what a close breaks


def ask(lm: Any, name: str, errors: list[BaseException]) -> None:
    for number in range(CALLS):
        try:
            lm(f"{name} {number}")
        except Exception as error:
            errors.append(error)


async def aask(lm: Any, name: str, errors: list[BaseException]) -> None:
    for number in range(CALLS):
        try:
            await lm.acall(f"{name} {number}")
        except Exception as error:
            errors.append(error)


@pytest.fixture
def retired(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The transports that were closed, in whatever way."""
    found: list[Any] = []
    for kind in (BoundedTransport, PacedAsyncTransport):
        retire: Any = kind.retire

        def noted(self: Any, retire: Any = retire) -> Any:
            found.append(self)
            return retire(self)

        monkeypatch.setattr(kind, "retire", noted)
    return found


@pytest.mark.parametrize("close", ["close", "aclose"])
def test_calls_of_threads_and_tasks_go_on_while_the_lm_is_closed(
    serve: MakeProvider, connect: MakeLM, retired: list[Any], close: str
) -> None:
    """Each has its answer and its record, and is billed once; and no connection is left open."""
    provider = serve(latency=0.01)
    lm = connect(provider, **BARE)
    errors: list[BaseException] = []

    async def scene() -> None:
        threads = [threading.Thread(target=ask, args=(lm, f"thread {one}", errors)) for one in range(4)]
        for thread in threads:
            thread.start()
        tasks = [asyncio.ensure_future(aask(lm, f"task {one}", errors)) for one in range(4)]
        while any(thread.is_alive() for thread in threads) or not all(task.done() for task in tasks):
            if close == "aclose":
                await lm.pipeline.aclose()
            else:
                await asyncio.to_thread(lm.pipeline.close)
            await asyncio.sleep(0.002)
        await lm.aclose()

    asyncio.run(scene())
    assert errors == []
    assert len(provider.calls) == len(records(lm)) == 8 * CALLS
    assert len(retired) > 3
    left = [transport.pool_stats() for transport in retired]
    assert [stats for stats in left if stats["idle"] or stats["in_use"]] == []
