"""What the composition tests share: an LM over a script, with every policy off but those under test."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import dspy
from dspy.lm15 import Request
from dspy.utils.exceptions import LMServerError

import dspy_prod
from dspy_prod import Price
from dspy_prod.testing import ScriptedEngine

MODEL = "openai/pair"
SPARE = "openai/spare"
CENT = 10_000_000
"""One US cent in nano-USD."""

A_CENT = Price(input=0.0, output=100.0)
"""With `max_tokens=100` a call is bound to one cent; an answer of 100 tokens costs exactly that."""

_numbers = itertools.count()


def over(engine: ScriptedEngine, **policies: Any) -> dspy_prod.LM:
    """An LM on this script: a store of its own, and no policy but the given ones."""
    off: dict[str, Any] = {"cache": False, "retry": False, "breaker": False, "max_tokens": 100}
    own = {"store": f"memory://pair-{next(_numbers)}", "namespace": "pairs", "prices": {MODEL: A_CENT, SPARE: A_CENT}}
    return dspy_prod.LM(MODEL, engine=engine, async_engine=engine.asynchronous, **{**off, **own, **policies})


def spare(engine: ScriptedEngine) -> dspy.LM:
    """A plain LM to fall back to."""
    return dspy.LM(SPARE, engine=engine, async_engine=engine.asynchronous, max_tokens=100)


def down(status: int = 500, retry_after: float | None = None) -> LMServerError:
    """An upstream's failure. 500 is not billed, 504 may have been."""
    return LMServerError("the upstream is down", model=MODEL, status=status, retry_after=retry_after)


def caught(call: Callable[[], Any]) -> BaseException:
    """What a call raised; it must raise."""
    try:
        answer = call()
    except Exception as error:
        return error
    raise AssertionError(f"the call was answered: {answer!r}")


class Gate:
    """An upstream that answers when it is told to.

    Attributes:
        arrived: a call has reached the upstream.
    """

    def __init__(self, answer: Any = "ok") -> None:
        self.arrived = threading.Event()
        self._opened = threading.Event()
        self._answer = answer

    def __call__(self, request: Request) -> Any:
        self.arrived.set()
        assert self._opened.wait(30), "nobody opened the gate"
        return self._answer

    def open(self) -> None:
        self._opened.set()


class Caller(threading.Thread):
    """A call made on a thread of its own, whose outcome can be awaited."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.answer: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._call()
        except BaseException as error:
            self.error = error

    def outcome(self, timeout: float = 30.0) -> Any:
        """The answer, or the error itself."""
        self.join(timeout)
        assert not self.is_alive(), f"the call did not end within {timeout} s"
        return self.answer if self.error is None else self.error


def until(condition: Callable[[], object], timeout: float = 30.0) -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not come true within {timeout} s"
        time.sleep(0.001)


def records(lm: dspy_prod.LM) -> list[dspy_prod.CallRecord]:
    """The ledger, oldest first."""
    found: list[dspy_prod.CallRecord] = lm.ledger.records()
    return found[::-1]


def following(lm: dspy_prod.LM) -> int:
    """Calls that wait for an identical one."""
    return lm.pipeline.flights.following()


def in_window(lm: dspy_prod.LM) -> float:
    """Requests of the primary's minute that are taken."""
    limiter = lm.pipeline.store.limiter(lm.pipeline.primary.limit_key)
    if limiter is None:
        return 0
    assert limiter.requests_available is not None
    assert limiter.requests_max is not None
    return limiter.requests_max - limiter.requests_available


def idle(lm: dspy_prod.LM) -> bool:
    """Nothing is held, nobody waits, no probe is out, no flight is open."""
    store, breaker = lm.pipeline.store, lm.pipeline.primary.breaker
    probes = 0 if breaker is None else breaker.snapshot().probes_in_flight
    return (store.holds(), store.waiting(), probes, len(lm.pipeline.flights)) == (0, 0, 0, 0)
