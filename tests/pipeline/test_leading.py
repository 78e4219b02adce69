"""Who leads identical calls ends their flight, whatever befalls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dspy.utils.exceptions import LMUnexpectedError

import dspy_prod
from dspy_prod.testing import Provider
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
