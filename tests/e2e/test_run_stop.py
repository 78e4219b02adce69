"""A run that is stopped sends nothing more, and keeps nobody waiting: limits, budgets, pauses and hanging upstreams."""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from dspy.utils.exceptions import LMError

import dspy_prod
from dspy_prod import (
    Budget,
    RateLimit,
    Retry,
    Run,
    RunStoppedError,
)
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.testing import FaultPlan, Hang, Provider, Status
from tests.e2e.children import evaluate_in_a_run
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.runs import A_CENT
from tests.e2e.support import (
    answers,
    assert_nothing_held,
    errors,
    fresh_memory,
    outcome,
    until,
)

SPAWN = mp.get_context("spawn")


def waits_for_its_limit(serve: MakeProvider, connect: MakeLM, store: str) -> tuple[Provider, Any]:
    provider = serve()
    lm = connect(provider, limit=RateLimit(rpm=1, max_wait=600), store=store)
    lm("the minute's only one")
    return provider, lm


def waits_for_a_retry(serve: MakeProvider, connect: MakeLM, store: str) -> tuple[Provider, Any]:
    provider = serve(faults=FaultPlan.script([None, *[Status(503, retry_after=25)] * 9]))
    lm = connect(provider, retry=Retry(attempts=5), store=store)
    lm("answered at once")
    return provider, lm


def waits_for_a_providers_pause(serve: MakeProvider, connect: MakeLM, store: str) -> tuple[Provider, Any]:
    provider = serve(faults=FaultPlan.script([None, Status(429, retry_after=25)]))
    lm = connect(provider, store=store)
    lm("answered at once")
    assert isinstance(outcome(lambda: lm("too much")), LMError)
    return provider, lm


def waits_for_money_of_others(serve: MakeProvider, connect: MakeLM, store: str) -> tuple[Provider, Any]:
    """Of a budget, all of which another call holds."""
    provider = serve(prices=A_CENT)
    provider.hold()
    lm = connect(provider, prices=A_CENT, budget=Budget(usd=0.01, max_wait=600), store=store)
    threading.Thread(target=lambda: outcome(lambda: lm("holds all")), daemon=True).start()
    provider.wait_until(lambda p: p.in_flight == 1)
    return provider, lm


def waits_for_an_identical_call(serve: MakeProvider, connect: MakeLM, store: str) -> tuple[Provider, Any]:
    provider = serve()
    provider.hold()
    lm = connect(provider, cache=True, store=store)
    threading.Thread(target=lambda: outcome(lambda: lm("waits")), daemon=True).start()
    provider.wait_until(lambda p: p.in_flight == 1)
    return provider, lm


WAITS = [
    *(waits_for_its_limit, waits_for_a_retry, waits_for_a_providers_pause, waits_for_money_of_others),
    waits_for_an_identical_call,
]


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("waiting", WAITS)
def test_stopping_ends_every_wait_at_once(
    serve: MakeProvider, connect: MakeLM, waiting: Any, way: str, store_url: str
) -> None:
    """After Ctrl-C an optimizer's threads slept on in Retry-After and in the limiter: the process lived 75 s longer."""
    provider, lm = waiting(serve, connect, store_url)
    run, before = Run("it", usd=5, store=fresh_memory()), len(provider.calls)
    found: list[Any] = []

    def caller() -> None:
        with dspy_prod.call_context(run=run):
            found.append(outcome(lambda: lm("waits") if way == "sync" else asyncio.run(lm.acall("waits"))))

    threads = [threading.Thread(target=caller, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(run._watchers) == 4, what="waiting")
    sent = len(provider.calls)
    run.stop("enough")
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert [type(each) for each in found] == [RunStoppedError] * 4
    assert "sends nothing more: enough" in str(found[0])
    assert len(provider.calls) == sent >= before
    assert not run._watchers
    assert run.used().held_usd == 0.0
    assert lm.pipeline.store.waiting() == 0
    with dspy_prod.call_context(run=run), pytest.raises(RunStoppedError):
        lm("another")
    assert len(provider.calls) == sent


def test_stopping_ends_a_wait_for_money(serve: MakeProvider, connect: MakeLM) -> None:
    """One call holds the only cent; who waits for it is told at once, and the one under way is answered."""
    provider = serve(prices=A_CENT, usage=(20, 100), latency=0.5)
    lm = connect(provider, prices=A_CENT, budget=Budget(usd=0.01), store=fresh_memory())
    run = Run("it", calls=100, store=fresh_memory())
    with ThreadPoolExecutor(4) as pool:

        def caller(number: int) -> Any:
            with dspy_prod.call_context(run=run):
                return outcome(lambda: lm(f"question {number}"))

        futures = [pool.submit(caller, number) for number in range(4)]
        until(lambda: len(provider.calls) == 1 and lm.pipeline.store.waiting() == 3)
        run.stop()
        outcomes = [future.result(10) for future in futures]
    assert len(answers(outcomes)) == 1
    assert len(errors(outcomes, RunStoppedError)) == 3
    assert run.used().calls == 1
    assert_nothing_held(lm.pipeline.store)


def test_stopping_ends_a_wait_for_what_the_run_has_left(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    provider = serve(prices=A_CENT, usage=(20, 100))
    provider.hold()
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    run.allow(usd=0.01)

    def caller(number: int) -> Any:
        with dspy_prod.call_context(run=run):
            return outcome(lambda: lm(f"question {number}"))

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(caller, number) for number in range(4)]
        until(lambda: provider.in_flight == 1 and run.store.waiting() == 3)
        run.stop()
        until(lambda: sum(future.done() for future in futures) == 3)
        provider.release()
        outcomes = [future.result(10) for future in futures]
    assert len(answers(outcomes)) == 1
    assert len(errors(outcomes, RunStoppedError)) == 3
    assert run.used() == (0.01, 0.0, 0.0, 1, 120)


def test_a_stop_while_an_engine_is_built_is_heard(
    serve: MakeProvider, connect: MakeLM, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing an engine takes seconds; the call went out after that."""
    provider = serve()
    lm = connect(provider, engine="litellm", store=fresh_memory())
    warm = Upstream.warm

    def slow(*arguments: Any) -> None:
        warm(*arguments)
        run.stop()

    monkeypatch.setattr(Upstream, "warm", slow)
    with dspy_prod.call_context(run=run), pytest.raises(RunStoppedError):
        lm("a question")
    assert provider.calls == []
    assert run.used() == (0.0, 0.0, 0.0, 0, 0)


def test_a_signal_handler_may_stop_a_run(serve: MakeProvider, connect: MakeLM) -> None:
    """Also while the thread that it interrupts waits in a call of the run, whatever lock it holds just then."""
    provider, lm = waits_for_its_limit(serve, connect, fresh_memory())
    run = Run("it", usd=5, store=fresh_memory())
    before = signal.signal(signal.SIGUSR1, lambda *_: run.stop("a signal"))

    def interrupt() -> None:
        until(lambda: len(run._watchers) == 1)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=interrupt, daemon=True)
    try:
        thread.start()
        with dspy_prod.call_context(run=run), pytest.raises(RunStoppedError, match="a signal"):
            lm("waits")
    finally:
        signal.signal(signal.SIGUSR1, before)
        thread.join(10)
    with run._lock:  # held by the very thread that the signal interrupts
        run._stopped = None
        run.stop("again")
    assert run.stopped == "again"
    assert len(provider.calls) == 1


def test_a_signal_that_interrupts_nothing_is_heard_all_the_same(serve: MakeProvider, connect: MakeLM) -> None:
    """One that comes just as a wait begins ends no system call, as one that another thread gets; its handler runs."""
    _, lm = waits_for_its_limit(serve, connect, fresh_memory())
    run = Run("it", usd=5, store=fresh_memory())
    before = signal.signal(signal.SIGUSR1, lambda *_: run.stop("a signal"))
    here = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    began = time.monotonic()

    def interrupt() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        until(lambda: len(run._watchers) == 1)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=interrupt, daemon=True)
    try:
        thread.start()
        with dspy_prod.call_context(run=run), pytest.raises(RunStoppedError, match="a signal"):
            lm("waits")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, here)
        signal.signal(signal.SIGUSR1, before)
        thread.join(10)
    assert time.monotonic() - began < 30  # its limit lets it go after a minute


@pytest.mark.parametrize("waiting", ["limit", "retry", "hang"])
def test_a_process_ends_when_its_run_is_stopped(serve: MakeProvider, waiting: str) -> None:
    """Its threads waited on for minutes; a call that hangs ends at the deadline of its context."""
    faults = {"limit": None, "retry": Status(503, retry_after=50), "hang": Hang()}[waiting]
    provider = serve(faults=faults)
    deadline = 4.0 if waiting == "hang" else 600.0
    begun, stop = SPAWN.Event(), SPAWN.Event()
    child = SPAWN.Process(target=evaluate_in_a_run, args=(provider.url, waiting == "limit", deadline, begun, stop))
    child.start()
    try:
        assert begun.wait(60)
        provider.wait_until(lambda p: len(p.calls) >= (1 if waiting == "limit" else 4))
        stop.set()
        child.join(20)
        assert child.exitcode == 0
    finally:
        child.kill()


def test_attempts_under_way_end_by_themselves(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """They are paid for either way, so their answers are kept."""
    provider = serve(latency=0.3)
    lm = connect(provider, store=fresh_memory())
    with ThreadPoolExecutor(4) as pool:

        def ask(number: int) -> Any:
            with dspy_prod.call_context(run=run):
                return lm(f"question {number}")

        futures = [pool.submit(ask, number) for number in range(4)]
        until(lambda: len(provider.calls) == 4)
        run.stop()
        assert len([future.result() for future in futures]) == 4
    assert run.used().usd == pytest.approx(provider.bill.usd)


def test_a_stopped_run_is_told_once(serve: MakeProvider) -> None:
    told: list[Any] = []
    remove = dspy_prod.add_listener(told.append)
    try:
        run = Run("it", calls=1, store=fresh_memory())
        run.stop("enough")
        run.stop("again")
    finally:
        remove()
    said = [dict(event.data) for event in told if event.name == "run_stopped"]  # what other tests left may end just now
    assert said == [{"run": "it", "reason": "enough"}]
    assert run.stopped == "enough"
