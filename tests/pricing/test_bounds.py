"""No tokenizer, template or setting gets more tokens out of a request than its bounds say."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dspy._vendor.lm15.providers.anthropic import _max_tokens_for_anthropic, _reasoning_thinking_budget
from dspy._vendor.lm15.providers.common import EFFORT_THINKING_BUDGETS
from dspy._vendor.lm15.types import (
    AudioPart,
    BinaryPart,
    CacheConfig,
    CitationPart,
    ContinuationState,
    DataPart,
    DocumentPart,
    Reasoning,
    RefusalPart,
    TextPart,
    ThinkingPart,
    VideoPart,
    tool_call,
)
from dspy.lm15 import BuiltinTool, Config, FunctionTool, LMRouter, Message, Request, RouterConfig
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dspy_prod.pricing import bounds
from dspy_prod.pricing.bounds import hosted_fees, input_bound, output_bound
from dspy_prod.pricing.media import census

Counter = Callable[[str], int]


def _request(*messages: Message | str, model: str = "openai/gpt-4o-mini", **fields: Any) -> Request:
    parts = tuple(Message.user(m) if isinstance(m, str) else m for m in messages)
    return Request(model=model, messages=parts or (Message.user("hi"),), **fields)


def _bound(*messages: Message | str, **fields: Any) -> int:
    found = input_bound(_request(*messages, **fields), max_input_tokens=None)
    assert found is not None
    return found


# -- real tokenizers, from files that LiteLLM carries: no network -------------------------------------------------

_ENCODINGS = {"cl100k_base": "encodings/cl100k_base.tiktoken", "o200k_base": "encodings/o200k_base.tiktoken"}


def _tokenizers_folder() -> Path:
    spec = importlib.util.find_spec("litellm")  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("litellm, whose tokenizer files are used, is not installed")
    return Path(spec.submodule_search_locations[0]) / "litellm_core_utils" / "tokenizers"


def _tiktoken(name: str, monkeypatch: pytest.MonkeyPatch) -> Counter:
    tiktoken, folder = pytest.importorskip("tiktoken"), _tokenizers_folder()
    url = "https://openaipublic.blob.core.windows.net/" + _ENCODINGS[name]
    if not (folder / hashlib.sha1(url.encode()).hexdigest()).exists():
        pytest.skip(f"{name} is not among LiteLLM's tokenizer files")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    encoding = tiktoken.get_encoding(name)
    return lambda text: len(encoding.encode_ordinary(text))


def _claude() -> Counter:
    tokenizers, path = pytest.importorskip("tokenizers"), _tokenizers_folder() / "anthropic_tokenizer.json"
    if not path.exists():
        pytest.skip("Claude's tokenizer is not among LiteLLM's files")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text).ids)


@pytest.fixture(scope="module")
def counters() -> dict[str, Counter]:
    """Tokens of a text by GPT-4's, GPT-4o's and Claude 2's tokenizers."""
    with pytest.MonkeyPatch.context() as patch:
        found = {name: _tiktoken(name, patch) for name in _ENCODINGS}
    return {**found, "claude": _claude()}


CODE = Path(bounds.__file__).read_text()
TEXTS = {
    "empty": "",
    "english": "The quick brown fox jumps over the lazy dog. " * 40,
    "code": CODE,
    "minified": "".join(CODE.split()),
    "spaces": " " * 3000,
    "tabs and newlines": "\t\n\r\n \n" * 500,
    "single letters": " a b c d e f" * 200,
    "digits": "".join(str(i * 7919) for i in range(500)),
    "punctuation": "!@#$%^&*()_+{}|:<>?~`-=[]\\;',./" * 60,
    "random bytes in base64": hashlib.sha512(b"x").hexdigest() * 10,
    "control characters": "".join(map(chr, range(32))) * 20,
    "german": "Fußgängerübergänge müßten größer sein. " * 30,
    "chinese": "限流器和熔断器保护上游服务。" * 40,
    "japanese": "予算を超える呼び出しは拒否されます。" * 40,
    "korean": "예산을 초과하는 호출은 거부됩니다." * 40,
    "arabic": "يجب ألا تتجاوز الميزانية أبدًا. " * 40,
    "arabic ligature that NFKC turns into eighteen letters": "\ufdfa" * 200,
    "compatibility forms": "ﬃ㍿㎉½™①ａｂｃ" * 50,
    "hindi": "बजट कभी पार नहीं होना चाहिए। " * 40,
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏿" * 60,
    "combining marks": "e\u0301\u0323\u0302" * 200,
    "rare scripts": "𓀀𒀀𐤀ꙮ᚛ᚑ" * 80,
    "noncharacters": "\ufffe\uffff\U0010ffff\x00" * 100,
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_messages_bound_dominates_every_tokenizer(name: str, counters: dict[str, Counter]) -> None:
    """With 5 tokens of template around each message and 80 of a default system prompt on top."""
    text = TEXTS[name]
    request = _request(Message.developer(text), Message.user([TextPart(text), TextPart(text)]), system=text or None)
    bound = input_bound(request, max_input_tokens=None)
    assert bound is not None
    for count in counters.values():
        assert count(text) * 4 + 3 * 5 + 80 <= bound


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=200))
@example(text="\u0958\u0344\U0001d160\ufdfa")
def test_no_text_has_more_tokens_than_its_bytes(text: str, counters: dict[str, Counter]) -> None:
    """The fact that everything here stands on, normalization included."""
    for count in counters.values():
        assert count(text) <= bounds._bytes(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(value=json_values)
@example(value=[1, 2, 3, 4, 5, 6, 7, 8, 9])
@example(value={"é": "ü" * 20, "": 2**70, "\x00": 1e300})
@example(value="\x7f")
@example(value=[1e16, 1e-7, -1e22])
def test_a_json_value_is_bounded_in_every_usual_rendering(value: Any, counters: dict[str, Counter]) -> None:
    """Compact or spaced, non-ASCII escaped or not: providers differ in what they show to the model."""
    bound = bounds._json(value)
    for ascii_only in (False, True):
        for separators in ((",", ":"), (", ", ": ")):
            shown = json.dumps(value, ensure_ascii=ascii_only, separators=separators)
            assert len(shown.encode("utf-8", "surrogatepass")) <= bound  # a tokenizer may see each byte alone
            for count in counters.values():
                assert count(shown) <= bound


def _typescript(tool: FunctionTool) -> str:
    """A tool as OpenAI is known to show it: a TypeScript type in a namespace (github.com/hmarr/openai-chat-tokens)."""
    lines = [f"// {tool.description}", f"type {tool.name} = (_: {{"]
    for name, schema in tool.parameters["properties"].items():
        lines += [f"// {schema['description']}", f"{name}?: {schema['type']},"]
    return "\n".join(
        ["# Tools", "## functions", "namespace functions {", *lines, "}) => any;", "} // namespace functions"]
    )


@pytest.mark.parametrize("words", ["weather", "天気予報", "погода"])
def test_a_tools_bound_dominates_its_definition_in_any_form(words: str, counters: dict[str, Counter]) -> None:
    """As JSON, pretty-printed JSON or TypeScript, beside Anthropic's preamble of some 530 tokens."""
    properties = {f"p{i}": {"type": "string", "description": f"{words} {i}"} for i in range(12)}
    tool = FunctionTool("forecast", f"The {words} of a city", {"type": "object", "properties": properties})
    definition = {"name": tool.name, "description": tool.description, "input_schema": tool.parameters}
    added = _bound(tools=(tool,)) - _bound()
    for count in counters.values():
        for shown in (json.dumps(definition), json.dumps(definition, indent=2), _typescript(tool)):
            assert count(shown) + 530 <= added


def test_a_conversation_with_tools_dominates_every_tokenizer(counters: dict[str, Counter]) -> None:
    """Calls with arguments quoted as JSON in JSON, and results quoted as JSON strings with their newlines escaped."""
    arguments = {"path": 'C:\\temp\\"x"', "text": 'a "quoted" line\n' * 30, "ü": "ß" * 40}
    result = 'line "one"\n\n\n\tüber\\x ' * 60
    call = Message.assistant([ThinkingPart("hm " * 50), tool_call("call_1", "write", arguments)])
    added = _bound("go", call, Message.tool("call_1", result)) - _bound("go")
    shown = [
        "hm " * 50,
        json.dumps({"id": "call_1", "name": "write", "arguments": json.dumps(arguments)}),
        json.dumps({"id": "call_1", "name": "write", "content": result}),
    ]
    for count in counters.values():
        assert sum(count(text) + 5 for text in shown) <= added


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
@example(text="\x01" * 50)
@example(text='"\\' * 50)
def test_tool_calls_and_results_cover_their_quoted_forms(text: str) -> None:
    """Byte for byte: arguments as JSON within a JSON string, results as a JSON string, escaped to ASCII or not."""
    call = Message.assistant([tool_call("c", "t", {"a": text})])
    result = Message.tool("c", text)
    for ascii_only in (False, True):
        quoted = json.dumps(json.dumps({"a": text}, ensure_ascii=ascii_only), ensure_ascii=ascii_only)
        assert _bound("go", call) - _bound("go") >= len(quoted.encode())
        quoted = json.dumps(text, ensure_ascii=ascii_only)
        assert _bound("go", result) - _bound("go") >= len(quoted.encode())


# -- what is counted ----------------------------------------------------------------------------------------------


def test_plain_text_is_its_bytes_and_fixed_overheads() -> None:
    """By hand: 128 for the prompt, 8 a message, 4 a part; the system prompt is a message."""
    assert _bound("hello") == 128 + 8 + 4 + 5
    assert _bound("hello", "straße", system="be brief") == 128 + (8 + 4 + 5) + (8 + 4 + 7) + (8 + 8)
    assert _bound(Message.user([TextPart("a"), TextPart("b")])) == 128 + 8 + 4 + 1 + 4 + 1
    assert _bound("x", system=(TextPart("ü"),)) == 128 + 8 + 4 + 1 + 8 + 4 + 2


@pytest.mark.parametrize(
    ("message", "marks"),
    [
        (Message.assistant([ThinkingPart("T" * 500)]), 500),
        (Message.assistant([RefusalPart("R" * 500)]), 500),
        (Message.assistant([CitationPart(url="u" * 100, title="t" * 100, text="x" * 300)]), 500),
        (Message.assistant([DataPart({"k": "v" * 500})]), 500),
        (Message.assistant([tool_call("i", "n", {"a": "v" * 500})]), 500),
        (Message.tool("id", "r" * 500), 500),
        (Message.assistant([TextPart("", continuation=(ContinuationState("openai", "k", {"e": "s" * 500}),))]), 500),
        (Message("assistant", (TextPart(""),), (ContinuationState("gemini", "k", {"e": "s" * 500}),)), 500),
    ],
    ids=["thinking", "refusal", "citation", "data", "call", "result", "part state", "message state"],
)
def test_every_kind_of_part_counts(message: Message, marks: int) -> None:
    """What is replayed to the provider is billed again, whichever part carries it."""
    assert _bound("go", message) - _bound("go") >= marks


def test_a_schema_and_provider_native_settings_count() -> None:
    """A response format is shown to the model; so may be any extension."""
    schema = {"type": "json_schema", "schema": {"type": "object", "description": "d" * 700}}
    assert _bound(config=Config(response_format=schema)) - _bound() >= 700 + bounds.PER_TOOLS
    assert _bound(config=Config(extensions={"instructions": "x" * 700})) - _bound() >= 700


DIALECTS = ("openai:gpt-5", "openai-chat:gpt-4o", "anthropic:claude-sonnet-4-5", "gemini:gemini-2.5-pro", "xai:grok-4")


@pytest.mark.parametrize("target", DIALECTS)
def test_what_dspy_really_sends_is_within_the_bound(target: str, counters: dict[str, Counter]) -> None:
    """The whole HTTP body, JSON syntax and all, has fewer tokens than the bound of its request."""
    tool = FunctionTool("lookup", "Looks it up", {"type": "object", "properties": {"q": {"type": "string"}}})
    request = Request(
        model=target.partition(":")[2],
        system="Be brief. " * 10,
        messages=(
            Message.user("Wo liegt Köln? " * 20),
            Message.assistant([tool_call("call_1", "lookup", {"q": "Köln"})]),
            Message.tool("call_1", "am Rhein\n" * 20),
        ),
        tools=(tool,),
        config=Config(max_tokens=100, response_format={"type": "json_schema", "schema": tool.parameters, "name": "s"}),
    )
    keys = dict.fromkeys(("openai", "openai-chat", "anthropic", "gemini", "xai"), "k")
    with LMRouter(RouterConfig(api_keys=keys)) as router:
        sent = router.lm(target).build_request(request, False)
    body = sent.body.decode() if isinstance(sent.body, bytes) else json.dumps(sent.body)
    assert "am Rhein" in body
    bound = input_bound(request, max_input_tokens=None)
    assert bound is not None
    for count in counters.values():
        assert count(body) <= bound


def test_grok_is_allowed_its_hidden_prompt() -> None:
    """xAI bills a prompt of its own with the user's, also through a gateway."""
    assert _bound(model="xai/grok-4") - _bound() == bounds.PER_HIDDEN_PROMPT
    assert _bound(model="openrouter/x-ai/grok-4") - _bound() == bounds.PER_HIDDEN_PROMPT
    assert _bound(model="groq/llama-3.3-70b") == _bound()


@pytest.mark.parametrize("text", ["\ud800", "a\udfff" * 50, "é\ud83d"])
def test_lone_surrogates_are_bounded_not_raised(text: str) -> None:
    """Broken text from elsewhere must fail at the provider if anywhere, not in accounting."""
    assert _bound(text) >= 3
    assert _bound("go", Message.tool("id", text), tools=(FunctionTool("t", text),)) > 0


# -- limits, media and what only the server knows -----------------------------------------------------------------


def test_the_context_limit_caps_the_bound() -> None:
    """A provider refuses what is longer, so more can never be billed."""
    request = _request("x" * 10_000)
    assert input_bound(request, max_input_tokens=8_000) == 8_000
    assert input_bound(request, max_input_tokens=1_000_000) == 128 + 8 + 4 + 10_000


@pytest.mark.parametrize(
    "request_",
    [
        _request(Message.user([AudioPart(url="https://x/y.mp3")])),
        _request(Message.user([VideoPart(url="https://x/y")])),
        _request(Message.user([DocumentPart(data="aGk=")])),
        _request(Message.user([BinaryPart(data="aGk=")])),
        _request("go", Message.tool({"id": [TextPart("see"), DocumentPart(url="https://x/y.pdf")]})),
        _request(system=(TextPart("see"), AudioPart(file_id="f"))),
    ],
    ids=["audio", "video", "document", "binary", "in a tool result", "in the system prompt"],
)
def test_media_of_unknown_length_stand_for_the_whole_context(request_: Request) -> None:
    """Nothing tells how long they are; without a known context limit there is no bound."""
    assert census(request_) != (0, False)
    assert input_bound(request_, max_input_tokens=128_000) == 128_000
    assert input_bound(request_, max_input_tokens=None) is None


@pytest.mark.parametrize(
    "config",
    [
        Config(extensions={"previous_response_id": "r"}),
        Config(extensions={"conversation": "c"}),
        Config(extensions={"cachedContent": "c"}),
        Config(cache=CacheConfig(resource="cachedContents/1")),
    ],
)
def test_context_kept_by_the_server_stands_for_the_whole_context(config: Config) -> None:
    """The request names it but does not show it."""
    request = _request(config=config)
    assert census(request) == (0, False)
    assert input_bound(request, max_input_tokens=128_000) == 128_000
    assert input_bound(request, max_input_tokens=None) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": (BuiltinTool("web_search"),)},
        {"tools": (FunctionTool("own"), BuiltinTool("code_interpreter"))},
        {"config": Config(extensions={"web_search_options": {}})},
        {"config": Config(extensions={"plugins": [{"id": "web"}]})},
        {"config": Config(extensions={"speed": "fast"})},
        {"config": Config(extensions={"models": ["openai/gpt-5-pro"]})},
    ],
)
def test_what_is_billed_apart_from_tokens_has_no_bound(fields: dict[str, Any]) -> None:
    """Hosted tools, searches, fast modes and a model chosen elsewhere: no number of tokens tells the bill."""
    request = _request(**fields)
    assert hosted_fees(request)
    assert input_bound(request, max_input_tokens=128_000) is None


def test_plain_requests_have_neither_fees_nor_media() -> None:
    """Function tools, results in text and harmless extensions included."""
    request = _request(
        "go", Message.tool("id", "r"), system="s", tools=(FunctionTool("t"),), config=Config(extensions={"seed": 1})
    )
    assert not hosted_fees(request)
    assert census(request) == (0, False)


def test_measured_probabilities_have_no_bound() -> None:
    """lm15 measures them by sending the prompt once per step of every key."""
    assert input_bound(_request(config=Config(probabilities="required")), max_input_tokens=9) is None
    assert input_bound(_request(config=Config(probabilities="off")), max_input_tokens=9) == 9


# -- output -------------------------------------------------------------------------------------------------------


def _output(limit: int | None = None, model: str = "openai/gpt-4o-mini", **config: Any) -> int | None:
    return output_bound(_request(model=model, config=Config(**config)), max_output_tokens=limit)


def test_an_explicit_max_tokens_bounds_the_output() -> None:
    """As asked, even above the limit the metadata states: that may be out of date, and the bill follows the wire."""
    assert _output(16_384, max_tokens=500) == 500
    assert _output(None, max_tokens=500) == 500
    assert _output(16_384, max_tokens=100_000) == 100_000
    assert _output(16_384, max_tokens=500, reasoning=Reasoning("high")) == 500  # OpenAI counts reasoning within


def test_without_max_tokens_the_models_own_limit_bounds_the_output() -> None:
    """And without either there is no bound."""
    assert _output(16_384) == 16_384
    assert _output(None) is None
    assert _output(64_000, model="anthropic/claude-sonnet-4-5", reasoning=Reasoning("max")) == 64_000


@pytest.mark.parametrize("effort", [*EFFORT_THINKING_BUDGETS, "off"])
def test_a_thinking_budget_adds_to_claudes_max_tokens_as_on_the_wire(effort: Any) -> None:
    """For the models before adaptive thinking lm15 sends budget + max_tokens as the limit; so does the bound."""
    for model in ("anthropic/claude-sonnet-4-5", "claude-3-7-sonnet", "moonshotai-anthropic:kimi-k2"):
        request = _request(model=model, config=Config(max_tokens=700, reasoning=Reasoning(effort)))
        wire = _max_tokens_for_anthropic(request, _reasoning_thinking_budget(request))
        assert output_bound(request, max_output_tokens=None) == wire


def test_an_explicit_thinking_budget_counts_as_given() -> None:
    """It replaces the one that the effort stands for."""
    reasoning = Reasoning("low", thinking_budget=30_000)
    assert _output(max_tokens=700, model="anthropic/claude-sonnet-4-5", reasoning=reasoning) == 30_700


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        ({"max_tokens": 100, "extensions": {"max_completion_tokens": 900}}, 900),
        ({"max_tokens": 900, "extensions": {"max_tokens": 100}}, 900),
        ({"extensions": {"max_output_tokens": 900}}, 900),
        ({"max_tokens": 100, "extensions": {"n": 4}}, 400),
        ({"extensions": {"n": 2}}, 2_000),
        ({"max_tokens": 100, "extensions": {"generationConfig": {"maxOutputTokens": 700, "candidateCount": 2}}}, 1_400),
        ({"max_tokens": 100, "extensions": {"generationConfig": {"temperature": 0}}}, 1_000),
        ({"max_tokens": 100, "extensions": {"generationConfig": "odd", "n": "odd"}}, 100),
    ],
)
def test_provider_native_settings_that_raise_the_output_raise_the_bound(config: dict[str, Any], bound: int) -> None:
    """Extensions go to the wire verbatim, over what the canonical request says."""
    assert _output(1_000, **config) == bound


# -- speed --------------------------------------------------------------------------------------------------------


def test_bounding_stays_off_the_profile() -> None:
    """About 0.5 µs for two messages and 2 KB here; the limit leaves room for a slow or busy machine."""
    request = _request("x" * 1000, "y" * 1000, config=Config(max_tokens=500))
    request = dataclasses.replace(request, system="z" * 200)
    for call, limit in (
        (lambda: input_bound(request, max_input_tokens=128_000), 5e-6),
        (lambda: output_bound(request, max_output_tokens=16_384), 2e-6),
    ):
        assert min(timeit.repeat(call, number=2000, repeat=15)) / 2000 < limit
