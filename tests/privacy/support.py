"""What the tests of privacy share: an LM that costs nothing, a program, and a redactor in force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import Price, Redactor, privacy
from dspy_prod.testing import ScriptedEngine

MODEL = "openai/test-model"
EMAIL = "alice.archer@example.com"
_names = itertools.count()


def make_lm(*answers: Any, **options: Any) -> dspy_prod.LM:
    engine = ScriptedEngine(list(answers))
    defaults: dict[str, Any] = {
        "retry": False,
        "breaker": False,
        "cache": False,
        "max_tokens": 10,
        "store": f"memory://privacy-{next(_names)}",
        "prices": {MODEL: Price(input=1, output=2)},
    }
    return dspy_prod.LM(MODEL, engine=engine, async_engine=engine.asynchronous, **{**defaults, **options})


class Ask(dspy.Module):
    """A program that asks an LM."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, question: str) -> Any:
        return dspy.Prediction(answer=self.lm(question)[0])


@pytest.fixture
def installed() -> Iterator[Redactor]:
    """A redactor in force."""
    redactor = Redactor()
    restore = privacy.install(redactor)
    yield redactor
    restore()
