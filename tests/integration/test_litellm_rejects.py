"""An answer that LiteLLM rejects, as its user has told it, is not delivered: LiteLLM could read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import litellm
import pytest
from litellm.integrations.custom_guardrail import CustomGuardrail

from dspy_prod.testing import Verbatim
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CHEAP, MODEL, ask, records
from tests.e2e.test_dialects import ANTHROPIC, GEMINI, Server, end, lm_at
from tests.e2e.test_dialects import TOLD as OWED
from tests.e2e.test_unusable import DONE, END, QUICK, START, TOLD, USAGE, WAYS, body, chunk, stream, told

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}


def says_no(_: str) -> dict[str, Any]:
    return {"decision": False, "message": "blocked by policy"}


def breaks(_: str) -> bool:
    raise ValueError("blocked by policy")


def warns(*_: Any) -> None:
    raise UserWarning("blocked by policy")


async def awarns(*_: Any, **__: Any) -> None:
    warns()


@pytest.mark.parametrize(
    ("place", "way"),
    [*product(["pre_call_rules", "post_call_rules"], WAYS), ("before", "async"), ("after", "async")],
)
def test_who_says_no_by_a_warning_says_no(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch, place: str, way: str
) -> None:
    """It is an exception too, as where warnings are errors: it ended the call, and no other model was asked."""
    if place.endswith("rules"):
        monkeypatch.setattr(litellm, place, [warns])
    else:
        hook = "async_pre_call_deployment_hook" if place == "before" else "async_post_call_success_deployment_hook"
        guardrail = CustomGuardrail(guardrail_name="any")
        setattr(guardrail, hook, awarns)
        monkeypatch.setattr(litellm, "callbacks", [guardrail])
    other = connect(serve(), model=CHEAP)
    lm = connect(serve(), engine="litellm", fallbacks=[other])
    assert ask(lm, way) == ["ok"]
    assert [each.model for each in records(lm)] == [MODEL, CHEAP]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", [says_no, breaks, lambda _: False], ids=["says why", "raises", "says no"])
def test_what_a_rule_forbids_is_not_delivered(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch, way: str, rule: Any
) -> None:
    """It was read once more, and delivered. It is owed, says nothing against the provider, and another may be asked."""
    monkeypatch.setattr(litellm, "post_call_rules", [rule])
    lm = connect(serve(faults=Verbatim(body())), engine="litellm", retry=QUICK)
    said = ask(lm, way)
    assert isinstance(said, Exception)
    assert ("blocked by policy" if rule in (says_no, breaks) else "post-call-rule check") in str(said)
    assert "cannot be read" not in str(said)
    assert [(each.outcome, each.cost_nano, each.estimated) for each in records(lm)] == [("error", TOLD, False)]
    assert lm.pipeline.primary.breaker.snapshot().total_failures == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dialect", ["anthropic", "gemini"])
def test_rules_hold_in_every_dialect(server: Server, monkeypatch: pytest.MonkeyPatch, dialect: str, way: str) -> None:
    """The same of those that LiteLLM translates."""
    monkeypatch.setattr(litellm, "post_call_rules", [says_no])
    server.body = json.dumps(ANTHROPIC if dialect == "anthropic" else GEMINI).encode()
    lm = lm_at(server.url, dialect)
    said = ask(lm, way)
    assert "blocked by policy" in str(said)
    assert end(lm, said)[1:] == (("error", OWED, False),)
    lm.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_rule_forbids_a_stream_too(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What was heard of it until then is a failure of nobody, and is not paid twice."""
    monkeypatch.setattr(litellm, "post_call_rules", [says_no])
    provider = serve(faults=Verbatim(START + chunk({"content": "hello"}) + END + USAGE + DONE))
    lm = connect(provider, engine="litellm", retry=QUICK)
    _, error = stream(lm, way)
    assert "blocked by policy" in str(error)
    assert [each.outcome for each in records(lm)] == ["error"]
    assert lm.pipeline.primary.breaker.snapshot().total_failures == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("content", ["hello", '{"a": "no number"}'])
def test_what_is_not_of_the_schema_is_not_delivered(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch, way: str, content: str
) -> None:
    """LiteLLM checks it where it was told to; another model may keep to the schema."""
    monkeypatch.setattr(litellm, "enable_json_schema_validation", True)
    faults = [Verbatim(told(content=content)), Verbatim(told(content='{"a": 1}'))]
    lm = connect(serve(faults=faults), engine="litellm", retry=QUICK, fallbacks=[CHEAP], response_format=FORM)
    assert ask(lm, way) == ['{"a": 1}']
    assert [(each.model, each.outcome, each.estimated) for each in records(lm)] == [
        (MODEL, "error", False),
        (CHEAP, "ok", False),
    ]
