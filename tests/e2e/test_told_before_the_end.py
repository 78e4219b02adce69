"""A usage that a provider has told is what is charged, by whatever its stream is cut off before its end."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any, Literal

import pytest

from dspy_prod import Budget, DeadlineExceededError, call_context
from dspy_prod.compat.dspy import engines_of
from dspy_prod.testing import ScriptedEngine
from tests.e2e.halting import STOP, Halting, told, usage, words
from tests.e2e.support import account, assert_nothing_held, make_lm, request, until, upstream
from tests.e2e.test_deadline import ENGINES, LIFE, _warm  # noqa: F401  (a fixture)
from tests.pipeline.support import answer

AFTER = 0.3
"""Seconds in which what has arrived is surely read."""
COST = 3 * 150 + 1 * 600
"""Nano-USD of three tokens in and one out."""

End = Literal["reset", "deadline", "cancelled", "interrupted"]


def cut_off(lm: Any, way: str, end: End, provider: Halting) -> None:
    """A stream that ends so soon after its first word."""

    def shown(event: Any) -> None:
        if event.type == "delta" and end == "reset":
            threading.Timer(AFTER, provider.reset).start()
        if event.type == "delta" and end == "interrupted":
            threading.Timer(AFTER, os.kill, (os.getpid(), signal.SIGINT)).start()

    async def read() -> None:
        async for event in engines_of(lm)[1].stream(request()):
            shown(event)
            if event.type == "delta" and end == "cancelled":
                task = asyncio.current_task()
                assert task is not None
                asyncio.get_running_loop().call_later(AFTER, task.cancel)

    async def in_task() -> None:
        try:
            await read()
        finally:
            await lm.pipeline.aclose()

    def call() -> None:
        with call_context(deadline=LIFE if end == "deadline" else None):
            if way == "async stream":
                asyncio.run(in_task())
            else:
                for event in engines_of(lm)[0].stream(request()):
                    shown(event)

    if (way, end) == ("async stream", "reset"):  # whoever carries it may have it for the end
        with suppress(Exception):
            call()
        return
    with pytest.raises(BaseException) as caught:
        call()
    kinds = {"deadline": DeadlineExceededError, "cancelled": asyncio.CancelledError, "interrupted": KeyboardInterrupt}
    assert isinstance(caught.value, kinds.get(end, Exception))


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize(
    ("way", "end", "outcome"),
    [
        ("sync stream", "reset", "error"),
        ("sync stream", "deadline", "timeout"),
        ("sync stream", "interrupted", "cancelled"),
        ("async stream", "reset", "error"),
        ("async stream", "deadline", "timeout"),
        ("async stream", "cancelled", "cancelled"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_usage_that_was_told_is_charged_by_whatever_a_stream_is_cut_off(
    engine: str, way: str, end: End, outcome: str
) -> None:
    """It was after a reset by way of LiteLLM; a cancelled task, Ctrl-C or a deadline cost the bound."""
    if (engine, way, end) == ("litellm", "async stream", "reset"):
        outcome = "ok"  # aiohttp has the end of the connection for the end of the answer, and all was told
    with Halting(words("one"), STOP, told(3, 1)) as provider:
        lm = make_lm(provider.url, engine=engine, budget=Budget(usd=1.0))
        cut_off(lm, way, end, provider)
        until(lambda: upstream(lm), 15, "the end of the attempt")  # LiteLLM's goes on until its own, rounded time-out
        [record] = upstream(lm)
        assert (record.outcome, record.cost_nano, record.estimated) == (outcome, COST, False)
        assert (record.input_tokens, record.output_tokens) == (3, 1)
        assert account(lm) == (COST, 0, 0)
        assert_nothing_held(lm.pipeline.store)
        lm.close()


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("way", ["sync stream", "async stream"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "events",
    [[words("one", **usage(3, 1))], [words("one"), STOP, told(3, 1), words("two")]],
    ids=["a running count", "more behind it"],
)
def test_a_usage_that_may_have_grown_is_not_believed(events: list[Any], engine: str, way: str) -> None:
    """Then the bound is charged, as nobody knows."""
    with Halting(*events) as provider:
        lm = make_lm(provider.url, engine=engine, budget=Budget(usd=1.0))
        cut_off(lm, way, "reset" if way == "sync stream" else "cancelled", provider)
        [record] = upstream(lm)
        assert (record.outcome, record.estimated) == ("error" if way == "sync stream" else "cancelled", True)
        assert record.cost_nano is not None
        assert record.cost_nano > COST
        lm.close()


def test_the_end_that_a_worker_has_heard_counts_although_its_reader_is_late() -> None:
    """An engine object's stream was all there while its consumer held the first word past the deadline."""
    engine: Any = ScriptedEngine(answer(1, text="one two three"))
    lm: Any = make_lm("", api_key=None, api_base=None, engine=engine, budget=Budget(usd=1.0))

    def read_slowly() -> None:
        with call_context(deadline=0.5):
            for event in engines_of(lm)[0].stream(request()):
                if event.type == "delta":
                    time.sleep(0.6)

    with pytest.raises(DeadlineExceededError):
        read_slowly()
    until(lambda: upstream(lm), 15, "the end of the attempt")
    [record] = upstream(lm)
    assert (record.outcome, record.cost_nano, record.estimated) == ("timeout", 10 * 150 + 1 * 600, False)
