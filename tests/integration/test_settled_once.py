"""Whatever moment Ctrl-C comes at, an attempt is settled once: what it holds, what it took of a run, its permit and its
record."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from dspy.utils.exceptions import LMRateLimitError

import dspy_prod
from dspy_prod import Budget, CircuitBreaker, RateLimit, Run, call_context
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.testing import ScriptedEngine
from tests.compose.support import MODEL, down, over
from tests.e2e.support import account
from tests.e2e.support import request as asked
from tests.interrupts import interrupted
from tests.pipeline.support import answer
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
        "breaker": CircuitBreaker(failure_threshold=10**6),
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
        state, owed = account(self.lm), sum(row.cost_nano or 0 for row in rows)
        wrong = []
        if (self.store.holds(), self.store.waiting(), state.held) != (0, 0, 0):
            wrong.append(f"{self.store.holds()} held, {self.store.waiting()} in line, {state.held} nano-USD held")
        if state.spent != owed:
            wrong.append(f"{state.spent} nano-USD spent, {owed} in the ledger")
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
    assert point > 50
