"""A plain answer is what DSPy makes of it."""

from __future__ import annotations

from typing import Any

from dspy.clients.execution import _result, prepare
from dspy.lm15 import (
    CitationPart,
    DataPart,
    Message,
    RefusalPart,
    Response,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    Usage,
)
from hypothesis import given
from hypothesis import strategies as st

import dspy_prod
from dspy_prod.compat import asking, executing
from dspy_prod.testing import ScriptedEngine

LM = dspy_prod.LM(
    "openai/gpt-4o-mini", engine=ScriptedEngine(), store="memory://executing", namespace="executing", max_tokens=50
)

counters = st.none() | st.integers(0, 3)
usages = st.builds(Usage, *[counters] * 8) | st.builds(Usage, st.integers(0, 9), st.integers(0, 9))
parts = st.sampled_from(
    [
        TextPart("an answer"),
        TextPart(" "),
        ThinkingPart("hm"),
        RefusalPart("no"),
        DataPart({"a": 1}),
        ToolCallPart("1", "look", {"a": 1}),
        CitationPart("https://example.com", "a title", "a text"),
    ]
)  # fmt: skip
answers = st.builds(
    lambda found, usage, finish: Response(None, "m-2", Message("assistant", tuple(found)), finish, usage),
    st.lists(parts, min_size=1, max_size=3), usages, st.sampled_from(["stop", "length", "tool_call", "content_filter"]),
)  # fmt: skip


@given(answer=answers, kwargs=st.sampled_from([{}, {"logprobs": True}]))
def test_the_short_result_equals_dspy_s(answer: Response, kwargs: dict[str, Any]) -> None:
    """Outputs, usage and all else that DSPy finishes a call from are what its own executor makes of the answer."""
    prepared = prepare(LM, "hi", None, kwargs)
    request = asking.request_of(LM, prepared)
    quick = executing.result_of(LM, answer, prepared, request)
    assert quick == _result(LM, answer, prepared, None, request, estimate=False)
    assert list(quick.usage) == list(_result(LM, answer, prepared, None, request, estimate=False).usage)
