"""An LM alone: answers, history, copies, state, errors."""

from __future__ import annotations

from importlib import metadata, util
from typing import Any

import dspy
import pytest
from dspy.lm15 import Config, Message, Request, Response
from dspy.utils.exceptions import (
    ContextWindowExceededError,
    LMAuthError,
    LMConfigurationError,
    LMError,
    LMInvalidRequestError,
    LMRateLimitError,
    LMServerError,
)
from packaging import version

from dspy_prod.testing import Provider, Status
from tests.dspy_suite.conftest import MODEL, Make

needs_tools = pytest.mark.skipif(
    version.parse(metadata.version("litellm")) < version.parse("1.110") and not util.find_spec("mcp"),
    reason="this LiteLLM sends tools only where the package mcp is installed, for plain DSPy too",
)


def body(provider: Provider, at: int = -1) -> dict[str, Any]:
    """What arrived."""
    found: dict[str, Any] = provider.calls[at].body
    return found


def test_a_prompt_is_one_user_message_and_gives_a_list_of_texts(lm: Any, provider: Provider) -> None:
    assert lm("What is the colour?") == ["ok"]
    assert body(provider)["messages"] == [{"role": "user", "content": "What is the colour?"}]


def test_messages_are_sent_as_they_are(lm: Any, provider: Provider) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Colour?"}]
    assert lm(messages=messages) == ["ok"]
    assert body(provider)["messages"] == messages


def test_arguments_of_a_call_win_over_those_of_the_lm(make: Make, provider: Provider) -> None:
    lm = make(temperature=0.1, max_tokens=10)
    lm("?", temperature=0.9)
    assert body(provider)["temperature"] == 0.9
    assert 10 in (body(provider).get("max_tokens"), body(provider).get("max_completion_tokens"))


def test_n_answers_are_a_list_of_n(make: Make, provider: Provider) -> None:
    provider.answer = [{"content": "one"}, {"content": "two"}]
    assert len(make(temperature=1.0)("?", n=2)) == 2


def test_a_typed_request_gives_a_response(lm: Any) -> None:
    response = lm(Request(model=MODEL, messages=(Message.user("?"),), config=Config(temperature=0.3)))
    assert isinstance(response, Response)
    assert response.text == "ok"


@needs_tools
def test_tool_calls_make_dictionaries(lm: Any, provider: Provider) -> None:
    provider.answer = {"content": "ok", "tool_calls": [{"name": "look", "arguments": {"what": "sky"}}]}
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    answer = lm("?", tools=[tool])[0]
    assert isinstance(answer, dict)
    assert answer["tool_calls"][0]["function"]["name"] == "look"


def test_reasoning_content_is_told(lm: Any, provider: Provider) -> None:
    provider.answer = {"content": "ok", "reasoning": "hm"}
    assert lm("?")[0] in ("ok", {"text": "ok", "reasoning_content": "hm"})


def test_history_tells_what_was_asked_and_what_came_back(lm: Any, kind: str) -> None:
    lm("What is the colour?", temperature=0.5)
    entry = lm.history[-1]
    assert entry["prompt"] == "What is the colour?"
    assert entry["messages"] is None or entry["messages"][0]["content"] == "What is the colour?"
    assert entry["kwargs"]["temperature"] == 0.5
    assert "api_key" not in entry["kwargs"]
    assert entry["outputs"] == ["ok"]
    assert entry["usage"]["total_tokens"] == entry["usage"]["prompt_tokens"] + entry["usage"]["completion_tokens"] > 0
    assert entry["cost"] > 0
    assert entry["model"] == MODEL
    assert {"uuid", "timestamp", "response_model", "model_type", "response"} <= set(entry)
    assert "cost_details" in entry or "litellm" in kind


def test_history_is_kept_by_the_lm_and_by_dspy(lm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lm("one")
    lm("two")
    assert [entry["prompt"] for entry in lm.history] == ["one", "two"]
    lm.inspect_history(n=1)
    shown = capsys.readouterr().out
    assert "two" in shown
    assert "one" not in shown
    dspy.inspect_history(n=2)
    assert "one" in capsys.readouterr().out


@pytest.mark.parametrize(("settings", "kept"), [({"disable_history": True}, 0), ({"max_history_size": 2}, 2)])
def test_history_can_be_bounded_or_off(lm: Any, settings: dict[str, Any], kept: int) -> None:
    with dspy.context(**settings):
        for number in range(4):
            lm(str(number))
    assert len(lm.history) == kept


def test_a_copy_has_its_own_history_and_arguments(make: Make, provider: Provider) -> None:
    lm = make(temperature=0.1)
    lm("?")
    twin = lm.copy(temperature=0.9, rollout_id=4)
    assert (twin.kwargs["temperature"], twin.kwargs["rollout_id"]) == (0.9, 4)
    assert lm.kwargs["temperature"] == 0.1
    assert twin.history == []
    twin("?")
    assert len(lm.history) == 1
    assert body(provider)["temperature"] == 0.9
    assert "rollout_id" not in body(provider)


def test_kwargs_can_be_read_and_set(make: Make, provider: Provider) -> None:
    """As `lm.launch()` does: what is in `kwargs` is what the next call uses, the address and the key included."""
    lm = make(temperature=0.1)
    assert lm.kwargs["api_base"] == provider.url
    assert lm.kwargs["api_key"] == "sk-test"
    lm.kwargs["temperature"] = 0.7
    lm("?")
    assert body(provider)["temperature"] == 0.7
    with Provider() as other:
        lm.kwargs["api_base"] = other.url
        lm("another question")
        assert len(other.calls) == 1


def test_state_holds_no_key_and_makes_the_same_lm(make: Make) -> None:
    lm = make(temperature=0.3, max_tokens=20)
    state = lm.dump_state()
    assert "sk-test" not in repr(state)
    assert state["temperature"] == 0.3
    twin = dspy.BaseLM.load_state(state, allow_custom_lm_class=True)
    assert type(twin) is type(lm)
    assert (twin.model, twin.kwargs["max_tokens"]) == (MODEL, 20)


@pytest.mark.parametrize(
    ("status", "kind_of_error"),
    [(400, LMInvalidRequestError), (401, LMAuthError), (429, LMRateLimitError), (500, LMServerError)],
)
def test_errors_have_their_class_and_status(
    lm: Any, provider: Provider, status: int, kind_of_error: type[Exception]
) -> None:
    provider.faults = Status(status)
    with pytest.raises(kind_of_error) as caught:
        lm("?")
    assert isinstance(caught.value, LMError)
    assert caught.value.status == status
    assert caught.value.model is not None


def test_a_prompt_that_is_too_long_is_told_apart(lm: Any, provider: Provider) -> None:
    message = "This model's maximum context length is 8 tokens. However, your messages resulted in 9 tokens."
    provider.faults = Status(400, message, error_code="context_length_exceeded")
    with pytest.raises(ContextWindowExceededError):
        lm("?")


@pytest.mark.parametrize("model", ["openai/gpt-5-mini", "openai/o3-mini"])
def test_reasoning_models_have_rules_for_their_arguments(make: Make, provider: Provider, model: str) -> None:
    lm = make(model, temperature=1.0, max_tokens=20_000)
    lm("?")
    assert body(provider)["max_completion_tokens"] == 20_000
    assert "max_tokens" not in body(provider)
    with pytest.raises(LMConfigurationError, match="temperature"):
        make(model, temperature=0.2, max_tokens=20_000)


def test_usage_is_tracked(lm: Any) -> None:
    with dspy.track_usage() as tracker:
        lm("one")
        lm("two")
    total = tracker.get_total_tokens()[MODEL]
    assert total["total_tokens"] == sum(entry["usage"]["total_tokens"] for entry in lm.history)


def test_the_responses_api(make: Make, provider: Provider) -> None:
    lm = make(model_type="responses", engine="auto")
    assert lm("?") in (["ok"], [{"text": "ok"}])
    assert provider.calls[-1].path.endswith("/responses")


def test_a_text_model(make: Make, provider: Provider) -> None:
    lm = make("text-completion-openai/gpt-3.5-turbo-instruct", model_type="text")
    assert lm("?")
    assert "prompt" in body(provider)


def test_what_an_lm_can_do_is_known(lm: Any) -> None:
    assert lm.supports_function_calling
    assert lm.supports_response_schema
    assert not lm.supports_reasoning
    assert "response_format" in lm.supported_params


def test_the_engine_is_told(lm: Any) -> None:
    assert lm.engine is not None


def test_a_subclass_may_prepare_calls(kind: str, make: Make) -> None:
    """Users derive from the LM to change what is sent."""
    made = make()

    class Polite(type(made)):  # type: ignore[misc]
        def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
            return super().__call__(f"Please: {prompt}", messages=messages, **kwargs)

    made.__class__ = Polite
    made("?")
    assert made.history[-1]["prompt"] == "Please: ?"
