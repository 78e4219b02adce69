"""More answers than were asked for, and others that cannot be read: what the provider billed is owed, once."""

from __future__ import annotations

from typing import Any

import pytest

import dspy_prod
from dspy_prod.testing import Verbatim
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CHEAP, MODEL, ask, outcome, records, until
from tests.e2e.test_unusable import ENGINES, QUICK, TOLD, WAYS, body

TOOL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def several(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A chat completion with so many choices."""
    choices = [
        {"index": number, "message": {"role": "assistant", "content": None, **said}, "finish_reason": "stop"}
        for number, said in enumerate(messages)
    ]
    return body(lambda whole, _, __: whole.update(choices=choices, **more))


MANY: dict[str, Any] = {
    "two": several({"content": "a"}, {"content": "b"}),
    "three": several({"content": "a"}, {"content": "b"}, {"content": "c"}),
    "tools": several({"tool_calls": [TOOL]}, {"tool_calls": [TOOL]}),
    "a tool and a text": several({"tool_calls": [TOOL]}, {"content": "b"}),
    "one of them empty": several({"content": "a"}, {"content": ""}),
    "under names": body(lambda whole, _, __: whole.update(choices={"first": whole["choices"][0]})),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MANY)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_an_answer_of_several_is_charged_as_told_and_not_asked_for_again(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, name: str
) -> None:
    """It was charged thirteen times what the provider billed, for the usage was in what could not be read.

    LiteLLM said 500 for choices under names, and they were paid three times.
    """
    provider = serve(faults=lambda asked: Verbatim(MANY[name]) if asked.model == "e2e" else None)
    lm = connect(provider, engine=engine, retry=QUICK, fallbacks=[CHEAP])
    assert ask(lm, way) == ["ok"]
    first, second = records(lm)
    assert (first.model, first.outcome, first.cost_nano, first.estimated) == (MODEL, "error", TOLD, False)
    assert (first.input_tokens, first.output_tokens) == (11, 7)
    assert (second.model, second.outcome) == (CHEAP, "ok")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("choices", [2, 3])
def test_several_text_completions_are_owed(serve: MakeProvider, connect: MakeLM, way: str, choices: int) -> None:
    """It was booked as never sent, at nothing: DSPy says of such an answer what it says of what cannot be asked."""
    entries = [
        {"index": number, "text": "hello", "finish_reason": "stop", "logprobs": None} for number in range(choices)
    ]
    fault = body(lambda whole, _, __: whole.update(object="text_completion", choices=entries))
    provider = serve(faults=[Verbatim(fault)] * 3)
    lm = connect(provider, model_type="text", retry=QUICK)
    assert isinstance(ask(lm, way), Exception)
    assert [(record.outcome, record.cost_nano, record.estimated) for record in records(lm)] == [("error", TOLD, False)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_several_messages_of_one_response_are_one_answer(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str
) -> None:
    """The Responses API answers in several messages where it likes."""
    said = [{"type": "output_text", "text": "hello", "annotations": []}]
    message = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": said}
    usage = {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}
    whole = {"id": "r", "object": "response", "created_at": 1, "status": "completed", "model": "e2e", "usage": usage}
    lm = connect(serve(faults=Verbatim({**whole, "output": [message, message]})), engine=engine, model_type="responses")
    assert not isinstance(ask(lm, way), Exception)
    assert [(record.outcome, record.cost_nano) for record in records(lm)] == [("ok", TOLD)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("given", [1, 2, 3])
def test_several_asked_for_are_asked_for_one_by_one(
    serve: MakeProvider, connect: MakeLM, engine: str, given: int
) -> None:
    """Two calls of one answer each; one that brings more ends as above, and the other is not sent any more."""
    provider = serve(faults=Verbatim(several(*[{"content": "a"}] * given)))
    lm = connect(provider, engine=engine, retry=QUICK)
    answer = outcome(lambda: lm("a question", n=2))
    assert (answer == ["a", "a"]) is (given == 1)
    assert [record.cost_nano for record in records(lm)] == [TOLD] * len(provider.calls)


@pytest.mark.parametrize("engine", ENGINES)
def test_choices_of_text_are_an_answer_with_nothing_in_it(serve: MakeProvider, connect: MakeLM, engine: str) -> None:
    """Looking for a refusal in them raised an AttributeError, and the bound was charged."""
    fault = body(lambda whole, _, __: whole.update(choices=["hello"]))
    lm = connect(serve(faults=[Verbatim(fault)]), engine=engine, retry=QUICK)
    assert ask(lm) == ["ok"]
    assert [(record.outcome, record.error) for record in records(lm)] == [
        ("error", "UnusableAnswerError"),
        ("ok", None),
    ]
    assert records(lm)[0].cost_nano == TOLD


@pytest.mark.parametrize("engine", ENGINES)
def test_several_without_a_usage_are_charged_the_bound(serve: MakeProvider, connect: MakeLM, engine: str) -> None:
    """Nobody knows what they took."""
    lm = connect(serve(faults=Verbatim(several({"content": "a"}, {"content": "b"}, usage=None))), engine=engine)
    assert isinstance(ask(lm), Exception)
    [record] = records(lm)
    assert record.estimated
    assert (record.cost_nano or 0) > TOLD


def test_an_answer_of_several_that_comes_too_late_is_charged_as_told(serve: MakeProvider, connect: MakeLM) -> None:
    """The caller has gone, the worker hears what it took."""
    provider = serve(faults=Verbatim(MANY["two"]))
    lm = connect(provider, engine="litellm")
    outcome(lambda: lm("warm"))
    provider.hold()
    with dspy_prod.call_context(deadline=1.5):
        assert isinstance(ask(lm), dspy_prod.DeadlineExceededError)
    provider.release()
    until(lambda: len(records(lm)) == 2)
    assert [(record.cost_nano, record.estimated) for record in records(lm)] == [(TOLD, False)] * 2
