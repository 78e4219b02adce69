"""What one model costs: exact integer arithmetic over DSPy's model metadata, or over a `Price` the user gives.

A model's rates are compiled once into integers (see `tables`); pricing an attempt is then a few multiplications,
rounded UP to a whole nano-USD. What a usage counter means at a provider, and which rate applies to it, follows
`dspy/clients/costs.py`; an unknown price is None, never zero. Beyond it, what a region costs more is charged where the
region is known and held where it is not. As there, off-peak discounts are not modelled (the peak rate is charged).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspy_prod.pricing import tables
from dspy_prod.records import MOST_TOKENS

if TYPE_CHECKING:
    from dspy.lm15 import Usage

ATTO_PER_NANO = 10**9
_UNLIMITED = 2**31 - 1

_SEPARATE_REASONING = frozenset(("gemini", "vertex", "vertex-express", "xai"))
_SURELY_STANDARD = frozenset(("default", "standard", "on_demand"))
TIERS: dict[str | None, str] = {None: "", "auto": "", "priority": "_priority", "flex": "_flex"}
TIERS.update(dict.fromkeys(_SURELY_STANDARD, ""))


class Rates:
    """What one model costs at one provider, compiled to integers.

    Attributes:
        model, prefix: the model's name at the provider, and what precedes it in LiteLLM's string.
        provider: whose usage counters these are, by DSPy's name; None and `"litellm"` count in OpenAI's way.
        source: `"override"` (a `Price`) or `"dspy"` (metadata).
        max_output_tokens, max_input_tokens: the model's own limits, None when unknown.
        flat: the dearest (input, output, fee) in atto-USD when they depend on nothing but the tier, else None.
        uplifts: by how much the regions that have a price of their own are dearer, in thousandths; mostly empty.
    """

    __slots__ = (
        *("model", "prefix", "provider", "source", "max_output_tokens", "max_input_tokens", "flat", "uplifts"),
        *("_bands", "_disjoint_cache", "_fee", "_fee_per_image", "_input", "_output", "_rows", "_separate_reasoning"),
        "_thresholds",
    )

    def __init__(self, model: str, provider: str | None, source: str, prefix: str, info: Mapping[str, Any]) -> None:
        """Compile `info`, an entry of the metadata that has the plain input and output rates."""
        self.model, self.prefix, self.provider, self.source = model, prefix, provider, source
        # The legacy `max_tokens` is the output limit or something larger.
        self.max_output_tokens = tables.limit(info, "max_output_tokens", "max_tokens")
        self.max_input_tokens = tables.limit(info, "max_input_tokens")
        # Anthropic's cache counters are disjoint from its input tokens; the reasoning of Gemini and xAI is separate
        # from their output tokens; everywhere else both are included (`dspy/clients/costs.py`).
        self._disjoint_cache = provider is not None and provider.endswith("anthropic")
        self._separate_reasoning = provider in _SEPARATE_REASONING
        found = tables.thresholds(info)
        # Whose prompt is exactly as long as xAI's threshold pays for a longer one.
        inclusive = 1 if provider == "xai" or prefix == "xai/" or "grok" in model.lower() else 0
        self._thresholds = [tokens - inclusive for tokens, _ in found]
        bands = ["", *(suffix for _, suffix in found)]
        known = {"", "_priority", "_flex"}
        self._rows = {(t, long): [tables.row(info, b, t, long) for b in bands] for t in known for long in (False, True)}
        if not self._disjoint_cache:  # whose cache entries last longer at no charge, unless it lists one
            for tier in known:
                pairs = zip(self._rows[tier, False], self._rows[tier, True], strict=True)
                self._rows[tier, True] = [brief if long[4] is None else long for brief, long in pairs]
        # Anthropic bills the tokens of a cache entry that lasts an hour twice, wherever the model is sold.
        write = 200 if source == "dspy" and (self._disjoint_cache or "claude" in model.lower()) else 0
        kinds = {"standard": {""}, "known": known, "every": tables.tiers(info) | known}
        self._bands = {name: tables.dearest(info, bands, which, write) for name, which in kinds.items()}
        self._fee = tables.atto(info.get("input_cost_per_request")) or 0
        self._fee_per_image = tables.atto(info.get("input_cost_per_image")) or 0
        self.uplifts = tables.uplifts(info)
        most = self._bands["known"][0]
        flat = not self._thresholds and most.text == most.media and not self._fee_per_image
        self.flat = (most.text, most.output, self._fee) if flat else None
        self._input, self._output = (rate or 0 for rate in self._rows["", False][0][:2])

    def tokens(self, usage: Usage) -> int | None:
        """All tokens of a call, which a rate limit counts, each once; None when they are not known."""
        inputs: int | None = usage.input_tokens
        outputs: int | None = usage.output_tokens
        if inputs is None or outputs is None:
            return None
        if self._disjoint_cache:
            inputs += (usage.cache_read_tokens or 0) + (usage.cache_write_tokens or 0)
        total = inputs + outputs + ((usage.reasoning_tokens or 0) if self._separate_reasoning else 0)
        return total if total <= MOST_TOKENS else None

    def cost(self, usage: Usage, tier: str | None = None, long_cache: bool = False) -> int | None:
        """The exact cost in nano-USD, rounded up; None when it cannot be known.

        `tier` is the service tier that served the call (None: standard). `long_cache` says that prompt-cache writes
        were asked to last long (`CacheConfig.retention`), which Anthropic bills at its one-hour rate.
        """
        inputs: int | None = usage.input_tokens
        outputs: int | None = usage.output_tokens
        if inputs is None or outputs is None or inputs + outputs > MOST_TOKENS:
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
        rows = self._rows.get((TIERS.get(tier, "unknown"), long_cache))
        if inputs < 0 or outputs < 0 or rows is None or total_input + reasoning > MOST_TOKENS:
            return None
        row = rows[bisect_left(self._thresholds, total_input)]
        total = self._fee
        for count, rate in zip((inputs, outputs, reasoning, cached, written, audio_in, audio_out), row, strict=True):
            if count and rate is None:
                return None
            total += count * (rate or 0)
        return -(-total // ATTO_PER_NANO)

    def _applicable(self, input_tokens: int, tier: str | None, media: bool, images: int) -> tuple[int, int, int]:
        name = "standard" if tier in _SURELY_STANDARD else "known" if tier in TIERS else "every"
        text, image, with_media, output = self._bands[name][bisect_left(self._thresholds, input_tokens)]
        if not media and not images:
            return text, output, self._fee
        return (with_media if media else image), output, self._fee + images * self._fee_per_image

    def bound(
        self, input_tokens: int, output_tokens: int, *, tier: str | None = None, media: bool = False, images: int = 0
    ) -> int:
        """The most these tokens can cost in nano-USD: each at the dearest rate that may apply, plus fees.

        Input at the dearest of plain, cache read and cache write (the one-hour rate included), output at the dearest
        of plain, reasoning and audio, both over every long-context band that `input_tokens` can reach and every region
        that may serve. `tier` is `Config.service_tier`: unset and "auto" cover priority and flex too (OpenAI then
        follows the project's setting), "default" only the standard tier. `images` pictures admit the rate and the fee
        of pictures, `media` those of sound and film too.
        """
        input_rate, output_rate, fee = self._applicable(input_tokens, tier, media, images)
        return -(-(input_tokens * input_rate + output_tokens * output_rate + fee) // ATTO_PER_NANO)

    def max_output_for(
        self, nano: int, input_tokens: int, *, tier: str | None = None, media: bool = False, images: int = 0
    ) -> int:
        """The largest `output_tokens` whose `bound` is at most `nano` nano-USD; 0 when not even the input fits."""
        input_rate, output_rate, fee = self._applicable(input_tokens, tier, media, images)
        left = nano * ATTO_PER_NANO - input_tokens * input_rate - fee
        return 0 if left < 0 else min(left // output_rate, _UNLIMITED) if output_rate else _UNLIMITED
