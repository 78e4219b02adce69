"""Answers from memory in a row are noted together; whoever looks finds each as a record of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod.testing import ScriptedEngine


@pytest.fixture(params=["memory", "sqlite"])
def lm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dspy_prod.LM]:
    url = "memory://hits" if request.param == "memory" else f"sqlite:///{tmp_path}/state.db"
    made = dspy_prod.LM(
        "openai/m", engine=ScriptedEngine(["an answer"]), store=url, namespace=tmp_path.name, max_tokens=10,
        prices={"openai/m": dspy_prod.Price(input=1, output=1)},
    )  # fmt: skip
    with closing(made):
        yield made
    made.pipeline.store.close()


def outcomes(lm: dspy_prod.LM, **wanted: Any) -> list[str]:
    return [record.outcome for record in lm.ledger.records(**wanted)]


def test_each_is_recorded(lm: dspy_prod.LM) -> None:
    assert {lm("q")[0] for _ in range(300)} == {"an answer"}
    assert sorted(outcomes(lm)) == ["cached"] * 299 + ["ok"]
    assert len({record.id for record in lm.ledger.records()}) == 300
    assert all(entry["cached"] and entry["cost"] == 0 for entry in lm.history[1:])
    assert [row.cached for row in lm.costs(by="model")] == [299]


def test_whose_each_is(lm: dspy_prod.LM) -> None:
    """One user's block was followed by another's: the answers of the second were counted as the first one's."""
    lm("q")
    for number in range(60):
        with dspy_prod.call_context(user=f"u{number % 3}", tags={"n": str(number % 2)}):
            for _ in range(number % 4):
                lm("q")
    for user in range(3):
        expected = sum(number % 4 for number in range(60) if number % 3 == user)
        assert outcomes(lm, user=f"u{user}") == ["cached"] * expected
    assert {row.value: row.cached for row in lm.costs(by="tag:n")} == {"0": 30, "1": 60}


def test_listeners_hear_of_each_by_the_id_that_the_ledger_has(lm: dspy_prod.LM) -> None:
    for _ in range(5):
        lm("q")
    told: list[Any] = []
    remove = dspy_prod.add_listener(told.append)
    try:
        for _ in range(5):
            lm("q")
    finally:
        remove()
    lm("q")
    heard = {event.data["record_id"] for event in told if event.name == "call_finished"}
    assert len(heard) == 5
    assert heard <= {record.id for record in lm.ledger.records()}
    assert len(outcomes(lm)) == 11


def test_a_report_tells_its_own(lm: dspy_prod.LM) -> None:
    """A program's report counts the answers that were given inside it, and no others."""
    import dspy

    class Twice(dspy.Module):
        def forward(self, question: str) -> Any:
            lm("q")
            return dspy.Prediction(answer=lm("q")[0])

    for _ in range(3):
        lm("q")
    report = dspy_prod.call_report(dspy_prod.Production(Twice())(question="x"))
    assert (report.status, report.attempts, report.cost_usd) == ("cached", 0, 0.0)
    assert len(outcomes(lm)) == 5
