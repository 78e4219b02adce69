"""What a saved LM may say when nobody vouches for whoever wrote it."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_prod.lm.settings import DSPY, ROWS
from dspy_prod.privacy.states import OPERATING, SHAPING, harmless

CLASS = "_dspy_lm_class"
ELSEWHERE: dict[str, Any] = {
    "api_base": "https://evil.example/v1",
    "base_url": "https://evil.example/v1",
    "api_key": "os.environ/OTHER",
    "api_version": "2020-01-01",
    "custom_llm_provider": "hosted_vllm",
    "extra_headers": {"x": "y"},
    "headers": {"x": "y"},
    "extra_query": {"x": "y"},
    "extra_body": {"x": "y"},
    "organization": "o",
    "project": "p",
    "model_list": [],
    "aws_bedrock_runtime_endpoint": "https://evil.example",
    "aws_web_identity_token": "/etc/token",
    "aws_region_name": "x",
    "vertex_credentials": "/etc/key.json",
    "vertex_project": "p",
    "azure_ad_token": "t",
    "tools": [{"type": "mcp", "server_url": "https://evil.example"}],
    "provider": {"order": ["evil"]},
    "prices": {"openai/m": {"input": 0, "output": 0}},
    "budget": [{"usd": 1e6}],
    "store": "redis://evil.example/0",
    "namespace": "elsewhere",
    "launch_kwargs": {},
    "train_kwargs": {},
    "engine": {"class": "evil.Engine"},
    "async_engine": {"class": "evil.Engine"},
    "never_heard_of": 1,
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_says_where_or_with_what_is_left_out(name: str) -> None:
    """With the key of the environment and the prompt, a call went where the state said."""
    kept, left_out = harmless({CLASS: "c", "model": "openai/m", "temperature": 0.5, name: ELSEWHERE[name]}, CLASS)
    assert (kept, left_out) == ({CLASS: "c", "model": "openai/m", "temperature": 0.5}, [name])


@pytest.mark.parametrize("model", ["huggingface/https://evil.example", "https://evil.example/v1"])
def test_an_address_is_no_model(model: str) -> None:
    assert harmless({"model": model}, CLASS) == ({}, ["model"])


def test_nothing_said_is_nothing_left_out() -> None:
    """A plain LM writes its arguments down, given or not."""
    state = {"model": "openai/m", "api_base": None, "finetuning_model": None, "engine": "litellm"}
    assert harmless(state, CLASS)[1] == []


def test_each_argument_of_ours_is_judged() -> None:
    """One that is new is left out until somebody says that it is harmless."""
    names = {row.name for row in ROWS.values()} | set(DSPY)
    judged = {*OPERATING, *SHAPING, *ELSEWHERE}
    assert names - judged == {"callbacks", "clock", "finetuning_model"}
