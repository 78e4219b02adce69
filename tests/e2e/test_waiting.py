"""Waiting for admission: in order, by priority, without starvation, without losses, and never longer than useful."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Literal

import dspy
import pytest

from dspy_prod import Budget, DeadlineExceededError, RateLimit, RateLimitedError, call_context
from dspy_prod.context.current import current, use
from dspy_prod.testing import Provider
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import (
    MODEL,
    Crowd,
    Pool,
    account,
    answers,
    assert_nothing_held,
    errors,
    outcome,
    together,
    until,
)
from tests.stopwatch import Stopwatch

Priority = Literal["high", "normal", "low"]
ONE_AT_A_TIME = RateLimit(concurrency=1)


class Loop:
    """An event loop in a thread, for tasks that wait in the same line as threads."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def submit(self, lm: Any, prompt: str) -> Future[Any]:
        """Call the LM in a task, under the context in force here."""
        context = current()

        async def call() -> Any:
            with use(context):
                return await lm.acall(prompt)

        return asyncio.run_coroutine_threadsafe(call(), self.loop)

    def close(self, lm: Any) -> None:
        asyncio.run_coroutine_threadsafe(lm.pipeline.aclose(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.abandon()


def prompts(provider: Provider) -> list[str]:
    """What was asked, in the order in which it arrived."""
    return [call.last_message for call in provider.calls]


def occupy(provider: Provider, lm: Any, pool: Pool) -> Future[Any]:
    """Fill the only place with a call that the provider does not answer until `release`."""
    provider.hold()
    first: Future[Any] = pool.submit(lm, "first")
    provider.wait_until(lambda p: p.in_flight == 1, timeout=30)
    return first


def call_with(priority: Priority, lm: Any, prompt: str) -> Any:
    with call_context(priority=priority):
        return lm(prompt)


@pytest.mark.parametrize("crowd", ["threads", "tasks", "both"])
def test_who_waits_longest_goes_first(
    serve: MakeProvider, connect: MakeLM, store_url: str, pool: Pool, crowd: Crowd | Literal["both"]
) -> None:
    """Threads and tasks stand in one line, first in, first out, and every one of them is answered."""
    provider = serve()
    lm = connect(provider, limit=ONE_AT_A_TIME, store=store_url)
    loop = Loop()
    waiters = [occupy(provider, lm, pool)]
    for number in range(20):
        in_task = crowd == "tasks" or (crowd == "both" and number % 2)
        waiters.append(loop.submit(lm, f"number {number}") if in_task else pool.submit(lm, f"number {number}"))
        until(lambda number=number: lm.pipeline.store.waiting() == number + 1)  # type: ignore[misc]
    provider.release()
    for waiter in waiters:
        assert waiter.result(20)
    assert prompts(provider) == ["first", *(f"number {number}" for number in range(20))]
    assert_nothing_held(lm.pipeline.store)
    loop.close(lm)


def test_high_priority_goes_first_and_low_priority_does_not_starve(
    serve: MakeProvider, connect: MakeLM, store_url: str, pool: Pool
) -> None:
    """Urgent calls overtake, but only ten times in a row: then the lowest one waiting has its turn."""
    provider = serve()
    lm = connect(provider, limit=ONE_AT_A_TIME, store=store_url)
    waiters = [occupy(provider, lm, pool)]
    line: list[tuple[Priority, str]] = [("low", "low"), ("normal", "normal")]
    line += [("high", f"high {number}") for number in range(15)]
    for place, (priority, prompt) in enumerate(line):
        waiters.append(pool.submit(call_with, priority, lm, prompt))
        until(lambda place=place: lm.pipeline.store.waiting() == place + 1)  # type: ignore[misc]
    provider.release()
    for waiter in waiters:
        waiter.result(20)
    order = prompts(provider)[1:]
    assert [prompt for prompt in order if prompt.startswith("high")] == [f"high {number}" for number in range(15)]
    assert order[:10] == [f"high {number}" for number in range(10)]
    assert order.index("low") in (10, 11)
    assert order.index("normal") > order.index("high 9")
    assert_nothing_held(lm.pipeline.store)


def test_a_high_priority_never_breaks_the_limit(
    serve: MakeProvider, connect: MakeLM, store_url: str, pool: Pool
) -> None:
    """However urgent, only as many calls are in flight as the limit says."""
    provider = serve(latency=(0.0, 0.05), concurrency=3)
    lm = connect(provider, limit=RateLimit(concurrency=3), store=store_url)
    kinds: list[Priority] = ["low", "normal", "high"]
    waiters = [pool.submit(call_with, kinds[number % 3], lm, f"number {number}") for number in range(45)]
    assert len(answers([waiter.result(20) for waiter in waiters])) == 45
    assert provider.max_in_flight == 3


@pytest.mark.parametrize("crowd", ["threads", "tasks"])
def test_a_hopeless_wait_is_refused_at_once(serve: MakeProvider, connect: MakeLM, store_url: str, crowd: Crowd) -> None:
    """Whoever cannot be admitted within `max_wait` is told so now, and when it could be."""
    provider = serve()
    lm = connect(provider, limit=RateLimit(rpm=1, max_wait=30.0), store=store_url)
    lm("the minute's only request")
    with Stopwatch() as took:
        (refusal,) = errors(together(crowd, lm, 1), RateLimitedError)
    assert took.seconds < 1.0
    assert "max_wait" in str(refusal)
    assert 55.0 < refusal.retry_after <= 65.0
    assert len(provider.calls) == 1
    assert_nothing_held(lm.pipeline.store)


def test_a_wait_beyond_the_deadline_is_refused_at_once(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """Without a `max_wait` the call's own deadline is the longest useful wait."""
    provider = serve()
    lm = connect(provider, limit=RateLimit(rpm=1), store=store_url)
    lm("the minute's only request")
    with Stopwatch() as took, call_context(deadline=20.0), pytest.raises(RateLimitedError) as refusal:
        lm("one too many")
    assert took.seconds < 1.0
    assert refusal.value.retry_after > 20.0


def test_a_wait_ends_at_max_wait(serve: MakeProvider, connect: MakeLM, store_url: str, pool: Pool) -> None:
    """A wait that might have been served, but was not, ends when `max_wait` is over, and leaves the line."""
    provider = serve()
    lm = connect(provider, limit=RateLimit(concurrency=1, max_wait=0.3), store=store_url)
    first = occupy(provider, lm, pool)
    with Stopwatch() as took, pytest.raises(RateLimitedError, match="concurrency"):
        lm("second")
    assert took.wall > 0.25
    assert took.seconds < 1.0
    with call_context(deadline=0.2), pytest.raises(DeadlineExceededError, match="waiting for concurrency"):
        lm("third")
    assert lm.pipeline.store.waiting() == 0
    provider.release()
    assert first.result(10)
    assert prompts(provider) == ["first"]
    assert_nothing_held(lm.pipeline.store)


def test_whoever_waits_in_line_is_told_what_for(
    serve: MakeProvider, connect: MakeLM, store_url: str, pool: Pool
) -> None:
    """A refusal after a wait names the dimension that was exhausted, also to those who stood further back."""
    provider = serve()
    lm = connect(provider, limit=RateLimit(concurrency=1, max_wait=0.5), store=store_url)
    first = occupy(provider, lm, pool)
    refusals = [pool.submit(outcome, lambda number=number: lm(f"number {number}")) for number in range(16)]
    assert {refusal.result(10).dimension for refusal in refusals} == {"concurrency"}
    provider.release()
    first.result(10)


def test_cancelled_tasks_give_everything_back(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """Tasks cancelled in line leave no hold, no place and no money behind, and the others are served."""
    provider = serve()
    lm = connect(provider, limit=ONE_AT_A_TIME, budget=Budget(usd=10.0), store=store_url)
    store = lm.pipeline.store

    async def scene() -> list[Any]:
        provider.hold()
        tasks = [asyncio.create_task(lm.acall(f"number {number}")) for number in range(12)]
        await asyncio.to_thread(until, lambda: provider.in_flight == 1 and store.waiting() == 11)
        sent = int(prompts(provider)[0].split()[1])
        waiting = [task for number, task in enumerate(tasks) if number != sent]
        for task in waiting[::2]:
            task.cancel()
        await asyncio.gather(*waiting[::2], return_exceptions=True)
        await asyncio.to_thread(until, lambda: store.waiting() == 5)
        assert store.holds() == 1
        provider.release()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        await lm.pipeline.aclose()
        return done

    done = asyncio.run(scene())
    assert sum(isinstance(each, asyncio.CancelledError) for each in done) == 6
    assert len(provider.calls) == 6
    assert_nothing_held(store)
    assert account(lm) == (provider.bill.nano, 0, 0)


def test_a_cancelled_wait_for_money_gives_everything_back(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """A task cancelled while it waits for money that another call holds takes nothing with it."""
    prices = {MODEL: (0.0, 100.0)}
    provider = serve(prices=prices, usage=(20, 10))
    with pytest.warns(UserWarning, match="more than 5 %"):
        lm = connect(provider, prices=prices, max_tokens=100, budget=Budget(usd=0.015), store=store_url)
    store = lm.pipeline.store

    async def scene() -> None:
        provider.hold()
        first = asyncio.create_task(lm.acall("first"))
        await asyncio.to_thread(provider.wait_until, lambda p: p.in_flight == 1)
        second = asyncio.create_task(lm.acall("second"))
        await asyncio.to_thread(until, lambda: store.waiting() == 1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        await asyncio.to_thread(until, lambda: store.waiting() == 0)
        provider.release()
        await first
        await lm.acall("third")
        await lm.pipeline.aclose()

    asyncio.run(scene())
    assert prompts(provider) == ["first", "third"]
    assert_nothing_held(store)
    assert account(lm) == (provider.bill.nano, 0, 0)


def test_max_tokens_above_the_limit_fails_at_once(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """A call that no minute could ever hold is refused before anything is sent, naming both remedies."""
    provider = serve()
    lm = connect(provider, limit=RateLimit(tpm=1000), max_tokens=1001, store=store_url)
    with pytest.raises(RateLimitedError, match=r"max_tokens=1001 is above tpm=1000 .*Lower max_tokens or raise tpm"):
        lm("a question")
    with pytest.raises(RateLimitedError, match="max_tokens=5000 is above"):
        dspy.Predict("question -> answer")(question="?", lm=lm, config={"max_tokens": 5000})
    assert provider.calls == []
    assert lm("a question", max_tokens=10)
