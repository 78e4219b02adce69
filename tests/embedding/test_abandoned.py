"""A function that goes on in its thread after nobody waits for it: it keeps what it holds until it has ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dspy_prod import Budget, DeadlineExceededError, Price, RateLimit, RateLimitedError, call_context
from tests.e2e.support import until
from tests.embedding.conftest import MakeEmbedder


class Slow:
    """Embeds once it may, and knows how often it did so at once."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Semaphore(0), threading.Event()
        self.live = self.most = self.asked = 0
        self.error: Exception | None = None
        self._lock = threading.Lock()

    def __call__(self, texts: list[str]) -> Any:
        with self._lock:
            self.live, self.asked = self.live + 1, self.asked + 1
            self.most = max(self.most, self.live)
        self.begun.release()
        try:
            assert self.may_end.wait(20)
        finally:
            with self._lock:
                self.live -= 1
        if self.error is not None:
            raise self.error
        return [[1.0, 2.0] for _ in texts]


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.may_end.set()


@pytest.fixture
def make_slow(make: MakeEmbedder, slow: Slow) -> Callable[..., Any]:
    def made(**options: Any) -> Any:
        price = Price(input=1000, output=0)
        return make(slow, prices=price, budget=Budget(usd=1000, per="day"), caching=False, **options)

    return made


async def leave(embedder: Any, slow: Slow, left: str) -> None:
    """Ask, and leave once the function has begun."""
    if left == "deadline":
        with call_context(deadline=0.3), pytest.raises(DeadlineExceededError):
            await embedder.acall(["a text"])
        assert slow.begun.acquire(timeout=20)
        return
    task = asyncio.ensure_future(embedder.acall(["a text"]))
    assert await asyncio.to_thread(slow.begun.acquire, timeout=20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


LEFT = pytest.mark.parametrize("left", ["deadline", "cancelled"])


@LEFT
def test_its_place_is_kept_until_the_function_has_returned(left: str, slow: Slow, make_slow: Any) -> None:
    """With one call at a time, each that was left made way for a further one: four went on at once."""
    embedder = make_slow(limit=RateLimit(concurrency=1, max_wait=0.05))

    async def asks() -> None:
        await leave(embedder, slow, left)
        for _ in range(3):
            with pytest.raises(RateLimitedError):
                await embedder.acall(["another"])
        slow.may_end.set()
        await asyncio.to_thread(until, lambda: embedder.pipeline.store.holds() == 0, 15, "the end of the attempt")
        assert (await embedder.acall(["another"])).tolist() == [[1.0, 2.0]]

    asyncio.run(asks())
    assert (slow.most, slow.asked) == (1, 2)


@LEFT
@pytest.mark.parametrize("fails", [False, True])
def test_its_money_is_held_until_then(left: str, fails: bool, slow: Slow, make_slow: Any) -> None:
    """It was booked at once, while the function went on. It tells no usage: it costs its bound, whatever it raises."""
    embedder = make_slow()
    slow.error = RuntimeError("its index is missing") if fails else None

    async def asks() -> None:
        await leave(embedder, slow, left)
        assert embedder.ledger.records() == []
        assert embedder.pipeline.store.holds() > 0
        slow.may_end.set()
        await asyncio.to_thread(until, embedder.ledger.records, 15, "the end of the attempt")

    asyncio.run(asks())
    [record] = embedder.ledger.records()
    outcome = "timeout" if left == "deadline" else "cancelled"
    assert (record.outcome, record.cost_nano > 0, record.estimated) == (outcome, True, True)
    assert embedder.pipeline.store.holds() == 0


def test_what_waits_for_a_thread_has_not_begun_and_never_will(slow: Slow, make_slow: Any) -> None:
    """The event loop has so many threads: what was cancelled before one was free was charged as if it had been sent."""
    embedder = make_slow()

    async def asks() -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            loop.set_default_executor(one)
            first = asyncio.ensure_future(embedder.acall(["first"]))
            assert await loop.run_in_executor(other, slow.begun.acquire)
            second = asyncio.ensure_future(embedder.acall(["second"]))
            await loop.run_in_executor(other, until, lambda: embedder.pipeline.store.holds() == 2)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            assert embedder.pipeline.store.holds() == 1
            slow.may_end.set()
            await first

    asyncio.run(asks())
    assert slow.asked == 1
    assert sorted((each.outcome, each.cost_nano > 0) for each in embedder.ledger.records()) == [
        ("cancelled", False), ("ok", True),
    ]  # fmt: skip
