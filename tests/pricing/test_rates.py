"""Prices agree with DSPy to the nano-USD, are never guessed, and never exceed their bound."""

from __future__ import annotations

import functools
import gzip
import json
import math
import subprocess
import sys
import threading
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import pytest
from dspy._vendor.lm15.registry import PROVIDERS
from dspy.clients import costs, model_metadata
from dspy.lm15 import BuiltinTool, CacheConfig, Config, FunctionTool, ImagePart, Message, Request, Response, Usage
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_prod.options import Price
from dspy_prod.pricing import lookup
from dspy_prod.pricing.book import PriceBook
from dspy_prod.pricing.rates import Rates
from dspy_prod.pricing.regions import region_of
from tests.logged import logged
from tests.stores.support import FakeClock

BOOK = PriceBook()
NANO = 10**9


def _rates(model: str, provider: str | None = None, book: PriceBook = BOOK) -> Rates:
    rates = book.rates(model, provider)
    assert rates is not None
    return rates


def _request(model: str = "m", **config: Any) -> Request:
    return Request(model=model, messages=(Message.user("hi"),), config=Config(**config))


def _response(
    usage: Usage, model: str = "m", provider_data: dict[str, Any] | None = None, parts: Any = "x"
) -> Response:
    return Response(
        id=None,
        model=model,
        message=Message.assistant(parts),
        finish_reason="stop",
        usage=usage,
        provider_data=provider_data,
    )


# -- by hand ------------------------------------------------------------------------------------------------------


def test_plain_usage_costs_what_the_price_list_says() -> None:
    """gpt-4o-mini: $0.15 and $0.60 per million, so 1000 in and 300 out are 330,000 nano-USD."""
    assert _rates("openai/gpt-4o-mini").cost(Usage(input_tokens=1000, output_tokens=300)) == 330_000


def test_sound_costs_as_much_more_than_text_at_every_tier() -> None:
    """gemini-2.5-flash lists no flex rate of sound: 600 tokens of it were billed as 600 of text, 275,000 in all.

    400 of text at 150, 600 of sound at 500, which is to 150 as 1000 is to 300, and 100 of output at 1250.
    """
    usage = Usage(input_tokens=1000, output_tokens=100, input_audio_tokens=600)
    assert _rates("gemini/gemini-2.5-flash").cost(usage, "flex") == 400 * 150 + 600 * 500 + 100 * 1250 == 485_000


def test_cache_writes_cost_more_than_input_in_a_band_that_does_not_list_them() -> None:
    """A rate that only the first band has grows with the plain one, instead of becoming it."""
    info = {
        "input_cost_per_token": 1e-6,
        "output_cost_per_token": 2e-6,
        "cache_creation_input_token_cost": 1.25e-6,
        "input_cost_per_token_above_200k_tokens": 2e-6,
        "output_cost_per_token_above_200k_tokens": 3e-6,
    }
    usage = Usage(input_tokens=200_001, output_tokens=0, cache_write_tokens=200_001)
    assert Rates("m", "openai", "dspy", "", info).cost(usage) == 200_001 * 2500


@pytest.mark.parametrize("model", ["xai/grok-4.20-0309-reasoning", "xai/grok-4.3"])
@pytest.mark.parametrize("provider", ["xai", "litellm"])
def test_xais_threshold_is_inclusive(model: str, provider: str) -> None:
    """At exactly 200,000 tokens a call was booked at half of what xAI bills."""
    rates = _rates(model, provider)
    threshold, below = (rates.cost(Usage(input_tokens=n, output_tokens=10)) or 0 for n in (200_000, 199_999))
    assert threshold > below * 1.9
    assert rates.bound(200_000, 10) >= threshold
    if model == "xai/grok-4.20-0309-reasoning":
        assert threshold == 500_050_000


def test_openai_counts_cached_and_reasoning_tokens_within_its_totals() -> None:
    """600 fresh at 150, 400 cached at 75; the 100 reasoning tokens are among the 300 output tokens."""
    usage = Usage(input_tokens=1000, output_tokens=300, cache_read_tokens=400, reasoning_tokens=100)
    assert _rates("openai/gpt-4o-mini").cost(usage) == 600 * 150 + 400 * 75 + 300 * 600


def test_anthropic_counts_its_cache_apart_from_the_input() -> None:
    """claude-sonnet-4-5: 100 fresh at 3000, 5000 read at 300, 1000 written at 3750, 10 out at 15000 nano-USD."""
    usage = Usage(input_tokens=100, output_tokens=10, cache_read_tokens=5000, cache_write_tokens=1000)
    rates = _rates("anthropic/claude-sonnet-4-5")
    assert rates.cost(usage) == 100 * 3000 + 5000 * 300 + 1000 * 3750 + 10 * 15000
    assert rates.cost(usage, long_cache=True) == 100 * 3000 + 5000 * 300 + 1000 * 6000 + 10 * 15000


def test_long_context_rates_apply_from_the_first_token_past_the_threshold() -> None:
    """claude-sonnet-4-5 doubles its input rate above 200,000 tokens of whole prompt, cache included."""
    rates = _rates("anthropic/claude-sonnet-4-5")
    assert rates.cost(Usage(input_tokens=200_000, output_tokens=1)) == 200_000 * 3000 + 15000
    assert rates.cost(Usage(input_tokens=200_001, output_tokens=1)) == 200_001 * 6000 + 22500
    beyond = Usage(input_tokens=1, output_tokens=1, cache_read_tokens=200_000)
    assert rates.cost(beyond) == 6000 + 200_000 * 600 + 22500


def test_gemini_bills_reasoning_beside_the_output() -> None:
    """gemini-2.5-pro: 10 visible and 90 thinking tokens are 100 billed ones; via LiteLLM the 90 are included."""
    usage = Usage(input_tokens=100, output_tokens=100, reasoning_tokens=90)
    assert _rates("gemini/gemini-2.5-pro").cost(usage) == 100 * 1250 + 190 * 10_000
    assert _rates("gemini/gemini-2.5-pro", "litellm").cost(usage) == 100 * 1250 + 100 * 10_000


def test_a_service_tier_has_its_own_rates_and_an_unknown_one_has_none() -> None:
    """gemini-2.5-pro's priority and flex rates are in the metadata; a tier nobody listed is not guessed."""
    rates, usage = _rates("gemini/gemini-2.5-pro"), Usage(input_tokens=100, output_tokens=10)
    assert rates.cost(usage, "priority") == 100 * 2250 + 10 * 18_000
    assert rates.cost(usage, "flex") == 100 * 625 + 10 * 5_000
    assert rates.cost(usage, "ultra") is None
    assert _rates("anthropic/claude-haiku-4-5").cost(usage, "priority") is None


@pytest.mark.parametrize(
    "usage",
    [
        Usage(),
        Usage(input_tokens=10),
        Usage(output_tokens=10),
        Usage(input_tokens=10, output_tokens=5, cache_read_tokens=11),
        Usage(input_tokens=10, output_tokens=5, reasoning_tokens=6),
    ],
)
def test_usage_that_is_incomplete_or_contradictory_has_no_price(usage: Usage) -> None:
    """What the provider did not tell, or told inconsistently, is unknown rather than zero."""
    assert _rates("openai/gpt-4o-mini").cost(usage) is None


# -- against DSPy -------------------------------------------------------------------------------------------------

USAGES = [
    Usage(input_tokens=1000, output_tokens=300),
    Usage(input_tokens=1, output_tokens=1),
    Usage(input_tokens=1_234_567, output_tokens=54_321),
    Usage(input_tokens=5000, output_tokens=999, cache_read_tokens=1024, cache_write_tokens=333, reasoning_tokens=77),
    Usage(input_tokens=199_990, output_tokens=9, cache_read_tokens=20, cache_write_tokens=3),
    Usage(input_tokens=300_001, output_tokens=999, input_audio_tokens=11, output_audio_tokens=7),
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"service_tier": "default", "cache": CacheConfig(retention="long")},
    {"service_tier": "priority"},
    {"service_tier": "flex"},
    {"service_tier": "unheard-of"},
]


@functools.cache
def _snapshot() -> dict[str, Any]:
    packed = files("dspy.clients.model_metadata").joinpath("snapshot.json.gz").read_bytes()
    snapshot: dict[str, Any] = json.loads(gzip.decompress(packed))
    return snapshot


def _models(provider: str) -> Iterator[str]:
    names = model_metadata._provider_names(provider)
    for key, entry in _snapshot().items():
        if key in model_metadata._RESERVED:
            continue
        head, _, rest = key.partition("/")
        if head in names and rest:
            yield rest
        elif not rest and entry.get("litellm_provider") in names:
            yield key


def _stands_in(entry: dict[str, Any], usage: Usage, config: dict[str, Any]) -> bool:
    """Whether DSPy bills sound or cache writes, listed apart, as plain input because this tier or band lacks them."""
    tier = {"priority": "_priority", "flex": "_flex"}.get(config.get("service_tier", ""), "")
    counts = {
        "input_cost_per_audio_token": usage.input_audio_tokens,
        "output_cost_per_audio_token": usage.output_audio_tokens,
        "cache_creation_input_token_cost": usage.cache_write_tokens,
        "output_cost_per_reasoning_token": usage.reasoning_tokens,
    }
    return any(count and key in entry and (tier or "_above_" in "".join(entry)) for key, count in counts.items())


@pytest.mark.parametrize("provider", sorted(PROVIDERS))
def test_every_model_of_dspys_metadata_costs_what_dspy_says(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the nano-USD, rounded up, over usages, tiers and cache retention; and never above its bound.

    Except that a dimension with a rate of its own is never billed below it where DSPy takes the plain rate of the tier
    or band for it: sound at Gemini's flex tier.
    """
    monkeypatch.setattr(costs, "model_info", functools.cache(model_metadata.model_info))
    seen: Counter[str] = Counter()
    disjoint, separate = provider.endswith("anthropic"), provider in ("gemini", "vertex", "vertex-express", "xai")
    for model in sorted(set(_models(provider))):
        rates = BOOK.rates(model, provider)
        for usage in USAGES:
            for config in SETTINGS:
                request, response = _request(model, **config), _response(usage, model)
                theirs, _ = costs.estimate_cost(response, provider=provider, requested_model=model, request=request)
                ours = BOOK.price_response(rates, response, request)
                if theirs is None or model in ("openrouter/auto", "openrouter/bodybuilder"):
                    assert ours is None, (model, usage, config)
                elif ours is None:
                    entry = model_metadata.model_info(provider, model)
                    assert not {"input_cost_per_token", "output_cost_per_token"} <= set(entry), (model, usage, config)
                else:
                    lifted = _stands_in(model_metadata.model_info(provider, model), usage, config)
                    seen["lifted"] += lifted
                    above = ours - theirs * NANO
                    assert above >= -1e-3, (model, usage, config)
                    assert above < 1 + 1e-3 or lifted, (model, usage, config)
                    assert rates is not None
                    cached = (usage.cache_read_tokens or 0) + (usage.cache_write_tokens or 0)
                    inputs = (usage.input_tokens or 0) + (cached if disjoint else 0)
                    outputs = (usage.output_tokens or 0) + ((usage.reasoning_tokens or 0) if separate else 0)
                    media, tier = bool(usage.input_audio_tokens), config.get("service_tier")
                    assert rates.bound(inputs, outputs, tier=tier, media=media) >= ours, (model, usage, config)
                    seen["compared"] += 1
    if provider in ("openai-chat", "openai", "anthropic", "gemini", "openrouter", "groq", "azure-chat", "deepseek"):
        assert seen["compared"] > 25


def test_dspys_list_of_providers_with_disjoint_caches_is_those_named_anthropic() -> None:
    """`Rates` recognizes them by their name's end; a provider of another dialect must not end so."""
    for name, definition in PROVIDERS.items():
        if name != "claude-code":
            assert name.endswith("anthropic") == (definition.dialect == "anthropic")


# -- regions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "region", "thousandths"),
    [
        ("openai/gpt-5.4", "eu", 1100),
        ("openai/gpt-5.4", "us", 1100),
        ("openai/gpt-5.4", None, 1000),
        ("openai/gpt-4o-mini", "eu", 1000),
        ("vertex_ai/claude-haiku-4-5", "regional", 1100),
        ("vertex_ai/claude-haiku-4-5", None, 1000),
    ],
)
def test_a_dearer_region_is_charged_and_always_held(model: str, region: str | None, thousandths: int) -> None:
    """eu.api.openai.com and Vertex outside "global" cost a tenth more; the bound holds it wherever the call goes."""
    rates, usage = _rates(model), Usage(input_tokens=1000, output_tokens=100)
    plain, asked = rates.cost(usage) or 0, _request()
    cost = BOOK.price_response(rates, _response(usage, rates.model), asked, region)
    assert cost == -(-plain * thousandths // 1000)
    assert rates.bound(1000, 100) >= -(-plain * max([1000, *rates.uplifts.values()]) // 1000)


def test_the_geography_that_anthropic_reports_is_charged() -> None:
    """A workspace may be set to US-only inference, a tenth dearer, which only the answer tells."""
    rates, usage = _rates("anthropic/claude-opus-4-6"), Usage(input_tokens=1000, output_tokens=0)
    for told, nano in (("us", 5_500_000), ("global", 5_000_000), (None, 5_000_000), ("not_available", 5_000_000)):
        response = _response(usage, "claude-opus-4-6", {"usage": {"inference_geo": told}})
        assert BOOK.price_response(rates, response, None) == nano
    assert rates.bound(1000, 0, tier="default") >= 5_500_000


@pytest.mark.parametrize(
    ("model", "clients", "region"),
    [
        ("openai/gpt-5.4", {"api_base": "https://eu.api.openai.com/v1"}, "eu"),
        ("openai/gpt-5.4", {"base_url": "https://US.api.openai.com/v1"}, "us"),
        ("openai/gpt-5.4", {}, None),
        ("openai/gpt-5.4", {"api_base": "https://eu.api.openai.com.evil.example"}, None),
        ("openai/gpt-5.4", {"api_base": "https://[broken"}, None),
        ("vertex_ai/claude-haiku-4-5", {}, "regional"),
        ("vertex_ai/claude-haiku-4-5", {"vertex_location": "europe-west1"}, "regional"),
        ("vertex_ai/claude-haiku-4-5", {"vertex_location": "global"}, None),
        ("vertex:gemini-3.5-flash", {"location": "global"}, None),
    ],
)
def test_the_region_is_told_by_the_address(
    model: str, clients: dict[str, Any], region: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's regions by their host; Vertex is regional unless it is said to be global."""
    for name in ("OPENAI_BASE_URL", "VERTEXAI_LOCATION", "VERTEX_LOCATION", "GOOGLE_CLOUD_LOCATION"):
        monkeypatch.delenv(name, raising=False)
    assert region_of(clients, model) == region


# -- looking up ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "provider", "nano_in"),
    [
        ("openai/gpt-4o-mini", None, 150),
        ("openai/gpt-4o-mini", "openai-chat", 150),
        ("openai/gpt-4o-mini", "openai", 150),
        ("openai/gpt-4o-mini", "litellm", 150),
        ("gpt-4o-mini", None, 150),
        ("gpt-4o-mini", "litellm", 150),
        ("bedrock/us.anthropic.claude-sonnet-4-5-20250929-v1:0", None, 3300),
        ("bedrock/us.anthropic.claude-sonnet-4-5-20250929-v1:0", "bedrock", 3300),
        ("vertex_ai/gemini-2.5-pro", "vertex_ai", 1250),
        ("groq/openai/gpt-oss-120b", "groq", 150),
        ("ollama/llama3.1", None, 0),
        ("ollama_chat/llama3.1", None, 0),
        ("ollama_chat/llama3.1", "litellm", 0),
    ],
)
def test_prices_are_found_as_dspy_and_litellm_find_them(model: str, provider: str | None, nano_in: int) -> None:
    """By DSPy's provider where it has one, else by LiteLLM's key; a zero that the metadata states is a price."""
    rates = _rates(model, provider)
    assert rates.source == "dspy"
    assert rates.cost(Usage(input_tokens=1000, output_tokens=0)) == 1000 * nano_in


@pytest.mark.parametrize(
    ("model", "provider"),
    [
        ("lm_studio/local", None),
        ("ollama/never-heard-of", None),
        ("claude-sonnet-4-5", "claude-code"),
        ("gpt-4o-mini", "openai-codex"),
        ("github_copilot/claude-haiku-4.5", None),
        ("openrouter/openrouter/auto", None),  # listed at zero, but stands for whatever model it picks
        ("perplexity/sonar", None),  # bills a search fee per request that no usage tells
        ("openai/openai/gpt-oss-120b", "vllm"),
        ("sample_spec", None),
        ("", None),
        ("/", None),
        ("a//b", "//"),
    ],
)
def test_what_nobody_can_price_is_unknown_and_never_zero(model: str, provider: str | None) -> None:
    """Unknown names, subscriptions, routers and fees outside the usage give None, without raising."""
    assert BOOK.rates(model, provider) is None
    assert BOOK.price_response(BOOK.rates(model, provider), _response(USAGES[0]), None) is None


def test_the_models_limits_come_with_its_rates() -> None:
    """They bound a call without `max_tokens` and a call with media."""
    rates = _rates("openai/gpt-4o-mini")
    assert (rates.max_output_tokens, rates.max_input_tokens) == (16384, 128000)


def test_the_legacy_token_limit_bounds_the_output_where_there_is_no_other() -> None:
    """LiteLLM's `max_tokens` is the output limit or something larger; it says nothing about the input."""
    info = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "max_tokens": 4096}
    rates = Rates("m", None, "dspy", "", info)
    assert (rates.max_output_tokens, rates.max_input_tokens) == (4096, None)
    rates = Rates("m", None, "dspy", "", {**info, "max_output_tokens": 100.0, "max_input_tokens": "many"})
    assert (rates.max_output_tokens, rates.max_input_tokens) == (100, None)


@pytest.mark.parametrize("value", [-1, -1e-6, float("nan"), float("inf"), "free", True, None, [1e-6]])
def test_what_is_not_a_price_is_not_taken_for_one(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Placeholders such as -1 leave the model unpriced."""
    entry = {"input_cost_per_token": value, "output_cost_per_token": 1e-6}
    monkeypatch.setattr(model_metadata, "model_info", lambda *_, **__: entry)
    assert PriceBook().rates("openai/gpt-4o-mini") is None


def test_a_model_is_looked_up_once_and_what_providers_can_fill_is_bounded() -> None:
    """Served model names come from outside, so the memory they take has a limit."""
    book = PriceBook()
    assert book.rates("openai/gpt-4o-mini") is book.rates("openai/gpt-4o-mini")
    book._rates.update({(f"served-{i}", "x"): None for i in range(4096)})
    assert book.rates("one-more/model") is None
    assert len(book._rates) == 1


def test_threads_that_look_up_at_once_get_the_same_price() -> None:
    """Compiling twice is harmless; a half-built entry would not be."""
    book, barrier, costs_seen = PriceBook(), threading.Barrier(16), []

    def look_up() -> None:
        barrier.wait()
        costs_seen.append(_rates("openai/gpt-4o-mini", None, book).cost(USAGES[0]))

    threads = [threading.Thread(target=look_up) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert costs_seen == [330_000] * 16


def test_unreadable_metadata_makes_a_price_unknown_but_spares_an_override(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken price map fails no call, and what the user stated still holds."""

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken map")

    monkeypatch.setattr(model_metadata, "model_info", broken)
    book = PriceBook({"openai/mine": Price(input=1, output=2)})
    assert book.rates("openai/gpt-4o-mini") is None
    assert _rates("openai/mine", None, book).cost(Usage(input_tokens=1, output_tokens=1)) == 3000


def test_a_model_that_nobody_lists_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new LM spent 30 ms of its first call on going through the whole catalogue a dozen times."""
    asked, whole = Counter[tuple[Any, ...]](), model_metadata.model_info

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked[(*args, kwargs.get("namespaces"))] += 1
        return whole(*args, **kwargs)

    monkeypatch.setattr(model_metadata, "model_info", counted)
    for _ in range(3):
        assert PriceBook().rates("openai/nobody-lists-this") is None
        assert PriceBook().rates("openai/gpt-4o-mini") is not None
    assert set(asked.values()) == {1}


def test_metadata_that_could_not_be_read_is_read_again_after_a_pause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One failed read made the price unknown for the life of the process; later each call paid for another try.

    What the user stated holds at once; what failed is told once.
    """
    broken, tries, whole, clock = True, 0, model_metadata.model_info, FakeClock()

    def reading(*args: Any, **kwargs: Any) -> Any:
        nonlocal tries
        tries += 1
        if broken:
            raise OSError("too many open files")
        return whole(*args, **kwargs)

    monkeypatch.setattr(model_metadata, "model_info", reading)
    book = PriceBook({"openai/mine": Price(input=1, output=2)}, clock)
    for pause in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        before = tries
        for _ in range(3):
            assert book.rates("openai/gpt-4o-mini") is None
            assert _rates("openai/mine", None, book).cost(Usage(input_tokens=1, output_tokens=1)) == 3000
            assert not book.settled("openai/gpt-4o-mini")
        assert tries == before + 2, "each model once"
        clock.advance(pause - 0.01)
        assert book.rates("openai/gpt-4o-mini") is None
        assert tries == before + 2
        clock.advance(0.01)
    assert len(logged(caplog)) == 2
    broken = False
    assert book.rates("openai/gpt-4o-mini") is not None
    assert book.settled("openai/gpt-4o-mini")
    assert not book.settled("openai/mine")
    assert book.rates("openai/mine") is not None
    assert book.settled("openai/mine")


def test_preload_reads_the_metadata_ahead_of_the_first_request() -> None:
    """Afterwards DSPy's map is in memory."""
    lookup.preload()
    assert model_metadata._data is not None


def test_importing_the_module_loads_neither_metadata_nor_litellm() -> None:
    """`import dspy_prod` stays light."""
    code = (
        "import sys, dspy_prod.pricing\n"
        "loaded = sys.modules.get('dspy.clients.model_metadata')\n"
        "assert loaded is None or loaded._data is None\n"
        "assert 'litellm' not in sys.modules\n"
        "import dspy_prod.telemetry.logs, dspy_prod.metrics, dspy_prod.alerts.sending\n"
        "assert not [each for each in sys.modules if each.startswith(('opentelemetry', 'prometheus_client'))]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- overrides ----------------------------------------------------------------------------------------------------


def test_an_override_is_found_by_full_or_bare_name_and_wins() -> None:
    """Exactly as given to the LM, or without the provider prefix, whichever provider serves it."""
    for key in ("openai/gpt-4o-mini", "gpt-4o-mini"):
        book = PriceBook({key: Price(input=1, output=2)})
        for name, provider in (("openai/gpt-4o-mini", None), ("openai/gpt-4o-mini", "openai-chat"), (key, None)):
            rates = _rates(name, provider, book)
            assert rates.source == "override"
            assert rates.cost(Usage(input_tokens=3, output_tokens=5)) == 13_000
    assert _rates("openai:gpt-4o", None, PriceBook({"gpt-4o": Price(input=1, output=2)})).source == "override"
    assert _rates("azure/gpt-4o", None, PriceBook({"openai/gpt-4o": Price(input=1, output=2)})).source == "dspy"


def test_an_override_prices_every_dimension_and_the_request() -> None:
    """Cached 0.5, written 1.5, reasoning 4 USD per million and a cent per request, by OpenAI's counters."""
    price = Price(input=1, output=2, cached_input=0.5, cache_write=1.5, reasoning=4, per_request=0.01)
    rates = _rates("openai/mine", None, PriceBook({"openai/mine": price}))
    usage = Usage(input_tokens=100, output_tokens=50, cache_read_tokens=20, cache_write_tokens=30, reasoning_tokens=10)
    expected = 50 * 1000 + 20 * 500 + 30 * 1500 + 40 * 2000 + 10 * 4000 + NANO // 100
    assert rates.cost(usage) == expected
    assert rates.bound(100, 50) == 100 * 1500 + 50 * 4000 + NANO // 100


def test_an_override_holds_at_every_tier_and_cache_retention() -> None:
    """It is what the user pays; as the remedy for an unknown price it must not be unknown itself."""
    book = PriceBook({"anthropic/mine": Price(input=1, output=2, cache_write=3)})
    rates, usage = _rates("anthropic/mine", None, book), Usage(input_tokens=10, output_tokens=1, cache_write_tokens=10)
    for config in SETTINGS:
        cost = book.price_response(rates, _response(usage, provider_data={"service_tier": "odd"}), _request(**config))
        assert cost == 10 * 1000 + 10 * 3000 + 2000  # disjoint counters: the provider is Anthropic


def test_an_override_leaves_open_limits_to_the_metadata() -> None:
    """A user who only knows a better price need not look up the context length."""
    rates = _rates("openai/gpt-4o-mini", None, PriceBook({"gpt-4o-mini": Price(input=1, output=2)}))
    assert (rates.max_output_tokens, rates.max_input_tokens) == (16384, 128000)
    price = Price(input=1, output=2, max_output_tokens=7, max_input_tokens=9)
    rates = _rates("openai/gpt-4o-mini", None, PriceBook({"gpt-4o-mini": price}))
    assert (rates.max_output_tokens, rates.max_input_tokens) == (7, 9)
    assert _rates("lm_studio/x", None, PriceBook({"x": Price(input=0, output=0)})).max_output_tokens is None


def test_fractions_of_a_nano_are_kept_until_the_total_and_then_rounded_up() -> None:
    """$0.0375 per million is 37.5 pico-USD a token: a million tokens cost exactly 37,500,000 nano-USD, one costs 38."""
    with pytest.warns(UserWarning, match="per million"):
        price = Price(input=0.0375, output=0.000001)
    rates = _rates("lm_studio/x", None, PriceBook({"x": price}))
    assert rates.cost(Usage(input_tokens=1_000_000, output_tokens=0)) == 37_500_000
    assert rates.cost(Usage(input_tokens=1, output_tokens=0)) == 38
    assert rates.cost(Usage(input_tokens=0, output_tokens=1)) == 1
    assert rates.cost(Usage(input_tokens=0, output_tokens=0)) == 0


def test_a_free_override_costs_nothing() -> None:
    """Zero stated is zero known."""
    rates = _rates("lm_studio/x", None, PriceBook({"lm_studio/x": Price(input=0, output=0)}))
    assert rates.cost(USAGES[3]) == 0
    assert rates.bound(10**6, 10**6) == 0
    assert rates.max_output_for(0, 10**6) > 10**9


# -- bounds -------------------------------------------------------------------------------------------------------


def test_a_bound_covers_the_dearest_rate_that_may_apply() -> None:
    """Sonnet: cache writes for an hour at 6000; past 200,000 tokens of prompt at 12000, and output at 22500."""
    rates = _rates("anthropic/claude-sonnet-4-5")
    assert rates.bound(1000, 10) == 1000 * 6000 + 10 * 15_000
    assert rates.bound(200_000, 10) == 200_000 * 6000 + 10 * 15_000
    assert rates.bound(200_001, 10) == 200_001 * 12_000 + 10 * 22_500


def test_a_bound_covers_the_tiers_that_the_request_leaves_open() -> None:
    """OpenAI serves an unset or "auto" tier as the project is set up, priority included; "default" is sure."""
    rates = _rates("openai/gpt-4o-mini")
    assert rates.bound(1000, 100, tier="default") == 1000 * 150 + 100 * 600
    for tier in (None, "auto", "priority", "flex"):
        assert rates.bound(1000, 100, tier=tier) == 1000 * 250 + 100 * 1000


def test_a_bound_covers_the_fee_per_picture() -> None:
    """Some gateways list a price per picture beside the one per token."""
    info = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "input_cost_per_image": 0.0004}
    rates = Rates("m", None, "dspy", "", {**info, "input_cost_per_image_token": 3e-6})
    assert rates.bound(100, 0) == 100 * 1000
    assert rates.bound(100, 0, images=2) == 100 * 3000 + 2 * 400_000
    assert rates.max_output_for(100 * 3000 + 2 * 400_000 + 2000, 100, images=2) == 1


def test_a_bound_covers_a_tier_that_only_the_metadata_names() -> None:
    """A tier without a formula in DSPy costs None afterwards, yet what it can cost is known before."""
    info = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "input_cost_per_token_ultrafast": 9e-6}
    rates = Rates("m", "openai", "dspy", "", info)
    assert rates.cost(USAGES[0], "ultrafast") is None
    assert rates.bound(1000, 0, tier="ultrafast") == 9_000_000
    assert rates.bound(1000, 0) == 1_000_000


def test_a_bound_never_falls_with_the_length_of_the_prompt() -> None:
    """A long-context band that is cheaper, or lacks a rate, may not apply to a call that turns out shorter."""
    info = {
        "input_cost_per_token": 5e-6,
        "output_cost_per_token": 7e-6,
        "input_cost_per_token_above_128k_tokens": 1e-6,
        "output_cost_per_token_above_256k_tokens": 9e-6,
    }
    rates = Rates("m", "openai", "dspy", "", info)
    assert rates.bound(128_000, 1) == 128_000 * 5000 + 7000
    assert rates.bound(128_001, 1) == 128_001 * 5000 + 7000
    assert rates.bound(256_001, 1) == 256_001 * 5000 + 9000
    assert rates.cost(Usage(input_tokens=200_000, output_tokens=1)) is None  # no output rate in that band


def test_a_bound_takes_the_audio_rate_only_with_media() -> None:
    """gemini-2.5-flash bills audio input dearer than text, and pictures as text."""
    rates = _rates("gemini/gemini-2.5-flash")
    assert rates.bound(1000, 0, images=1) == rates.bound(1000, 0)
    text, media = rates.bound(1000, 0, tier="default"), rates.bound(1000, 0, tier="default", media=True)
    assert text < media
    assert media >= (rates.cost(Usage(input_tokens=1000, output_tokens=0, input_audio_tokens=1000)) or 0)


MODELS = (
    "openai/gpt-4o-mini",
    "openai/gpt-5",
    "anthropic/claude-sonnet-4-5",
    "gemini/gemini-2.5-pro",
    "deepseek/deepseek-chat",
    "ollama/llama3.1",
)
tokens = st.integers(0, 400_000)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MODELS), tokens, tokens, tokens, tokens, tokens, st.sampled_from([None, "priority", "flex"]))
def test_no_usage_within_its_bounds_costs_more_than_the_bound(
    model: str, inputs: int, outputs: int, cached: int, written: int, reasoning: int, tier: str | None
) -> None:
    """However the counters are split, whichever band and tier: the promise a hard budget stands on."""
    rates = _rates(model)
    usage = Usage(
        input_tokens=inputs,
        output_tokens=outputs,
        cache_read_tokens=cached,
        cache_write_tokens=written,
        reasoning_tokens=reasoning,
    )
    whole_input = inputs + cached + written if model.startswith("anthropic") else inputs
    whole_output = outputs + reasoning if model.startswith("gemini") else outputs
    for long_cache in (False, True):
        cost = rates.cost(usage, tier, long_cache)
        assert cost is None or cost <= rates.bound(whole_input, whole_output, tier=tier)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MODELS), st.integers(0, 300_000), st.integers(0, 10**10), st.sampled_from([None, "default"]))
def test_the_largest_affordable_output_is_exact(model: str, inputs: int, nano: int, tier: str | None) -> None:
    """`max_output_for` fits, and one token more does not."""
    rates = _rates(model)
    outputs = rates.max_output_for(nano, inputs, tier=tier)
    if rates.bound(inputs, 0, tier=tier) > nano:
        assert outputs == 0
        return
    assert rates.bound(inputs, outputs, tier=tier) <= nano
    assert rates.bound(1, 1) == 0 or rates.bound(inputs, outputs + 1, tier=tier) > nano


# -- responses ----------------------------------------------------------------------------------------------------


def test_the_model_that_served_is_the_one_that_is_priced() -> None:
    """gpt-4o answered by gpt-4o-2024-05-13 costs that snapshot's 5000 and 15000; an unknown name costs as asked."""
    rates, usage = _rates("openai/gpt-4o"), Usage(input_tokens=1000, output_tokens=0)
    assert BOOK.price_response(rates, _response(usage, "gpt-4o-2024-05-13"), None) == 5_000_000
    assert BOOK.price_response(rates, _response(usage, "my-deployment"), None) == 2_500_000


def test_a_model_served_through_litellm_is_priced_at_its_own_provider() -> None:
    """Bedrock's regional Haiku costs 1100, not the 3300 of the Sonnet that was asked nor Anthropic's own 1000."""
    usage = Usage(input_tokens=1000, output_tokens=0)
    for provider in (None, "bedrock", "litellm"):
        rates = _rates("bedrock/us.anthropic.claude-sonnet-4-5-20250929-v1:0", provider)
        served = _response(usage, "us.anthropic.claude-haiku-4-5-20251001-v1:0")
        assert BOOK.price_response(rates, served, None) == 1_100_000


def test_the_served_model_does_not_displace_an_override() -> None:
    """The user's price is for what they asked."""
    book = PriceBook({"openai/gpt-4o": Price(input=1, output=1)})
    response = _response(Usage(input_tokens=1000, output_tokens=0), "gpt-4o-2024-05-13")
    assert book.price_response(_rates("openai/gpt-4o", None, book), response, None) == 1_000_000


@pytest.mark.parametrize(
    ("asked", "told", "nano"),
    [
        (None, None, 150_000),
        ("auto", {"service_tier": "default"}, 150_000),
        ("priority", None, 250_000),
        ("priority", {"service_tier": "default"}, 150_000),
        (None, {"service_tier": "priority"}, 250_000),
        (None, {"service_tier": "on_demand"}, 150_000),  # Groq's word for the standard tier
        (None, {"usageMetadata": {"serviceTier": "priority"}}, 250_000),
        (None, {"usageMetadata": {"serviceTier": "ON_DEMAND"}}, 150_000),
        (None, {"usageMetadata": "odd"}, 150_000),
        (None, {"service_tier": "scale"}, None),
        (None, {"service_tier": {"type": "default"}}, None),
    ],
)
def test_the_tier_that_the_provider_reports_wins(
    asked: str | None, told: dict[str, Any] | None, nano: int | None
) -> None:
    """The bill follows the tier that served; one that cannot be read has no price."""
    usage = Usage(input_tokens=1000, output_tokens=0)
    response = _response(usage, "gpt-4o-mini", provider_data=told)
    assert BOOK.price_response(_rates("openai/gpt-4o-mini"), response, _request(service_tier=asked)) == nano


def test_generated_media_and_hosted_tools_have_no_token_price() -> None:
    """Their fees are billed apart; function tools are tokens like any others."""
    rates, usage = _rates("openai/gpt-4o-mini"), Usage(input_tokens=1000, output_tokens=0)
    image = ImagePart(data="aGk=")
    assert BOOK.price_response(rates, _response(usage, "gpt-4o-mini", parts=[image]), None) is None
    hosted = Request(model="m", messages=(Message.user("hi"),), tools=(BuiltinTool("web_search"),))
    own = Request(model="m", messages=(Message.user("hi"),), tools=(FunctionTool("search"),))
    assert BOOK.price_response(rates, _response(usage), hosted) is None
    assert BOOK.price_response(rates, _response(usage), _request(extensions={"web_search_options": {}})) is None
    assert BOOK.price_response(rates, _response(usage), own) == 150_000
    assert BOOK.price_response(None, _response(usage), own) is None


# -- speed --------------------------------------------------------------------------------------------------------


def test_pricing_stays_off_the_profile() -> None:
    """As a multiple of what the sum alone takes on the same machine: about 5 plain, 23 by dimension."""
    rates, plain, split = _rates("openai/gpt-4o-mini"), USAGES[0], USAGES[3]

    def took(call: Callable[[], object]) -> float:
        return min(timeit.repeat(call, number=500, repeat=40))

    alone = took(lambda: plain.input_tokens * 150 + plain.output_tokens * 600)
    assert took(lambda: rates.cost(plain)) < 20 * alone
    assert took(lambda: rates.cost(split)) < 90 * alone
    assert not math.isnan(rates.cost(split) or 0)
