"""Every way to spell a model that LiteLLM prices is priced here, and never below it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import dspy
import pytest
from dspy.lm15 import Message, Response, Usage

import dspy_prod
from dspy_prod import Budget, Price, UnpricedModelError
from dspy_prod.pricing.book import PriceBook
from dspy_prod.pricing.lookup import resolve
from dspy_prod.testing import Provider, ScriptedEngine

BOOK = PriceBook()
USAGE = Usage(input_tokens=1000, output_tokens=100)

SONNET = "anthropic.claude-sonnet-4-5-20250929-v1:0"
HAIKU = "anthropic.claude-3-5-haiku-20241022-v1:0"


def _nano(model: str, provider: str | None = None) -> int | None:
    rates = BOOK.rates(model, provider)
    return None if rates is None else rates.cost(USAGE)


@pytest.mark.parametrize(
    ("spelled", "plain"),
    [
        (f"bedrock/converse/us.{SONNET}", f"bedrock/us.{SONNET}"),
        (f"bedrock/invoke/us.{SONNET}", f"bedrock/us.{SONNET}"),
        (f"bedrock/converse_like/{HAIKU}", f"bedrock/{HAIKU}"),
        (f"bedrock/us-west-2/{HAIKU}", f"bedrock/{HAIKU}"),
        (f"bedrock/us-gov-west-1/us.{SONNET}", f"bedrock/us.{SONNET}"),
        (f"bedrock/converse/eu-central-1/{HAIKU}", f"bedrock/{HAIKU}"),
        (f"bedrock/{HAIKU}:48k", f"bedrock/{HAIKU}"),
        (f"bedrock/us-gov.{HAIKU}", f"bedrock/us.{HAIKU}"),
        (f"bedrock/ca.{SONNET}", f"bedrock/us.{SONNET}"),
        (f"bedrock/arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.{SONNET}", f"bedrock/us.{SONNET}"),
        (f"bedrock/converse/arn:aws:bedrock:eu-west-1::foundation-model/{HAIKU}", f"bedrock/{HAIKU}"),
        ("fireworks_ai/llama-v3p1-8b-instruct", "fireworks_ai/accounts/fireworks/models/llama-v3p1-8b-instruct"),
        ("fireworks_ai/deepseek-v3", "fireworks_ai/accounts/fireworks/models/deepseek-v3"),
        ("openai/responses/gpt-5", "openai/gpt-5"),
        ("azure/responses/gpt-5", "azure/gpt-5"),
        ("openai/ft:gpt-4o-mini-2024-07-18:acme:summaries:abc123", "openai/ft:gpt-4o-mini-2024-07-18"),
        ("openai/ft:gpt-4o-mini-2024-07-18:acme::abc123", "openai/ft:gpt-4o-mini-2024-07-18"),
        ("azure/gpt-4o-mini-2031-01-01", "azure/gpt-4o-mini"),
        ("vertex_ai/gemini-2.5-flash-001", "vertex_ai/gemini-2.5-flash"),
    ],
)
def test_a_model_costs_the_same_however_it_is_spelled(spelled: str, plain: str) -> None:
    """Routes, regions, ARNs, fine-tunes and short names were unknown, and refused under a budget."""
    assert _nano(plain)
    assert _nano(spelled) == _nano(plain)
    rates = BOOK.rates(spelled)
    assert rates is not None
    assert rates.max_output_tokens


def test_vertex_lists_its_older_models_apart() -> None:
    """Under a namespace of their own, without the prefix."""
    assert _nano("vertex_ai/text-unicorn") == 1000 * 10_000 + 100 * 28_000


def test_a_fireworks_model_that_is_not_listed_costs_what_its_size_does() -> None:
    """Fireworks prices by parameters; where nothing tells them, nothing is known (LiteLLM: free)."""
    assert _nano("fireworks_ai/acme-3b") == _nano("fireworks_ai/fireworks-ai-up-to-4b")
    assert _nano("fireworks_ai/acme-13b") == _nano("fireworks_ai/fireworks-ai-4.1b-to-16b")
    assert _nano("fireworks_ai/acme-70b") == _nano("fireworks_ai/fireworks-ai-above-16b")
    assert _nano("fireworks_ai/acme-8x7b") == _nano("fireworks_ai/fireworks-ai-moe-up-to-56b")
    assert _nano("fireworks_ai/acme-8x22b") == _nano("fireworks_ai/fireworks-ai-56b-to-176b")
    assert _nano("fireworks_ai/acme") is None


@pytest.mark.parametrize(
    "model",
    [
        "bedrock/arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/a1b2c3",
        "bedrock/converse/never-heard-of",
        "bedrock/",
        "bedrock/converse/",
        "azure/my-deployment",
        "openai/ft:never-heard-of:acme::1",
    ],
)
def test_a_name_that_tells_no_model_is_unknown(model: str) -> None:
    """And never taken for something like it."""
    assert BOOK.rates(model) is None


@pytest.mark.parametrize(
    ("tokens", "per_input", "per_output"),
    [
        (1000, 1200, 6000),
        (32_000, 1200, 6000),
        (32_001, 2400, 12_000),
        (128_001, 3000, 15_000),
        (999_999, 3000, 15_000),
    ],
)
def test_prices_in_bands_of_the_whole_input(tokens: int, per_input: int, per_output: int) -> None:
    """dashscope/qwen3-max: all tokens at the rate of the band the input falls into, the last one without an end."""
    rates = BOOK.rates("dashscope/qwen3-max")
    assert rates is not None
    assert rates.cost(Usage(input_tokens=tokens, output_tokens=100)) == tokens * per_input + 100 * per_output
    assert rates.bound(tokens, 100) == tokens * per_input + 100 * per_output
    cached = Usage(input_tokens=tokens, output_tokens=0, cache_read_tokens=500)
    assert rates.cost(cached) == tokens * per_input  # a band that lists no cached rate has none


def test_the_model_that_answered_is_priced_where_the_name_that_was_asked_is_unknown() -> None:
    """`azure/my-deployment` says nothing; its answers say gpt-4o-mini."""
    for provider in (resolve("azure/my-deployment")[0], None, "litellm", "azure-chat"):
        rates = BOOK.served("azure/my-deployment", provider, "gpt-4o-mini-2024-07-18")
        assert rates is not None
        response = Response(
            id=None, model="gpt-4o-mini-2024-07-18", message=Message.assistant("x"), finish_reason="stop", usage=USAGE
        )
        assert BOOK.price_response(rates, response, None) == _nano("azure/gpt-4o-mini-2024-07-18") == 210_000
    assert BOOK.served("azure/my-deployment", None, "my-deployment") is None
    assert BOOK.served("lm_studio/x", None, "x") is None


def test_calls_of_a_deployment_are_recorded_with_the_price_of_its_model() -> None:
    """They had no cost at all; under a budget they are refused before the first, since nothing tells what it costs."""
    response = Response(
        id=None, model="gpt-4o-mini-2024-07-18", message=Message.assistant("x"), finish_reason="stop", usage=USAGE
    )
    lm = dspy_prod.LM("azure/my-deployment", engine=ScriptedEngine(response), cache=False, store="memory://deployment")
    assert lm("q") == ["x"]
    assert [record.cost_nano for record in lm.ledger.records()] == [210_000]
    lm = lm.copy(budget=Budget(usd=1, name="deployment"))
    with pytest.raises(UnpricedModelError, match=r"pass prices=.*base_model='azure/gpt-4o-mini'"):
        lm("q")


@pytest.mark.parametrize(
    "said",
    [
        {"base_model": "azure/gpt-4o-mini"},
        {"base_model": "gpt-4o-mini"},
        {"model_info": {"base_model": "azure/gpt-4o-mini"}},
    ],
)
def test_a_deployment_may_say_which_model_it_is(said: dict[str, Any]) -> None:
    """As LiteLLM takes it: then its calls are bounded before they are sent, and a budget admits them."""
    lm = dspy_prod.LM(
        "azure/my-deployment", api_key="k", api_base="http://127.0.0.1:1", max_tokens=100, cache=False,
        store="memory://said", budget=Budget(usd=1), **said,
    )  # fmt: skip
    seen = lm.preview("q")
    assert (seen.reason, seen.affordable) == (None, True)
    like = dspy_prod.LM("azure/gpt-4o-mini", max_tokens=100, cache=False, store="memory://said")
    assert seen.bound_usd == like.preview("q").bound_usd


def test_a_call_costs_what_the_model_it_is_said_to_be_costs() -> None:
    """In the ledger, and in plain DSPy's history."""
    with Provider() as provider:
        given: dict[str, Any] = {"api_base": provider.url, "api_key": "k", "max_tokens": 100, "cache": False}
        given["base_model"] = "openai/gpt-4o-mini"
        plain = dspy.LM("openai/my-own-model", **given)
        lm = dspy_prod.LM("openai/my-own-model", **given, store="memory://really", budget=Budget(usd=1))
        assert plain("q") == lm("q")
        cost = plain.history[-1]["cost"]
        assert cost
        assert [record.cost_usd for record in lm.ledger.records()] == [lm.history[-1]["cost"]] == [cost]


def test_what_a_deployment_is_said_to_be_yields_to_a_price_and_to_a_name_that_is_known() -> None:
    book = PriceBook({"azure/mine": Price(input=1, output=2)})
    mine = book.rates("azure/mine", None, "azure/gpt-4o-mini")
    assert mine is not None
    assert mine.cost(Usage(input_tokens=1, output_tokens=1)) == 3_000
    assert mine.max_output_tokens == 16_384
    known = book.rates("azure/gpt-4o-mini", None, "azure/no-such-model")
    assert known is not None
    assert known.cost(USAGE) == _nano("azure/gpt-4o-mini")


def test_looking_up_imports_no_litellm() -> None:
    """LiteLLM's names are read by their form; importing it takes seconds."""
    code = (
        "import sys\nfrom dspy_prod.pricing.book import PriceBook\n"
        "assert PriceBook().rates('bedrock/converse/us.anthropic.claude-sonnet-4-5-20250929-v1:0')\n"
        "assert 'litellm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
