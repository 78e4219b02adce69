"""Which engine carries a request is decided once for each shape of it."""

from __future__ import annotations

from typing import Any

import pytest
from dspy.clients.engines.lm15_engine import LM15Engine
from dspy.lm15 import Config, Message, Request

from dspy_prod.pipeline.upstream.upstream import Upstream


def test_new_shapes_are_remembered_whatever_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many seeds as were remembered, each request of another shape was planned anew for ever."""
    planned: list[Any] = []
    plan = LM15Engine.plan

    def counted(engine: Any, request: Request) -> Any:
        planned.append(request)
        return plan(engine, request)

    monkeypatch.setattr(LM15Engine, "plan", counted)
    upstream = Upstream("openai/gpt-4o-mini", "chat", "auto", None, {"api_key": "k"}, {})

    def ask(**settings: Any) -> int:
        before = len(planned)
        request = Request(model="openai/gpt-4o-mini", messages=(Message.user("hi"),), config=Config(**settings))
        assert upstream.is_native(request, None)
        return len(planned) - before

    assert sum(ask(seed=number) for number in range(2100)) == 2100
    assert [ask(top_p=0.25), ask(top_p=0.25), ask(seed=2099), ask(seed=0)] == [1, 0, 0, 1]
