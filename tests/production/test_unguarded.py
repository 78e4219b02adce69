"""An LM that is no `dspy_prod.LM`, beneath a `Production`: its calls would pass budget and ledger unseen."""

from __future__ import annotations

import asyncio
import copy
import logging
from typing import Any

import cloudpickle
import dspy
import pytest
from dspy.utils import DummyLM

import dspy_prod
from dspy_prod import ConfigError, Production
from dspy_prod.testing import Provider, ScriptedEngine

ANSWER = "[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"


def plain(model: str = "openai/test-model") -> dspy.LM:
    engine = ScriptedEngine([ANSWER])
    return dspy.LM(model, engine=engine, async_engine=engine.asynchronous, cache=False)


def guarded() -> dspy_prod.LM:
    engine = ScriptedEngine([ANSWER])
    return dspy_prod.LM(
        "openai/test-model", engine=engine, async_engine=engine.asynchronous, store="memory://unguarded"
    )


class Two(dspy.Module):  # type: ignore[misc]
    """Two predictors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("question -> answer")
        self.second = dspy.ChainOfThought("question -> answer")

    def forward(self, question: str) -> Any:
        return self.first(question=question)

    async def aforward(self, question: str) -> Any:
        return await self.first.acall(question=question)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "past" in record.getMessage()]


def test_a_plain_lm_on_a_predictor_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """A plain `dspy.LM` set on one predictor spent money that no budget and no ledger saw, without a word."""
    program = Two()
    program.second.predict.lm = plain()
    with dspy.context(lm=guarded()), caplog.at_level(logging.WARNING, "dspy_prod"):
        prod = Production(program)
        assert ["'second.predict'" in text and "openai/test-model" in text for text in said(caplog)] == [True]
        prod(question="?")
        prod(question="?")
    assert len(said(caplog)) == 1


@pytest.mark.parametrize("way", ["sync", "async"])
def test_one_that_is_set_later_or_for_a_block_is_found_when_it_is_used(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`dspy.context(lm=...)`, `set_lm` after the construction, a frozen program: each call looks."""
    prod = Production(Two())

    def call() -> None:
        if way == "sync":
            prod(question="?")
        else:
            asyncio.run(prod.acall(question="?"))

    with caplog.at_level(logging.WARNING, "dspy_prod"), dspy.context(lm=guarded()):
        call()
        assert said(caplog) == []
        with dspy.context(lm=plain()):
            call()
        assert len(said(caplog)) == 2  # both predictors would use it
        caplog.clear()
        prod.program._compiled = True
        prod.program.first.lm = plain("openai/another")
        call()
        assert ["'first'" in text for text in said(caplog)] == [True]


def test_who_wants_none_refuses_it() -> None:
    """`unguarded="refuse"` raises at construction and at the call, and no fallback answers for that mistake."""
    program = Two()
    program.first.lm = plain()
    with dspy.context(lm=guarded()):
        with pytest.raises(ConfigError, match=r"'first'.*dspy_prod\.LM"):
            Production(program, unguarded="refuse")
        program.first.lm = None
        prod = Production(program, unguarded="refuse", fallback_response="sorry", catch="all")
        assert prod(question="?").answer == "yes"
        prod.set_lm(plain())
        with pytest.raises(ConfigError, match="'first'"):
            prod(question="?")


def test_guarded_lms_dummies_and_who_allows_it_hear_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """No word where nothing is wrong: our LMs, DSPy's dummy for tests, no LM yet, `unguarded="allow"`."""
    with caplog.at_level(logging.WARNING, "dspy_prod"):
        Production(Two())
        with dspy.context(lm=DummyLM([{"answer": "yes"}])):
            Production(Two())(question="?")
        with Provider() as provider:
            wrapped = dspy_prod.wrap(
                dspy.LM("openai/test-model", api_base=provider.url, api_key="k"), store="memory://unguarded"
            )
            with dspy.context(lm=wrapped):
                Production(Two())
        with dspy.context(lm=plain()):
            Production(Two(), unguarded="allow")(question="?")
    assert said(caplog) == []


def test_an_unknown_choice_is_named() -> None:
    with pytest.raises(ConfigError, match="unguarded='no': use 'warn', 'refuse', 'allow'"):
        Production(Two(), unguarded="no")  # type: ignore[arg-type]


def test_a_copy_looks_at_its_own_program(caplog: pytest.LogCaptureFixture) -> None:
    """Optimizers and savers copy programs: the copy is watched, and not copied twice."""
    prod = Production(Two())
    for twin in (prod.deepcopy(), copy.deepcopy(prod), cloudpickle.loads(cloudpickle.dumps(prod))):
        caplog.clear()
        twin.program.first.lm = plain()
        with dspy.context(lm=guarded()), caplog.at_level(logging.WARNING, "dspy_prod"):
            twin(question="?")
        assert ["'first'" in text for text in said(caplog)] == [True]


def call(prod: Any, way: str, **arguments: Any) -> Any:
    if way == "sync":
        return prod(question="?", **arguments)

    async def ask() -> Any:
        if way == "async":
            return await prod.acall(question="?", **arguments)
        return [item async for item in dspy.streamify(prod)(question="?", **arguments)][-1]

    return asyncio.run(ask())


WAYS = ["sync", "async", "stream"]


class Passing(dspy.Module):  # type: ignore[misc]
    """Hands an LM of its caller on, under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = dspy.Predict("question -> answer")

    def forward(self, question: str, judge: Any = None, lm: Any = None) -> Any:
        return self.ask(question=question, lm=lm or judge)

    async def aforward(self, question: str, judge: Any = None, lm: Any = None) -> Any:
        return await self.ask.acall(question=question, lm=lm or judge)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("argument", ["lm", "judge"])
def test_one_that_is_given_at_the_call_is_found(argument: str, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """`production(question=..., lm=plain)` spent past the budget, even with `unguarded="refuse"`."""
    with caplog.at_level(logging.WARNING, "dspy_prod"), dspy.context(lm=guarded()):
        refusing, warning = Production(Passing(), unguarded="refuse"), Production(Passing())
        call(refusing, way, **{argument: guarded()})
        with pytest.raises(ConfigError, match=f"argument '{argument}' of 'Passing'"):
            call(refusing, way, **{argument: plain()})
        call(warning, way, **{argument: plain()})
        call(warning, way, **{argument: plain()})
    assert [f"'{argument}'" in text for text in said(caplog)] == [True]


@pytest.mark.parametrize("way", WAYS)
def test_a_bare_predictor_is_called_with_another_lm(way: str) -> None:
    """`dspy.Predict` takes `lm=` for one call."""
    with dspy.context(lm=guarded()):
        prod = Production(dspy.Predict("question -> answer"), unguarded="refuse")
        with pytest.raises(ConfigError, match="argument 'lm' of 'Predict'"):
            call(prod, way, lm=plain())


@pytest.mark.parametrize("way", WAYS)
def test_the_model_that_an_adapter_reads_answers_with_is_found(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """The second step of `dspy.TwoStepAdapter(plain)` was paid for unseen."""
    prod = Production(Two(), unguarded="refuse")
    with caplog.at_level(logging.WARNING, "dspy_prod"), dspy.context(lm=guarded()):
        with dspy.context(adapter=dspy.TwoStepAdapter(guarded())):
            call(prod, way)
        with dspy.context(adapter=dspy.TwoStepAdapter(plain())):
            with pytest.raises(ConfigError, match="'extraction_model' of the adapter of 'Two'"):
                call(prod, way)
            call(Production(Two(), unguarded="allow"), way)
            assert said(caplog) == []
            call(Production(Two()), way)
    assert ["'extraction_model'" in text for text in said(caplog)] == [True]


class Holding(dspy.Module):  # type: ignore[misc]
    """Keeps something that calls an LM as its own."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, question: str) -> Any:
        return dspy.Prediction(answer=question)


def test_one_that_a_module_keeps_is_found_however_it_is_kept() -> None:
    """An adapter, a judge, the second LM of `dspy.RLM`, or the fallback that is a program itself."""
    fallback = Two()
    fallback.first.lm = plain()
    with dspy.context(lm=guarded()):
        for held, told in ((dspy.TwoStepAdapter(plain()), "'extraction_model' of 'held'"), (plain(), "'held'")):
            with pytest.raises(ConfigError, match=told):
                Production(Holding(held), unguarded="refuse")
        with pytest.raises(ConfigError, match="'sub_lm' of 'RLM'"):
            Production(dspy.RLM("question -> answer", sub_lm=plain()), unguarded="refuse")
        with pytest.raises(ConfigError, match="'first' of the fallback of 'Two'"):
            Production(Two(), unguarded="refuse", fallback_response=fallback)
        Production(Holding(dspy.TwoStepAdapter(guarded())), unguarded="refuse")
        Production(Holding(guarded()), unguarded="refuse")
