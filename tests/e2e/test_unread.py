"""Answers with HTTP 200 that LiteLLM raises for: they are read as the native engine reads them, and charged as told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dspy_prod.testing import Verbatim
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CHEAP, MODEL, ask, records
from tests.e2e.test_unusable import DONE, END, ENGINES, QUICK, START, TOLD, USAGE, WAYS, body, chunk, stream, told

SHAPES: dict[str, Any] = {
    "choices of null": body(lambda whole, _, __: whole.update(choices=[None])),
    "choices of nothing": body(lambda whole, _, __: whole.update(choices=[{}])),
    "choices that are no list": body(lambda whole, _, __: whole.update(choices={})),
    "no message": body(lambda _, choice, __: choice.pop("message")),
    "null message": body(lambda _, choice, __: choice.update(message=None)),
    "message of text": body(lambda _, choice, __: choice.update(message="hello")),
    "content of nothing": told(content=[]),
    "content of numbers": told(content=5),
    "tools of nothing": told(content=None, tool_calls=[None]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_what_nobody_can_use_is_retried_and_charged_as_told(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, name: str
) -> None:
    """LiteLLM said 500 for it: one engine retried and charged the usage, the other did not and charged the bound."""
    provider = serve(faults=lambda asked: Verbatim(SHAPES[name]) if asked.model == "e2e" else None)
    lm = connect(provider, engine=engine, retry=QUICK, fallbacks=[CHEAP])
    assert ask(lm, way) == ["ok"]
    *failed, last = records(lm)
    assert [(record.model, record.outcome, record.cost_nano, record.estimated) for record in failed] == [
        (MODEL, "error", TOLD, False)
    ] * 3
    assert (last.model, last.outcome) == (CHEAP, "ok")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_an_answer_in_parts_is_an_answer(serve: MakeProvider, connect: MakeLM, engine: str, way: str) -> None:
    """LiteLLM refuses a list of parts, which some servers send; what can be read was paid for."""
    lm = connect(serve(faults=Verbatim(told(content=[{"type": "text", "text": "hello"}]))), engine=engine)
    assert ask(lm, way) == ["hello"]
    assert [(record.outcome, record.cost_nano) for record in records(lm)] == [("ok", TOLD)]


@pytest.mark.parametrize("way", [*WAYS, "sync stream", "async stream"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("counter", ["prompt_tokens", "completion_tokens"])
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_truth_value_is_no_count(serve: MakeProvider, connect: MakeLM, engine: str, way: str, counter: str) -> None:
    """LiteLLM took `true` for one token, and the call was charged less than the provider's bill."""
    if "stream" in way:
        number = {"prompt_tokens": "11", "completion_tokens": "7"}[counter]
        usage = USAGE.replace(f'"{counter}":{number}', f'"{counter}":true')
        lm = connect(serve(faults=Verbatim(START + chunk({"content": "hello"}) + END + usage + DONE)), engine=engine)
        stream(lm, way.split()[0])
    else:
        lm = connect(
            serve(faults=Verbatim(body(lambda whole, _, __: whole["usage"].update({counter: True})))), engine=engine
        )
        ask(lm, way)
    [record] = records(lm)
    assert record.estimated
    assert (record.cost_nano or 0) > TOLD


def _of(old: str, new: str) -> bytes:
    return json.dumps(body()).replace(old, new).encode("latin-1")


BROKEN: dict[str, Any] = {
    "no UTF-8": _of("hello", "hell\xff"),
    "a list": [body()],
    "a fraction of a token": _of("11", "11.5"),
    "a number of 5,000 digits": _of("11", "1" * 5_000),
    "a hundred thousand lists in one another": b"[" * 100_000,
    "a page": "<html>",
    "half of it": json.dumps(body())[:60],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", BROKEN)
def test_what_was_completed_and_cannot_be_read_is_paid_once(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, name: str
) -> None:
    """LiteLLM says 500 for bad UTF-8 and for JSON that Python does not read: three attempts were owed at the bound."""
    provider = serve(faults=lambda asked: Verbatim(BROKEN[name]) if asked.model == "e2e" else None)
    lm = connect(provider, engine=engine, retry=QUICK, fallbacks=[CHEAP])
    assert ask(lm, way) == ["ok"]
    assert [(record.model, record.outcome, record.estimated) for record in records(lm)] == [
        (MODEL, "error", True),
        (CHEAP, "ok", False),
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [1_000, 300_000])
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_an_answer_that_repeats_the_key_is_charged_as_told(
    serve: MakeProvider, connect: MakeLM, engine: str, way: str, size: int
) -> None:
    """Only its beginning was cleaned and read again: half a JSON, which tells no usage."""
    key = "sk-test-0123456789abcdefghij"

    def change(whole: dict[str, Any], _: Any, message: dict[str, Any]) -> None:
        whole.update({"note": key + "x" * size, **whole})
        message.update(tool_calls=5)

    lm = connect(serve(faults=Verbatim(body(change))), engine=engine, api_key=key)
    error = ask(lm, way)
    assert isinstance(error, Exception)
    assert "Unterminated" not in str(error)
    assert [(record.outcome, record.cost_nano, record.estimated) for record in records(lm)] == [("error", TOLD, False)]


def test_a_usage_is_known_though_what_was_cleaned_does_not_tell_it(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secret of the environment may be a word that providers use."""
    monkeypatch.setenv("ANY_KEY", "prompt_tokens")
    lm = connect(serve(faults=Verbatim(told(content=None, tool_calls=5))), engine="lm15")
    assert isinstance(ask(lm), Exception)
    assert [(record.cost_nano, record.estimated) for record in records(lm)] == [(TOLD, False)]
