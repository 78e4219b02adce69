"""Which engine carries a request: the native one, or LiteLLM for what that cannot."""

from __future__ import annotations

from typing import Any

import pytest
from dspy.lm15 import Config, Message, Request, TextPart, UnsupportedFeatureError

from dspy_prod.pipeline.upstream.upstream import Upstream


class Refusing:
    """A native engine that cannot carry a penalty of -2."""

    def plan(self, request: Request) -> None:
        if request.config.presence_penalty == -2.0:
            raise UnsupportedFeatureError("no such penalty")


def asking(penalty: float) -> Request:
    config = Config(presence_penalty=penalty)
    return Request(model="openai/m", messages=(Message(role="user", parts=(TextPart("q"),)),), config=config)


@pytest.mark.parametrize("first", [-1.0, -2.0])
def test_a_request_goes_its_own_way_whatever_went_before(monkeypatch: pytest.MonkeyPatch, first: float) -> None:
    """-1 and -2 have one hash in Python: the way found for one was taken for the other, and a call failed by it."""
    upstream = Upstream("openai/m", "chat", "auto", None, {"api_key": "k"}, {})
    native: Any = Refusing()
    monkeypatch.setattr(upstream, "_native_engine", lambda: native)
    ways = {penalty: upstream.is_native(asking(penalty), None) for penalty in (first, -3.0 - first)}
    assert ways == {-1.0: True, -2.0: False}
