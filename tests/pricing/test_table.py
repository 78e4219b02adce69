"""Every model of both price lists costs what LiteLLM says, or differs by a rule that has a name and a reason.

The lists are DSPy's bundled metadata and LiteLLM's; the usage shapes are those that a provider can report: cached
input, cache writes, reasoning, sound, long prompts, service tiers, regions. A bound is never below either side's cost.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any, NamedTuple

import pytest
from dspy.clients import model_metadata
from dspy.lm15 import Message, Response, Usage

from dspy_prod.pricing.book import PriceBook
from dspy_prod.pricing.rates import Rates

NANO = 10**9
MODES = ("chat", "responses", "completion", None)
TIERS = (None, "flex", "priority", "batch")
PLAIN = {"input_cost_per_token", "output_cost_per_token"}
SUBSCRIPTIONS = ("github_copilot", "chatgpt")
ALIKE, UNEXPLAINED = "alike", "unexplained"
SOUND = "input_cost_per_audio_token"
SEARCH = "search_context_cost_per_query"
PREFIXES = {"bedrock_converse": "bedrock", "cohere_chat": "cohere"}
PARTS: tuple[dict[str, int], ...] = (
    {},
    {"cache_read_tokens": 400},
    {"cache_write_tokens": 400},
    {"reasoning_tokens": 100},
    {"input_audio_tokens": 600},
    {"output_audio_tokens": 200},
    {"cache_read_tokens": 300, "cache_write_tokens": 100, "reasoning_tokens": 50, "input_audio_tokens": 60},
)


class Shape(NamedTuple):
    """One call: its usage, counted in OpenAI's way, and what decides about the rate."""

    usage: Usage
    tier: str | None = None
    long_write: bool = False
    region: str | None = None


@dataclass(frozen=True)
class Case:
    """A model, a shape, and both prices in nano-USD; None where one of them has none."""

    provider: str
    model: str
    entry: dict[str, Any]
    shape: Shape
    ours: int | None
    theirs: float | None
    fails: bool
    twice: bool = False  # the list has another entry, under the name with its provider

    @property
    def above(self) -> bool:
        return self.ours is not None and self.theirs is not None and self.ours >= self.theirs * (1 - 1e-9)

    @property
    def suffix(self) -> str:
        return "" if self.shape.tier is None else f"_{self.shape.tier}"

    @property
    def doubled(self) -> bool:
        return self.model.startswith(f"{self.provider}/{self.provider}/")

    def lists(self, key: str) -> bool:
        """Whether the entry has such a rate for any tier or length."""
        return any(listed.startswith(key) for listed in self.entry)

    def lacks(self, key: str) -> bool:
        """Whether the entry has no such rate for the tier and the length of this prompt."""
        bands = {int(n) * (1000 if k else 1): f"_above_{n}{k}_tokens" for n, k in _bands(self.entry)}
        band = max((tokens for tokens in bands if (self.shape.usage.input_tokens or 0) > tokens), default=None)
        return key + (bands[band] if band else "") + self.suffix not in self.entry


@dataclass(frozen=True)
class Rule:
    """Why a price differs from LiteLLM's; `example` is a model to which it applies, always looked at."""

    reason: str
    applies: Callable[[Case], bool]
    example: str


def _unpriced(case: Case) -> bool:
    steps = case.entry.get("tiered_pricing")
    first = steps[0] if isinstance(steps, list) and steps else case.entry
    return not {*first, *case.entry} >= PLAIN


STANDS_IN = (
    ("cache_read_tokens", "cache_read_input_token_cost"),
    ("cache_write_tokens", "cache_creation_input_token_cost"),
    ("reasoning_tokens", "output_cost_per_reasoning_token"),
    ("input_audio_tokens", "input_cost_per_audio_token"),
    ("output_audio_tokens", "output_cost_per_audio_token"),
    ("cache_write_tokens", "cache_creation_input_token_cost_above_1hr"),
)

RULES = {
    "batch": Rule(
        "no call of an LM is a batch; were a batch's tier reported, the call is charged at its bound",
        lambda case: case.shape.tier == "batch" and case.ours is None,
        "gpt-4o-mini",
    ),
    "tier without rates": Rule(
        "a tier for which nothing is listed has no price, as in DSPy; LiteLLM takes the standard one",
        lambda case: case.ours is None and bool(case.shape.tier) and any(map(case.lacks, PLAIN)),
        "claude-haiku-4-5",
    ),
    "not priced by the token": Rule(
        "an entry without both plain rates is priced by something else, which no usage tells; LiteLLM takes zero",
        lambda case: case.ours is None and _unpriced(case),
        "bedrock/us-east-1/1-month-commitment/anthropic.claude-v1",
    ),
    "listed twice": Rule(
        "the entry under the name with its provider is taken, as in DSPy, not the one without",
        lambda case: case.twice and (case.ours is None or case.above),
        "moonshotai.kimi-k2.5",
    ),
    "doubled name": Rule(
        "LiteLLM drops a doubled provider, though the list has an entry of that name with a price of its own",
        lambda case: case.doubled and case.ours is not None,
        "perplexity/perplexity/sonar",
    ),
    "search fee": Rule(
        "Perplexity bills a fee for every search, which no usage tells",
        lambda case: (
            case.ours is None and case.provider == "perplexity" and "search_context_cost_per_query" in case.entry
        ),
        "perplexity/sonar",
    ),
    "router": Rule(
        "stands for another model, chosen per call, and is listed at zero",
        lambda case: case.ours is None and case.theirs == 0 and case.model.startswith("openrouter/openrouter/"),
        "openrouter/openrouter/auto",
    ),
    "Perplexity's list": Rule(
        "LiteLLM's formula for Perplexity reads no bands, cached rates, sound or request fees of the list it is given",
        lambda case: case.provider == "perplexity" and (case.above or bool(case.shape.usage.cache_read_tokens)),
        "perplexity/openai/gpt-5.4",
    ),
    "off-peak": Rule(
        "discounts by the time of day are not modelled: the peak rate is charged, as in DSPy",
        lambda case: case.above and "off_peak_pricing" in case.entry,
        "deepseek/deepseek-v4-flash-vision-exp",
    ),
    "Fireworks' cache": Rule(
        "LiteLLM takes half of the input rate where Fireworks lists none for cached input, DSPy all of it",
        lambda case: case.above and case.provider == "fireworks_ai" and "cache_read_input_token_cost" not in case.entry,
        "fireworks_ai/fireworks-ai-up-to-4b",
    ),
    "Fireworks' tiers": Rule(
        "LiteLLM's formula for Fireworks does not read its tiers",
        lambda case: case.above and case.provider == "fireworks_ai" and case.shape.tier is not None,
        "fireworks_ai/accounts/fireworks/models/kimi-k2p6",
    ),
    "sound at a tier": Rule(
        "where a tier lists no rate of sound, it is as much dearer than text as at the standard tier; LiteLLM takes "
        "the standard rate of sound there, DSPy the tier's of text",
        lambda case: bool(case.shape.usage.input_audio_tokens) and case.lacks(SOUND) and SOUND in case.entry,
        "gemini/gemini-2.5-flash",
    ),
    "sound's own tier": Rule(
        "LiteLLM does not read the rates of sound that a list has for a tier",
        lambda case: case.above and bool(case.shape.usage.input_audio_tokens) and SOUND + case.suffix in case.entry,
        "gemini/gemini-3.5-flash",
    ),
    "stand-ins": Rule(
        "a rate that a tier or band leaves out is never below the dimension's own; LiteLLM takes the first band's",
        lambda case: (
            case.above
            and any(getattr(case.shape.usage, name) and case.lists(key) and case.lacks(key) for name, key in STANDS_IN)
        ),
        "vertex_ai/gemini-3-flash-preview",
    ),
    "Grok elsewhere": Rule(
        "xAI's threshold is inclusive, so that of its models at other sellers is taken to be",
        lambda case: case.above and "grok" in case.model and case.provider != "xai",
        "vertex_ai/xai/grok-4.6",
    ),
    "unknown to LiteLLM": Rule(
        "LiteLLM does not find this entry of the list",
        lambda case: case.fails,
        "command-r-plus-08-2024",
    ),
}


def _bands(entry: dict[str, Any]) -> set[tuple[str, str]]:
    return {band for key in entry for band in re.findall(r"_above_(\d+)(k?)_tokens", key)}


def _shapes(entry: dict[str, Any]) -> Iterator[Shape]:
    bands = {int(n) * (1000 if k else 1) for n, k in _bands(entry)}
    bands |= {int(step["range"][0]) for step in entry.get("tiered_pricing") or () if step.get("range")} - {0}
    for threshold in bands:
        yield Shape(Usage(input_tokens=threshold, output_tokens=300))
    for inputs in (1000, *(threshold + 1 for threshold in bands)):
        for tier in TIERS:
            for parts in PARTS:
                yield Shape(Usage(input_tokens=inputs, output_tokens=300, **parts), tier)
        yield Shape(Usage(input_tokens=inputs, output_tokens=300, cache_write_tokens=400), None, True)
    for region in ("eu", "us", "regional"):
        kind = "endpoint_uplift_multiplier" if region == "regional" else f"processing_uplift_multiplier_{region}"
        if f"regional_{kind}" in entry:
            yield Shape(Usage(input_tokens=1000, output_tokens=300, cache_read_tokens=400), None, False, region)


def _theirs(provider: str, model: str, shape: Shape) -> float | None:
    import litellm
    from litellm.types.utils import (
        CacheCreationTokenDetails,
        CompletionTokensDetailsWrapper,
        PromptTokensDetailsWrapper,
    )
    from litellm.types.utils import Usage as TheirUsage

    usage = shape.usage
    written = usage.cache_write_tokens or 0
    lasting = CacheCreationTokenDetails(ephemeral_1h_input_tokens=written, ephemeral_5m_input_tokens=0)
    told = TheirUsage(
        prompt_tokens=usage.input_tokens,
        completion_tokens=usage.output_tokens,
        total_tokens=usage.total_tokens,
        prompt_tokens_details=PromptTokensDetailsWrapper(
            cached_tokens=usage.cache_read_tokens or 0,
            cache_creation_tokens=written,
            audio_tokens=usage.input_audio_tokens or 0,
            cache_creation_token_details=lasting if shape.long_write else None,
        ),
        completion_tokens_details=CompletionTokensDetailsWrapper(
            reasoning_tokens=usage.reasoning_tokens or 0, audio_tokens=usage.output_audio_tokens or 0
        ),
    )
    try:
        both = litellm.cost_per_token(
            model=model,
            custom_llm_provider=provider,
            usage_object=told,
            prompt_tokens=usage.input_tokens or 0,
            completion_tokens=usage.output_tokens or 0,
            service_tier=None if shape.tier == "batch" else shape.tier,
            call_type="retrieve_batch" if shape.tier == "batch" else "completion",
            data_residency=shape.region if shape.region != "regional" else None,
            vertex_location="europe-west1" if shape.region == "regional" else None,
        )
    except Exception:
        return None
    return sum(both) * NANO


def _ours(book: PriceBook, rates: Rates | None, shape: Shape) -> int | None:
    if rates is None or shape.region is None:
        return None if rates is None else rates.cost(shape.usage, shape.tier, shape.long_write)
    response = Response(
        id=None, model=rates.model, message=Message.assistant("x"), finish_reason="stop", usage=shape.usage
    )
    return book.price_response(rates, response, None, shape.region)


def _difference(case: Case) -> str:
    """The rule that explains a difference, `ALIKE` without one."""
    if case.fails:
        return "unknown to LiteLLM"
    assert case.theirs is not None
    if case.ours is not None and -1e-3 * max(1.0, case.theirs / NANO) <= case.ours - case.theirs < 1.01:
        return ALIKE
    return next((name for name, rule in RULES.items() if rule.applies(case)), UNEXPLAINED)


def _bound(case: Case, rates: Rates) -> int:
    usage, tier = case.shape.usage, case.shape.tier
    inputs, outputs = usage.input_tokens or 0, usage.output_tokens or 0
    bound = rates.bound(inputs, outputs, tier=tier, media=bool(usage.input_audio_tokens))
    if rates.flat is not None and tier is None:  # what `Route.most` takes a short cut by
        text, output, fee = rates.flat
        assert -(-(inputs * text + outputs * output + fee) // 10**9) >= bound
    return bound


def _compare(listed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, step: int) -> Counter[str]:
    """Compare every `step`-th model of a list, and the examples of the rules."""
    import litellm

    monkeypatch.setattr(model_metadata, "_data", listed)
    # Entries are looked up once a process: another list needs another reader.
    monkeypatch.setattr(model_metadata, "model_info", partial(model_metadata.model_info))
    monkeypatch.setattr(litellm, "model_cost", {key: value for key, value in listed.items() if key not in RESERVED})
    monkeypatch.setattr(litellm, "suppress_debug_info", True)
    litellm.utils._invalidate_model_cost_lowercase_map()
    book, seen, unexplained = PriceBook(), Counter[str](), []
    usual = [key for key, entry in listed.items() if key not in RESERVED and entry.get("mode") in MODES]
    examples = {rule.example for rule in RULES.values()} & set(usual)
    for key in dict.fromkeys([*usual[::step], *sorted(examples)]):
        entry = listed[key]
        provider = entry.get("litellm_provider", "")
        provider = "vertex_ai" if provider.startswith("vertex_ai") else PREFIXES.get(provider, provider)
        model = key if key.startswith(provider + "/") else f"{provider}/{key}"
        rates = book.rates(model, "litellm")
        if provider in SUBSCRIPTIONS:  # not billed by the token; LiteLLM would ask for a log-in
            assert rates is None
            continue
        for shape in _shapes(entry):
            theirs = _theirs(provider, model, shape)
            ours = _ours(book, rates, shape)
            twice = model != key and model in listed
            case = Case(provider, model, entry, shape, ours, theirs, theirs is None, twice)
            name = _difference(case)
            most = max(case.ours or 0, 0 if case.doubled else math.floor(theirs or 0))
            if rates is not None and _bound(case, rates) < most:
                unexplained.append(f"{model}: bound {_bound(case, rates)} below {most}, for {shape}")
            seen[name] += 1
            if name == UNEXPLAINED:
                unexplained.append(f"{model}: {case.ours}, LiteLLM {case.theirs}, for {shape}")
    assert not unexplained, "\n".join([f"{len(unexplained)} prices differ without a reason, such as", *unexplained[:9]])
    return seen


RESERVED = model_metadata._RESERVED


_FORMULAS = "litellm.litellm_core_utils.llm_cost_calc.utils"


def _both_lists(monkeypatch: pytest.MonkeyPatch, step: int) -> Counter[str]:
    pytest.importorskip("litellm")
    import litellm

    theirs = json.loads(files("litellm").joinpath("model_prices_and_context_window_backup.json").read_text("utf-8"))
    try:
        seen = Counter[str]()
        for listed in (model_metadata._snapshot(), theirs):
            with monkeypatch.context() as patch:  # whatever the time of day is
                patch.setattr(f"{_FORMULAS}._is_off_peak", lambda *_, **__: True, raising=False)
                seen += _compare(listed, patch, step)
    finally:
        litellm.utils._invalidate_model_cost_lowercase_map()
    return seen


def _judge(seen: Counter[str]) -> None:
    unused = set(RULES) - set(seen)
    assert not unused, f"rules that explain nothing: {sorted(unused)}"
    explained = sum(seen.values()) - seen[ALIKE] - sum(seen[name] for name in ("batch", "tier without rates"))
    assert explained < 0.2 * seen[ALIKE], seen


def test_models_cost_what_litellm_says_or_differ_for_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 60th model of both lists, and one for each rule: 5 to 14 s."""
    _judge(_both_lists(monkeypatch, 60))


@pytest.mark.slow
def test_all_models_cost_what_litellm_says_or_differ_for_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in two minutes."""
    _judge(_both_lists(monkeypatch, 1))
