"""Each call of a `Production` leaves one small record of how it ended, whatever that was."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import dspy
import pytest
from dspy.utils import DummyLM
from dspy.utils.exceptions import AdapterParseError, LMServerError

import dspy_prod
from dspy_prod import Budget, Production, call_context, call_report
from dspy_prod.context.assignments import Assignment
from dspy_prod.context.current import assigned, current, use
from dspy_prod.stores.programs import ProgramCall
from dspy_prod.testing import Provider, ScriptedEngine

MODEL = "openai/m"
PRICE = dspy_prod.Price(input=1, output=2)
COST = 10 * 1_000 + 5 * 2_000
FORM = "[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"

Make = Callable[..., dspy_prod.LM]


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Make LMs on one store, in memory and in a file; all are closed at the end."""
    url = f"memory://calls-{tmp_path.name}" if request.param == "memory" else f"sqlite:///{tmp_path}/state.db"
    with contextlib.ExitStack() as stack:

        def make(*answers: Any, latency: float = 0.0, **options: Any) -> dspy_prod.LM:
            engine = ScriptedEngine(list(answers) or [FORM], latency=latency)
            fixed = {"store": url, "namespace": "calls", "retry": False, "breaker": False, "prices": {MODEL: PRICE}}
            lm = dspy_prod.LM(MODEL, engine=engine, async_engine=engine.asynchronous, **{**fixed, **options})
            stack.callback(lm.pipeline.store.close)
            stack.enter_context(contextlib.closing(lm))
            return lm

        yield make


def qa() -> dspy.Predict:
    return dspy.Predict("question -> answer")


def down() -> LMServerError:
    return LMServerError("down", model=MODEL, status=500)


async def _streamed(prod: Any, **inputs: Any) -> Any:
    listener = dspy.streaming.StreamListener(signature_field_name="answer")
    return [each async for each in dspy.streamify(prod, stream_listeners=[listener])(**inputs)][-1]


ASK: dict[str, Callable[..., Any]] = {
    "sync": lambda prod, **inputs: prod(**inputs),
    "async": lambda prod, **inputs: asyncio.run(prod.acall(**inputs)),
    "stream": lambda prod, **inputs: asyncio.run(_streamed(prod, **inputs)),
}


def ask(how: str, lm: Any, prod: Production, question: str = "q") -> Any:
    """The prediction, or the error."""
    try:
        with dspy.context(lm=lm):
            return ASK[how](prod, question=question)
    except Exception as error:
        return error


def ends(lm: dspy_prod.LM, **wanted: Any) -> list[tuple[str, str | None, str | None]]:
    """(status, reason, error) of each call, the newest first."""
    return [(call.status, call.reason, call.error) for call in lm.ledger.program_calls(**wanted)]


@pytest.mark.parametrize("how", ASK)
def test_answers_are_recorded_with_what_they_cost(make: Make, how: str) -> None:
    lm, prod = make(), Production(qa(), "triage")
    with call_context(user="u", tenant="t", session="s", run="r", tags={"team": "blue"}):
        first, second = (ask(how, lm, prod) for _ in range(2))
    cached, asked = lm.ledger.program_calls()
    assert (asked.status, asked.cost_nano, asked.list_nano, asked.attempts, asked.cached) == ("ok", COST, COST, 1, 0)
    assert (cached.status, cached.cost_nano, cached.list_nano, cached.attempts, cached.cached) == (
        *("cached", 0, COST),
        *(0, 1),
    )
    for call, pred in ((asked, first), (cached, second)):
        report = call_report(pred)
        assert (report.id, report.status, report.attempts) == (call.id, call.status, call.attempts)
        assert (report.cost_usd, report.list_cost_usd) == (call.cost_usd, call.list_cost_usd)
        assert call.latency == report.latency > 0
        whose = (call.program, call.user, call.tenant, call.session, call.run, dict(call.tags))
        assert whose == ("triage", "u", "t", "s", "r", {"team": "blue"})
    [row] = lm.ledger.programs()
    assert (row.value, row.calls, row.ok, row.cached, row.error_rate) == ("triage", 2, 1, 1, 0.0)
    assert (row.usd, row.list_usd) == (COST / 1e9, 2 * COST / 1e9)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_fallback_is_recorded_with_its_reason(make: Make, how: str) -> None:
    """In the ledger its call was `ok`: nobody could read from it how often the fallback answered."""
    lm = make("{}")
    prod = Production(dspy.Predict("question -> answer: int"), "triage", {"answer": 0})
    pred = ask(how, lm, prod)
    assert call_report(pred).status == "fallback"
    assert ends(lm) == [("fallback", "parse_error", "AdapterParseError")]
    assert {record.outcome for record in lm.ledger.records()} == {"ok"}
    [call] = lm.ledger.program_calls(reason="parse_error")
    assert call.cost_nano == sum(record.cost_nano or 0 for record in lm.ledger.records()) > 0
    [row] = lm.ledger.programs(by="day")
    assert (row.fallback, row.reasons, row.fallback_rate, row.error_rate) == (1, {"parse_error": 1}, 1.0, 0.0)


def test_a_streamed_answer_that_cannot_be_read_is_an_error(make: Make) -> None:
    """A part of it was shown, so that no fallback may answer."""
    lm = make("{}")
    assert isinstance(ask("stream", lm, Production(qa(), "triage", "sorry")), AdapterParseError)
    assert ends(lm) == [("error", "parse_error", "AdapterParseError")]


@pytest.mark.parametrize("how", ASK)
def test_what_raises_is_recorded_as_a_refusal_or_an_error(make: Make, how: str) -> None:
    lm = make(down(), budget=Budget(usd=1e-9), max_tokens=10)
    raised = ask(how, lm, Production(qa(), "triage"))
    assert isinstance(raised, Exception)
    other = make(down(), namespace="calls")
    assert isinstance(ask(how, other, Production(qa(), "triage"), "another"), Exception)
    found = ends(lm)
    assert found == [("error", "upstream_error", found[0][2]), ("refused", "budget_exceeded", found[1][2])]
    [row] = lm.ledger.programs()
    assert (row.refused, row.error, row.error_rate) == (1, 1, 1.0)
    assert row.reasons == {"budget_exceeded": 1, "upstream_error": 1}


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_mistake_of_the_program_is_an_error_and_still_raises(make: Make, how: str) -> None:
    class Broken(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.answer = qa()

        def forward(self, question: str) -> Any:
            self.answer(question=question)
            raise KeyError("a mistake")

        async def aforward(self, question: str) -> Any:
            await self.answer.acall(question=question)
            raise KeyError("a mistake")

    lm = make()
    assert isinstance(ask(how, lm, Production(Broken())), KeyError)
    [call] = lm.ledger.program_calls()
    assert (call.status, call.reason, call.error, call.cost_nano) == ("error", "unexpected_error", "KeyError", COST)


def test_a_result_that_is_no_prediction_is_recorded_too(make: Make) -> None:
    class Text(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.answer = qa()

        def forward(self, question: str) -> str:
            return str(self.answer(question=question).answer)

    lm = make()
    assert ask("sync", lm, Production(Text())) == "yes"
    assert ends(lm) == [("ok", None, None)]


def test_a_fallback_that_fails_itself_is_an_error(make: Make) -> None:
    lm = make(down())

    def fails(question: str) -> str:
        raise LookupError("nothing there")

    assert isinstance(ask("sync", lm, Production(qa(), fallback_response=fails)), LookupError)
    assert ends(lm) == [("error", "unexpected_error", "LookupError")]


def test_a_cancelled_call_is_abandoned(make: Make) -> None:
    """As when a web server's client has gone. What it cost is in its record."""
    lm = make(latency=30.0)

    async def leave() -> None:
        with dspy.context(lm=lm):
            task = asyncio.create_task(Production(qa(), "triage", "sorry").acall(question="q"))
            await asyncio.sleep(0)  # it begins
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(leave())
    [call] = lm.ledger.program_calls()
    assert (call.status, call.reason, call.error, call.attempts) == ("abandoned", None, "CancelledError", 1)
    assert call.latency >= 0.2
    [row] = lm.ledger.programs()
    assert (row.abandoned, row.error_rate, row.fallback_rate) == (1, None, None)


@pytest.mark.parametrize("engine", ["lm15", "litellm"])
def test_a_stream_that_its_reader_leaves_is_abandoned(tmp_path: Path, engine: str) -> None:
    long = "[[ ## answer ## ]]\n" + "word " * 400 + "\n\n[[ ## completed ## ]]"
    with Provider(answer=long, chunks=200, chunk_delay=0.02) as provider:
        lm = dspy_prod.LM(
            MODEL, api_base=provider.url, api_key="key", engine=engine, store=f"sqlite:///{tmp_path}/state.db",
            namespace="left", prices={MODEL: PRICE},
        )  # fmt: skip
        listener = dspy.streaming.StreamListener(signature_field_name="answer")

        async def leave() -> None:
            began = asyncio.Event()

            async def read() -> None:
                async for _ in dspy.streamify(Production(qa(), "triage"), stream_listeners=[listener])(question="q"):
                    began.set()

            with dspy.context(lm=lm):
                reader = asyncio.create_task(read())
                await began.wait()
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
            # Its thread notices with the next chunk. A loop that ended under it would leave it waiting for ever.
            until = time.monotonic() + 10.0
            while not lm.ledger.program_calls() and time.monotonic() < until:  # noqa: ASYNC110 - nobody tells when
                await asyncio.sleep(0.01)

        asyncio.run(leave())
        [call] = lm.ledger.program_calls()
        assert (call.status, call.program) == ("abandoned", "triage")
        lm.close()
        lm.pipeline.store.close()


def test_what_the_garbage_collector_ends_is_abandoned(make: Make) -> None:
    """Nothing of it may be done on the collector's thread, which may hold any lock."""
    lm = make()
    with dspy.context(lm=lm):
        coroutine = Production(Sleeps()).acall(question="q")
        coroutine.send(None)
        coroutine.close()
    assert ends(lm) == [("abandoned", None, "GeneratorExit")]


class Sleeps(dspy.Module):  # type: ignore[misc]
    """Never answers."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = qa()

    async def aforward(self, question: str) -> Any:
        await Forever()


class Forever:
    def __await__(self) -> Iterator[None]:
        yield


def test_the_experiment_its_stage_and_the_version_are_reported_and_recorded(make: Make) -> None:
    lm, prod = make(), Production(qa(), "triage")
    with call_context(experiment="outer", variant="control"), call_context(prompt_version="triage/7"):
        with use(assigned(current(), Assignment("inner", "new", "5%", "u", 0.05))):
            report = call_report(ask("sync", lm, prod))
    assert (report.experiment, report.variant, report.stage, report.prompt_version) == (
        *("inner", "new"),
        *("5%", "triage/7"),
    )
    for words in ("inner", "new", "5%", "triage/7"):
        assert words in str(report)
    [call] = lm.ledger.program_calls(experiment="inner", variant="new", stage="5%", prompt_version="triage/7")
    assert call.tags == (("experiment:outer", "control"),)
    assert [row.value for row in lm.ledger.programs(by="variant")] == ["inner/new"]
    assert [row.value for row in lm.ledger.programs(by="tag:experiment:outer")] == ["control"]


def test_an_experiment_within_the_program_is_reported(make: Make) -> None:
    class Inside(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.answer = qa()

        def forward(self, question: str) -> Any:
            with call_context(experiment="e", variant="v", prompt_version="x/1"):
                return self.answer(question=question)

    lm = make()
    report = call_report(ask("sync", lm, Production(Inside())))
    assert (report.experiment, report.variant, report.stage, report.prompt_version) == ("e", "v", None, "x/1")


def test_one_within_another_is_recorded_for_each(make: Make) -> None:
    lm = make()
    ask("sync", lm, Production(Production(qa(), "inner"), "outer"))
    assert sorted(call.program for call in lm.ledger.program_calls()) == ["inner", "outer"]


def test_what_is_scored_is_not_recorded(make: Make) -> None:
    """It would count in the error rate of what users were answered."""
    lm, prod = make(), Production(qa(), "triage", "sorry")
    examples = [dspy.Example(question=f"q{number}", answer="yes").with_inputs("question") for number in range(3)]
    with dspy.context(lm=lm):
        dspy.Evaluate(devset=examples, metric=lambda *_: 1.0, num_threads=1, display_progress=False)(prod)
    assert lm.ledger.program_calls() == []
    assert len(lm.ledger.records()) == 3
    assert call_report(ask("sync", lm, prod)).id == lm.ledger.program_calls()[0].id


def test_without_an_lm_of_ours_nothing_is_recorded_and_all_is_reported() -> None:
    """There is no store; of a plain `dspy.LM` DSPy's history tells what a cached answer has cost."""
    report = call_report(ask("sync", DummyLM([{"answer": "yes"}]), Production(qa(), unguarded="allow")))
    assert (report.status, report.id) == ("ok", None)


def test_a_plain_lms_cached_answer_is_listed_at_what_it_cost() -> None:
    """As one of ours: the list cost of both programs is the same."""
    with Provider(answer=FORM) as provider:
        lm = dspy.LM("openai/gpt-4o-mini", api_base=provider.url, api_key="key", cache=True)
        prod = Production(qa(), unguarded="allow")
        question = f"a new one, {uuid4()}"  # DSPy's cache outlives the process
        with dspy.context(lm=lm):
            first, second = (call_report(prod(question=question)) for _ in range(2))
    assert (first.status, second.status) == ("ok", "cached")
    assert second.cost_usd == 0
    assert first.cost_usd
    assert second.list_cost_usd == pytest.approx(first.cost_usd) == first.list_cost_usd


def test_calls_and_rows_show_themselves(make: Make) -> None:
    lm = make(FORM, down())
    prod = Production(qa(), "triage", "sorry")
    with call_context(user="ann", experiment="e", variant="v"):
        for question in ("q", "another"):
            ask("sync", lm, prod, question)
    calls, rows = lm.ledger.program_calls(), lm.ledger.programs()
    for words in ("triage", "fallback", "upstream_error", "ann", "e/v", calls[0].id):
        assert words in str(calls)
    assert all(words in str(rows) for words in ("triage", "upstream_error", "50.0"))
    assert list(calls.to_frame()["status"]) == ["fallback", "ok"]
    assert list(rows.to_frame()["fallback_rate"]) == [0.5]
    assert isinstance(calls[0], ProgramCall)


def test_an_unknown_dimension_is_refused_by_name(make: Make) -> None:
    with pytest.raises(dspy_prod.ConfigError, match=r"by='colour'.*'variant'.*'tag:<key>'"):
        make().ledger.programs(by="colour")
