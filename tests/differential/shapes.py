"""Who is called, and how: every family of providers, and every shape of call a DSPy program makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import dspy
from pydantic import BaseModel

# A red pixel, a second of silence, a page: the least that is what it says.
PNG: Final = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    "AAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
WAV: Final = "UklGRiQAAABXQVZFZm10IBAAAAABAAEAQB8AAIA+AAACABAAZGF0YQAAAAA="
PDF: Final = "data:application/pdf;base64,JVBERi0xLjQKJcOkw7zDtsOfCg=="


@dataclass(frozen=True)
class Family:
    """One way to a provider.

    Attributes:
        model: model string.
        model_type: DSPy's.
        connect: constructor arguments that lead to a server at this URL.
    """

    model: str
    connect: Callable[[str], dict[str, Any]]
    model_type: str = "chat"


def _keyed(suffix: str = "") -> Callable[[str], dict[str, Any]]:
    return lambda url: {"api_base": url + suffix, "api_key": "sk-test"}


def _aws(url: str) -> dict[str, Any]:
    return {
        "aws_bedrock_runtime_endpoint": url, "aws_region_name": "eu-central-1", "aws_access_key_id": "test",
        "aws_secret_access_key": "test",
    }  # fmt: skip


FAMILIES: Final[dict[str, Family]] = {
    "openai": Family("openai/gpt-4o-mini", _keyed("/v1")),
    "openai-reasoning": Family("openai/gpt-5-mini", _keyed("/v1")),
    "responses": Family("openai/gpt-4o-mini", _keyed("/v1"), "responses"),
    "text": Family("text-completion-openai/gpt-3.5-turbo-instruct", _keyed("/v1"), "text"),
    "anthropic": Family("anthropic/claude-haiku-4-5", _keyed()),
    "gemini": Family("gemini/gemini-2.5-flash", _keyed("/v1beta")),
    "bedrock": Family("bedrock/anthropic.claude-3-haiku-20240307-v1:0", _aws),
    "ollama": Family("ollama_chat/llama3", _keyed()),
    "compatible": Family("openai/my-own-model", _keyed("/v1")),
    "lm-studio": Family("lm_studio/local", _keyed("/v1")),
    "deepseek": Family("deepseek/deepseek-chat", _keyed("/v1")),
    "azure": Family("azure/my-deployment", lambda url: {**_keyed()(url), "api_version": "2024-10-21"}),
}


@dataclass(frozen=True)
class Shape:
    """One call.

    Attributes:
        call: what the LM is called with.
        init: what it is made with, beside the connection.
    """

    call: dict[str, Any] = field(default_factory=lambda: {"prompt": "What is the colour?"})
    init: dict[str, Any] = field(default_factory=dict)


class Colour(BaseModel):
    """A schema."""

    name: str
    bright: bool = False


def say(*content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    """A message of text, or of parts."""
    only = len(content) == 1 and (content[0] is None or isinstance(content[0], str))
    return {"role": role, "content": content[0] if only else list(content), **more}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def messages(*each: dict[str, Any], **more: Any) -> Shape:
    return Shape({"messages": list(each), **more})


def asked(**more: Any) -> Shape:
    return Shape({"prompt": "What is the colour?", **more})


def made(**init: Any) -> Shape:
    return Shape(init=init)


TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look it up.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
    },
}
_BARE_TOOL: Final = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
}
_CALLED: Final = {"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"what": "sky"}'}}
_SCHEMA: Final = {
    "type": "json_schema",
    "json_schema": {"name": "colour", "schema": {"type": "object", "properties": {"name": {"type": "string"}}}},
}
USER: Final = say("What is the colour?")

SHAPES: Final[dict[str, Shape]] = {
    # what is asked
    "prompt": asked(),
    "empty prompt": Shape({"prompt": ""}),
    "unicode": Shape({"prompt": "Farbe? \U0001f308 \u0000 \u202e é"}),
    "surrogate": Shape({"prompt": "bad \ud800"}),
    "user": messages(USER),
    "system": messages(say("Be brief.", role="system"), USER),
    "only a system message": messages(say("Be brief.", role="system")),
    "two systems": messages(say("Be brief.", role="system"), USER, say("Be kind.", role="system"), USER),
    "developer": messages(say("Be brief.", role="developer"), USER),
    "turns": messages(USER, say("blue", role="assistant"), say("Sure?")),
    "ends with the assistant": messages(USER, say("It is", role="assistant")),
    "no messages": messages(),
    "no content": messages(say()),
    "empty content": messages(say("")),
    "content is None": messages({"role": "user", "content": None}),
    "parts": messages(say(text("What is"), text("the colour?"))),
    "cache control": messages(say(text("A long text.", cache_control={"type": "ephemeral"}), text("Which?"))),
    "image": messages(say(text("Which?"), {"type": "image_url", "image_url": {"url": PNG}})),
    "image, low": messages(say(text("Which?"), {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}})),
    "image by address": messages(
        say(text("Which?"), {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}})
    ),
    "audio": messages(say(text("What?"), {"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}})),
    "file": messages(say(text("What?"), {"type": "file", "file": {"file_data": PDF, "filename": "a.pdf"}})),
    "file by id": messages(say(text("What?"), {"type": "file", "file": {"file_id": "file-1"}})),
    "name": messages(say("What is the colour?", name="ann")),
    "unknown key": messages(say("What is the colour?", mood="good")),
    "unknown role": messages(say("What is the colour?", role="poet")),
    "function role": messages(USER, say("blue", role="function", name="look")),
    "tool result": messages(
        USER, say(None, role="assistant", tool_calls=[_CALLED]), say("blue", role="tool", tool_call_id="t1")
    ),
    "thinking blocks": messages(
        USER,
        say("blue", role="assistant", thinking_blocks=[{"type": "thinking", "thinking": "hm", "signature": "s"}]),
        say("Sure?"),
    ),
    "reasoning content": messages(USER, say("blue", role="assistant", reasoning_content="hm"), say("Sure?")),
    # how it is asked
    "temperature": asked(temperature=0.3),
    "temperature 0": asked(temperature=0),
    "temperature None": asked(temperature=None),
    "temperature as text": asked(temperature="0.3"),
    "max_tokens": asked(max_tokens=50),
    "max_completion_tokens": asked(max_completion_tokens=50),
    "both maxima": asked(max_tokens=50, max_completion_tokens=60),
    "top_p": asked(top_p=0.5),
    "top_k": asked(top_k=5),
    "stop": asked(stop="END"),
    "stops": asked(stop=["END", "FIN"]),
    "seed": asked(seed=7),
    "n": asked(n=2, temperature=1.0),
    "n None": asked(n=None),
    "n 0": asked(n=0),
    "logprobs": asked(logprobs=True),
    "top_logprobs": asked(logprobs=True, top_logprobs=2),
    "presence_penalty": asked(presence_penalty=0.5),
    "frequency_penalty": asked(frequency_penalty=0.5),
    "logit_bias": asked(logit_bias={"50256": -100}),
    "user id": asked(user="ann"),
    "service_tier": asked(service_tier="flex"),
    "metadata": asked(metadata={"team": "a"}),
    "store": asked(store=True),
    "reasoning_effort": asked(reasoning_effort="low"),
    "reasoning": asked(reasoning={"effort": "low"}),
    "thinking": asked(thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2048),
    "prediction": asked(prediction={"type": "content", "content": "blue"}),
    "modalities": asked(modalities=["text"]),
    "verbosity": asked(verbosity="low"),
    "extra_body": asked(extra_body={"custom": 1}),
    "extra_headers": asked(extra_headers={"x-tenant": "a"}),
    "headers": asked(headers={"x-tenant": "a"}),
    "extra_query": asked(extra_query={"a": "b"}),
    "another key": asked(api_key="sk-other"),
    "timeout": asked(timeout=5),
    "drop_params": asked(drop_params=True),
    "organization": asked(organization="org"),
    "unknown argument": asked(made_up=1),
    "rollout_id": asked(rollout_id=3, temperature=1.0),
    "tools": asked(tools=[TOOL]),
    "bare tool": asked(tools=[_BARE_TOOL]),
    "tool_choice auto": asked(tools=[TOOL], tool_choice="auto"),
    "tool_choice none": asked(tools=[TOOL], tool_choice="none"),
    "tool_choice required": asked(tools=[TOOL], tool_choice="required"),
    "tool_choice named": asked(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "look"}}),
    "parallel_tool_calls": asked(tools=[TOOL], parallel_tool_calls=False),
    "hosted tool": asked(tools=[{"type": "web_search_preview"}]),
    "native tool_choice": asked(tools=[TOOL], tool_choice={"type": "function", "name": "look"}),
    "json": asked(response_format={"type": "json_object"}),
    "schema": asked(response_format=_SCHEMA),
    "schema class": asked(response_format=Colour),
    # how the LM is made
    "made: temperature": made(temperature=0.3, max_tokens=60),
    "made: top_k": made(top_k=5),
    "made: extra_body": made(extra_body={"custom": 1}),
    "made: extra_headers": made(extra_headers={"x-tenant": "a"}),
    "made: organization": made(organization="org"),
    "made: tools": made(tools=[TOOL]),
    "made: reasoning_effort": made(reasoning_effort="low"),
    "made: n": made(n=2, temperature=1.0),
    "made: developer role": Shape({"messages": [say("Be brief.", role="system"), USER]}, {"use_developer_role": True}),
    "made: prompt_cache": made(prompt_cache=dspy.lm15.CacheConfig()) if hasattr(dspy, "lm15") else made(),
    "made: unknown": made(made_up=1),
    "made: engine litellm": made(engine="litellm"),
    "made: drop_params": made(drop_params=True),
    "made: num_retries": made(num_retries=2),
}
