"""All threads that calls may have are taken: a further call is not begun, costs nothing, and says why."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMLockTimeoutError, LMTimeoutError

from dspy_prod import Budget, call_context
from dspy_prod.pipeline.upstream import deadline
from dspy_prod.pipeline.upstream.workers import Workers
from dspy_prod.testing import Hang, ScriptedEngine
from tests.compose.support import MODEL as SCRIPTED
from tests.compose.support import over
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import account, assert_nothing_held, request, until
from tests.e2e.test_deadline import _warm  # noqa: F401  (a fixture)


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """One thread for all calls, and nobody in it yet."""
    workers = Workers(limit=1)
    monkeypatch.setattr(deadline, "WORKERS", workers)
    return workers


@pytest.fixture
def taken(crowd: Workers) -> Any:
    """Somebody's attempt hangs in that thread."""
    over = threading.Event()
    crowd.submit(lambda: over.wait(30))
    yield over
    over.set()


@pytest.mark.usefixtures("_warm", "taken")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_call_without_a_thread_costs_nothing(serve: MakeProvider, connect: MakeLM, streaming: bool) -> None:
    """It was charged its bound, for no answer within 20 s, at once: the provider had not seen it."""
    provider = serve()
    lm = connect(provider, engine="litellm", timeout=20, budget=Budget(usd=1, name="all"))
    lm.pipeline.primary.upstream.ready = True
    with pytest.raises(LMLockTimeoutError, match="All 1 threads"), call_context(deadline=20):
        list(lm._engine_spec.stream(request())) if streaming else lm("a question")
    (record,) = lm.ledger.records()
    assert (record.outcome, record.cost_nano, record.estimated) == ("error", 0, False)
    assert (account(lm).spent, account(lm).unconfirmed) == (0, 0)
    assert provider.calls == []
    assert lm.pipeline.primary.breaker.snapshot().failures == 0
    assert_nothing_held(lm.pipeline.store)


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("streaming", [False, True])
def test_of_an_engine_of_the_users_own_it_is_known_too(streaming: bool) -> None:
    """It was never handed the request."""
    engine = ScriptedEngine(["yes"])
    lm: Any = over(engine, budget=Budget(usd=1, name="all"))
    with pytest.raises(LMLockTimeoutError), call_context(deadline=20):
        list(lm._engine_spec.stream(request(model=SCRIPTED))) if streaming else lm("a question")
    assert [(record.outcome, record.cost_nano) for record in lm.ledger.records()] == [("error", 0)]
    assert engine.calls == 0


@pytest.mark.usefixtures("_warm", "taken")
def test_a_call_goes_where_no_thread_is_needed(serve: MakeProvider, connect: MakeLM) -> None:
    """A task needs none, and a route of the native engine neither."""
    provider = serve(answer="from there")
    lm = connect(
        provider, engine="litellm", timeout=20, budget=Budget(usd=1, name="all"),
        fallbacks=[dspy.LM("openai/e2e-cheap", api_base=provider.url, api_key="test", engine="lm15")],
    )  # fmt: skip
    lm.pipeline.primary.upstream.ready = True
    assert lm("a question") == ["from there"]
    assert asyncio.run(lm.acall("a question")) == ["from there"]
    assert [call.model for call in provider.calls] == ["e2e-cheap", "e2e"]


@pytest.mark.usefixtures("_warm", "crowd")
def test_a_thread_is_free_again_when_what_hung_in_it_has_ended(serve: MakeProvider, connect: MakeLM) -> None:
    """An attempt that was given up takes its thread for as long as it goes on."""
    provider = serve(faults=[Hang(seconds=1.5)])
    lm = connect(provider, engine="litellm", timeout=0.8, budget=Budget(usd=1, name="all"))
    with pytest.raises(LMTimeoutError):
        lm("one")
    with pytest.raises(LMLockTimeoutError):
        lm("two")
    until(lambda: lm.pipeline.store.holds() == 0, 10, "the end of the attempt")
    until(lambda: deadline.WORKERS._idle == 1, 10, "an idle thread")
    lm("three")
    assert len(provider.calls) == 2
