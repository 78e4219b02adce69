"""A process that may have no more threads, for a moment or for long."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Config, Message, Request
from dspy.utils.exceptions import LMLockTimeoutError

import dspy_prod
from dspy_prod.compat.dspy import engines_of
from dspy_prod.errors import StoreUnavailableError
from dspy_prod.pipeline.upstream import deadline
from dspy_prod.pipeline.upstream.workers import Workers
from dspy_prod.registry.errors import RegistryUnavailableError
from dspy_prod.registry.server import MOST_WAITING, _bounded
from dspy_prod.runtime import threads
from dspy_prod.runtime.reaper import Reaper
from dspy_prod.stores.base import GRANTED, REFUSED
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.testing import ScriptedEngine
from tests.logged import logged
from tests.stores.support import ask, record, settlement, until

WORD = "can't start new thread"


@pytest.fixture(autouse=True)
def _nothing_is_missing() -> Iterator[None]:
    yield
    threads._MISSING.clear()


@contextmanager
def none_to_be_had(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The system refuses every thread of this library."""
    start = threading.Thread.start

    def refused(self: threading.Thread) -> None:
        if self.name.startswith("dspy_prod"):
            raise RuntimeError(WORD)
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        yield


def test_a_thread_that_cannot_be_started_is_told_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once in the log, and in health until it runs."""
    ran = threading.Event()
    with none_to_be_had(monkeypatch):
        assert threads.begin("dspy_prod-one", ran.set) is None
        assert threads.begin("dspy_prod-one", ran.set) is None
    assert [WORD in line.getMessage() for line in logged(caplog)] == [True]
    health = dspy_prod.health()
    assert health.status == "degraded"
    assert any("dspy_prod-one" in reason for reason in health.reasons)
    assert threads.begin("dspy_prod-one", ran.set) is not None
    assert ran.wait(10)
    assert threads.missing() == {}


def test_a_store_without_its_thread_refuses_and_then_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One refusal of the system at the first call, and the store was "closed" for the life of the process."""
    store = SqliteStore(str(tmp_path / "s.db"))
    try:
        with none_to_be_had(monkeypatch):
            refused = store.admit(ask())
            assert refused.state == REFUSED
            assert refused.refusal is not None
            assert (refused.refusal.reason, "threads" in refused.refusal.detail) == ("store_unavailable", True)
            store.append(record("kept"))
            with pytest.raises(StoreUnavailableError, match="threads"):
                store.waiting()
        granted = store.admit(ask())
        until(lambda: granted.state == GRANTED)
        store.settle(granted, settlement(granted, 5))
        assert store.flush(10)
        assert "kept" in {row.id for row in store.records()}
    finally:
        store.close()


def test_what_a_store_was_told_is_written_although_it_never_had_a_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`close` does the writing itself."""
    path = str(tmp_path / "s.db")
    store = SqliteStore(path)
    with none_to_be_had(monkeypatch):
        store.append(record("kept"))
        store.close()
    again = SqliteStore(path)
    assert [row.id for row in again.records()] == ["kept"]
    again.close()


ENDING = """
import sys, threading
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import record

def refused(self):
    raise RuntimeError("can't start new thread")

threading.Thread.start = refused
store = SqliteStore(sys.argv[1])
store.append(record("kept"))
"""


def test_what_a_store_was_told_is_written_at_the_end_of_the_process(tmp_path: Path) -> None:
    """As for every other store, also where nobody closes it."""
    path = str(tmp_path / "s.db")
    root = str(Path(dspy_prod.__file__).parent.parent)
    subprocess.run([sys.executable, "-c", ENDING, path], env={**os.environ, "PYTHONPATH": root}, check=True, timeout=60)
    again = SqliteStore(path)
    assert [row.id for row in again.records()] == ["kept"]
    again.close()


def test_a_memory_store_without_its_timer_serves_all_who_need_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those who must, once there is a thread again."""
    store = MemoryStore()
    seat = dspy_prod.RateLimit(concurrency=1)
    with none_to_be_had(monkeypatch):
        first = store.admit(ask(limit=seat, lease=0.05))
        second = store.admit(ask(limit=seat))
    assert first.state == GRANTED
    store.admit(ask())
    until(lambda: second.state == GRANTED)
    store.close()


def test_an_attempt_without_a_thread_costs_nothing_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six hundred such moments, and no attempt with a deadline was possible any more: each took a place for ever."""
    workers = Workers(limit=3)
    with none_to_be_had(monkeypatch):
        for _ in range(5):
            with pytest.raises(LMLockTimeoutError, match="threads"):
                workers.submit(lambda: 1)
    job = workers.submit(lambda: 2)
    assert job.wait(inf)
    assert job.value == 2

    engine = ScriptedEngine(["yes"])
    lm = dspy_prod.LM(
        "openai/m", engine=engine, store="memory://", namespace="threads", cache=False, max_tokens=9,
        retry={"attempts": 2, "backoff": 0.001},
        prices={"openai/m": dspy_prod.Price(input=1, output=1)}, budget=dspy_prod.Budget(usd=1),
    )  # fmt: skip
    monkeypatch.setattr(deadline, "WORKERS", Workers())  # no idle thread of an earlier call takes it
    with none_to_be_had(monkeypatch), pytest.raises(LMLockTimeoutError), dspy_prod.call_context(deadline=30):
        lm("q")
    assert [(row.outcome, row.cost_nano, row.error) for row in lm.ledger.records()] == [
        ("error", 0, "LMLockTimeoutError")
    ] * 2
    assert lm.health().breakers[0].state == "closed"
    assert lm("q") == ["yes"]


@pytest.mark.parametrize("limit", [{"timeout": 30}, {"deadline": 30}, {"timeout": 30, "deadline": 60}], ids=str)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_call_is_tried_again_where_every_thread_hangs_in_another(
    streaming: bool, limit: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream without a deadline failed because its deadline had passed, at once and for good, and was charged."""
    workers, over = Workers(limit=1), threading.Event()
    monkeypatch.setattr(deadline, "WORKERS", workers)
    workers.submit(over.wait)
    engine = ScriptedEngine(["yes"])
    lm = dspy_prod.LM(
        "openai/m", engine=engine, store=MemoryStore(), cache=False, max_tokens=9,
        timeout=limit.get("timeout"), retry={"attempts": 3, "backoff": 0.001},
        breaker=dspy_prod.CircuitBreaker(failure_threshold=1),
        prices={"openai/m": dspy_prod.Price(input=1, output=1)}, budget=dspy_prod.Budget(usd=1),
    )  # fmt: skip

    def ask() -> None:
        if streaming:
            list(engines_of(lm)[0].stream(Request("openai/m", (Message.user("q"),), config=Config(max_tokens=9))))
        else:
            lm("q")

    with dspy_prod.call_context(deadline=limit.get("deadline")):
        with pytest.raises(LMLockTimeoutError, match="All 1 threads"):
            ask()
        assert engine.requests == []
        assert [(row.outcome, row.cost_nano, row.estimated, row.error) for row in lm.ledger.records()] == [
            ("error", 0, False, "LMLockTimeoutError")
        ] * 3
        assert lm.health().breakers[0].state == "closed"
        over.set()
        until(lambda: workers._idle == 1)
        ask()
    assert len(engine.requests) == 1


def test_mlflow_is_away_while_there_is_no_thread_to_ask_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no place among those who may wait is lost."""
    with none_to_be_had(monkeypatch):
        for _ in range(MOST_WAITING + 1):
            with pytest.raises(RegistryUnavailableError, match="threads"):
                _bounded(lambda: 1, 5, "here")
    assert _bounded(lambda: 1, 5, "here") == 1


def test_what_finalisers_left_is_done_when_a_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pipeline fails to be built for want of it."""
    reaper, done = Reaper(), threading.Event()
    with none_to_be_had(monkeypatch):
        reaper.start()
        reaper.post(done.set)
        assert not reaper.flush(0.1)
    assert reaper.flush(10)
    assert done.is_set()


def test_a_program_is_called_although_nothing_could_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole LM, built and called in such a moment: on a memory store nothing of it needs a thread."""
    with none_to_be_had(monkeypatch):
        lm: Any = dspy_prod.LM(
            "openai/m", engine=ScriptedEngine(["[[ ## answer ## ]]\nyes"]), store="memory://", namespace="t"
        )
        with dspy.context(lm=lm):
            assert dspy.Predict("question -> answer")(question="q").answer == "yes"
