"""What reaches LiteLLM is what a plain `dspy.LM` hands it: regions, addresses, bodies, time-outs, per LM and call."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMUnsupportedFeatureError

import dspy_prod
from dspy_prod.testing import ScriptedEngine
from tests.e2e.support import fresh_memory

_HOUSEKEEPING = ("cache", "num_retries", "retry_strategy", "headers", "n", "logger_fn")
"""How DSPy's two LiteLLM paths differ from each other: no caching, one attempt, a user agent, one candidate.

And how ours does: a function to which LiteLLM tells the answer as it arrived.
"""

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bedrock-region": ("bedrock/anthropic.claude-3-haiku-20240307-v1:0", {"aws_region_name": "eu-central-1"}, {}),
    "bedrock-region-per-call": ("bedrock/mistral.mistral-7b-instruct-v0:2", {}, {"aws_region_name": "eu-west-1"}),
    "ollama-context": ("ollama_chat/llama3", {"num_ctx": 8192, "api_base": "http://ollama"}, {"temperature": 0.3}),
    "extra-body": (
        "openai/vllm", {"api_base": "http://v/v1", "api_key": "k", "extra_body": {"guided_json": {}}}, {"stop": ["x"]},
    ),
    "extra-body-per-call": (
        "openai/vllm", {"api_base": "http://v/v1", "api_key": "k", "extra_body": {"a": 1}}, {"extra_body": {"b": 2}},
    ),
    "address-and-timeout-per-call": (
        "openai/vllm", {"api_base": "http://v/v1", "api_key": "k", "engine": "litellm", "timeout": 30},
        {"timeout": 7, "api_base": "http://w/v1"},
    ),
    "vertex": (
        "vertex_ai/gemini-1.5-pro", {"vertex_project": "p", "drop_params": True, "extra_headers": {"x": "y"}},
        {"top_p": 0.4, "seed": 1},
    ),
    "azure": (
        "azure/deployment", {"api_base": "http://a", "api_key": "k", "api_version": "2026-01-01"},
        {"response_format": {"type": "json_object"}},
    ),
    "watsonx": ("watsonx/ibm/granite-3-8b-instruct", {"project_id": "p"}, {}),
    "reasoning-model": ("azure/o3-mini", {"api_base": "http://a", "api_key": "k", "max_tokens": 20_000}, {}),
}  # fmt: skip


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of LiteLLM, which goes no further."""
    import litellm  # takes seconds, so not while tests are collected

    seen: list[dict[str, Any]] = []

    def completion(**arguments: Any) -> Any:
        seen.append(arguments)
        message = {"role": "assistant", "content": "ok"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return litellm.ModelResponse(model="m", choices=[{"message": message, "finish_reason": "stop"}], usage=usage)

    async def acompletion(**arguments: Any) -> Any:
        return completion(**arguments)

    monkeypatch.setattr(litellm, "completion", completion)
    monkeypatch.setattr(litellm, "acompletion", acompletion)
    return seen


def essential(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in _HOUSEKEEPING and value is not None}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("case", CASES)
def test_litellm_is_given_what_plain_dspy_gives_it(sent: list[dict[str, Any]], case: str, asynchronous: bool) -> None:
    """Everything but DSPy's own housekeeping is equal, wherever the argument was given."""
    model, options, call = CASES[case]
    for lm in (
        dspy.LM(model, **{"max_tokens": 50, "cache": False, **options}),
        dspy_prod.LM(model, **{"max_tokens": 50, "cache": False, "store": fresh_memory(), **options}),
    ):
        answer = asyncio.run(lm.acall("hello", **call)) if asynchronous else lm("hello", **call)
        assert answer == ["ok"]
    theirs, ours = sent
    assert essential(ours) == essential(theirs)
    assert {*options, *call} - {"engine", "max_tokens"} <= ours.keys()


def test_a_copy_with_another_key_sends_that_key(sent: list[dict[str, Any]]) -> None:
    """`copy(api_key=...)` changes what is sent by the copy, and only by it."""
    lm = dspy_prod.LM("openai/x", api_key="one", num_ctx=1, api_base="http://x", store=fresh_memory(), cache=False)
    lm.copy(api_key="two")("q")
    lm("q")
    assert [call["api_key"] for call in sent] == ["two", "one"]


def test_what_litellm_alone_understands_is_part_of_the_cache_key(sent: list[dict[str, Any]]) -> None:
    """Calls that differ in such an argument only are different calls; equal ones are one."""
    lm = dspy_prod.LM("ollama_chat/llama3", api_base="http://ollama", store=fresh_memory())
    for context in (1024, 2048, 1024, 2048):
        lm("q", num_ctx=context)
    assert [call["num_ctx"] for call in sent] == [1024, 2048]


def test_an_engine_object_refuses_what_it_cannot_carry() -> None:
    """Arguments that only LiteLLM understands are refused by name, at construction and per call."""
    engine = ScriptedEngine()
    with pytest.raises(dspy_prod.ConfigError, match="num_ctx"):
        dspy_prod.LM("any/model", engine=engine, num_ctx=1, store=fresh_memory())
    lm = dspy_prod.LM("any/model", engine=engine, store=fresh_memory())
    with pytest.raises(LMUnsupportedFeatureError, match="num_ctx"):
        lm("q", num_ctx=1)
    with pytest.raises(ValueError, match="api_key"):
        lm("q", api_key="other")
    assert engine.calls == 0
