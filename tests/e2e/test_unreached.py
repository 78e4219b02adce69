"""An upstream that was never reached has worked for nobody: whatever ends the attempt, it costs nothing.

A host that drops packets, behind a firewall or a route that is gone, is the common case: a time-out ended each attempt,
and each was charged with its bound, until a budget was spent on a provider that had not heard of one of them.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal

import pytest
from dspy.utils.exceptions import LMTimeoutError

import dspy_prod
from dspy_prod import Budget, DeadlineExceededError, Embedder, Price, RateLimit, call_context
from dspy_prod.testing import Hang
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import MODEL, account, assert_nothing_held, fresh_memory, make_lm, request, until
from tests.e2e.test_deadline import ENGINES, LIFE, WAYS, Way, _warm  # noqa: F401  (a fixture)
from tests.stopwatch import Stopwatch

SHORT = 0.4


@pytest.fixture
def full() -> Iterator[str]:
    """The address of a port whose queue is full: the kernel drops whatever wants to connect."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            with suppress(BlockingIOError):
                each.connect(listening.getsockname())
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        for each in waiting:
            each.close()


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a server that accepts and never says a word, so that no TLS comes about."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)
        yield f"https://127.0.0.1:{listening.getsockname()[1]}/v1"


def ask(lm: Any, way: Way, deadline: float | None = None, leave_after: float | None = None) -> BaseException:
    """What one call ends with; a task that calls may be cancelled."""

    async def asking() -> None:
        if way == "async":
            await lm.acall("hello")
        else:
            async for _ in lm._async_engine_spec.stream(request("hello")):
                pass

    async def left() -> None:
        task = asyncio.create_task(asking())
        await asyncio.wait([task], timeout=leave_after)
        task.cancel()
        try:
            await task
        finally:
            await lm.pipeline.aclose()

    with call_context(deadline=deadline):
        try:
            if way == "sync":
                lm("hello")
            elif way == "sync stream":
                list(lm._engine_spec.stream(request("hello")))
            else:
                asyncio.run(left())
        except BaseException as error:
            return error
    raise AssertionError("it was answered")


def booked(lm: Any) -> list[tuple[str, float, bool]]:
    """(outcome, dollars, whether that is a bound) of each attempt, when it has ended: LiteLLM may go on with it."""
    until(lambda: lm.ledger.records(), 8.0, "a record")
    return [(record.outcome, record.cost_usd, record.estimated) for record in lm.ledger.records()]


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("address", ["full", "mute"])
@pytest.mark.parametrize("ends", ["timeout", "deadline"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_time_limit_that_passes_before_anybody_was_reached_costs_nothing(
    engine: str, way: Way, ends: Literal["timeout", "deadline"], address: str, request: pytest.FixtureRequest
) -> None:
    """The address took nothing of the request, so there is nothing that a provider could bill, and no place is used."""
    lm = make_lm(
        request.getfixturevalue(address), engine=engine, timeout=SHORT if ends == "timeout" else 30.0,
        budget=Budget(usd=1, name="all"), limit=RateLimit(rpm=5),
    )  # fmt: skip
    with Stopwatch() as watch:
        error = ask(lm, way, deadline=SHORT if ends == "deadline" else None)
    assert watch.seconds < 4.0, "LiteLLM takes whole seconds; a connection of its own the native engine makes in ten"
    [(outcome, *cost)] = booked(lm)
    assert type(error) is (LMTimeoutError if ends == "timeout" else DeadlineExceededError)
    assert outcome == "timeout"
    assert cost == [0.0, False]
    assert (account(lm).spent, account(lm).unconfirmed) == (0, 0)
    assert_nothing_held(lm.pipeline.store)
    lm.close()


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("way", ["async", "async stream"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_task_that_is_cancelled_before_anybody_was_reached_costs_nothing(engine: str, way: Way, full: str) -> None:
    """As where a client leaves whose request has got no further."""
    lm = make_lm(full, engine=engine, timeout=30.0, budget=Budget(usd=1, name="all"))
    assert isinstance(ask(lm, way, leave_after=SHORT), asyncio.CancelledError)
    assert booked(lm) == [("cancelled", 0.0, False)]
    assert_nothing_held(lm.pipeline.store)
    lm.close()


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("way", ["async", "async stream"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_task_that_is_cancelled_when_its_request_is_out_costs_its_bound(
    engine: str, way: Way, serve: MakeProvider, connect: MakeLM
) -> None:
    """The provider has it, and may bill it."""
    provider = serve(faults=Hang())
    lm = connect(provider, engine=engine, timeout=30.0, budget=Budget(usd=1, name="all"))

    assert isinstance(ask(lm, way, leave_after=LIFE), asyncio.CancelledError)
    assert len(provider.calls) == 1
    [(outcome, cost, estimated)] = booked(lm)
    assert (outcome, estimated) == ("cancelled", True)
    assert cost > 0


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("way", ["sync", "async"])
def test_texts_for_vectors_that_reach_nobody_cost_nothing(way: str, full: str) -> None:
    """An embedder has the same flow and an engine of its own."""
    embedder = Embedder(
        MODEL, api_base=full, api_key="test", timeout=SHORT, retry=False, caching=False,
        prices={MODEL: Price(input=1, output=0)}, budget=Budget(usd=1, name="all"), store=fresh_memory(),
    )  # fmt: skip
    with pytest.raises(LMTimeoutError):
        embedder(["hello"]) if way == "sync" else asyncio.run(embedder.acall(["hello"]))
    assert booked(embedder) == [("timeout", 0.0, False)]


def test_of_an_engine_of_the_users_own_nobody_knows() -> None:
    """It was handed the request and may have sent it, so the bound is charged."""

    class Silent:
        waits = True

        def complete(self, request: Any) -> Any:
            time.sleep(SHORT * 2)
            raise TimeoutError

        def stream(self, request: Any) -> Any:
            raise NotImplementedError

    lm = dspy_prod.LM(
        MODEL, engine=Silent(), timeout=SHORT, retry=False, cache=False, max_tokens=100, store=fresh_memory(),
        prices={MODEL: Price(input=1, output=1)}, budget=Budget(usd=1, name="all"),
    )  # fmt: skip
    assert isinstance(ask(lm, "sync"), LMTimeoutError)
    [(outcome, cost, estimated)] = booked(lm)
    assert (outcome, estimated) == ("timeout", True)
    assert cost > 0
