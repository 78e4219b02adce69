"""Ctrl-C in a call whose worker goes on: its attempt keeps what it holds until it has ended, and costs what came of it.

It was settled at once, and where the worker still connected as never sent: then it was sent and billed.
"""

from __future__ import annotations

import itertools
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import pytest

from dspy_prod import LM, Budget, Embedder, Price, RateLimit, Run, call_context
from dspy_prod.pipeline.upstream.workers import Job
from dspy_prod.testing import ScriptedEngine, Status
from tests.compose.support import CENT, over
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import MODEL, account, assert_nothing_held, fresh_memory, request, until
from tests.e2e.test_deadline import _warm  # noqa: F401  (a fixture)
from tests.interrupts import interrupted
from tests.pipeline.support import answer


class Door:
    """Where connections wait until it opens."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    door, connect = Door(), socket.create_connection

    def waiting(*args: Any, **options: Any) -> socket.socket:
        door.reached.set()
        assert door.open.wait(20)
        return connect(*args, **options)

    monkeypatch.setattr(socket, "create_connection", waiting)
    yield door
    door.open.set()


@contextmanager
def ctrl_c_at(reached: threading.Event) -> Iterator[None]:
    """Ctrl-C for this thread, once that is reached; it must come before the block ends."""
    here = threading.get_ident()

    def strike() -> None:
        if reached.wait(20):
            signal.pthread_kill(here, signal.SIGINT)

    before, thread = signal.signal(signal.SIGINT, signal.default_int_handler), threading.Thread(target=strike)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("ends", ["timeout", "deadline"])
@pytest.mark.parametrize("kind", ["chat", "text", "vectors"])
def test_what_is_sent_after_ctrl_c_is_in_the_books(serve: MakeProvider, door: Door, kind: str, ends: str) -> None:
    """A run had not been charged for the call, and the ledger said that it had cost nothing."""
    provider, store = serve(), fresh_memory()
    run = Run("it", calls=5, usd=1, store=store, namespace="e2e")
    options: dict[str, Any] = {
        "api_key": "test", "api_base": provider.url, "timeout": 20 if ends == "timeout" else None, "retry": False,
        "budget": Budget(usd=1, name="all"), "store": store, "namespace": "e2e",
    }  # fmt: skip
    lm: Any
    if kind == "vectors":
        lm = Embedder(MODEL, caching=False, prices={MODEL: Price(input=0.15, output=0)}, **options)
    else:
        prices = {MODEL: Price(input=0.15, output=0.60)}
        lm = LM(MODEL, engine="litellm", model_type=kind, cache=False, max_tokens=100, prices=prices, **options)
    with call_context(run=run, deadline=20 if ends == "deadline" else None), ctrl_c_at(door.reached):
        lm(["hello"] if kind == "vectors" else "hello")
    assert lm.ledger.records() == []
    assert account(lm).held > 0
    door.open.set()
    until(lambda: lm.ledger.records(), 15, "the end of the attempt")
    (record,) = lm.ledger.records()
    assert (record.outcome, record.cost_nano, record.estimated) == ("cancelled", provider.bill.nano, False)
    assert len(provider.calls) == run.used().calls == 1
    assert_nothing_held(lm.pipeline.store)
    lm.close()


@pytest.mark.usefixtures("_warm")
def test_a_stream_that_is_sent_after_ctrl_c_costs_its_bound(serve: MakeProvider, connect: MakeLM, door: Door) -> None:
    """Nobody reads it up to its usage."""
    provider = serve()
    lm = connect(provider, engine="litellm", budget=Budget(usd=1, name="all"))
    with call_context(deadline=20), ctrl_c_at(door.reached):
        list(lm._engine_spec.stream(request("hello")))
    assert lm.ledger.records() == []
    door.open.set()
    until(lambda: lm.ledger.records(), 15, "the end of the attempt")
    (record,) = lm.ledger.records()
    assert (record.outcome, record.estimated) == ("cancelled", True)
    assert record.cost_nano >= provider.bill.nano > 0


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("fault", [None, Status(503)], ids=["unreached", "down"])
def test_what_nobody_has_worked_on_after_ctrl_c_costs_nothing(
    serve: MakeProvider, connect: MakeLM, door: Door, streaming: bool, fault: Status | None
) -> None:
    """What its worker met counts, as it would have for the caller."""
    provider = serve(faults=fault)
    lm = connect(provider, engine="litellm", budget=Budget(usd=1, name="all"))
    with call_context(deadline=20), ctrl_c_at(door.reached):
        list(lm._engine_spec.stream(request("hello"))) if streaming else lm("hello")
    if fault is None:
        provider.stop()  # nobody listens there any more
    door.open.set()
    until(lambda: lm.ledger.records(), 15, "the end of the attempt")
    (record,) = lm.ledger.records()
    assert (record.outcome, record.cost_nano, record.estimated) == ("cancelled", 0, False)


@pytest.mark.usefixtures("_warm")
def test_a_place_is_kept_until_the_worker_has_ended(serve: MakeProvider, connect: MakeLM) -> None:
    """With one call at a time two were on their way."""
    came = threading.Event()

    def latency(_: Any) -> float:
        came.set()
        return 0.6

    provider = serve(latency=latency)
    lm = connect(provider, engine="litellm", timeout=20, limit=RateLimit(concurrency=1), budget=Budget(usd=1))
    with ctrl_c_at(came):
        lm("one")
    lm("two")
    assert provider.max_in_flight == 1
    assert sum(record.cost_nano for record in lm.ledger.records()) == provider.bill.nano


# -- at any point ----------------------------------------------------------------------------------------------------
def whole(lm: Any) -> None:
    lm("hello")


def stream(lm: Any) -> None:
    list(lm._engine_spec.stream(request("hello")))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", [whole, stream])
def test_ctrl_c_at_any_point_of_a_worker_books_what_it_sends(way: Callable[[Any], None]) -> None:
    """Also just before it begins, when it does not begin any more, and when the answer has come."""
    lm = over(ScriptedEngine(lambda _: answer(50)), budget=Budget(usd=1000, name="all"), retry=False)
    engine = lm.pipeline.primary.upstream.spec
    for point in itertools.count():
        before = len(lm.ledger.records()), engine.calls
        with call_context(deadline=20):
            hit, _ = interrupted(lambda: way(lm), point, "upstream/deadline.py", "upstream/workers.py")
        until(lambda: lm.pipeline.store.holds() == 0, 5, f"the end of the attempt interrupted at {point}")
        records = lm.ledger.records()
        new = [(each.outcome, each.cost_nano) for each in records[: len(records) - before[0]]]
        sent = engine.calls - before[1]
        assert len(new) == 1
        assert new[0][1] == 0 if sent == 0 else new[0][1] in (CENT // 2, CENT), (point, new, sent)
        if not hit:
            break
    assert point > 8


def test_a_job_that_nobody_waits_for_does_not_begin() -> None:
    """It waited for an idle worker: what it would send, nobody would be told of."""
    job: Job[int] = Job()
    told: list[Any] = []
    job.on_end(lambda *end: told.append(end))
    assert told == [(None, None)]
    job.run(lambda: pytest.fail("it began"))
    assert job.wait(inf)
    assert len(told) == 1
