"""DSPy's cache: which calls are the same, and what a cached answer looks like."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy
import pytest

from dspy_prod.testing import Provider, Status
from tests.dspy_suite.conftest import Make


def test_the_same_call_is_sent_once(lm: Any, provider: Provider) -> None:
    assert lm("?") == lm("?")
    assert len(provider.calls) == 1
    assert lm.history[-1]["usage"] in ({}, None) or not any(
        isinstance(value, int) and value for value in lm.history[-1]["usage"].values()
    )


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "another"},
        {"prompt": "?", "temperature": 0.4},
        {"prompt": "?", "max_tokens": 5},
        {"prompt": "?", "stop": "x"},
        {"prompt": "?", "seed": 4},
        {"prompt": "?", "rollout_id": 1, "temperature": 1.0},
        {"prompt": "?", "response_format": {"type": "json_object"}},
        {"messages": [{"role": "system", "content": "?"}, {"role": "user", "content": "?"}]},
    ],
)
def test_another_call_is_another(lm: Any, provider: Provider, other: dict[str, Any]) -> None:
    lm("?")
    lm(**other)
    assert len(provider.calls) == 2


def test_rollouts_are_kept_apart_and_remembered(make: Make, provider: Provider) -> None:
    lm = make(temperature=1.0)
    for rollout in (1, 2, 1, 2, None, None):
        lm("?", rollout_id=rollout)
    assert len(provider.calls) == 3


def test_n_is_part_of_the_call(make: Make, provider: Provider) -> None:
    provider.answer = [{"content": "one"}, {"content": "two"}]
    lm = make(temperature=1.0)
    first = lm("?", n=2)
    sent = len(provider.calls)
    assert lm("?", n=2) == first
    assert len(provider.calls) == sent


@pytest.mark.parametrize("where", ["lm", "call"])
def test_the_cache_can_be_off(make: Make, provider: Provider, where: str) -> None:
    lm = make(**({"cache": False} if where == "lm" else {}))
    for _ in range(2):
        lm("?", **({"cache": False} if where == "call" else {}))
    assert len(provider.calls) == 2


def test_it_can_be_off_for_all(make: Make, provider: Provider) -> None:
    """`dspy.configure_cache(False, False)` switches it off for every LM."""
    lm = make()
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    lm("?")
    lm("?")
    assert len(provider.calls) == 2


def test_errors_are_not_kept(lm: Any, provider: Provider) -> None:
    provider.faults = [Status(400)]
    with pytest.raises(Exception, match="nvalid request"):
        lm("?")
    assert lm("?") == ["ok"]


def test_a_task_finds_what_a_task_left(lm: Any, provider: Provider) -> None:
    async def twice() -> None:
        await lm.acall("?")
        await lm.acall("?")

    asyncio.run(twice())
    assert len(provider.calls) == 1


def test_a_program_that_runs_again_costs_nothing(lm: Any, provider: Provider) -> None:
    program = dspy.ChainOfThought("question -> answer")
    with dspy.context(lm=lm):
        first, second = program(question="?"), program(question="?")
    assert first.answer == second.answer
    assert len(provider.calls) == 1


def test_a_cached_answer_counts_no_tokens(lm: Any) -> None:
    with dspy.context(lm=lm):
        program = dspy.Predict("question -> answer")
        program(question="?")
        with dspy.track_usage() as tracker:
            program(question="?")
    assert not any(each.get("total_tokens") for each in tracker.get_total_tokens().values())
