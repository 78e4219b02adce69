"""Prices: exact integer arithmetic over DSPy's model metadata, or over a `Price` the user gives.

A model's rates are compiled once into integers (atto-USD, `1e-18` USD, per token: fine enough for every published
price); pricing an attempt is then a few multiplications, rounded UP to a whole nano-USD. What a usage counter means
at a provider, and which rate applies to it, follows `dspy/clients/costs.py`. An unknown price is None, never zero.
As there, regional uplifts and off-peak discounts are not modelled (the peak rate is charged).
"""

from __future__ import annotations

import importlib
import logging
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from dspy_prod.options import Price
from dspy_prod.pricing.bounds import MEDIA, hosted_fees

if TYPE_CHECKING:
    from dspy.lm15 import Request, Response, Usage

logger = logging.getLogger(__name__)

_ATTO, ATTO_PER_NANO, _UNLIMITED = 10**18, 10**9, 2**31 - 1

_SEPARATE_REASONING = frozenset(("gemini", "vertex", "vertex-express", "xai"))
_SUBSCRIPTIONS = frozenset(("claude-code", "openai-codex", "chatgpt", "github_copilot"))
# Models that stand for another one, chosen per call; the metadata lists them at a price of zero.
_ROUTERS = frozenset(("openrouter/auto", "openrouter/bodybuilder"))
_SURELY_STANDARD = frozenset(("default", "standard", "on_demand"))
_TIERS: dict[str | None, str] = {None: "", "auto": "", "priority": "_priority", "flex": "_flex"}
_TIERS.update(dict.fromkeys(_SURELY_STANDARD, ""))

# Metadata key of each dimension, and the key whose rate stands in when it has none of its own.
_DIMENSIONS = (
    ("input_cost_per_token", None),
    ("output_cost_per_token", None),
    ("output_cost_per_reasoning_token", "output_cost_per_token"),
    ("cache_read_input_token_cost", "input_cost_per_token"),
    ("cache_creation_input_token_cost", "input_cost_per_token"),
    ("input_cost_per_audio_token", "input_cost_per_token"),
    ("output_cost_per_audio_token", "output_cost_per_token"),
)
_Row = tuple[int | None, ...]  # atto-USD per token by dimension; None where no rate is known
_Band = tuple[int, int, int]  # the dearest of those: for text input, input with media, output

_MOST = 4096  # models remembered: providers choose the names of served ones, so bound what they can fill

# Metadata namespaces of LiteLLM prefixes, where they differ from the prefix itself.
_NAMESPACES: dict[str, tuple[str, ...]] = {
    "bedrock": ("bedrock", "bedrock_converse"),
    "cohere": ("cohere", "cohere_chat"),
    "ollama_chat": ("ollama",),
    "vertex_ai": ("vertex_ai", "vertex_ai-language-models"),
}


def preload() -> None:
    """Load DSPy's model metadata: up to 5 s of network, once a process, here so that no request pays for it."""
    importlib.import_module("dspy.clients.model_metadata").source_info()


def _atto(value: object) -> int | None:
    """A price in atto-USD; None for anything that is not a price."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)) or not math.isfinite(value) or value < 0:
        return None
    return round(Decimal(str(value)) * _ATTO)


def _limit(info: Mapping[str, Any], *names: str) -> int | None:
    return next((limit for name in names if (limit := (_atto(info.get(name)) or 0) // _ATTO)), None)


def _row(info: Mapping[str, Any], band: str, tier: str, long_write: bool) -> _Row:
    found = [(_atto(info.get(key + band + tier)), stand_in) for key, stand_in in _DIMENSIONS]
    row = [_atto(info.get(stand_in + band + tier)) if rate is None and stand_in else rate for rate, stand_in in found]
    if long_write:
        row[4] = _atto(info.get(f"cache_creation_input_token_cost_above_1hr{band}{tier}"))
    return tuple(row)


def _dearest(info: Mapping[str, Any], bands: list[str], tiers: Iterable[str]) -> list[_Band]:
    """Per long-context band, the dearest rates of that band and those below it."""
    result, text, media, output = [], 0, 0, 0
    for band in bands:
        for row in (_row(info, band, tier, long) for tier in tiers for long in (False, True)):
            text = max(text, row[0] or 0, row[3] or 0, row[4] or 0)
            media = max(media, text, row[5] or 0)
            output = max(output, row[1] or 0, row[2] or 0, row[6] or 0)
        result.append((text, media, output))
    return result


class Rates:
    """What one model costs at one provider, compiled to integers.

    Attributes:
        model, prefix: the model's name at the provider, and what precedes it in LiteLLM's string.
        provider: whose usage counters these are, by DSPy's name; None and `"litellm"` count in OpenAI's way.
        source: `"override"` (a `Price`) or `"dspy"` (metadata).
        max_output_tokens, max_input_tokens: the model's own limits, None when unknown.
        flat: the dearest (input, output, fee) in atto-USD when they depend on nothing but the tier, else None.
    """

    __slots__ = (
        *("model", "prefix", "provider", "source", "max_output_tokens", "max_input_tokens", "flat"),
        *("_bands", "_disjoint_cache", "_fee", "_input", "_output", "_rows", "_separate_reasoning", "_thresholds"),
    )

    def __init__(self, model: str, provider: str | None, source: str, prefix: str, info: Mapping[str, Any]) -> None:
        """Compile `info`, an entry of the metadata that has the plain input and output rates."""
        self.model, self.prefix, self.provider, self.source = model, prefix, provider, source
        # The legacy `max_tokens` is the output limit or something larger.
        self.max_output_tokens = _limit(info, "max_output_tokens", "max_tokens")
        self.max_input_tokens = _limit(info, "max_input_tokens")
        # Anthropic's cache counters are disjoint from its input tokens; the reasoning of Gemini and xAI is separate
        # from their output tokens; everywhere else both are included (`dspy/clients/costs.py`).
        self._disjoint_cache = provider is not None and provider.endswith("anthropic")
        self._separate_reasoning = provider in _SEPARATE_REASONING
        self._thresholds = sorted({int(k) * 1000 for key in info for k in re.findall(r"_above_(\d+)k_tokens", key)})
        bands = ["", *(f"_above_{threshold // 1000}k_tokens" for threshold in self._thresholds)]
        known = {"", "_priority", "_flex"}
        self._rows = {(t, long): [_row(info, b, t, long) for b in bands] for t in known for long in (False, True)}
        suffixes = (re.fullmatch(r"(?:in|out)put_cost_per_token(?:_above_\d+k_tokens)?(_[a-z]+)", key) for key in info)
        tiers = {"standard": {""}, "known": known, "every": {"", *(match.group(1) for match in suffixes if match)}}
        self._bands = {name: _dearest(info, bands, which) for name, which in tiers.items()}
        self._fee = _atto(info.get("input_cost_per_request")) or 0
        text, media, output = self._bands["known"][0]
        self.flat = (text, output, self._fee) if not self._thresholds and text == media else None
        self._input, self._output = (rate or 0 for rate in self._rows["", False][0][:2])

    def tokens(self, usage: Usage) -> int | None:
        """All tokens of a call, which a rate limit counts, each once; None when they are not known."""
        inputs: int | None = usage.input_tokens
        outputs: int | None = usage.output_tokens
        if inputs is None or outputs is None:
            return None
        if self._disjoint_cache:
            inputs += (usage.cache_read_tokens or 0) + (usage.cache_write_tokens or 0)
        return inputs + outputs + ((usage.reasoning_tokens or 0) if self._separate_reasoning else 0)

    def cost(self, usage: Usage, tier: str | None = None, long_cache: bool = False) -> int | None:
        """The exact cost in nano-USD, rounded up; None when it cannot be known.

        `tier` is the service tier that served the call (None: standard). `long_cache` says that prompt-cache writes
        were asked to last long (`CacheConfig.retention`), which Anthropic bills at its one-hour rate.
        """
        inputs: int | None = usage.input_tokens
        outputs: int | None = usage.output_tokens
        if inputs is None or outputs is None:
            return None
        cached, written = usage.cache_read_tokens or 0, usage.cache_write_tokens or 0
        audio_in, audio_out = usage.input_audio_tokens or 0, usage.output_audio_tokens or 0
        reasoning = usage.reasoning_tokens or 0
        special = cached or written or reasoning or audio_in or audio_out or tier
        if not special and (not self._thresholds or inputs <= self._thresholds[0]):
            return -(-(inputs * self._input + outputs * self._output + self._fee) // ATTO_PER_NANO)
        total_input = inputs + cached + written if self._disjoint_cache else inputs
        inputs -= audio_in if self._disjoint_cache else audio_in + cached + written
        outputs -= audio_out if self._separate_reasoning else audio_out + reasoning
        if self.source == "override":  # a Price is what the user pays, at whatever tier and retention
            tier, long_cache = None, False
        rows = self._rows.get((_TIERS.get(tier, "unknown"), long_cache and self._disjoint_cache))
        if inputs < 0 or outputs < 0 or rows is None:
            return None
        row = rows[bisect_left(self._thresholds, total_input)]
        total = self._fee
        for count, rate in zip((inputs, outputs, reasoning, cached, written, audio_in, audio_out), row, strict=True):
            if count and rate is None:
                return None
            total += count * (rate or 0)
        return -(-total // ATTO_PER_NANO)

    def _applicable(self, input_tokens: int, tier: str | None, media: bool) -> tuple[int, int]:
        name = "standard" if tier in _SURELY_STANDARD else "known" if tier in _TIERS else "every"
        text, with_media, output = self._bands[name][bisect_left(self._thresholds, input_tokens)]
        return (with_media if media else text), output

    def bound(self, input_tokens: int, output_tokens: int, *, tier: str | None = None, media: bool = False) -> int:
        """The most these tokens can cost in nano-USD: each at the dearest rate that may apply, plus the fee.

        Input at the dearest of plain, cache read and cache write (the one-hour rate included), output at the dearest
        of plain, reasoning and audio, both over every long-context band that `input_tokens` can reach. `tier` is
        `Config.service_tier`: unset and "auto" cover priority and flex too (OpenAI then follows the project's setting),
        "default" only the standard tier. `media` admits the rate of audio input.
        """
        input_rate, output_rate = self._applicable(input_tokens, tier, media)
        return -(-(input_tokens * input_rate + output_tokens * output_rate + self._fee) // ATTO_PER_NANO)

    def max_output_for(self, nano: int, input_tokens: int, *, tier: str | None = None, media: bool = False) -> int:
        """The largest `output_tokens` whose `bound` is at most `nano` nano-USD; 0 when not even the input fits."""
        input_rate, output_rate = self._applicable(input_tokens, tier, media)
        left = nano * ATTO_PER_NANO - input_tokens * input_rate - self._fee
        return 0 if left < 0 else min(left // output_rate, _UNLIMITED) if output_rate else _UNLIMITED


def _priced(price: Price, known: Rates | None) -> dict[str, Any]:
    """A `Price` as a metadata entry; the limits it leaves open are the metadata's."""
    per_million = (price.input, price.output, price.reasoning, price.cached_input, price.cache_write)
    return {
        **{key: Decimal(repr(usd)) / 10**6 for (key, _), usd in zip(_DIMENSIONS, per_million) if usd is not None},  # noqa: B905
        "input_cost_per_request": price.per_request,
        "max_output_tokens": price.max_output_tokens or (known and known.max_output_tokens),
        "max_input_tokens": price.max_input_tokens or (known and known.max_input_tokens),
    }


def _resolve(model: str) -> tuple[str | None, str]:
    """DSPy's own provider and wire name for a model string; (None, model) when DSPy leaves it to LiteLLM."""
    try:
        from dspy.clients.engines.lm15_engine import LM15Engine
        from dspy.lm15 import RouterConfig

        route = LM15Engine(RouterConfig(env={})).resolve(model)
    except Exception:
        return None, model
    return route.provider, route.model


def _metadata(model: str, provider: str | None, native: str | None, wire: str) -> Rates | None:
    """The first priced metadata entry in DSPy's order of look-up, then, for the same provider, in LiteLLM's."""
    from dspy.clients.model_metadata import model_info

    head, slash, rest = model.partition("/")
    through_litellm = provider in (None, "litellm") or (native is None and provider == head)
    owner = native if through_litellm else provider
    places: list[tuple[str, str, tuple[str, ...] | None]] = [(owner, name, None) for name in (wire, model) if owner]
    if rest and (through_litellm or provider == native):
        places.append((head, rest, _NAMESPACES.get(head, (head,))))
    for where, name, namespaces in places:
        info = model_info(where, name, namespaces=namespaces)
        # Perplexity bills every request a search fee that no usage tells.
        searches = where == "perplexity" and "search_context_cost_per_query" in info
        priced = all(_atto(info.get(f"{side}put_cost_per_token")) is not None for side in ("in", "out"))
        if priced and not searches and where not in _SUBSCRIPTIONS and _ROUTERS.isdisjoint((name, wire)):
            return Rates(name, provider, "dspy", head + slash if through_litellm and rest else "", info)
    return None


class PriceBook:
    """Rates by model, each compiled once. Safe to share between threads; no method raises.

    `overrides` maps a model string as given to the LM (`"openai/gpt-4o-mini"`), or the name without its provider
    prefix, to a `Price`, which wins over the metadata.
    """

    def __init__(self, overrides: Mapping[str, Price] | None = None) -> None:
        self._overrides = dict(overrides or {})
        self._rates: dict[tuple[str, str | None], Rates | None] = {}
        self._unread: set[str] = set()

    def rates(self, model: str, provider: str | None = None) -> Rates | None:
        """The rates of a model; None when its price is unknown.

        `model` is the string given to the LM. `provider` is DSPy's name of the provider that serves it
        (`dspy.clients.capabilities.resolve(lm).provider`), or `"litellm"` when the call goes through LiteLLM, which
        reports any usage in OpenAI's way; None resolves it as DSPy's `engine="auto"` does. For a provider that only
        LiteLLM has, its prefix and None mean the same.
        """
        try:
            return self._rates[model, provider]
        except KeyError:
            pass
        found, certain = self._compile(model, provider)
        if not certain:  # metadata that cannot be read now may be readable at the next call
            return found
        if len(self._rates) >= _MOST:
            self._rates.clear()
        self._rates[model, provider] = found
        return found

    def settled(self, model: str, provider: str | None = None) -> bool:
        """Whether what `rates` said last of this model holds for good."""
        return (model, provider) in self._rates

    def _compile(self, model: str, provider: str | None) -> tuple[Rates | None, bool]:
        """The rates, and whether the metadata could be read."""
        native, wire = _resolve(model)
        provider = provider or native
        known, certain = None, True
        try:
            known = _metadata(model, provider, native, wire)
        except Exception:
            certain = False
            if model not in self._unread and len(self._unread) < _MOST:  # each call tries again: tell it once
                self._unread.add(model)
                logger.warning("the metadata of %r cannot be read; its price counts as unknown", model, exc_info=True)
        for name in (model, model.partition("/")[2], wire):
            if name in self._overrides:
                return Rates(name, provider, "override", "", _priced(self._overrides[name], known)), certain
        return known, certain

    def price_response(self, rates: Rates | None, response: Response, request: Request | None) -> int | None:
        """What a completed response cost in nano-USD, rounded up; None when it cannot be known.

        As in DSPy, the model that really served is priced when the metadata knows it, and the tier the provider
        reports wins over the one asked for; generated media and hosted tools are billed apart from tokens: None.
        """
        if rates is None:
            return None
        parts = response.message.parts
        if len(parts) != 1 or parts[0].type != "text":
            if any(part.type in MEDIA for part in parts):
                return None
        elif response.provider_data is None and request is not None and response.model == rates.model:
            config = request.config
            if not (request.tools or config.extensions or config.service_tier or config.cache):
                return rates.cost(response.usage)  # the plain case, in a microsecond
        tier, long_cache = None, False
        if request is not None:
            config = request.config
            if (request.tools or config.extensions) and hosted_fees(request):
                return None
            tier, long_cache = config.service_tier, config.cache is not None and config.cache.retention == "long"
        if response.model != rates.model and rates.source == "dspy":
            rates = self.rates(rates.prefix + response.model, rates.provider) or rates
        raw = response.provider_data or {}
        google = raw.get("usageMetadata")
        tier = raw.get("service_tier") or (google.get("serviceTier") if isinstance(google, dict) else None) or tier
        if tier is not None:
            tier = tier.lower() if isinstance(tier, str) else "unknown"
        return rates.cost(response.usage, tier if _TIERS.get(tier) != "" else None, long_cache)
