"""A plain call is converted as DSPy converts it, also from the second time on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from dspy.clients.execution import _canonical, prepare
from dspy.lm15 import CacheConfig
from hypothesis import given
from hypothesis import strategies as st

import dspy_prod
from dspy_prod.compat import asking
from dspy_prod.testing import ScriptedEngine

LM = dspy_prod.LM(
    "openai/gpt-4o-mini", engine=ScriptedEngine(), store="memory://asking", namespace="asking", max_tokens=50
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


def as_dspy_does(messages: Any, kwargs: dict[str, Any]) -> Any:
    """A call as DSPy prepares it, and its canonical request."""
    call = prepare(LM, None, messages, kwargs, direct=True)
    return call, _canonical(call)


def as_we_do(messages: Any, kwargs: dict[str, Any]) -> Any:
    """The same, the short way if there is one."""
    found = asking.plain(LM, None, messages, kwargs)
    if found is not None:
        return found
    call = prepare(LM, None, messages, kwargs, direct=True)
    return call, asking.request_of(LM, call)


@given(messages=st.lists(rows, max_size=4), kwargs=arguments)
def test_the_short_conversion_equals_dspy_s(messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> None:
    """Whatever the messages and arguments, both ways prepare equal calls and requests, or both refuse."""
    slow = outcome(lambda: as_dspy_does(messages, kwargs))
    for _ in range(2):  # the second time from memory
        quick = outcome(lambda: as_we_do(messages, kwargs))
        assert quick == slow
        assert repr(quick) == repr(slow)


@pytest.mark.filterwarnings("ignore:rollout_id has no effect:UserWarning")
@pytest.mark.parametrize(
    "kwargs",
    [{"n": True}, {"n": 2}, {"n": None}, {"rollout_id": 3}, {"rollout_id": None}, {"cache": False}, {"api_key": "k"},
     {"request": None}, {"max_tokens": True}, {"prompt_cache": CacheConfig(mode="auto")}, {"prompt_cache": 1},
     {"temperature": 0, "rollout_id": 1}],
    ids=str,
)  # fmt: skip
def test_what_dspy_looks_at_it_still_looks_at(kwargs: dict[str, Any]) -> None:
    """An argument that DSPy refuses, counts by or leaves out is refused, counted by or left out from the second call
    on as well, though others that are equal to it (1 and True) came before."""
    messages = [{"role": "user", "content": "hi"}]
    for before in ({}, {"n": 1}, {"max_tokens": 1}, {"temperature": 0}):
        as_we_do(messages, before)
    slow = outcome(lambda: as_dspy_does(messages, kwargs))
    for _ in range(2):
        assert outcome(lambda: as_we_do(messages, kwargs)) == slow


@pytest.mark.parametrize("role", ["user", "system"])
def test_text_that_no_provider_can_receive_is_still_refused(role: str) -> None:
    """A lone surrogate is an error of the caller's, named as DSPy names it."""
    hi = {"role": "user", "content": "hi"}
    as_we_do([{"role": role, "content": "fine"}, hi], {})
    with pytest.raises(ValueError, match="lone surrogate U\\+D800"):
        as_we_do([{"role": role, "content": "\ud800"}, hi], {})


def test_plain_calls_are_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 512 rollouts every call with new settings was converted anew, for the rest of the process's life."""
    converted: list[Any] = []

    def counted(call: Any) -> Any:
        converted.append(call)
        return _canonical(call)

    def ask(**kwargs: Any) -> int:
        before = len(converted)
        as_we_do([{"role": "user", "content": "hi"}], kwargs)
        return len(converted) - before

    monkeypatch.setattr(asking, "canonical", counted)
    asking._config.cache_clear()
    assert sum(ask(temperature=0.5, rollout_id=number) for number in range(600)) == 1
    assert sum(ask(seed=number) for number in range(600)) == 600
    assert [ask(top_p=0.25), ask(top_p=0.25), ask(seed=599), ask(seed=0)] == [1, 0, 0, 1]


def test_a_class_with_other_fields_is_made_by_its_own_constructor() -> None:
    """A version of lm15 that keeps something else beside a text checks and completes it by itself."""

    @dataclass(frozen=True)
    class Other:
        text: str
        type: str = field(default="text", init=False)
        more: int = 7

    assert asking._unchecked(Other, "text", "type")("hi", "text") == Other("hi")
