"""What DSPy's history says of calls that our cache answered."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from dspy.lm15 import Request, Response

import dspy_prod
from dspy_prod import Price
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import ScriptedEngine

PRICES = {"unit/m": Price(input=1, output=1)}


class Asking(ScriptedEngine):
    """An engine that asks another LM before it answers, as one with a router or a tool of its own does."""

    def __init__(self, inner: dspy_prod.LM) -> None:
        super().__init__("outer")
        self.inner = inner

    def complete(self, request: Request) -> Response:
        self.inner("q")
        return super().complete(request)

    async def acomplete(self, request: Request) -> Response:
        await self.inner.acall("q")
        return super().complete(request)


class AsyncAsking:
    def __init__(self, engine: Asking) -> None:
        self.complete = engine.acomplete


def make(engine: Any, **arguments: Any) -> dspy_prod.LM:
    return dspy_prod.LM("unit/m", engine=engine, store=MemoryStore(), prices=PRICES, **arguments)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_hit_inside_another_lms_call_is_told_as_a_hit(asynchronous: bool) -> None:
    """An answer that cost nothing stood in the history with `cached=False`: its facts were read off the outer call."""
    inner = make(ScriptedEngine("inner"))
    inner("q")
    engine = Asking(inner)
    outer = make(engine, async_engine=AsyncAsking(engine), cache=False)
    assert (asyncio.run(outer.acall("p")) if asynchronous else outer("p")) == ["outer"]
    told = inner.history[-1]
    assert (told["cached"], told["cost"], told["route"]) == (True, 0.0, "primary")
    assert outer.history[-1]["cached"] is False
