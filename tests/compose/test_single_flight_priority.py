"""High priority goes first, also where its answer is one that a call of low priority waits to ask for."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dspy.lm15 import Request

import dspy_prod
from dspy_prod import Budget, RateLimit, Run, call_context
from dspy_prod.testing import ScriptedEngine
from tests.compose.support import Caller, Gate, following, idle, over, until

_numbers = itertools.count()


def within(call: Callable[[], Any], priority: Any) -> Callable[[], Any]:
    def asking() -> Any:
        with call_context(priority=priority):
            return call()

    return asking


class Line:
    """One seat, which is taken, and the order in which the others come to it."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.order: list[str] = []

    def __call__(self, request: Request) -> Any:
        return self.take(request.messages[-1].parts[0].text)

    def take(self, text: str) -> str:
        if text == "first":
            self.gate(None)  # type: ignore[arg-type]
        else:
            self.order.append(text)
        return text


@pytest.mark.parametrize("store", ["memory", "sqlite"])
@pytest.mark.parametrize("way", ["call", "acall", "vectors"])
def test_who_is_waited_for_by_one_of_high_priority_goes_before_others(tmp_path: Path, way: str, store: str) -> None:
    """Given a line of calls, when one of high priority follows the last of them, then that one goes first, once."""
    line = Line()
    url = f"memory://urgent-{next(_numbers)}" if store == "memory" else f"sqlite:///{tmp_path}/state.db"
    limit = RateLimit(concurrency=1)
    lm: Any
    if way == "vectors":
        lm = dspy_prod.Embedder(
            lambda texts: [[float(len(line.take(text)))] for text in texts], store=url, limit=limit, retry=False
        )
    else:
        lm = over(ScriptedEngine(line), cache=True, limit=limit, store=url)
    pipeline = lm.pipeline

    def ask(question: str) -> Callable[[], Any]:
        return (lambda: asyncio.run(lm.acall(question))) if way == "acall" else (lambda: lm(question))

    callers = [Caller(ask("first"))]
    assert line.gate.arrived.wait(30)
    for waiting, (question, priority) in enumerate([("a", "normal"), ("b", "normal"), ("q", "low")], 1):
        callers.append(Caller(within(ask(question), priority)))
        until(lambda waiting=waiting: pipeline.store.waiting() == waiting)  # type: ignore[misc]
    callers.append(Caller(within(ask("q"), "high")))
    until(lambda: following(lm) == 1)
    until(lambda: callers[3].is_alive() and pipeline.store.waiting() == 3 and raised(pipeline))
    line.gate.open()
    for caller in callers:
        assert not isinstance(caller.outcome(), Exception)
    assert line.order == ["q", "a", "b"]
    until(lambda: idle(lm))
    pipeline.close()


@pytest.mark.parametrize("of", ["run", "budget"])
@pytest.mark.parametrize("way", ["call", "acall"])
def test_who_waits_for_money_goes_before_others_too(way: str, of: str) -> None:
    """Given money for one call at a time, of a run or of a budget."""
    line = Line()
    lm = over(
        ScriptedEngine(line, output_tokens=1), cache=True,
        **({"budget": Budget(usd=0.0105, max_wait=30)} if of == "budget" else {}),
    )  # fmt: skip
    run = Run("r", usd=0.0105, store=f"memory://urgent-{next(_numbers)}") if of == "run" else None
    store = run.claims[0].store if run is not None else lm.pipeline.store

    def ask(question: str, priority: Any) -> Callable[[], Any]:
        def asking() -> Any:
            with call_context(priority=priority, **({} if run is None else {"run": run})):
                return asyncio.run(lm.acall(question)) if way == "acall" else lm(question)

        return asking

    callers = [Caller(ask("first", "normal"))]
    assert line.gate.arrived.wait(30)
    for waiting, (question, priority) in enumerate([("a", "normal"), ("b", "normal"), ("q", "low")], 1):
        callers.append(Caller(ask(question, priority)))
        until(lambda waiting=waiting: store.waiting() == waiting)  # type: ignore[misc]
    callers.append(Caller(ask("q", "high")))
    until(lambda: following(lm) == 1 and store.waiting() == 3 and raised(lm.pipeline))
    line.gate.open()
    for caller in callers:
        assert isinstance(caller.outcome(), list)
    assert line.order == ["q", "a", "b"]
    assert idle(lm)


def raised(pipeline: Any) -> bool:
    """Whether who leads the question stands in line as one of high priority does."""
    for found in list(pipeline.flights._flights.values()):
        asks = getattr(found, "leader", found).asks
        call = getattr(asks, "latest", asks)
        if call.line is not None and call.line.priority == 0 and call.line.blocked_on:
            return True
    return False
