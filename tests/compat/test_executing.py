"""A plain call is converted as DSPy converts it, also from the second time on."""

from __future__ import annotations

from typing import Any

import pytest
from dspy.clients.execution import _canonical, _result, prepare
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
from dspy_prod.compat import executing
from dspy_prod.testing import ScriptedEngine

LM = dspy_prod.LM(
    "openai/gpt-4o-mini", engine=ScriptedEngine(), store="memory://executing", namespace="executing", max_tokens=50
)

roles = st.sampled_from(["system", "developer", "user", "assistant"])
contents = st.one_of(st.text(max_size=20), st.just([{"type": "text", "text": "a part"}]), st.none())
rows = st.fixed_dictionaries({"role": roles, "content": contents}, optional={"name": st.none()})
arguments = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([None, 0, 0.0, 1, 0.7]),
        "max_tokens": st.sampled_from([None, 1, 64]),
        "stop": st.sampled_from([None, "END", ["a", "b"]]),
        "seed": st.sampled_from([None, 0, 7]),
        "reasoning_effort": st.sampled_from([None, "low"]),
        "user": st.sampled_from([None, "u1"]),
        "logprobs": st.sampled_from([None, False, True]),
        "response_format": st.sampled_from([None, {"type": "json_object"}]),
    },
)


def outcome(convert: Any) -> Any:
    """What a conversion gives or raises."""
    try:
        return convert()
    except Exception as error:
        return type(error).__name__


@given(messages=st.lists(rows, min_size=1, max_size=4), kwargs=arguments)
def test_the_short_conversion_equals_dspy_s(messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> None:
    """Whatever the messages and arguments, both conversions give equal requests, or both refuse."""
    prepared = outcome(lambda: prepare(LM, None, messages, kwargs))
    if isinstance(prepared, str):
        return
    slow = outcome(lambda: _canonical(prepared))
    for _ in range(2):  # the second time from memory
        quick = outcome(lambda: executing.request_of(LM, prepared))
        if isinstance(slow, str):
            assert isinstance(quick, str)
        else:
            assert quick == slow
            assert repr(quick) == repr(slow)


def test_settings_of_different_types_are_not_confused() -> None:
    """`max_tokens=True` is refused even after `max_tokens=1` was converted."""
    messages = [{"role": "user", "content": "hi"}]
    executing.request_of(LM, prepare(LM, None, messages, {"max_tokens": 1}))
    with pytest.raises(TypeError):
        executing.request_of(LM, prepare(LM, None, messages, {"max_tokens": True}))


def test_new_settings_are_remembered_whatever_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 512 rollouts every call with new settings was converted anew, for the rest of the process's life."""
    converted: list[Any] = []

    def counted(call: Any) -> Any:
        converted.append(call)
        return _canonical(call)

    def ask(**kwargs: Any) -> int:
        before = len(converted)
        executing.request_of(LM, prepare(LM, "hi", None, kwargs))
        return len(converted) - before

    monkeypatch.setattr(executing, "_canonical", counted)
    executing._config.cache_clear()
    assert sum(ask(temperature=0.5, rollout_id=number) for number in range(600)) == 1
    assert sum(ask(seed=number) for number in range(600)) == 600
    assert [ask(top_p=0.25), ask(top_p=0.25), ask(seed=599), ask(seed=0)] == [1, 0, 0, 1]


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
    request = executing.request_of(LM, prepared)
    quick = executing.result_of(LM, answer, prepared, request)
    assert quick == _result(LM, answer, prepared, None, request, estimate=False)
    assert list(quick.usage) == list(_result(LM, answer, prepared, None, request, estimate=False).usage)
