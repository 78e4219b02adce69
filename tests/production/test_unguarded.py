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
