"""A stream that its reader has left gives back what it holds at once, however long its provider is silent."""

from __future__ import annotations

import gc
from contextlib import closing
from typing import Any

import pytest

from dspy_prod import Budget, DeadlineExceededError, RateLimit, call_context
from tests.e2e.halting import Halting, words
from tests.e2e.support import account, assert_nothing_held, make_lm, request, until, upstream
from tests.e2e.test_deadline import LIFE, _warm  # noqa: F401  (a fixture)

SOON = 2.0
"""Seconds; LiteLLM's own time-out, a rounded one, comes later in each case."""


def leave(lm: Any, way: str) -> None:
    """Read a stream up to its first word, and leave it."""
    with call_context(deadline=LIFE if way == "deadline" else 20):
        stream = lm._engine_spec.stream(request())
        if way == "deadline":
            with pytest.raises(DeadlineExceededError):
                list(stream)
            return
        assert next(event for event in stream if event.type == "delta").delta.text == "one"
        if way == "closed":
            stream.close()
        elif way == "cycle":
            held: list[Any] = [stream]
            held.append(held)
            del held
        del stream
        gc.collect()


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("way", ["closed", "let fall", "cycle", "deadline"])
def test_a_stream_by_way_of_litellm_ends_with_its_reader(way: str) -> None:
    """Its worker waited for the next event, and the seat, the money and the run with it."""
    with (
        Halting(words("one")) as provider,
        closing(make_lm(provider.url, engine="litellm", limit=RateLimit(concurrency=1), budget=Budget(usd=1.0))) as lm,
    ):
        leave(lm, way)
        until(lambda: lm.pipeline.store.holds() == 0, SOON, "the end of the attempt")
        [record] = upstream(lm)
        assert (record.outcome, record.estimated) == ("timeout" if way == "deadline" else "cancelled", True)
        assert account(lm) == (record.cost_nano, 0, record.cost_nano)
        assert_nothing_held(lm.pipeline.store)
