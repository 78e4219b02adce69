"""Answers that are kept although they are no plain texts, and what is told while they can or cannot be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest

from dspy_prod import Redactor, Run, call_context
from dspy_prod.privacy import install
from dspy_prod.testing import Provider


@pytest.fixture
def provider() -> Iterator[Provider]:
    count, lock = iter(range(10**6)), threading.Lock()

    def answer(call: Any) -> Any:
        with lock:
            number = next(count)
        if "tools" not in call.body:
            return f"answer {number}"
        return {"tool_calls": [{"name": "look_up", "arguments": {"word": f"word {number}"}}]}

    with Provider(prices={"e2e": (0.15, 0.60)}, answer=answer) as provider:
        yield provider
        assert provider.errors == []


@pytest.fixture
def begun(tmp_path: Path) -> Callable[..., Run]:
    """The run, as another process would begin or resume it."""
    return lambda **options: Run(
        "it", store=f"sqlite:///{tmp_path}/runs.db", namespace="e2e", keep_answers=True, **options
    )


def look_up(word: str) -> str:
    """Look up a word."""
    return word


class Ask(dspy.Signature):
    """Answer with the tool."""

    question: str = dspy.InputField()
    tools: list[dspy.Tool] = dspy.InputField()
    outputs: dspy.ToolCalls = dspy.OutputField()


@pytest.mark.parametrize("engine", ["auto", "litellm"])
@pytest.mark.parametrize("cache", [True, False])
def test_a_native_call_of_a_tool_is_given_again(
    provider: Provider, connect: Callable[..., Any], begun: Callable[..., Run],
    engine: Literal["auto", "litellm"], cache: bool,
) -> None:  # fmt: skip
    program = dspy.Predict(Ask)
    adapter = dspy.ChatAdapter(use_native_function_calling=True)

    def once(run: Run) -> Any:
        lm = connect(engine=engine, cache=cache, model="openai/gpt-4o-mini", prices={"openai/gpt-4o-mini": (1, 1)})
        with call_context(run=run), dspy.context(lm=lm, adapter=adapter):
            return program(question="which word?", tools=[dspy.Tool(look_up)]).outputs

    first = once(begun())
    assert [(each.name, each.args) for each in first.tool_calls] == [("look_up", {"word": "word 0"})]
    run = begun()
    assert once(run) == first
    assert (run.replayed, len(provider.calls)) == (1, 1)


def test_a_full_disk_gives_what_is_paid_and_keeps_what_comes_when_there_is_room(
    provider: Provider, connect: Callable[..., Any], begun: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    """The answer that could not be kept is asked again, once; everything else is not."""
    lm, run = connect(cache=True), begun()
    connection = run.store._writer.tables.connection  # type: ignore[attr-defined]
    with call_context(run=run):
        assert lm("first") == ["answer 0"]
        run.store.flush(10)
        with run.store._writer.io:  # type: ignore[attr-defined]
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count={pages}")
        number = 0
        while not run.unkept:
            number += 1
            assert lm(f"{number} {'long ' * 20}") == [f"answer {number}"]
        assert "have to be paid again" in caplog.text
        with run.store._writer.io:  # type: ignore[attr-defined]
            connection.execute("PRAGMA max_page_count=1000000")
        while not run.store.flush(1):
            pass
        assert lm(f"{number} {'long ' * 20}") == [f"answer {number}"], "from the cache, and kept now"
        assert lm("last") == [f"answer {number + 1}"]
    paid = len(provider.calls)
    again, elsewhere = begun(), connect(cache=True)
    with call_context(run=again):
        for text in ("first", *[f"{each} {'long ' * 20}" for each in range(1, number + 1)], "last"):
            elsewhere(text)
    assert (len(provider.calls), again.replayed) == (paid, number + 2)


@pytest.mark.parametrize("cache", [True, False])
def test_a_preview_knows_what_the_run_has_answers_of(
    provider: Provider, connect: Callable[..., Any], begun: Callable[..., Run], cache: bool
) -> None:
    """And gives nothing of it out."""
    with call_context(run=begun(usd=1.0)):
        connect(cache=cache)("known", n=2)
    run, lm = begun(usd=1.0), connect(cache=cache)
    with call_context(run=run):
        for _ in range(3):
            seen = lm.preview("known", n=2)
            assert (seen.cached, seen.bound_usd, seen.affordable, seen.wait) == (True, 0, True, 0)
            assert "The run would answer" in seen.detail
        assert not lm.preview("known", n=3).cached
        new = lm.preview("new")
        assert (new.cached, new.bound_usd > 0) == (False, True)
        assert (run.asked, run.replayed, run.unkept) == (0, 0, 0)
        lm("known", n=2)
        assert run.replayed == 2
        assert lm.preview("known", n=2).cached is cache, "without a cache each answer is given once"
    assert not lm.preview("known", n=2).cached or cache
    assert len(provider.calls) == 2


def test_half_a_secret_is_not_told_of_a_strange_question(
    connect: Callable[..., Any], begun: Callable[..., Run]
) -> None:
    """The beginning of a long question is left out, and what is private in it is found before that."""
    lm = connect()
    with call_context(run=begun()):
        for number in range(40):
            lm(f"question {number}")
    run, restore = begun(), install(Redactor())
    try:
        with call_context(run=run):
            for number in range(17):
                lm(f"{number} somebody.with.a.long.name@example.com{' and more' * 21}")
        told = run.diverged
    finally:
        restore()
    assert told is not None
    assert "and more" in told
    assert "example.com" not in told


def test_a_few_answers_that_nobody_asks_for_are_no_other_way(
    connect: Callable[..., Any], begun: Callable[..., Run]
) -> None:
    """A dear call was refused just before the end, and what came instead of it is not asked again."""
    lm = connect()
    with call_context(run=begun()):
        for number in range(120):
            lm(f"question {number}")
    for asked, tells in ((104, False), (103, True)):
        run = begun()
        with call_context(run=run):
            for number in range(asked):
                lm(f"question {number}")
            for number in range(20):
                lm(f"{asked}: something new {number}")
        assert (run.replayed, run.strangers) == (asked, 20)
        assert (run.diverged is not None) is tells
        if tells:
            assert "20 calls differ" in str(run.diverged)
            assert "refused something" in str(run.diverged)
