"""What the end-to-end tests share: an LM in front of a real provider, crowds of callers, and comparing books.

Child processes import it too, so it makes nothing at import.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from dspy.lm15 import Config, Message, Request

import dspy_prod
from dspy_prod import CallRecord, Price
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.base import Store
from dspy_prod.testing import Provider

MODEL = "openai/e2e"
CHEAP = "openai/e2e-cheap"
CENT = 10_000_000
"""One US cent in nano-USD."""

PRICES: dict[str, tuple[float, float]] = {MODEL: (0.15, 0.60), CHEAP: (0.05, 0.11)}
"""USD per million tokens, for the provider and for the LM."""

Crowd = Literal["threads", "tasks"]
_numbers = itertools.count()


def make_lm(
    url: str, *, model: str = MODEL, prices: dict[str, tuple[float, float]] | None = None, **options: Any
) -> Any:
    """A `dspy_prod.LM` in front of the provider at `url`: no cache, no retries, a store of its own."""
    table = PRICES if prices is None else prices
    defaults: dict[str, Any] = {
        "api_key": "test",
        "api_base": url,
        "max_tokens": 100,
        "cache": False,
        "retry": False,
        "prices": {name: Price(input=rate[0], output=rate[1]) for name, rate in table.items()},
        "namespace": "e2e",
    }
    if "store" not in options:
        defaults["store"] = fresh_memory()
    return dspy_prod.LM(model, **{**defaults, **options})


def fresh_memory() -> str:
    """The URL of a memory store nobody else uses."""
    return f"memory://e2e-{next(_numbers)}"


def request(text: str = "a question", *, model: str = MODEL, max_tokens: int = 100) -> Request:
    """A canonical request, for the engines beneath an LM."""
    return Request(model, (Message.user(text),), config=Config(max_tokens=max_tokens))


# -- crowds ----------------------------------------------------------------------------------------------------------
def together(
    crowd: Crowd, lm: Any, callers: int, *, calls: int = 1, timeout: float = 60.0, say: str = "question"
) -> list[Any]:
    """Outcomes (answers or exceptions) of `callers` that each make `calls` calls in a row, all beginning at once.

    A caller that does not end in time fails the test.
    """
    outcomes: list[Any] = []
    if crowd == "threads":
        start = threading.Barrier(callers)

        def caller(number: int) -> None:
            start.wait(timeout)
            for call in range(calls):
                outcomes.append(outcome(lambda: lm(f"{say} {number}.{call}")))  # noqa: B023  (called at once)

        join([threading.Thread(target=caller, args=(number,), daemon=True) for number in range(callers)], timeout)
    else:

        async def acaller(number: int) -> None:
            for call in range(calls):
                try:
                    outcomes.append(await lm.acall(f"{say} {number}.{call}"))
                except Exception as error:
                    outcomes.append(error)

        async def crowd_of_tasks() -> None:
            await asyncio.wait_for(asyncio.gather(*[acaller(number) for number in range(callers)]), timeout)
            await lm.pipeline.aclose()

        asyncio.run(crowd_of_tasks())
    assert len(outcomes) == callers * calls, "a caller was lost"
    return outcomes


def join(threads: list[threading.Thread], timeout: float = 60.0) -> None:
    """Start threads and wait until all have ended."""
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), f"{thread.name} did not end within {timeout} s"


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returned or raised."""
    try:
        return call()
    except Exception as error:
        return error


def ask(lm: Any, way: str = "sync") -> Any:
    """One call, `sync` or `async`; its answer or what it raised."""

    async def in_task() -> Any:
        try:
            return await lm.acall("a question")
        finally:
            await lm.pipeline.aclose()

    return outcome(lambda: lm("a question")) if way == "sync" else outcome(lambda: asyncio.run(in_task()))


def answers(outcomes: list[Any]) -> list[Any]:
    return [each for each in outcomes if not isinstance(each, BaseException)]


def errors(outcomes: list[Any], kind: type[BaseException]) -> list[Any]:
    """The errors among outcomes; all of them must be of this kind."""
    found = [each for each in outcomes if isinstance(each, BaseException)]
    strange = [each for each in found if not isinstance(each, kind)]
    assert not strange, f"{len(strange)} of {len(outcomes)} callers met something else, first {strange[0]!r}"
    return found


def until(condition: Callable[[], object], timeout: float = 30.0, what: str = "the condition") -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout} s"
        time.sleep(0.002)


class Pool:
    """Threads that call one after another, so that a test knows their order in line."""

    def __init__(self, size: int = 64) -> None:
        self._executor = ThreadPoolExecutor(size)

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._executor.submit(function, *args, **kwargs)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True)

    def abandon(self) -> None:
        """Wait for nobody: calls of a test that failed may hang until their provider stops."""
        self._executor.shutdown(wait=False, cancel_futures=True)


# -- books -----------------------------------------------------------------------------------------------------------
def records(lm: Any) -> list[CallRecord]:
    """The ledger's records, oldest first, with everything settled that finalisers posted."""
    assert REAPER.flush()
    found: list[CallRecord] = lm.ledger.records()
    return found[::-1]


def upstream(lm: Any) -> list[CallRecord]:
    """The records of upstream attempts, without answers from the cache and refusals."""
    return [record for record in records(lm) if not record.cached and record.outcome != "refused"]


def charged(lm: Any) -> int:
    """The sum of the ledger in nano-USD; no cost may be unknown."""
    costs = [record.cost_nano for record in records(lm)]
    assert None not in costs
    return sum(cost for cost in costs if cost is not None)


def assert_equals_bill(lm: Any, provider: Provider) -> None:
    """Every attempt that was billed is in the ledger at its exact price, and nothing else costs anything."""
    mine = sorted(record.cost_nano or 0 for record in records(lm) if record.cost_nano != 0)
    assert mine == sorted(row.nano for row in provider.bill.rows if row.nano)
    assert charged(lm) == provider.bill.nano
    assert not any(record.estimated for record in records(lm))


def assert_nothing_held(store: Store) -> None:
    """Nobody waits, and no money, seat or token is kept for anybody."""
    assert REAPER.flush()
    assert store.waiting() == 0
    assert store.holds() == 0


def account(lm: Any) -> Any:
    """State of the LM's only budget account."""
    (rule,) = lm.pipeline.budgets
    pipeline = lm.pipeline
    return pipeline.store.account(
        rule.account(dspy_prod.context.current.EMPTY, pipeline.primary.model, time.time()).key
    )


def gaps(times: list[float]) -> Iterator[float]:
    """Seconds between neighbours."""
    return (later - earlier for earlier, later in itertools.pairwise(sorted(times)))
