"""Providers' answers, read by the real engines of real LMs: whole and streamed, in tasks too, under policies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any, Final

import dspy
from dspy.lm15 import Config, Message, Request

from dspy_prod.context.current import EMPTY, SETTING
from dspy_prod.pipeline import preparing
from dspy_prod.pipeline.clocks import _OrMoved
from dspy_prod.pipeline.effects import Wait
from dspy_prod.pipeline.upstream.workers import WORKERS
from dspy_prod.runtime.clock import Moment
from dspy_prod.runtime.reaper import REAPER
from tests.fuzz import invariants
from tests.fuzz.benches import CLOCK, ENGINES, POLICIES, Bench, bench
from tests.fuzz.draws import Draws
from tests.fuzz.exchange import Exchange, healthy
from tests.fuzz.framing import exchange
from tests.fuzz.memory import watched
from tests.fuzz.sockets import HOME, WIRE, instead_of_sockets

PATIENCE: Final = 20.0
"""Seconds an example may take: generous, for a machine that does other things too."""
MEMORY: Final = 200_000_000
"""Bytes an example may take at most."""
NATIVE: Final = [place for place, (engine, _, _) in enumerate(ENGINES) if engine == "lm15"]
THROUGH_LITELLM: Final = [place for place, (engine, _, _) in enumerate(ENGINES) if engine == "litellm"]
TICKS: Final = 3_000
"""Examples after which LMs and stores are made anew, so that their ledgers stay short."""


def _wait(effect: Wait) -> None:
    """Time passes at once when somebody waits: on the clock that leaps, as much as the driver would wait."""
    what = effect.what._what if isinstance(effect.what, _OrMoved) else effect.what
    until = CLOCK.monotonic() + (60 if effect.until == inf else effect.until - time.monotonic())
    if what is None:
        CLOCK.leap(until)
        return
    for _ in range(200):
        if not what.attach(lambda: None) or CLOCK.monotonic() >= until:
            return
        store = getattr(what, "store", None)
        CLOCK.leap(min(until, CLOCK.monotonic() + 0.5) if store is None else until)
    CLOCK.leap(until)


async def _await(effect: Wait) -> None:
    _wait(effect)


class Answers:
    """The fuzzer of answers.

    Args:
        litellm: whether examples go through LiteLLM; else through the native engines.
        memory: one example in this many is measured for its memory.
    """

    def __init__(self, litellm: bool = False, memory: int = 100) -> None:
        self._litellm = litellm
        self._memory = memory
        self._benches: dict[tuple[int, str], Bench] = {}
        self._loop = asyncio.new_event_loop()
        self._examples = 0

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Waits take no time in here, and DSPy keeps no history."""
        before = preparing._wait, preparing._await
        names: Any = preparing
        names._wait, names._await = _wait, _await
        try:
            with instead_of_sockets(), dspy.context(disable_history=True):
                yield
        finally:
            names._wait, names._await = before

    def close(self) -> None:
        """Close the loop of the tasks."""
        for each in self._benches.values():
            self._loop.run_until_complete(each.lm.pipeline.aclose())
        self._benches.clear()
        self._loop.close()

    def example(self, draws: Draws) -> str:
        """Make one call, or two; "answer", or the class of the error.

        Raises:
            Violation: a rule does not hold.
        """
        self._examples += 1
        if self._examples % TICKS == 0:
            for each in self._benches.values():
                self._loop.run_until_complete(each.lm.pipeline.aclose())
            self._benches.clear()
        engine = draws.pick(THROUGH_LITELLM if self._litellm else NATIVE)
        policies = draws.pick(tuple(POLICIES))
        bench = self._bench(engine, policies)
        way = draws.pick(("sync", "async", "stream", "astream"))
        measured = draws.one_in(self._memory)
        number = next(bench.numbers) % 10_000
        script = [exchange(draws, bench.api, "stream" in way, number) for _ in range(1 + draws.below(3))]
        WIRE.load(script, healthy(bench.api, "stream" in way, number))
        twice = draws.one_in(4)
        leaves = draws.below(12)
        late = draws.one_in(3)
        records: list[Any] = []
        context = EMPTY._replace(records=records, deadline=Moment.of(CLOCK, CLOCK.monotonic() + 50.0) if late else inf)
        began = time.thread_time()
        taken = watched() if measured else None
        with dspy.context(**{SETTING: context}):
            first = self._call(bench, way, number, leaves)
            second = self._call(bench, way, number, leaves) if twice else None
        if taken is not None:
            invariants.small(taken(), MEMORY)
        self._check(bench, number, (first, second), records)
        invariants.bounded(time.thread_time() - began, PATIENCE)
        CLOCK.leapt += 90.0  # pauses and open circuits are over
        return type(first).__name__ if isinstance(first, BaseException) else "answer"

    # -- details -----------------------------------------------------------------------------------------------------
    def _bench(self, engine: int, policies: str) -> Bench:
        found = self._benches.get((engine, policies))
        if found is None:
            found = self._benches[engine, policies] = bench(*ENGINES[engine], policies)
            WIRE.load([Exchange((), "reset", None, False)], healthy(found.api, False, 0))
            records: list[Any] = []
            with dspy.context(**{SETTING: EMPTY._replace(records=records)}):
                self._call(found, "sync", 0, 0)  # nobody knows what it cost: its bound
            found.bound = next(record.cost_nano for record in records if record.estimated)
            found.spent = self._spent(found)
        return found

    def _call(self, bench: Bench, way: str, number: int, leaves: int) -> Any:
        question = f"question {number:04d}"
        try:
            if way == "sync":
                return bench.lm(question)
            if way == "async":
                return self._loop.run_until_complete(self._ask(bench.lm, question, leaves))
            request = Request(bench.lm.model, (Message.user(question),), config=Config(max_tokens=50))
            if way == "stream":
                answer = _listen(bench.lm, request, leaves)
            else:
                answer = self._loop.run_until_complete(_alisten(bench.lm, request, leaves))
            if answer == "left":
                REAPER.flush()
                _workers_end()
            return answer
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            return error

    async def _ask(self, lm: Any, question: str, leaves: int) -> Any:
        if leaves < 10:
            return await lm.acall(question)
        task = asyncio.ensure_future(lm.acall(question))
        for _ in range(leaves - 9):
            await asyncio.sleep(0)
        task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return "left"

    def _check(self, bench: Bench, number: int, outcomes: tuple[Any, Any], records: list[Any]) -> None:
        lm = bench.lm
        before, bench.spent = bench.spent, self._spent(bench)
        spent = bench.spent - before
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                invariants.typed(outcome)
                invariants.no_secret([outcome])
            elif outcome is not None:
                invariants.own_answer(outcome, number)
        invariants.nothing_held(lm)
        invariants.charged(WIRE.told, records, bench.bound)
        invariants.at_home(WIRE.reached, HOME)
        invariants.no_secret(records)
        if bench.has_budget:
            invariants.booked(spent, records)

    @staticmethod
    def _spent(bench: Bench) -> int:
        if not bench.has_budget:
            return 0
        (rule,) = bench.lm.pipeline.budgets
        store = bench.lm.pipeline.store
        return int(store.account(rule.account(EMPTY, bench.lm.model, CLOCK.time()).key).spent)


def _workers_end() -> None:
    """What nobody reads any more is settled when its worker has ended, which is to be soon."""
    until = time.monotonic() + PATIENCE
    while WORKERS.busy:
        if time.monotonic() > until:
            raise invariants.Violation("ends", "a worker reads on what nobody reads any more")
        time.sleep(0.0005)


def _listen(lm: Any, request: Request, leaves: int) -> Any:
    events = lm._engine_spec.stream(request)
    seen = []
    try:
        for event in events:
            seen.append(event)
            if len(seen) == leaves - 8:
                return "left"
    finally:
        events.close()
    return seen


async def _alisten(lm: Any, request: Request, leaves: int) -> Any:
    events = lm._async_engine_spec.stream(request)
    seen = []
    try:
        async for event in events:
            seen.append(event)
            if len(seen) == leaves - 8:
                return "left"
    finally:
        await events.aclose()
    return seen
