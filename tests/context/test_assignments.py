"""Nested experiments: each keeps its own variant, and a call belongs to all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import call_context
from dspy_prod.context.assignments import Assignment
from dspy_prod.context.current import EMPTY, assigned, current, use
from dspy_prod.testing import ScriptedEngine

FORM = "[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"


def told() -> tuple[str | None, str | None, dict[str, str]]:
    context = current()
    return context.experiment, context.variant, dict(context.tags)


def test_the_innermost_experiment_has_the_fields_and_those_around_it_have_tags() -> None:
    with call_context(experiment="a", variant="control", tags={"team": "blue"}):
        assert told() == ("a", "control", {"team": "blue"})
        with call_context(experiment="b", variant="new", user="u"):
            assert told() == ("b", "new", {"team": "blue", "experiment:a": "control"})
            with call_context(experiment="c"):
                assert told() == ("c", None, {"team": "blue", "experiment:a": "control", "experiment:b": "new"})
                assert [each.experiment for each in current().assignments] == ["a", "b", "c"]
        assert told() == ("a", "control", {"team": "blue"})
    assert current() == EMPTY


def test_a_variant_alone_is_that_of_the_experiment_in_force() -> None:
    with call_context(experiment="a"), call_context(user="u"), call_context(variant="new"):
        assert current().assignments == (Assignment("a", "new"),)
        assert told() == ("a", "new", {})
    with call_context(variant="blue"):
        assert told() == (None, "blue", {})
        assert current().assignments == ()


def test_an_experiment_within_itself_is_refused() -> None:
    """Whichever variant won, the other one's costs and outcomes would be its own too."""
    with call_context(experiment="a", variant="control"), call_context(experiment="b", variant="x"):
        for variant in ("new", "control"):
            with (
                pytest.raises(ValueError, match=r"'a' is nested in itself.*'control'.*name of its own"),
                call_context(experiment="a", variant=variant),
            ):
                pass
        assert told()[:2] == ("b", "x")
    with call_context(experiment="a", variant="new"):
        assert told()[:2] == ("a", "new")


def test_an_assignment_keeps_its_stage_its_unit_and_its_propensity() -> None:
    with use(assigned(current(), Assignment("a", "new", "5%", "u1", 0.05))), call_context(user="u1"):
        assert current().assignments[-1] == ("a", "new", "5%", "u1", 0.05)
        with use(assigned(current(), Assignment("b"))):
            assert told() == ("b", None, {"experiment:a": "new"})


def _parallel(program: Any) -> None:
    examples = [dspy.Example(question=f"q{number}").with_inputs("question") for number in range(2)]
    dspy.Parallel(num_threads=2, disable_progress_bar=True)([(program, example) for example in examples])


async def _streamed(program: Any) -> None:
    listener = dspy.streaming.StreamListener(signature_field_name="answer")
    async for _ in dspy.streamify(program, stream_listeners=[listener])(question="q"):
        pass


HOW: dict[str, Callable[[Any], Any]] = {
    "sync": lambda program: program(question="q"),
    "async": lambda program: asyncio.run(program.acall(question="q")),
    "stream": lambda program: asyncio.run(_streamed(program)),
    "parallel": _parallel,
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_calls_of_nested_experiments_are_summed_for_each(kind: str, how: str, tmp_path: Path) -> None:
    """The outer one lost its calls: what it cost could not be read any more."""
    engine = ScriptedEngine(FORM)
    url = f"memory://{tmp_path.name}" if kind == "memory" else f"sqlite:///{tmp_path}/state.db"
    lm = dspy_prod.LM("openai/m", engine=engine, async_engine=engine.asynchronous, store=url, namespace="nested")
    with (
        dspy.context(lm=lm),
        call_context(experiment="a", variant="control"),
        call_context(experiment="b", variant="n"),
    ):
        HOW[how](dspy.Predict("question -> answer"))
        with call_context(cache="bypass"):
            HOW[how](dspy.Predict("question -> answer"))
    records = lm.ledger.records()
    assert len(records) >= 2
    assert {(row.experiment, row.variant, row.tags) for row in records} == {("b", "n", (("experiment:a", "control"),))}
    [row] = lm.costs(by="tag:experiment:a")
    assert (row.value, row.attempts + row.cached) == ("control", len(records))
    lm.close()
    lm.pipeline.store.close()
