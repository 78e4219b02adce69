"""What a saved LM may say when nobody vouches for whoever wrote it."""

from __future__ import annotations

from typing import Any

import dspy
import pytest

from dspy_prod.lm.settings import DSPY, ROWS
from dspy_prod.privacy.states import OPERATING, PLAIN, SHAPING, beyond, harmless

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
FALLBACK = {"model": "openai/m", "api_base": "https://evil.example/v1"}


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_says_where_or_with_what_is_left_out(name: str, ours: bool) -> None:
    """With the key of the environment and the prompt, a call went where the state said."""
    state = {CLASS: "c", "model": "openai/m", "temperature": 0.5, name: ELSEWHERE[name] or [1]}
    kept, left_out = harmless(state, CLASS, ours=ours)
    assert (kept, left_out) == ({CLASS: "c", "model": "openai/m", "temperature": 0.5}, [name])


@pytest.mark.parametrize("name", sorted(OPERATING - PLAIN))
def test_what_only_our_lm_understands_is_left_out_of_any_other(name: str) -> None:
    """DSPy's LM hands `fallbacks` to LiteLLM, which went to the address in them."""
    assert harmless({"model": "openai/m", name: [FALLBACK]}, CLASS, ours=False) == ({"model": "openai/m"}, [name])


def test_a_cache_is_not_shared_between_tenants() -> None:
    """One state made every tenant's answers everybody's."""
    cache = {"ttl": 60, "shared": True}
    assert harmless({"cache": cache}, CLASS, ours=True) == ({"cache": {"ttl": 60}}, ["cache.shared"])
    assert harmless({"cache": cache}, CLASS, ours=False) == ({}, ["cache"])
    for ours in (True, False):
        for value in (True, False, None):
            assert harmless({"cache": value}, CLASS, ours=ours) == ({"cache": value}, [])


@pytest.mark.parametrize("model", ["huggingface/https://evil.example", "https://evil.example/v1"])
def test_an_address_is_no_model(model: str) -> None:
    for ours in (True, False):
        assert harmless({"model": model}, CLASS, ours=ours) == ({}, ["model"])


def test_nothing_said_is_nothing_left_out() -> None:
    """A plain LM writes its arguments down, given or not."""
    state = {"model": "openai/m", "api_base": None, "finetuning_model": None, "engine": "litellm"}
    assert harmless(state, CLASS, ours=True)[1] == []
    assert harmless({**state, "launch_kwargs": {}, "train_kwargs": {}}, CLASS, ours=False)[1] == []


def test_each_argument_of_ours_is_judged() -> None:
    """One that is new is left out until somebody says that it is harmless."""
    names = {row.name for row in ROWS.values()} | set(DSPY)
    judged = {*OPERATING, *SHAPING, *ELSEWHERE}
    assert names - judged == {"callbacks", "clock", "finetuning_model"}


def test_what_dspy_writes_of_a_predictor_is_harmless() -> None:
    """A program that is saved by this DSPy, or was by an earlier one, is loaded without a word."""
    predictor = dspy.Predict("question -> answer")
    predictor.lm = dspy.LM("openai/m")
    assert beyond(predictor.dump_state()) == ([], [])
    assert harmless(predictor.lm.dump_state(), CLASS, ours=False)[1] == []


@pytest.mark.parametrize("name", ["forward", "callbacks", "history", "stage", "__class__", "forward "])
def test_a_key_that_nobody_writes_is_found(name: str) -> None:
    """DSPy sets it as an attribute: `forward` made each call a TypeError."""
    assert beyond({"demos": [], name: "x"}) == ([name], [])
    assert beyond({"demos": [], name: "x"}, {name}) == ([], [])


@pytest.mark.parametrize("name", [*ELSEWHERE, *sorted(OPERATING)])
def test_arguments_of_a_predictor_shape_its_answers_only(name: str) -> None:
    """They go with each call, and won over the LM's own address."""
    assert beyond({"config": {"temperature": 1, "n": 2, name: "x"}}) == ([], [f"config.{name}"])


@pytest.mark.parametrize("config", [[["api_base", "x"]], "x", 0])
def test_arguments_that_are_no_object_are_none(config: Any) -> None:
    assert beyond({"config": config}) == ([], ["config"])
