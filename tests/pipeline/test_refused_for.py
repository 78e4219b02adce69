"""Who was refused, and why: of each user, program and variant there is a record, however fast refusals follow."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import Budget, BudgetExceededError, Production, call_context
from dspy_prod.testing import ScriptedEngine


@pytest.fixture(params=["memory", "sqlite"])
def lm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dspy_prod.LM]:
    """An LM that may spend nothing."""
    url = f"memory://refused-{tmp_path.name}" if request.param == "memory" else f"sqlite:///{tmp_path}/state.db"
    engine = ScriptedEngine("an answer")
    made = dspy_prod.LM(
        "openai/m", engine=engine, async_engine=engine.asynchronous, store=url, namespace="refused", max_tokens=10,
        budget=Budget(usd=1e-9), prices={"openai/m": dspy_prod.Price(input=1, output=1)},
    )  # fmt: skip
    with contextlib.closing(made):
        yield made
    made.pipeline.store.close()


async def _streamed(program: Any) -> None:
    listener = dspy.streaming.StreamListener(signature_field_name="answer")
    async for _ in dspy.streamify(program, stream_listeners=[listener])(question="q"):
        pass


def refused(how: str, program: Any) -> None:
    with pytest.raises(BudgetExceededError):
        ASK[how](program)


ASK: dict[str, Callable[[Any], Any]] = {
    "sync": lambda program: program(question="q"),
    "async": lambda program: asyncio.run(program.acall(question="q")),
    "stream": lambda program: asyncio.run(_streamed(program)),
}


@pytest.mark.parametrize("how", ["sync", "async", "stream"])
def test_refusals_of_programs_and_variants_are_told_apart(lm: dspy_prod.LM, how: str) -> None:
    """Those of the second program were counted among those of the first: `(and 1 more)`."""
    for name in ("triage", "reply"):
        for variant in ("control", "new"):
            for _ in range(2):
                program = Production(dspy.Predict("question -> answer"), name)
                with dspy.context(lm=lm), call_context(user="u", experiment="e", variant=variant):
                    refused(how, program)
    for name in ("triage", "reply"):
        for variant in ("control", "new"):
            [row] = lm.ledger.records(outcome="refused", program=name, experiment="e", variant=variant)
            assert (row.user, row.reason, row.error) == ("u", "budget_exceeded: total", "BudgetExceededError")
            calls = lm.ledger.program_calls(program=name, status="refused", experiment="e", variant=variant)
            assert [call.reason for call in calls] == ["budget_exceeded"] * 2, "every one of them is recorded"
    assert {row.value: row.refused for row in lm.ledger.programs(by="variant")} == {"e/control": 4, "e/new": 4}
