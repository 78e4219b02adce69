"""Calls of every kind under faults of every kind: threads and tasks, whole and streamed, cancelled, late, abandoned."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import threading
import time
from collections import Counter
from typing import Any

import dspy
from dspy.lm15 import Config, Message, Request
from dspy.utils.exceptions import LMError

from dspy_prod import call_context
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.testing import (
    EmptyChoices,
    ErrorInStream,
    Fault,
    FaultPlan,
    Hang,
    MalformedJson,
    MissingUsage,
    Provider,
    Reset,
    Status,
    Trickle,
    TruncatedStream,
    WrongUsage,
)
from tests.e2e.support import MODEL

FAULTS: tuple[Fault, ...] = (
    *[Status(code) for code in (400, 401, 403, 404, 408, 409, 422, 500, 502, 503, 504, 529)],
    Status(429, retry_after=0.05),
    Status(503, retry_after=0.05),
    Status(400, error_code="context_length_exceeded"),
    Hang(),
    Hang(seconds=0.2),
    Hang(seconds=0.2, billed=True),
    Trickle(bytes_per_second=200),
    Trickle(bytes_per_second=100_000),
    Reset("before"),
    Reset("after_headers"),
    Reset("during"),
    TruncatedStream(),
    TruncatedStream(after=0),
    ErrorInStream(after=0),
    ErrorInStream(after=2),
    MalformedJson(),
    WrongUsage(factor=0.5),
    MissingUsage(),
    EmptyChoices(),
)
"""Everything that can go wrong at a provider."""


def faulty(share: float, seed: int) -> FaultPlan:
    """Each call meets one of all faults with this probability."""
    return FaultPlan.mix({fault: share / len(FAULTS) for fault in FAULTS}, seed=seed)


class Workload:
    """A number of calls, made by threads and by tasks of two loops.

    Args:
        lm: what is called.
        calls: how many calls are made.
        seed: of every random choice.
        threads: callers that are threads.
        tasks: callers that are tasks, spread over `loops` event loops.

    Attributes:
        outcomes: how the calls ended: `answer`, `stream`, `abandoned`, `cancelled`, or the class of a typed error.
        strange: what should never come out of a call.
    """

    def __init__(self, lm: Any, calls: int, seed: int, *, threads: int = 8, tasks: int = 24, loops: int = 2) -> None:
        self._lm = lm
        self._calls = calls
        self._seed = seed
        self._threads = threads
        self._tasks = tasks
        self._loops = loops
        # Threads and tasks have calls of their own: who comes first on a busy machine must not decide which are made.
        self._thread_next, self._task_next = (itertools.count(first, 2).__next__ for first in (0, 1))
        self.outcomes: Counter[str] = Counter()
        self.strange: list[BaseException] = []

    def run(self, timeout: float) -> None:
        """Make all calls; a caller that does not end in time fails the test."""
        workers = [threading.Thread(target=self._thread, daemon=True) for _ in range(self._threads)]
        workers += [threading.Thread(target=lambda: asyncio.run(self._loop()), daemon=True) for _ in range(self._loops)]
        deadline = time.monotonic() + timeout
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            assert not worker.is_alive(), f"a caller hangs; so far {self.outcomes}"
        assert self.strange == []
        assert sum(self.outcomes.values()) == self._calls

    def _thread(self) -> None:
        with dspy.context(disable_history=True):
            while (number := self._thread_next()) < self._calls:
                self._note(self._sync, number)

    def _note(self, call: Any, number: int) -> None:
        dice = random.Random(f"{self._seed}:{number}")
        try:
            with call_context(**self._context(dice)):
                self.outcomes[call(dice)] += 1
        except LMError as error:
            self.outcomes[type(error).__name__] += 1
        except BaseException as error:
            self.outcomes["strange"] += 1
            self.strange.append(error)

    async def _loop(self) -> None:
        with dspy.context(disable_history=True):
            await asyncio.gather(*[self._task() for _ in range(self._tasks // self._loops)])
        await self._lm.pipeline.aclose()

    async def _task(self) -> None:
        while (number := self._task_next()) < self._calls:
            dice = random.Random(f"{self._seed}:{number}")
            try:
                with call_context(**self._context(dice)):
                    self.outcomes[await self._async(dice)] += 1
            except LMError as error:
                self.outcomes[type(error).__name__] += 1
            except BaseException as error:
                self.outcomes["strange"] += 1
                self.strange.append(error)

    def _context(self, dice: random.Random) -> dict[str, Any]:
        chosen: dict[str, Any] = {"tenant": dice.choice("abc"), "priority": dice.choice(["high", "normal", "low"])}
        # A stream has no time-out of its own; against one that trickles, only a deadline helps.
        chosen["deadline"] = dice.uniform(0.01, 0.5) if dice.random() < 0.15 else 2.0
        if dice.random() < 0.05:
            chosen["cache"] = dice.choice(["bypass", "refresh"])
        return chosen

    def _question(self, dice: random.Random) -> str:
        return f"question {dice.randrange(max(10, self._calls // 3))} of {self._seed}"

    @staticmethod
    def _request(question: str) -> Request:
        return Request(MODEL, (Message.user(question),), config=Config(max_tokens=100))

    # -- kinds of calls ----------------------------------------------------------------------------------------------
    def _sync(self, dice: random.Random) -> str:
        question = self._question(dice)
        if dice.random() < 0.7:
            assert isinstance(self._lm(question)[0], str)
            return "answer"
        events = self._lm._engine_spec.stream(self._request(question))
        leave_after = dice.choice([None, None, 1, 3])
        for position, _ in enumerate(events, 1):
            if position == leave_after:
                never_closed = [events]
                never_closed.append(never_closed)  # only the garbage collector will find it
                return "abandoned"
        return "stream"

    async def _async(self, dice: random.Random) -> str:
        question = self._question(dice)
        kind = dice.random()
        if kind < 0.55:
            assert isinstance((await self._lm.acall(question))[0], str)
            return "answer"
        if kind < 0.75:
            call = asyncio.ensure_future(self._lm.acall(question))
            await asyncio.sleep(dice.uniform(0, 0.05))
            call.cancel()
            try:
                await call
            except asyncio.CancelledError:
                return "cancelled"
            return "answer"
        events = self._lm._async_engine_spec.stream(self._request(question))
        leave_after = dice.choice([None, None, 1, 3])
        position = 0
        async for _ in events:
            position += 1
            if position == leave_after:
                never_closed = [events]
                never_closed.append(never_closed)
                return "abandoned"
        return "stream"


def left_over(lm: Any, providers: list[Provider]) -> dict[str, Any]:
    """Everything that should be zero when nobody calls any more."""
    gc.collect()
    REAPER.flush()
    store, pipeline = lm.pipeline.store, lm.pipeline
    routes = [route for route in pipeline.every_route() if route.breaker is not None]
    limiters = [limiter for route in routes if (limiter := store.limiter(route.limit_key)) is not None]
    return {
        "holds": store.holds(),
        "waiting": store.waiting(),
        "seats": sum(limiter.in_flight for limiter in limiters),
        "probes": sum(route.breaker.snapshot().probes_in_flight for route in routes),
        "flights": len(pipeline.flights),
        "at the providers": sum(provider.in_flight for provider in providers),
    }


def settle_down(lm: Any, providers: list[Provider], timeout: float = 30.0) -> None:
    """Wait until nothing is left over."""
    deadline = time.monotonic() + timeout
    while any((left := left_over(lm, providers)).values()):
        assert time.monotonic() < deadline, f"left over after {timeout:g} s: {left}"
        time.sleep(0.02)
