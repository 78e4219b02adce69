"""What optimizers freeze, and what they leave on a program."""

from __future__ import annotations

import logging
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM

from dspy_prod import Production, registry
from tests.registry.programs import qa

pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Any:
    """The warnings of this library so far."""
    caplog.set_level(logging.WARNING, "dspy_prod")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "dspy_prod"]


class Frozen(dspy.Module):  # type: ignore[misc]
    """Predictors in every place where DSPy looks for them, and where it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.open = qa()
        self.inner = dspy.ChainOfThought("a -> b")
        self.many = [dspy.ChainOfThought("a -> b")]
        self.by_name = {"tax": dspy.ChainOfThought("a -> b")}
        self.tried = [{"score": 1.0, "program": dspy.ChainOfThought("a -> b")}]
        self.empty = dspy.Module()
        for module in (self.inner, *self.many, *self.by_name.values(), self.tried[0]["program"], self.empty):
            module._compiled = True


def test_the_result_of_an_optimizer_is_published_without_a_word(told: Any) -> None:
    """A random search left the programs it had tried on its result, and each was warned of as frozen."""
    examples = [dspy.Example(question=f"q{number}", answer="yes").with_inputs("question") for number in range(3)]
    search = dspy.BootstrapFewShotWithRandomSearch(
        lambda example, found, trace=None: found.answer == example.answer, max_labeled_demos=1,
        max_bootstrapped_demos=1, num_candidate_programs=1, num_threads=1,
    )  # fmt: skip
    with dspy.context(lm=DummyLM([{"answer": "yes"}] * 100)):
        best = search.compile(Asking(), trainset=examples, valset=examples)
    assert any(tried["program"]._compiled for tried in best.candidate_programs)
    version = registry.publish(best, "it")
    assert list(version.predictors) == ["ask"]
    assert registry.publish(Production(best, name="it"), "served").predictors
    assert told() == []


def test_a_part_that_is_frozen_is_named(told: Any) -> None:
    """DSPy saves nothing of it, so whoever publishes should know; a part without predictors has nothing to save."""
    registry.publish(Frozen(), "it")
    assert [text.split()[0] for text in told()] == ["self.inner", "self.many[0]", "self.by_name['tax']"]


class Asking(dspy.Module):  # type: ignore[misc]
    """One predictor in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = dspy.Predict("question -> answer")

    def forward(self, **inputs: Any) -> Any:
        return self.ask(**inputs)
