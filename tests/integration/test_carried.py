"""What no canonical request can say goes to LiteLLM as the caller wrote it, as a plain `dspy.LM` sends it."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMError, LMUnsupportedFeatureError

from dspy_prod import Budget, Price, UnpricedModelError
from dspy_prod.testing import Provider
from tests.e2e.conftest import MakeProvider
from tests.e2e.support import MODEL, make_lm

WAV = "UklGRiQAAABXQVZFZm10IBAAAAABAAEAgD4AAAB9AAACABAAZGF0YQAAAAA="


def user(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CASES: dict[str, dict[str, Any]] = {
    "audio": {"messages": user([{"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}}])},
    "file": {"messages": user([{"type": "file", "file": {"file_id": "file-1"}}])},
    "document": {"messages": user([{"type": "document", "source": {"type": "text", "data": "d"}}])},
    "cache control": {"messages": user([{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}])},
    "name": {"messages": user("hi", name="ann")},
    "thinking blocks": {
        "messages": [
            *user("a"),
            {"role": "assistant", "content": "b", "thinking_blocks": [{"type": "thinking", "thinking": "t"}]},
            *user("c"),
        ]
    },
    "function role": {"messages": [*user("a"), {"role": "function", "name": "f", "content": "1"}]},
    "unknown key": {"messages": user("hi", made_up=1)},
    "only a system message": {"messages": [{"role": "system", "content": "be brief"}]},
    "no content": {"messages": user([])},
    "reasoning": {"prompt": "hi", "reasoning": {"effort": "low"}},
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def plain(provider: Provider, **arguments: Any) -> Any:
    return dspy.LM(
        MODEL, **{"api_key": "test", "api_base": provider.url, "max_tokens": 100, "cache": False, "num_retries": 0,
                  **arguments},
    )  # fmt: skip


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("case", CASES)
def test_a_call_arrives_as_from_a_plain_lm(case: str, way: str, serve: MakeProvider) -> None:
    """All of these were refused with LMUnsupportedFeatureError."""
    provider = serve()
    lm, call = make_lm(provider.url, budget=None), CASES[case]

    def ask(each: Any) -> Any:
        try:
            return asyncio.run(each.acall(**call)) if way == "async" else each(**call)
        except LMError as error:
            return type(error)

    assert ask(lm) == ask(plain(provider))
    ours, theirs = provider.calls
    assert ours.body == theirs.body


@pytest.mark.parametrize(
    "arguments",
    [
        {"tools": [{"type": "web_search_preview"}]},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}},
        {"reasoning": {"effort": "low", "summary": "auto"}},
        {"engine": "litellm", "reasoning_effort": "low"},
        {"engine": "litellm", "tools": [TOOL]},
    ],
    ids=str,
)
def test_the_responses_api_has_its_own_words(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosted tools, native choices and `reasoning` of the Responses API are handed on as they are."""
    import litellm

    seen: list[dict[str, Any]] = []

    def responses(**given: Any) -> Any:
        seen.append(given)
        raise litellm.BadRequestError("no", model="m", llm_provider="openai")

    monkeypatch.setattr(litellm, "responses", responses)
    more = {"model_type": "responses", "max_tokens": 100, "api_key": "k", "api_base": "http://nowhere", **arguments}
    for each in (make_lm("", **more), dspy.LM(MODEL, cache=False, num_retries=0, **more)):
        with pytest.raises(LMError):
            each("q")
    ours, theirs = seen
    assert ours == theirs


def test_a_text_model_is_given_what_liteLLM_takes(serve: MakeProvider) -> None:
    """`top_k` of a text model was refused."""
    provider = serve()
    more = {"model_type": "text", "top_k": 5}
    assert make_lm(provider.url, **more)("q") == plain(provider, **more)("q")
    ours, theirs = provider.calls
    assert ours.body == theirs.body


def test_a_signature_may_hold_a_recording(serve: MakeProvider) -> None:
    """`dspy.Audio` in a signature failed; streamed to its user too."""
    provider = serve(answer="[[ ## answer ## ]]\nblue\n\n[[ ## completed ## ]]")

    class Listen(dspy.Signature):
        recording: dspy.Audio = dspy.InputField()
        answer: str = dspy.OutputField()

    recording = dspy.Audio(data=WAV, audio_format="wav")
    lm = make_lm(provider.url, cache=True)

    async def streamed() -> str:
        listener = dspy.streaming.StreamListener("answer")
        program = dspy.streamify(dspy.Predict(Listen), stream_listeners=[listener])
        return "".join([each.chunk async for each in program(recording=recording) if hasattr(each, "chunk")])

    with dspy.context(lm=lm):
        assert dspy.Predict(Listen)(recording=recording).answer == "blue"
        assert dspy.Predict(Listen)(recording=recording).answer == "blue"
        assert len(provider.calls) == 1, "the second one is from the cache"
        assert asyncio.run(streamed()) == "blue"
        other = dspy.Audio(data=WAV.replace("UklG", "UklH"), audio_format="wav")
        assert dspy.Predict(Listen)(recording=other).answer == "blue"
    assert len(provider.calls) == 2, "another recording is another question"
    assert all("input_audio" in json.dumps(call.body) for call in provider.calls)


@pytest.mark.parametrize("case", ["audio", "name", "function role"])
def test_a_budget_holds_for_such_calls(case: str, serve: MakeProvider) -> None:
    """It holds what the model's input limit allows, or the bytes of what is text; it spends what the provider bills."""
    provider = serve()
    prices = {MODEL: Price(input=0.15, output=0.60, max_input_tokens=1_000)}
    lm = make_lm(provider.url, budget=Budget(usd=1)).copy(prices=prices)
    lm(**CASES[case])
    [record] = lm.ledger.records()
    assert not record.estimated
    assert record.cost_nano == provider.bill.nano
    with pytest.raises(LMError):
        lm.copy(budget=Budget(usd=0.00001, name="small"))(**CASES[case])
    assert len(provider.calls) == 1


def test_a_recording_for_a_model_of_unknown_limit_is_refused_under_a_budget(serve: MakeProvider) -> None:
    """Nothing bounds what it may cost; the message says what to do."""
    lm = make_lm(serve().url, budget=Budget(usd=1))
    with pytest.raises(UnpricedModelError, match="max_input_tokens"):
        lm(messages=user([{"type": "input_audio", "input_audio": {"data": "ZkxhQw==", "format": "flac"}}]))


def test_a_hosted_tool_is_refused_under_a_budget(serve: MakeProvider) -> None:
    """It is billed apart from tokens."""
    lm = make_lm(serve().url, model_type="responses", budget=Budget(usd=1), tools=[{"type": "made_up_tool"}])
    with pytest.raises(UnpricedModelError, match="bills apart"):
        lm("q")


CANNOT = {"audio": "audio part", "only a system message": "engine=lm15 cannot carry", "no content": "engine=lm15"}


@pytest.mark.parametrize("case", CANNOT)
def test_an_engine_that_cannot_carry_it_says_so(case: str, serve: MakeProvider) -> None:
    """An LMError with the reason, where a bare ValueError was raised; nothing is sent."""
    provider = serve()
    with pytest.raises(LMUnsupportedFeatureError, match=CANNOT[case]):
        make_lm(provider.url, engine="lm15")(**CASES[case])
    assert provider.calls == []


def test_a_fallback_carries_it_with_its_own_settings(serve: MakeProvider) -> None:
    """The route's own model, address and settings are sent, with the caller's messages."""
    from dspy_prod.testing import Status

    dead, alive = serve(faults=Status(503)), serve()
    spare = dspy.LM("openai/e2e-cheap", api_key="own", api_base=alive.url, temperature=0.7)
    lm = make_lm(dead.url, fallbacks=[spare])
    assert lm(**CASES["name"]) == ["ok"]
    [call] = alive.calls
    assert (call.body["model"], call.body["temperature"], call.body["messages"]) == (
        "e2e-cheap", 0.7, CASES["name"]["messages"],
    )  # fmt: skip


def test_prompt_caching_needs_the_native_engine(serve: MakeProvider) -> None:
    """As a plain LM says, on the route through LiteLLM."""
    provider = serve()
    lm = make_lm(provider.url, engine="litellm", prompt_cache=dspy.lm15.CacheConfig(mode="auto"))
    with pytest.raises(LMUnsupportedFeatureError, match="prompt_cache"):
        lm("q")
    assert provider.calls == []
