"""Broken answers with HTTP 200 in the dialects that LiteLLM translates are judged as the native engine judges them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from dspy.utils.exceptions import LMError

import dspy_prod
from dspy_prod import Budget, Price
from dspy_prod.testing import Verbatim
from dspy_prod.testing.dialects import dumps
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CHEAP, ask, fresh_memory, records
from tests.e2e.test_unusable import QUICK, WAYS, body
from tests.listening import Listening, Silent

TOLD = 25_000
"""What eleven tokens of input and seven of output cost, in nano-USD."""
MODELS = {
    "anthropic": "anthropic/claude-sonnet-4-5", "gemini": "gemini/gemini-2.5-flash", "cohere": "cohere_chat/command-r",
    "bedrock": "bedrock/anthropic.claude-3-haiku-20240307-v1:0", "ollama": "ollama/any",
    "ollama-chat": "ollama_chat/any",
    "azure": "azure/any", "mistral": "mistral/any", "groq": "groq/any", "text": "text-completion-openai/any",
}  # fmt: skip
ANTHROPIC: dict[str, Any] = {
    "id": "m", "type": "message", "role": "assistant", "model": "any", "content": [{"type": "text", "text": "hello"}],
    "stop_reason": "end_turn", "usage": {"input_tokens": 11, "output_tokens": 7},
}  # fmt: skip
COUNTS = {"promptTokenCount": 11, "candidatesTokenCount": 7, "totalTokenCount": 18}
SAID = {"content": {"parts": [{"text": "hello"}], "role": "model"}, "finishReason": "STOP", "index": 0}
GEMINI: dict[str, Any] = {"candidates": [SAID], "usageMetadata": COUNTS}


class Server(Listening):
    """Answers any request with the body it is told."""

    def __init__(self) -> None:
        self.body = b""
        self.kind = "application/json"
        self.requests = 0
        outer = self

        class Handler(Silent):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.requests += 1
                self.send_response(200)
                self.send_header("content-type", outer.kind)
                self.send_header("content-length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

        super().__init__(Handler)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def lm_at(url: str, dialect: str, engine: str = "litellm", **options: Any) -> Any:
    own: dict[str, Any] = {
        "azure": {"api_version": "2024-06-01"},
        "bedrock": {"aws_access_key_id": "any", "aws_secret_access_key": "any", "aws_region_name": "eu-central-1",
                    "aws_bedrock_runtime_endpoint": url},
        "text": {"model_type": "text", "engine": "auto"},
    }.get(dialect, {})  # fmt: skip
    model = MODELS[dialect]
    return dspy_prod.LM(
        model,
        **{
            "api_base": url, "api_key": "a-key", "engine": engine, "cache": False, "retry": QUICK, "breaker": False,
            "store": fresh_memory(), "max_tokens": 50, "budget": Budget(usd=100),
            "prices": {model: Price(input=1, output=2), CHEAP: Price(input=1, output=2)}, **own, **options,
        },
    )  # fmt: skip


def end(lm: Any, said: Any) -> tuple[Any, ...]:
    """How a call ended, and what was booked."""
    booked = [(record.outcome, record.cost_nano, record.estimated) for record in records(lm)]
    return (type(said) if isinstance(said, Exception) else said, *booked)


ODD: list[Any] = [True, 7.5, "7", -7, 10**30]
BROKEN: dict[str, Any] = {
    "anthropic": [
        [ANTHROPIC], None, {}, "<html>", {**ANTHROPIC, "usage": None}, {**ANTHROPIC, "content": None},
        {**ANTHROPIC, "content": {"a": 1}}, {**ANTHROPIC, "content": [None]}, {**ANTHROPIC, "content": []},
        *[{**ANTHROPIC, "usage": {"input_tokens": 11, "output_tokens": each}} for each in ODD],
        {name: value for name, value in ANTHROPIC.items() if name != "usage"},
        {**ANTHROPIC, "content": None, "usage": {**ANTHROPIC["usage"], "cache_read_input_tokens": 1_000}},
    ],
    "gemini": [
        [GEMINI], None, {}, "<html>", {**GEMINI, "usageMetadata": None}, {**GEMINI, "candidates": None},
        {**GEMINI, "candidates": [None]}, {**GEMINI, "candidates": []}, {**GEMINI, "candidates": [SAID, SAID]},
        *[{**GEMINI, "usageMetadata": {**COUNTS, "candidatesTokenCount": each}} for each in ODD],
        {"candidates": [SAID]},
        {**GEMINI, "candidates": [None], "usageMetadata": {**COUNTS, "thoughtsTokenCount": 20}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dialect", BROKEN)
def test_a_broken_answer_ends_alike_on_both_engines(server: Server, dialect: str, way: str) -> None:
    """LiteLLM said 400 for a usage that Gemini did not tell, which cost nothing: the budget held nothing up.

    What it stumbled over in Anthropic's was paid three times, at the bound.
    """
    for broken in BROKEN[dialect]:
        server.body = json.dumps(broken).encode() if broken != "<html>" else b"<html>"
        ends = []
        for engine in ("lm15", "litellm"):
            lm = lm_at(server.url, dialect, engine)
            ends.append(end(lm, ask(lm, way)))
            lm.close()
        assert ends[0] == ends[1], broken
        assert all(cost >= TOLD for _, cost, _ in ends[0][1:]), broken


@pytest.mark.parametrize("broken", [b"[1]", b"null"], ids=["list", "null"])
@pytest.mark.parametrize("dialect", MODELS)
def test_what_was_completed_is_paid_once_whatever_the_dialect(
    server: Server, serve: MakeProvider, dialect: str, broken: bytes
) -> None:
    """Cohere's and Bedrock's cost nothing, for LiteLLM said 400; Azure's and others' were asked for three times."""
    server.body = broken
    lm = lm_at(server.url, dialect, fallbacks=[spare(serve)])
    assert ask(lm) == ["ok"]
    assert server.requests == 1
    first, second = records(lm)
    assert (first.outcome, first.estimated, second.outcome) == ("error", True, "ok")
    assert (first.cost_nano or 0) > TOLD
    lm.close()


def spare(serve: MakeProvider) -> Any:
    """Another model, elsewhere."""
    price = {CHEAP: Price(input=1, output=2)}
    return dspy_prod.LM(CHEAP, api_base=serve().url, api_key="a-key", prices=price, cache=False, store=fresh_memory())


def test_a_budget_holds_when_no_usage_is_told(server: Server) -> None:
    """Twenty answers were billed, and a budget for two was not touched."""
    server.body = dumps({"candidates": [SAID]})
    lm = lm_at(server.url, "gemini", budget=Budget(usd=0.000_5), retry=False)
    said = [ask(lm) for _ in range(20)]
    assert said[0] == ["hello"]
    assert isinstance(said[-1], dspy_prod.BudgetExceededError)
    assert server.requests < 10
    lm.close()


@pytest.mark.parametrize(("dialect", "told"), [("ollama", {}), ("ollama-chat", {"eval_count": 7})])
def test_a_usage_that_litellm_counted_itself_is_not_believed(server: Server, dialect: str, told: Any) -> None:
    """Ollama leaves the input out where it had it in its cache; what LiteLLM then counts may be below the bill."""
    said = {"message": {"role": "assistant", "content": "hello"}} if told else {"response": "hello"}
    server.body = dumps({"model": "any", "created_at": "", "done": True, "done_reason": "stop", **said, **told})
    lm = lm_at(server.url, dialect)
    assert ask(lm) == ["hello"]
    [record] = records(lm)
    assert record.estimated
    lm.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dialect", ["ollama-chat", "mistral"])
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_what_cannot_be_read_is_charged_as_told_whatever_the_dialect(server: Server, dialect: str, way: str) -> None:
    """Of Ollama's, which the native engine does not speak, the usage was known, and lost: the bound was charged."""
    said = {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": {"name": "", "arguments": {}}}]}
    whole = {"model": "any", "created_at": "", "done": True, "done_reason": "stop", "message": said}
    server.body = dumps({**whole, "prompt_eval_count": 11, "eval_count": 7})
    if dialect == "mistral":
        tool = {"id": "a", "type": "function", "function": {"name": "", "arguments": "{}"}}
        server.body = dumps(body(lambda _, __, message: message.update(content="", tool_calls=[tool])))
    lm = lm_at(server.url, dialect)
    error = ask(lm, way)
    assert isinstance(error, Exception)
    assert [(each.outcome, each.cost_nano, each.estimated) for each in records(lm)] == [("error", TOLD, False)]
    assert (records(lm)[0].input_tokens, records(lm)[0].output_tokens) == (11, 7)
    lm.close()


@pytest.mark.parametrize("way", WAYS)
def test_of_a_request_that_is_refused_nothing_is_owed(serve: MakeProvider, connect: MakeLM, way: str) -> None:
    """What was answered before it says nothing about it."""
    lm = connect(serve(faults=[None, Verbatim(body(), status=400)]), engine="litellm")
    assert ask(lm, way) == ["ok"]
    assert isinstance(ask(lm, way), Exception)
    answered, refused = records(lm)
    assert answered.cost_nano
    assert (refused.outcome, refused.cost_nano, refused.estimated) == ("error", 0, False)


@pytest.mark.parametrize("model", ["cohere/any", "openai/any", "gemini/any"])
def test_vectors_that_cannot_be_read_are_owed_once(server: Server, model: str) -> None:
    """The same of what embeds texts."""
    server.body = b"[1]"
    embedder = dspy_prod.Embedder(
        model, api_base=server.url, api_key="a-key", store=fresh_memory(), caching=False, retry=QUICK,
        prices={model: Price(input=1, output=0)}, budget=Budget(usd=100),
    )  # fmt: skip
    with pytest.raises(LMError):
        embedder("a text")
    [record] = records(embedder)
    assert server.requests == 1
    assert (record.outcome, record.estimated, bool(record.cost_nano)) == ("error", True, True)


TEXT: dict[str, Any] = {
    "id": "c", "object": "text_completion", "created": 1, "model": "any",
    "choices": [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_counter_elsewhere_in_a_text_completion_says_nothing_against_its_usage(server: Server, way: str) -> None:
    """Whatever is called so and is no number made the whole usage unbelievable."""
    for answer, known in [
        (TEXT, True), *[({**TEXT, "completion_tokens": each}, True) for each in ODD],
        *[({**TEXT, "usage": {**TEXT["usage"], "completion_tokens": each}}, False) for each in ODD],
        ({**TEXT, "completion_tokens": True, "usage": None}, False),
    ]:  # fmt: skip
        server.body = dumps(answer)
        lm = lm_at(server.url, "text")
        ask(lm, way)
        booked = records(lm)[-1]
        assert (booked.cost_nano == TOLD, booked.estimated) == (known, not known), answer
        lm.close()


CALLED = {
    "content": {"parts": [{"functionCall": {"name": "look", "args": {}}}], "role": "model"},
    "finishReason": "STOP",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_counter_elsewhere_says_nothing_against_the_usage_of_a_tool_that_nobody_gave(
    server: Server, way: str
) -> None:
    """By way of one LiteLLM asks for texts, so its reading is delivered; the native one tells the usage of it."""
    for answer, known in [
        ({"candidates": [CALLED], "usageMetadata": COUNTS, "input_tokens": True}, True),
        ({"candidates": [CALLED], "usageMetadata": {**COUNTS, "candidatesTokenCount": True}}, False),
    ]:
        server.body = dumps(answer)
        lm = lm_at(server.url, "gemini")
        ask(lm, way)
        booked = records(lm)[-1]
        assert (booked.cost_nano == TOLD, booked.estimated) == (known, not known), answer
        lm.close()
