"""The body of one process of a fleet: many callers, one LM, a clock that is wrong, and a report of how calls end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import dspy
from dspy.lm15 import Config, Message, Request
from dspy.utils.exceptions import LMError

from dspy_prod import Budget, BudgetExceededError, CircuitBreaker, RateLimit, Retry, call_context
from dspy_prod.runtime.clock import SystemClock
from tests.chaos.fleet.lateness import Lateness
from tests.e2e.support import MODEL, make_lm

REPORT: Final = 0.05
"""Seconds between two reports: of a process that is killed, so much is not known."""
OPENING: Final = 60.0
"""Seconds for which a worker tries to open its store, which may be away just now."""
FLUSH: Final = 20.0
"""Seconds within which what has ended is written once everything is back. Alone on a machine it takes one or two."""


@dataclass(frozen=True)
class Task:
    """What one worker does.

    Attributes:
        price: USD per million tokens of output; input is free.
        streams: streams, tasks and cancelled calls are among its calls.
        until_refused: a caller ends when its budget is spent; else when told to.
        same: all callers ask one and the same question, once.
        skew: seconds by which its clock is wrong; it jumps about within them.
        pause: seconds between two calls of a caller that was refused, so that refusals are not all there is.
    """

    url: str
    store: str
    callers: int
    seed: int
    usd: float
    price: float
    max_tokens: int = 100
    rpm: int | None = None
    tpm: int | None = None
    max_wait: float = 30.0
    timeout: float = 2.0
    deadlines: tuple[float, ...] = (60.0,)
    streams: bool = False
    until_refused: bool = False
    same: bool = False
    skew: float = 0.0
    pause: float = 0.02


class _Callers:
    """The callers of one worker, and what became of their calls since the last report."""

    def __init__(self, task: Task, lm: Any) -> None:
        self._task = task
        self._lm = lm
        self._lock = threading.Lock()
        self._ends: Counter[str] = Counter()
        self._strange: list[str] = []
        self._late = 0.0
        self._open: dict[int, float] = {}
        self._lateness = Lateness()
        self.stop = threading.Event()

    def run(self) -> None:
        """Return when all callers have ended."""
        task = self._task
        tasks = task.callers // 4 if task.streams else 0
        threads = [
            threading.Thread(target=self._thread, args=(number,), daemon=True) for number in range(task.callers - tasks)
        ]
        loop = threading.Thread(target=lambda: asyncio.run(self._loop(tasks, threads)), daemon=True)
        for thread in [*threads, loop]:
            thread.start()
        loop.join()

    def report(self) -> dict[str, Any]:
        """How calls ended since the last report; the latest one against its deadline, also among those under way."""
        now = time.monotonic()
        with self._lock:
            under_way = [self._lateness.beyond(deadline, now) for deadline in self._open.values()]
            told = {"ends": self._ends, "strange": self._strange, "late": max([self._late, *under_way])}
            self._ends, self._strange, self._late = Counter(), [], 0.0
        return told

    @property
    def under_way(self) -> int:
        """Calls that have begun and not ended."""
        return len(self._open)

    def note(self, number: int, deadline: float, error: BaseException | None, kind: str = "answer") -> None:
        ended = time.monotonic()
        typed = error is None or isinstance(error, (LMError, asyncio.CancelledError))
        with self._lock:
            self._open.pop(number, None)
            self._ends[type(error).__name__ if error is not None else kind] += 1
            self._late = max(self._late, self._lateness.beyond(deadline, ended))
            if os.environ.get("CHAOS_TEXTS") and error is not None:
                print(f"{kind} {error!r} {error.__cause__!r}", flush=True)
            if not typed and len(self._strange) < 5:
                assert error is not None
                self._strange.append("".join(traceback.format_exception(error)[-8:]))

    def _begin(self, number: int, dice: random.Random) -> tuple[float, float]:
        seconds = dice.choice(self._task.deadlines)
        deadline = time.monotonic() + seconds
        with self._lock:
            self._open[number] = deadline
        return seconds, deadline

    def _over(self, error: BaseException | None) -> bool:
        if self._task.same or self.stop.is_set():
            return True
        return self._task.until_refused and isinstance(error, BudgetExceededError)

    def _question(self, number: int, made: int) -> str:
        return "the same question" if self._task.same else f"question {made} of {number} of {self._task.seed}"

    # -- threads -----------------------------------------------------------------------------------------------------
    def _thread(self, number: int) -> None:
        dice = random.Random(f"{self._task.seed}:{number}")
        made, error = 0, None
        with dspy.context(disable_history=True):
            while made == 0 or not self._over(error):
                made += 1
                seconds, deadline = self._begin(number, dice)
                error, kind = None, "answer"
                try:
                    with call_context(deadline=seconds, tenant=None if self._task.same else dice.choice("abc")):
                        kind = self._call(self._question(number, made), dice)
                except BaseException as raised:
                    error = raised
                self.note(number, deadline, error, kind)
                if error is not None:
                    self.stop.wait(self._task.pause * dice.random())

    def _call(self, question: str, dice: random.Random) -> str:
        if not self._task.streams or dice.random() < 0.8:
            self._lm(question)
            return "answer"
        leave_after = dice.choice([None, None, 1, 3])
        events = self._lm._engine_spec.stream(self._request(question))
        for position, _ in enumerate(events, 1):
            if position == leave_after:
                events.close()
                return "abandoned"
        return "stream"

    def _request(self, question: str) -> Request:
        return Request(MODEL, (Message.user(question),), config=Config(max_tokens=self._task.max_tokens))

    # -- tasks -------------------------------------------------------------------------------------------------------
    async def _loop(self, tasks: int, threads: list[threading.Thread]) -> None:
        with dspy.context(disable_history=True):
            await asyncio.gather(*[self._task_of(self._task.callers + number) for number in range(tasks)])
        for thread in threads:  # their connections are closed too
            await asyncio.to_thread(thread.join)
        with suppress(LMError):
            await self._lm.pipeline.aclose()

    async def _task_of(self, number: int) -> None:
        dice = random.Random(f"{self._task.seed}:{number}")
        made = 0
        while not self.stop.is_set():
            made += 1
            seconds, deadline = self._begin(number, dice)
            error: BaseException | None = None
            try:
                with call_context(deadline=seconds, tenant=None if self._task.same else dice.choice("abc")):
                    await self._await(self._question(number, made), dice)
            except BaseException as raised:
                error = raised
            self.note(number, deadline, error)
            if error is not None:
                await asyncio.sleep(self._task.pause * dice.random())

    async def _await(self, question: str, dice: random.Random) -> None:
        call = asyncio.ensure_future(self._lm.acall(question))
        if dice.random() < 0.1:
            await asyncio.sleep(dice.uniform(0, 0.05))
            call.cancel()
        await call


def work(task: Task, line: Any) -> None:
    """Call until told to stop by anything on `line`, and report on it as JSON.

    The last report says `done`, and whether what had ended was `flushed`.
    """
    logging.disable(logging.CRITICAL)
    if task.skew:
        _skew(task.skew, random.Random(task.seed))
    lm = _opened(task)
    callers = _Callers(task, lm)
    over = threading.Event()

    def tell(**more: Any) -> None:
        line.send_bytes(json.dumps({**callers.report(), **more}).encode())

    def report() -> None:
        while not over.wait(REPORT):
            if line.poll():
                callers.stop.set()
            tell(**({"asked": True} if task.same and callers.under_way == task.callers else {}))

    reporting = threading.Thread(target=report, daemon=True)
    with suppress(BrokenPipeError):  # nobody listens any more
        tell(ready=True)
        reporting.start()
        callers.run()
        over.set()
        reporting.join()
        tell(ended=True)
        began, store = time.monotonic(), lm.pipeline.store
        flushed = False
        while not flushed and time.monotonic() < began + FLUSH:  # at once where the store was away a moment ago
            flushed = store.flush(FLUSH)
            time.sleep(0.0 if flushed else 0.1)
        took, problems = time.monotonic() - began, {} if flushed else store.problems
        lm.close()
        store.close()
        tell(done=True, flushed=flushed, took=took, problems=str(problems))


def _opened(task: Task) -> Any:
    until = time.monotonic() + OPENING
    while True:
        try:
            return make_lm(
                task.url,
                store=task.store,
                timeout=task.timeout,
                max_tokens=task.max_tokens,
                prices={MODEL: (0.0, task.price)},
                budget=Budget(usd=task.usd, per="total", max_wait=task.max_wait),
                limit=RateLimit(rpm=task.rpm, tpm=task.tpm, concurrency=400, max_wait=task.max_wait),
                retry=Retry(attempts=2, backoff=0.01, max_backoff=0.05) if task.streams else False,
                breaker=CircuitBreaker(failure_threshold=50, recovery_timeout=0.1) if task.streams else False,
                cache=task.same,
            )
        except Exception:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _skew(most: float, dice: random.Random) -> None:
    """Have this process's wall clock be wrong, by another span every few seconds."""
    real, off = time.time, dice.uniform(-most, most)

    def skewed() -> float:
        return real() + off

    def jump() -> None:
        nonlocal off
        while True:
            time.sleep(dice.uniform(1.0, 10.0))
            off = dice.uniform(-most, most)

    time.time = skewed
    SystemClock.time = staticmethod(skewed)
    threading.Thread(target=jump, daemon=True).start()
