"""An event loop is closed while a call of its leads others, and nobody cancels it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod.testing import Provider
from tests.e2e.support import until as wait_until
from tests.integration.support import Caller, following

# What such a call leaves open is collected at some time, and says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def left(call: Callable[[], Coroutine[Any, Any, Any]], provider: Provider) -> Callable[[], Any]:
    """Begin a call whose loop is closed once it is asked upstream; gives what closes it, and keeps its task."""
    loop = asyncio.new_event_loop()

    async def begin() -> Any:
        task = asyncio.ensure_future(call())
        while provider.in_flight < 1:  # noqa: ASYNC110  (nobody announces it)
            await asyncio.sleep(0.01)
        return task

    task = loop.run_until_complete(begin())

    def close() -> Any:
        loop.close()
        task._log_destroy_pending = False
        return task

    return close


@pytest.mark.parametrize("store", ["memory://", "sqlite"])
def test_a_follower_asks_in_the_place_of_a_call_whose_loop_was_closed(store: str, tmp_path: Path) -> None:
    """It waited for ever. So did whoever asked the same later."""
    url = store if store != "sqlite" else f"sqlite:///{tmp_path}/state.db"
    with Provider() as provider:
        lm = dspy_prod.LM("openai/gpt-4o-mini", api_base=provider.url, api_key="k", store=url)
        provider.hold()
        close = left(lambda: lm.acall("same"), provider)
        follower = Caller(lambda: lm("same"))
        wait_until(lambda: following(lm) == 1)
        task = close()
        provider.release()
        assert isinstance(follower.outcome(10), list)
        assert Caller(lambda: lm("same")).outcome(10) == follower.outcome()
        assert len(lm.pipeline.flights) == 0
        assert not task.done()


@pytest.mark.parametrize("store", ["memory://", "sqlite"])
def test_whoever_comes_after_it_was_closed_asks_himself(store: str, tmp_path: Path) -> None:
    url = store if store != "sqlite" else f"sqlite:///{tmp_path}/state.db"
    with Provider() as provider:
        lm = dspy_prod.LM("openai/gpt-4o-mini", api_base=provider.url, api_key="k", store=url)
        provider.hold()
        task = left(lambda: lm.acall("same"), provider)()
        provider.release()
        assert isinstance(Caller(lambda: lm("same")).outcome(10), list)
        assert isinstance(Caller(lambda: asyncio.run(lm.acall("same"))).outcome(10), list)
        assert len(lm.pipeline.flights) == 0
        assert not task.done()


def test_texts_are_asked_in_the_place_of_a_call_whose_loop_was_closed() -> None:
    with Provider() as provider:
        embedder = dspy_prod.Embedder(
            "openai/text-embedding-3-small", api_base=provider.url, api_key="k", caching=dspy_prod.Cache(persist=False)
        )
        provider.hold()
        close = left(lambda: embedder.acall(["a", "b"]), provider)
        follower = Caller(lambda: embedder(["b", "a"]).shape[0])
        wait_until(lambda: following(embedder) == 2)
        task = close()
        provider.release()
        assert follower.outcome(10) == 2
        assert len(embedder.pipeline.flights) == 0
        assert not task.done()
