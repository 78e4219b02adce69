"""Whoever waited for a call has gone: nobody is answered, nothing is spent, and the call counts as abandoned."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any

import anyio
import dspy
import pytest

import dspy_prod
from dspy_prod import Production
from dspy_prod.runtime.reaper import Reaper
from dspy_prod.testing import ScriptedEngine
from tests.stores.support import until

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

MODEL = "openai/m"


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(["sorry"] * 9)


@pytest.fixture
def lm(engine: ScriptedEngine, tmp_path: Path) -> Iterator[dspy_prod.LM]:
    lm = dspy_prod.LM(
        MODEL, engine=engine, async_engine=engine.asynchronous, store=f"sqlite:///{tmp_path}/state.db",
        prices={MODEL: dspy_prod.Price(input=1, output=2)},
    )  # fmt: skip
    with dspy.context(lm=lm):
        yield lm
    lm.close()
    lm.pipeline.store.close()


class Waits(dspy.Module):
    """Never answers; or first fails, if it is told so."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.predict, self.error = dspy.Predict("question -> answer"), error

    async def aforward(self, question: str) -> Any:
        if self.error is not None:
            raise self.error
        await asyncio.get_running_loop().create_future()


def leave(program: Any) -> None:
    """Call in a loop that is closed beneath the call, and leave it to the garbage collector."""

    async def begin() -> None:
        asyncio.get_running_loop().create_task(program.acall(question="q"))
        for _ in range(20):  # as many turns of the loop, however slow the first is
            await asyncio.sleep(0.001)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()


def collected(program: Any, where: Callable[[], Any] = gc.collect) -> None:
    """Have the garbage collector close a call."""
    gc.disable()
    try:
        leave(program)
        where()
    finally:
        gc.enable()


async def collected_in_a_loop() -> None:
    gc.collect()
    await asyncio.sleep(0.02)


ELSEWHERE = pytest.mark.parametrize(
    "where", [gc.collect, lambda: asyncio.run(collected_in_a_loop())], ids=["no loop", "another loop"]
)


def answers(lm: dspy_prod.LM, asked: list[str]) -> dict[str, Any]:
    """Fallbacks of each kind."""

    def function(question: str) -> str:
        asked.append("function")
        return str(lm("q")[0])

    async def coroutine(question: str) -> str:
        asked.append("coroutine")
        await asyncio.sleep(0.001)
        return str((await lm.acall("q"))[0])

    return {"text": "sorry", "function": function, "coroutine": coroutine, "module": dspy.Predict("question -> answer")}


@ELSEWHERE
@pytest.mark.parametrize("kind", ["text", "function", "coroutine", "module"])
def test_the_fallback_answers_nobody_for_a_call_that_is_collected(
    lm: dspy_prod.LM, engine: ScriptedEngine, kind: str, where: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It ran inside the collector: it asked a model, and a call that nobody waited for counted as failed."""
    asked: list[str] = []
    collected(Production(Waits(), "triage", answers(lm, asked)[kind], catch="all"), where)
    [call] = lm.ledger.program_calls()
    assert (call.status, call.reason, call.attempts) == ("abandoned", None, 0)
    assert asked == []
    assert engine.calls == 0
    assert not [each for each in caplog.records if each.name == "dspy_prod" and each.levelno >= logging.ERROR]


@ELSEWHERE
@pytest.mark.parametrize("kind", ["coroutine", "module"])
def test_a_call_that_is_collected_while_its_fallback_waits_is_abandoned(
    lm: dspy_prod.LM, kind: str, where: Callable[[], Any]
) -> None:
    """Nothing in what a module raises then tells that it was closed: the program's error has taken that place."""
    fallback = Waits() if kind == "module" else Waits().aforward
    collected(Production(Waits(LookupError("nothing there")), "triage", fallback, catch="all"), where)
    [call] = lm.ledger.program_calls()
    assert (call.status, call.reason) == ("abandoned", None)


@ELSEWHERE
def test_a_program_that_is_closed_as_it_tries_something_else_is_not_answered_for(
    lm: dspy_prod.LM, where: Callable[[], Any]
) -> None:
    """As above: it was closed in an `except`."""

    class Tries(Waits):
        async def aforward(self, question: str) -> Any:
            try:
                raise LookupError("nothing there")
            except LookupError:
                return await Waits().acall(question=question)

    collected(Production(Tries(), "triage", "sorry", catch="all"), where)
    [call] = lm.ledger.program_calls()
    assert (call.status, call.reason) == ("abandoned", None)


@ELSEWHERE
def test_of_two_programs_one_in_the_other_neither_falls_back(lm: dspy_prod.LM, where: Callable[[], Any]) -> None:
    asked: list[str] = []
    fallback = answers(lm, asked)["function"]
    inner = Production(Waits(), "inner", fallback, catch="all")
    collected(Production(inner, "outer", fallback, catch="all"), where)
    assert {(each.program, each.status) for each in lm.ledger.program_calls()} == {
        ("inner", "abandoned"), ("outer", "abandoned"),
    }  # fmt: skip
    assert asked == []


@pytest.mark.skipif(not hasattr(anyio, "RunFinishedError"), reason="this anyio says nothing of a loop that has ended")
def test_the_fallback_answers_nobody_in_a_stream_whose_loop_has_ended(lm: dspy_prod.LM) -> None:
    class Sends(Waits):
        def forward(self, question: str) -> Any:
            raise anyio.RunFinishedError

    asked: list[str] = []
    prod = Production(Sends(), "triage", answers(lm, asked)["function"], catch="all")
    with dspy.context(send_stream=object()), pytest.raises(anyio.RunFinishedError):
        prod(question="q")
    [call] = lm.ledger.program_calls()
    assert (call.status, asked) == ("abandoned", [])


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_caller_who_waits_is_answered_when_the_program_closes_something_else(lm: dspy_prod.LM, way: str) -> None:
    """It raises the same error, though nobody has left."""
    variable: ContextVar[int] = ContextVar("variable")

    def something() -> Iterator[int]:
        token = variable.set(1)
        try:
            yield 1
        finally:
            variable.reset(token)

    class Closes(Waits):
        def forward(self, question: str) -> Any:
            begun = something()
            copy_context().run(next, begun)
            begun.close()  # type: ignore[attr-defined]

        async def aforward(self, question: str) -> Any:
            self.forward(question)

    prod = Production(Closes(), "triage", "sorry", catch="all")
    result = prod(question="q") if way == "sync" else asyncio.run(prod.acall(question="q"))
    assert result.answer == "sorry"
    [call] = lm.ledger.program_calls()
    assert (call.status, call.reason, call.error) == ("fallback", "unexpected_error", "ValueError")


def test_a_call_begins_the_thread_that_there_was_none_of_before(
    lm: dspy_prod.LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where none could be had when the LM was made, or in a child just forked."""
    reaper = Reaper()
    monkeypatch.setattr("dspy_prod.production.watch.REAPER", reaper)
    collected(Production(Waits(), "triage"))
    until(lambda: [each.status for each in lm.ledger.program_calls()] == ["abandoned"])


class Stream:
    """A stream whose reader has gone, or reads on."""

    def __init__(self, gone: bool) -> None:
        self.gone = gone

    async def send(self, item: Any) -> None:
        if self.gone:
            raise anyio.BrokenResourceError


class Shares(Waits):
    """All calls wait for one task of the program's, which fails."""

    shared: asyncio.Future[Any]

    async def aforward(self, question: str) -> Any:
        stream = dspy.settings.send_stream
        if stream is not None:
            with suppress(anyio.BrokenResourceError):
                await stream.send(dspy.streaming.StatusMessage("thinking"))
        await self.shared


async def both(asked: Callable[[], Any], program: Shares, other: Stream | None) -> list[Any]:
    """What a call comes to whose reader has gone, and one of somebody who waits."""

    async def fails() -> None:
        await asyncio.sleep(0.01)
        raise ConnectionError("the index is down")

    async def call(stream: Stream | None) -> Any:
        with dspy.context(send_stream=stream):
            return await asked()

    program.shared = asyncio.ensure_future(fails())
    return await asyncio.gather(call(Stream(gone=True)), call(other), return_exceptions=True)


@pytest.mark.parametrize("other", [None, Stream(gone=False)], ids=["no stream", "a stream"])
def test_whose_error_is_shared_with_one_whose_reader_has_gone_is_answered(
    lm: dspy_prod.LM, other: Stream | None
) -> None:
    """It was marked as that one's, and whoever else waited for the same task of the program got it."""
    program = Shares()
    prod = Production(program, "triage", "sorry", catch="all")
    gone, waits = asyncio.run(both(lambda: prod.acall(question="q"), program, other))
    assert isinstance(gone, ConnectionError)
    assert waits.answer == "sorry"
    until(lambda: len(lm.ledger.program_calls()) == 2)
    assert {each.status for each in lm.ledger.program_calls()} == {"abandoned", "fallback"}


@pytest.mark.parametrize("way", ["bare", "Production"])
@pytest.mark.parametrize("other", [None, Stream(gone=False)], ids=["no stream", "a stream"])
def test_nor_is_it_taken_for_abandoned_by_an_experiment(lm: dspy_prod.LM, other: Stream | None, way: str) -> None:
    """The variant has failed for one of them, and the other has left, whatever the variant is."""
    program = Shares()
    variant, new = [program if way == "bare" else Production(program, "triage") for _ in range(2)]
    resolved, store = dspy_prod.Metric("resolved", margin=0.02), lm.pipeline.store.url
    exp = dspy_prod.Experiment("shared", variants={"control": variant, "new": new}, store=store, metrics=[resolved])
    users = iter(["leaves", "waits"])

    def asked() -> Any:
        with dspy_prod.call_context(user=next(users)):
            return asyncio.ensure_future(exp.acall(question="q"))

    asyncio.run(both(asked, program, other))
    trials = exp._works.trials
    until(lambda: sum(each.calls for each in trials.ended("shared")) == 2)
    ended = trials.ended("shared")
    assert (sum(each.failed for each in ended), sum(each.abandoned for each in ended)) == (1, 1)


def test_whose_program_lost_a_reader_of_its_own_is_answered(lm: dspy_prod.LM) -> None:
    """A program inside may answer somebody else, as in a stream that the one around it reads."""
    program = Shares()
    inner = Production(program, "inner", "sorry", catch="all")

    class Around(Waits):
        async def aforward(self, question: str) -> Any:
            return (await both(lambda: inner.acall(question=question), program, None))[0]

        async def acall(self, question: str) -> Any:
            found = await self.aforward(question)
            raise found

    outer = Production(Around(), "outer", "it is all right", catch="all")
    assert asyncio.run(outer.acall(question="q")).answer == "it is all right"
