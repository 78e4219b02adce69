"""Optimizers and retrievers of DSPy's that take an embedder, under a budget."""

from __future__ import annotations

import dspy
import pytest
from dspy.teleprompt import KNNFewShot

import dspy_prod
from dspy_prod.testing import Provider
from tests.embedding.conftest import MODEL, PRICES


def examples(count: int) -> list[dspy.Example]:
    return [
        dspy.Example(question=f"What is the capital of country {number}?", answer=f"city {number}").with_inputs(
            "question"
        )
        for number in range(count)
    ]


def test_few_shots_by_nearness_under_a_cap_in_dollars() -> None:
    """Vectors and answers are paid from one budget, and together never pass it."""
    budget = dspy_prod.Budget(usd=0.000_8, per="run")
    prices = {**PRICES, "openai/gpt-4o-mini": (0.15, 0.60)}
    with Provider(prices=prices, answer="[[ ## answer ## ]]\ncity\n\n[[ ## completed ## ]]") as provider:
        where = {"store": "memory://knn", "namespace": "t", "api_key": "k", "api_base": provider.url, "budget": budget}
        lm = dspy_prod.LM("openai/gpt-4o-mini", max_tokens=20, **where)
        embedder = dspy_prod.Embedder(MODEL, **where)
        compiled = KNNFewShot(2, examples(30), embedder, max_bootstrapped_demos=0).compile(
            dspy.Predict("question -> answer")
        )
        answered: list[str] = []

        def ask_for_ever() -> None:
            while True:
                answered.append(compiled(question=f"The capital of country {len(answered)}?").answer)

        with dspy.context(lm=lm), pytest.raises(dspy_prod.BudgetExceededError):
            ask_for_ever()
        assert len(answered) > 3
        assert set(answered) == {"city"}
        assert 500_000 < provider.bill.nano <= 800_000
        assert {row.value: round(row.usd * 1e9) for row in lm.costs("model")} == {
            name: sum(row.nano for row in provider.bill.rows if f"openai/{row.model}" == name) for name in prices
        }
        lm.close()
