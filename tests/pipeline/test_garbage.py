"""What a call leaves behind: nothing that only the garbage collector could free."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

import dspy_prod
from dspy_prod import Budget, CircuitBreaker, RateLimit
from dspy_prod.pipeline.call import Call
from dspy_prod.testing import ScriptedEngine
from tests.compose.support import over

EVERY: dict[str, Any] = {
    "budget": Budget(usd=1_000, name="all"),
    "limit": RateLimit(rpm=6_000_000, tpm=6_000_000_000),
    "breaker": CircuitBreaker(),
}


def left_by(lm: dspy_prod.LM, way: str) -> list[Call]:
    """Calls that only the collector finds, of twenty that were made."""

    async def ask() -> None:
        for _ in range(20):
            await lm.acall("q")

    gc.collect()
    gc.disable()
    try:
        if way == "async":
            asyncio.run(ask())
        else:
            for _ in range(20):
                lm("q")
        gc.set_debug(gc.DEBUG_SAVEALL)  # what is found is kept, to be looked at
        gc.collect()
        return [found for found in gc.garbage if isinstance(found, Call) and found.pipeline is lm.pipeline]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("policies", [{}, {"cache": True}, EVERY], ids=["bare", "hit", "every policy"])
def test_a_call_leaves_no_circles(policies: dict[str, Any], way: str) -> None:
    """A reservation that pointed back at its attempt kept request and answer of each call until a full collection."""
    assert left_by(over(ScriptedEngine("ok"), **policies), way) == []
