"""An LM asked from within another LM's call: each call's history tells of itself."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy_prod
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import ScriptedEngine


class Asking:
    """An engine that asks another LM before it answers."""

    def __init__(self, inner: dspy_prod.LM) -> None:
        self.inner = inner

    def complete(self, request: Any) -> Any:
        self.inner("inner")
        return ScriptedEngine("outer").complete(request)


class AsyncAsking(Asking):
    async def complete(self, request: Any) -> Any:  # type: ignore[override]
        await self.inner.acall("inner")
        return ScriptedEngine("outer").complete(request)


def nested(memory: MemoryStore) -> tuple[dspy_prod.LM, dspy_prod.LM]:
    engine = ScriptedEngine("inner")
    inner = dspy_prod.LM("unit/inner", engine=engine, async_engine=engine.asynchronous, store=memory)
    outer = dspy_prod.LM("unit/outer", engine=Asking(inner), async_engine=AsyncAsking(inner), store=memory, cache=False)
    return inner, outer


def check(inner: dspy_prod.LM, outer: dspy_prod.LM) -> None:
    assert [(entry["cached"], entry["route"]) for entry in inner.history] == [(False, "primary"), (True, "primary")]
    assert [entry["cost"] for entry in inner.history][1] == 0
    assert [(entry["cached"], entry["route"]) for entry in outer.history] == [(False, "primary")]


def test_a_hit_within_another_lms_call_is_told_as_a_hit() -> None:
    """A user saw `cached=False` and `route=None` for an answer from memory, asked for by an engine or a tool."""
    inner, outer = nested(MemoryStore("nested"))
    inner("inner")
    outer("q")
    check(inner, outer)


def test_a_hit_within_another_lms_call_is_told_as_a_hit_asynchronously() -> None:
    """The same for `acall`."""
    inner, outer = nested(MemoryStore("nested"))

    async def ask() -> None:
        await inner.acall("inner")
        await outer.acall("q")

    asyncio.run(ask())
    check(inner, outer)
