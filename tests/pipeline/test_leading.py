"""Who leads identical calls ends their flight, whatever befalls it."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from dspy.utils.exceptions import LMUnexpectedError

import dspy_prod
from dspy_prod.pipeline import flow
from dspy_prod.pipeline.effects import Wait
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.testing import Hang, Provider
from tests.e2e.support import until
from tests.integration.support import Caller


def test_a_leader_that_fails_before_it_asks_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    with Provider() as provider:
        lm = dspy_prod.LM("openai/m", api_base=provider.url, api_key="k", store="memory://leading", engine="lm15")
        cache, flights = lm.pipeline.cache, lm.pipeline.flights
        assert cache is not None

        def broken(*_: Any) -> Any:
            raise MemoryError

        with monkeypatch.context() as patched:
            patched.setattr(type(cache), "fresh", broken)
            with pytest.raises(LMUnexpectedError):
                lm("hello")
        assert len(flights) == 0
        with dspy_prod.call_context(deadline=5.0):
            assert lm("hello")
        lm.close()


def test_an_embedder_that_fails_before_it_asks_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor those of the texts before it, which it leads already."""
    with Provider() as provider:
        embedder = dspy_prod.Embedder(
            "openai/e", api_base=provider.url, api_key="k", store="memory://leading-texts",
            prices={"openai/e": dspy_prod.Price(input=0.02, output=0.0)},
        )  # fmt: skip
        pipeline = embedder.pipeline
        cache, flights = pipeline.cache, pipeline.flights
        assert cache is not None
        peeked: list[bytes] = []

        def broken(key: bytes) -> Any:
            peeked.append(key)
            if len(peeked) == 5:  # the three were looked for before
                raise MemoryError

        with monkeypatch.context() as patched:
            patched.setattr(cache, "peek", broken)
            with pytest.raises(MemoryError):
                embedder(["one", "two", "three"])
        assert len(peeked) == 5
        assert len(flights) == 0
        assert embedder(["one", "two", "three"]).shape[0] == 3
        embedder.close()


def test_a_leader_that_is_interrupted_as_he_is_told_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither here nor in other processes."""
    with Provider() as provider:
        lm = dspy_prod.LM("openai/m", api_base=provider.url, api_key="k", store=f"sqlite:///{tmp_path}/state.db")
        cache, store = lm.pipeline.cache, lm.pipeline.store
        assert cache is not None
        lead = cache.lead

        def interrupted(*arguments: Any, **more: Any) -> Any:
            lead(*arguments, **more)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(cache, "lead", interrupted)
            with pytest.raises(KeyboardInterrupt):
                lm("hello")
        assert len(store.flights._claims) == 0
        with dspy_prod.call_context(deadline=5.0):
            assert lm("hello")
        lm.close()


@pytest.mark.parametrize("told", [KeyboardInterrupt, True])
def test_a_caller_without_a_claim_does_not_end_that_of_another_lm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: type[BaseException] | bool
) -> None:
    """Of one process and store: one is interrupted as he is told that he follows, or asks alone, as all do
    that waited for an upstream's verdict, and is late; the other one leads on, and other processes follow it."""
    with Provider() as provider:
        at = {"api_base": provider.url, "api_key": "k", "store": f"sqlite:///{tmp_path}/state.db"}
        leads = dspy_prod.LM("openai/m", **at)
        other = dspy_prod.LM("openai/m", **at, fallbacks=[dspy_prod.LM("openai/n", **at)])
        cache = other.pipeline.cache
        assert leads.pipeline.flights is not other.pipeline.flights
        assert leads.pipeline.store is other.pipeline.store
        provider.hold()
        leader = Caller(lambda: leads("hello"))
        provider.wait_until(lambda it: it.in_flight == 1)
        lead = cache.lead

        def telling(*arguments: Any, **more: Any) -> Any:
            assert lead(*arguments, **more) is False
            if isinstance(told, bool):
                return told
            raise told

        def late() -> Any:
            with dspy_prod.call_context(deadline=0.5):
                return other("hello")

        with monkeypatch.context() as patched:
            patched.setattr(cache, "lead", telling)
            error = Caller(late).outcome(10)
        assert isinstance(error, dspy_prod.DeadlineExceededError if told is True else KeyboardInterrupt)
        assert len(leads.pipeline.store.flights._claims) == 1
        provider.release()
        assert leader.outcome(10)
        leads.close()
        other.close()


def test_who_is_passed_the_lead_looks_whether_the_answer_came_meanwhile() -> None:
    """Somebody who asked anew has filled the cache."""
    with Provider() as provider:
        lm = dspy_prod.LM("openai/m", api_base=provider.url, api_key="k", store="memory://leading-meanwhile")

        async def scene() -> Any:
            provider.faults = [Hang(30)]  # type: ignore[assignment]
            leader = asyncio.create_task(lm.acall("hello"))
            await asyncio.to_thread(provider.wait_until, lambda it: it.in_flight == 1)
            follower = asyncio.create_task(lm.acall("hello"))
            await asyncio.to_thread(until, lambda: lm.pipeline.flights.following() == 1)
            with dspy_prod.call_context(cache="refresh"):
                await lm.acall("hello")
            leader.cancel()
            return await asyncio.wait_for(follower, 10)

        assert isinstance(asyncio.run(scene()), list)
        assert len(provider.calls) == 2
        assert sorted(record.outcome for record in lm.ledger.records()) == ["cached", "cancelled", "ok"]
        lm.close()


@pytest.mark.parametrize("end", ["cancelled", "collected", "interrupted"])
def test_an_answer_that_is_paid_is_kept_though_writing_it_down_was_cut_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str
) -> None:
    """The run waits until it is durable; who is cut off then leaves the answer to those who asked the same."""
    with Provider() as provider:
        lm = dspy_prod.LM("openai/m", api_base=provider.url, api_key="k", store="memory://leading-paid")
        run = dspy_prod.Run("r", calls=9, store=f"sqlite:///{tmp_path}/run.db", keep_answers=True)
        writing = threading.Event()

        def cut(*_: Any) -> Any:
            writing.set()
            yield Wait(None, time.monotonic() + (0 if end == "interrupted" else 30))
            raise KeyboardInterrupt

        async def scene() -> None:
            task = asyncio.create_task(lm.acall("hello"))
            await asyncio.to_thread(writing.wait, 30)
            if end == "cancelled":
                task.cancel()
            else:
                task.get_coro().close()  # as the garbage collector does
                task.cancel()
            with suppress(asyncio.CancelledError, RuntimeError):
                await task

        with monkeypatch.context() as patched, dspy_prod.call_context(run=run):
            patched.setattr(flow, "keeping", cut)
            if end == "interrupted":
                with pytest.raises(KeyboardInterrupt):
                    lm("hello")
            else:
                asyncio.run(scene())
        assert REAPER.flush()
        assert len(lm.pipeline.flights) == 0
        assert isinstance(lm("hello"), list)
        assert len(provider.calls) == 1
        lm.close()
