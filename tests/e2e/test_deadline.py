"""A deadline ends a call, whatever the upstream does: hang, trickle, or answer too late."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing
from typing import Any, Literal, NamedTuple

import pytest
from dspy.utils.exceptions import LMTimeoutError, LMTransportError

from dspy_prod import Budget, DeadlineExceededError, Retry, call_context
from dspy_prod.testing import Hang, Provider, Trickle
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.halting import DONE, STOP, Halting, usage, words
from tests.e2e.support import Pool, account, assert_nothing_held, charged, make_lm, request, until, upstream
from tests.stopwatch import Stopwatch

LATEST = 1.15
"""Seconds for a deadline of one second. The bar is 1.1 s; 0.05 s more are for a busy CI."""
LIFE = 2.5
"""Seconds of a deadline before which a request surely leaves."""

Way = Literal["sync", "async", "sync stream", "async stream"]
WAYS: list[Way] = ["sync", "async", "sync stream", "async stream"]
ENGINES = ["lm15", "litellm"]


class Ended(NamedTuple):
    """What arrived, seconds by the clock, and seconds on a machine that has nothing else to do."""

    received: list[Any]
    wall: float
    seconds: float


def call(lm: Any, way: Way, deadline: float | None = None) -> Ended:
    """One call that must end by its deadline."""
    received: list[Any] = []

    async def in_task() -> None:
        try:
            if way == "async":
                received.append(await lm.acall("a question"))
            else:
                async for event in lm._async_engine_spec.stream(request()):
                    received.append(event)
        finally:
            took.append(time.monotonic() - begin)
            await lm.pipeline.aclose()

    took: list[float] = []
    with Stopwatch() as watch, call_context(deadline=deadline):
        begin = time.monotonic()
        try:
            if way == "sync":
                received.append(lm("a question"))
            elif way == "sync stream":
                received.extend(lm._engine_spec.stream(request()))
            else:
                asyncio.run(in_task())
        except DeadlineExceededError as error:
            received.append(error)
        if not took:
            took.append(time.monotonic() - begin)
    return Ended(received, took[0], took[0] - watch.lost)


@pytest.fixture(scope="module")
def _warm() -> None:
    """Import LiteLLM and open its pools once, so that no deadline is spent on that."""
    with Provider() as provider:
        for engine in ENGINES:
            with closing(make_lm(provider.url, engine=engine)) as lm:
                for way in WAYS:
                    call(lm, way)


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_deadline_is_kept(serve: MakeProvider, connect: MakeLM, engine: str, way: Way) -> None:
    """A call with seconds to live ends after them, whether the upstream hangs or trickles.

    Not one second: on a busy machine LiteLLM may take that long to send the request at all.
    """
    waiting = []
    with Pool(2) as pool:
        for fault in (Hang(), Trickle(bytes_per_second=60.0)):
            provider = serve(faults=fault, answer="word " * 200)
            lm = connect(provider, engine=engine, max_tokens=400)
            waiting.append((fault, provider, pool.submit(call, lm, way, deadline=LIFE)))
    for fault, provider, done in waiting:
        received, wall, seconds = done.result()
        print(f"{engine}, {way}, {fault.name}: {wall:.3f} s")
        assert isinstance(received[-1], DeadlineExceededError)
        assert wall >= LIFE - 0.01, f"{fault.name}: {wall:.3f} s"
        assert seconds <= LIFE - 1.0 + LATEST, f"{fault.name}: {seconds:.3f} s"
        assert len(provider.calls) == 1


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_attempt_ended_by_its_deadline_is_settled(
    serve: MakeProvider, connect: MakeLM, sqlite_url: str, engine: str, way: Way
) -> None:
    """The attempt's hold lasts until it has really ended, and then its bound is charged as unconfirmed."""
    provider = serve(faults=[Hang(seconds=LIFE + 0.5, billed=True)])
    lm = connect(provider, engine=engine, budget=Budget(usd=1.0), store=sqlite_url)
    received = call(lm, way, deadline=LIFE).received
    assert isinstance(received[-1], DeadlineExceededError)
    until(lambda: lm.pipeline.store.holds() == 0, 15, "the end of the attempt")
    (record,) = upstream(lm)
    assert record.outcome == "timeout"
    assert record.estimated
    assert record.cost_nano is not None
    assert record.cost_nano >= provider.bill.nano > 0
    assert account(lm) == (record.cost_nano, 0, record.cost_nano)
    assert_nothing_held(lm.pipeline.store)


@pytest.mark.usefixtures("_warm")
def test_a_late_answer_corrects_its_charge(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """LiteLLM cannot be stopped: its answer comes too late for the caller but not for the ledger."""
    provider = serve(latency=LIFE + 1.0, usage=(20, 30))
    lm = connect(provider, engine="litellm", budget=Budget(usd=1.0), store=store_url)
    received = call(lm, "sync", deadline=LIFE).received
    assert isinstance(received[-1], DeadlineExceededError)
    assert lm.pipeline.store.holds() == 1, "the attempt still runs, so its money is still held"
    until(lambda: lm.pipeline.store.holds() == 0, 15, "the end of the attempt")
    (record,) = upstream(lm)
    assert (record.outcome, record.estimated, record.cost_nano) == ("timeout", False, provider.bill.nano)
    assert account(lm) == (provider.bill.nano, 0, 0)


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_timeout_bounds_each_attempt_and_is_retried(
    serve: MakeProvider, connect: MakeLM, engine: str, way: Way
) -> None:
    """`timeout=` ends one attempt and the next one answers; each is in the ledger."""
    provider = serve(faults=[Hang(billed=True), Hang(billed=True)])
    lm = connect(provider, engine=engine, timeout=1.5, retry=Retry(attempts=3, backoff=0.01))
    received, wall, seconds = call(lm, way)
    assert received == [["ok"]] or received[0][0] == "ok"
    assert wall >= 3.0
    assert seconds < 4.5
    if engine == "litellm" and way == "sync":  # its abandoned attempts end when LiteLLM's own, rounded time-out does
        until(lambda: len(upstream(lm)) == 3, 10, "the end of the attempts")
    assert sorted(record.outcome for record in upstream(lm)) == ["ok", "timeout", "timeout"]
    assert charged(lm) >= provider.bill.nano


@pytest.mark.parametrize("way", ["sync", "async"])
def test_when_every_attempt_times_out_the_last_time_out_is_raised(
    serve: MakeProvider, connect: MakeLM, way: Way
) -> None:
    """Upstream time-outs keep DSPy's own class, so that callers need no new `except`."""
    provider = serve(faults=Hang())
    lm = connect(provider, timeout=0.2, retry=Retry(attempts=2, backoff=0.01))
    with pytest.raises(LMTimeoutError, match=r"no answer within timeout=0\.2 s"):
        call(lm, way)
    assert [record.outcome for record in upstream(lm)] == ["timeout", "timeout"]
    assert len(provider.calls) <= 2  # a busy machine's time is up before the server has read the request
    assert_nothing_held(lm.pipeline.store)


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("way", ["sync stream", "async stream"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_timeout_bounds_each_wait_of_a_stream(engine: str, way: Way) -> None:
    """One that stands still half-way has timed out, whoever carries it, and the ledger says so."""
    with Halting(words("one")) as provider, closing(make_lm(provider.url, engine=engine, timeout=0.5)) as lm:
        begin = time.monotonic()
        with pytest.raises((LMTimeoutError, LMTransportError)):  # as the transport says it, or we
            call(lm, way)
        assert time.monotonic() - begin >= 0.45
        assert [(record.outcome, record.estimated) for record in upstream(lm)] == [("timeout", True)]


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_synchronous_stream_that_says_that_it_is_alive_is_waited_for_as_dspy_does(engine: str) -> None:
    """While a model thinks, some servers send lines that are no events. It was ended as if they were silent."""
    alive = (": keep-alive", 0.6) * 4
    events = (*alive, words("one"), *alive, {**STOP, **usage(3, 1)}, DONE)
    with Halting(*events) as provider, closing(make_lm(provider.url, engine=engine, timeout=1.0)) as lm:
        call(lm, "sync stream")
        assert [(record.outcome, record.output_tokens) for record in upstream(lm)] == [("ok", 1)]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_deadline_bounds_retries_too(serve: MakeProvider, connect: MakeLM, way: Way) -> None:
    """However many attempts are left, the call ends with its deadline, and says so."""
    provider = serve(faults=Hang())
    # A pause that no longer fits before the deadline is not begun, and the upstream's word stands: so hardly any pause.
    lm = connect(provider, timeout=0.5, retry=Retry(attempts=100, backoff=1e-6, max_backoff=1e-6), breaker=False)
    received, _, seconds = call(lm, way, deadline=1.75)
    assert isinstance(received[-1], DeadlineExceededError)
    assert seconds <= 1.75 - 1.0 + LATEST
    assert 2 <= len(provider.calls) <= 4


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_in_time_is_not_touched_by_a_deadline(serve: MakeProvider, connect: MakeLM, way: Way) -> None:
    """A deadline that is not reached changes nothing, and the connection goes on to be used."""
    provider = serve(latency=0.05)
    lm = connect(provider)
    received, _, seconds = call(lm, way, deadline=5.0)
    assert received
    assert seconds < 1.0
    assert [record.outcome for record in upstream(lm)] == ["ok"]
    assert charged(lm) == provider.bill.nano
