"""Whatever moment Ctrl-C comes at, an attempt is settled once: what it holds, what it took of a run, its permit and its
record."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from dspy.utils.exceptions import LMRateLimitError

from dspy_prod import Budget, CircuitBreaker, RateLimit, Run, call_context
from dspy_prod.pipeline.plan import plan
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.base import GRANTED, Settlement
from dspy_prod.testing import ScriptedEngine
from tests.compose.support import CENT, MODEL, down, over
from tests.e2e.support import request as asked
from tests.e2e.support import until
from tests.integration.support import breaker
from tests.interrupts import interrupted, interrupted_at_line
from tests.pipeline.support import answer, call_of
from tests.stores.redis.servers import started_valkey

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NUMBERS = itertools.count()

SETTLING: Final = tuple(
    f"pipeline/{name}.py"
    for name in (
        *("flow", "settling", "admission", "plan", "drivers", "effects", "preparing", "taken", "running", "attempt"),
        *("outcome", "outlasting", "call", "refusals", "probing"),
    )
)


@pytest.fixture(scope="module")
def valkey() -> Iterator[str]:
    server = started_valkey()
    yield f"redis://127.0.0.1:{server.port}/0"
    server.stop()


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        url: str = request.getfixturevalue("valkey")
        return url
    return {"memory": f"memory://once-{next(NUMBERS)}", "sqlite": f"sqlite:///{tmp_path}/state.db"}[request.param]


@pytest.fixture
def make(store: str) -> Iterator[Callable[..., Any]]:
    """Make an LM over a script, with a budget and a seat for one call at a time."""
    made: list[Any] = []
    own: dict[str, Any] = {
        "store": store,
        "namespace": f"once-{next(NUMBERS)}",
        "budget": Budget(usd=1000, name="all"),
        "limit": RateLimit(concurrency=1),
        "breaker": CircuitBreaker(failure_threshold=10**6, failure_rate=None),
    }

    def make(script: Any, **policies: Any) -> Any:
        lm = over(ScriptedEngine(script), **{**own, **policies})
        made.append(lm)
        return lm

    yield make
    for lm in made:
        lm.close()
        lm.pipeline.store.close()


def sync(lm: Any) -> Any:
    return lm("a question")


def task(lm: Any) -> Any:
    return asyncio.run(lm.acall("a question"))


def stream(lm: Any) -> Any:
    return list(lm._engine_spec.stream(asked(model=MODEL)))


def stream_of_a_task(lm: Any) -> Any:
    async def consume() -> list[Any]:
        return [event async for event in lm._async_engine_spec.stream(asked(model=MODEL))]

    return asyncio.run(consume())


WAYS: Final = [sync, task, stream, stream_of_a_task]


class Books:
    """What an LM, and the run its calls belong to, have in their books."""

    def __init__(self, lm: Any, run: Run | None = None) -> None:
        self.lm, self.run = lm, run
        self.store = lm.pipeline.store
        self.seen: set[str] = set()
        self.calls = lm.pipeline.primary.upstream.spec.calls

    def balance(self) -> str:
        """What is wrong after a call, "" when nothing is."""
        assert REAPER.flush()
        assert self.store.flush()
        calls, self.calls = self.lm.pipeline.primary.upstream.spec.calls - self.calls, self.calls
        self.calls += calls
        rows = self.store.records()
        new = [row for row in rows if row.id not in self.seen]
        self.seen |= {row.id for row in new}
        states = [state for key, state in self.store.accounts("", "", 10_000) if key.startswith("all|")]
        spent, held = sum(state.spent for state in states), sum(state.held for state in states)
        owed, wrong = sum(row.cost_nano or 0 for row in rows), []
        if (self.store.holds(), self.store.waiting(), held) != (0, 0, 0):
            wrong.append(f"{self.store.holds()} held, {self.store.waiting()} in line, {held} nano-USD held")
        if spent != owed:
            wrong.append(f"{spent} nano-USD spent, {owed} in the ledger")
        if len(new) > 1 or len(new) < calls:
            wrong.append(f"{calls} calls, recorded {[(row.outcome, row.cost_nano) for row in new]}")
        if self.run is not None:
            used = self.run.used()
            if round(used.usd * 1e9) != owed or used.held_usd:
                wrong.append(f"the run used {used}, in the ledger are {owed}")
        return "; ".join(wrong)


SCRIPTS: Final[dict[str, Any]] = {
    "answered": lambda _: answer(50),
    "no usage told": lambda _: answer(None),
    "down": lambda _: down(503),
    "late": lambda _: down(504),
    "throttled": lambda _: LMRateLimitError("slow down", model=MODEL, status=429),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_at_any_point_leaves_nothing_held(make: Callable[..., Any], way: Any, script: str) -> None:
    """Seat and money stayed held when it came while a failure was settled, so that the next call waited in vain."""
    lm = make(SCRIPTS[script], limit=RateLimit(concurrency=1, adaptive=False))
    run = Run("it", usd=1e6, calls=10**9, store=lm.pipeline.store.url, namespace=lm.pipeline.store.namespace)
    books, wrong, kept = Books(lm, run), [], []
    for point in itertools.count():
        with call_context(run=run, deadline=10):
            hit, outcome = interrupted(lambda: way(lm), point, *SETTLING, resumed=False)
        kept.append(outcome)  # with its traceback: nothing may depend on its end
        if told := books.balance():
            wrong.append(f"{point}: {told}")
        if not hit or len(wrong) > 3:
            break
    assert wrong == []
    assert point > 80


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interrupt_at_any_line_of_settling_leaves_nothing_held(
    make: Callable[..., Any], way: Any, script: str
) -> None:
    """Settling depends on no two lines being done together."""
    lm = make(SCRIPTS[script], limit=RateLimit(concurrency=1, adaptive=False))
    run = Run("it", usd=1e6, calls=10**9, store=lm.pipeline.store.url, namespace=lm.pipeline.store.namespace)
    books, wrong = Books(lm, run), []
    for point in itertools.count():
        with call_context(run=run, deadline=10):
            hit, _ = interrupted_at_line(lambda: way(lm), point, "pipeline/settling.py", "pipeline/taken.py")
        if told := books.balance():
            wrong.append(f"{point}: {told}")
        if not hit or len(wrong) > 3:
            break
    assert wrong == []
    assert point > 30


class Seat:
    """The seat of an LM in somebody else's hands, until a call has to wait for it."""

    def __init__(self, lm: Any) -> None:
        self.store = lm.pipeline.store
        reservation = plan(call_of(lm, max_tokens=50), lm.pipeline.primary, 1).reservation
        assert reservation is not None
        self.reservation = self.store.admit(reservation)
        until(lambda: reservation.state == GRANTED)

    def leave(self) -> None:
        self.store.settle(self.reservation, Settlement(self.reservation.id, 0, 0, False, False, None))


@pytest.mark.parametrize("way", [sync, task])
@pytest.mark.parametrize("shrinks", [False, True])
def test_ctrl_c_at_any_point_of_a_wait_leaves_nobody_in_line(make: Callable[..., Any], way: Any, shrinks: bool) -> None:
    """A place in line was left behind, or that of the smaller call which the budget still covers, and got the seat."""
    money: dict[str, Any] = {"usd": 0.006, "scope": "user", "shrink_last": True} if shrinks else {"usd": 1000}
    lm = make(lambda _: answer(0), budget=Budget(name="all", **money))
    books, wrong, kept = Books(lm), [], []
    seat: Any = None

    def leave(event: Any) -> None:
        if event.name == "waiting":
            seat.leave()

    remove = lm.pipeline.bus.add(leave)
    try:
        for point in itertools.count():
            with call_context(user="somebody"):
                seat = Seat(lm)
            with call_context(user=f"u{point}", deadline=10):
                hit, outcome = interrupted(lambda: way(lm), point, *SETTLING, resumed=False)
            kept.append(outcome)
            seat.leave()
            if told := books.balance():
                wrong.append(f"{point}: {told}")
            if not hit or wrong:  # who is left in line has the seat now
                break
    finally:
        remove()
    assert wrong == []
    assert point > 50


@contextmanager
def ctrl_c_in(lm: Any, name: str, at_last: Callable[[], None] = int) -> Iterator[None]:
    """A listener that is interrupted as it hears of something, just after `at_last`."""
    rang: list[str] = []

    def hear(event: Any) -> None:
        if event.name == name and not rang:
            rang.append(name)
            at_last()
            signal.raise_signal(signal.SIGINT)

    remove, before = lm.pipeline.bus.add(hear), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        remove()
    assert rang


@pytest.mark.parametrize(
    ("event", "script", "outcome", "cost"),
    [
        ("call_finished", "answered", "ok", CENT // 2),
        ("call_finished", "no usage told", "ok", CENT),
        ("attempt_failed", "down", "error", 0),
        ("breaker_opened", "down", "error", 0),
        ("attempt_failed", "late", "timeout", CENT),
        ("throttled", "throttled", "error", 0),
        ("attempt_failed", "throttled", "error", 0),
    ],
)
@pytest.mark.parametrize("way", [sync, stream])
@pytest.mark.parametrize("bare", [False, True])
def test_ctrl_c_in_a_listener_books_what_the_attempt_came_to(
    make: Callable[..., Any], way: Any, bare: bool, event: str, script: str, outcome: str, cost: int
) -> None:
    """An answered call was booked once more, as cancelled and at its bound; a failed one not at all, and kept its seat.

    Once with all that can be held for it, once with nothing but the ledger.
    """
    policies: dict[str, Any] = {"budget": None, "limit": None} if bare else {"limit": RateLimit(concurrency=1)}
    lm = make(SCRIPTS[script], breaker=CircuitBreaker(failure_threshold=1), **policies)
    with ctrl_c_in(lm, event), pytest.raises(KeyboardInterrupt):
        way(lm)
    assert REAPER.flush()
    assert lm.pipeline.store.flush()
    (row,) = lm.pipeline.store.records()
    assert (row.outcome, row.cost_nano) == (outcome, cost)
    assert lm.pipeline.store.holds() == 0
    assert breaker(lm).total_successes == (outcome == "ok")
    assert breaker(lm).total_failures == (script in ("down", "late"))
    if not bare:
        assert Books(lm).balance() == ""


@pytest.mark.parametrize("event", ["waiting", "waited"])
@pytest.mark.parametrize("shrinks", [False, True])
def test_ctrl_c_in_a_listener_of_a_wait_gives_back_what_was_granted(
    make: Callable[..., Any], event: str, shrinks: bool
) -> None:
    """Also what was granted for the call as it was planned anew."""
    money: dict[str, Any] = {"usd": 0.006, "scope": "user", "shrink_last": True} if shrinks else {"usd": 1000}
    lm = make(lambda _: answer(0), budget=Budget(name="all", **money))
    with call_context(user="somebody"):
        seat = Seat(lm)
    remove = lm.pipeline.bus.add(lambda heard: seat.leave() if heard.name == "waiting" else None)
    with ctrl_c_in(lm, event), pytest.raises(KeyboardInterrupt), call_context(user="me", deadline=10):
        lm("a question")
    remove()
    seat.leave()
    assert Books(lm).balance() == ""
    assert lm.pipeline.store.records() == []
