"""The prices of all models: which rates a model string means, and what an answer cost by them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from dspy_prod.options import Price
from dspy_prod.pricing import lookup, tables
from dspy_prod.pricing.bounds import hosted_fees
from dspy_prod.pricing.media import MEDIA
from dspy_prod.pricing.rates import TIERS, Rates
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock

if TYPE_CHECKING:
    from dspy.lm15 import Request, Response

_log = logging.getLogger("dspy_prod")

FIRST_PAUSE: Final = 1.0
"""Seconds after which metadata that could not be read is tried again; twice as long after each further failure."""
LONGEST_PAUSE: Final = 60.0

MOST: Final = 4096
"""Models remembered: providers choose the names of served ones, so bound what they can fill."""

_Key = tuple[str, "str | None", "str | None"]
K = TypeVar("K")
V = TypeVar("V")


def _priced(price: Price, known: Rates | None) -> dict[str, Any]:
    """A `Price` as a metadata entry; the limits it leaves open are the metadata's."""
    per_million = (price.input, price.output, price.reasoning, price.cached_input, price.cache_write)
    return {
        **{key: Decimal(repr(usd)) / 10**6 for (key, _), usd in zip(tables.DIMENSIONS, per_million) if usd is not None},  # noqa: B905
        "input_cost_per_request": price.per_request,
        "max_output_tokens": price.max_output_tokens or (known and known.max_output_tokens),
        "max_input_tokens": price.max_input_tokens or (known and known.max_input_tokens),
    }


def _remember(known: dict[K, V], key: K, value: V) -> None:
    if len(known) >= MOST:
        known.clear()
    known[key] = value


def remedy(model: str) -> str:
    """What to do about a model whose price is not known."""
    said = f"pass prices={{{model!r}: dspy_prod.Price(input=..., output=...)}} (USD per million tokens)"
    head = model.partition("/")[0]
    if not head.startswith("azure"):
        return said
    return f"{said}, or say which model this deployment is, e.g. base_model='{head}/gpt-4o-mini'"


class _Unread(NamedTuple):
    """What is said of a model while its metadata cannot be read: an override's rates, or None."""

    rates: Rates | None
    until: float
    pause: float


class PriceBook:
    """Rates by model, each compiled once. Safe to share between threads; no method raises.

    Args:
        overrides: a model string as given to the LM (`"openai/gpt-4o-mini"`), or the name without its provider prefix,
            to a `Price`, which wins over the metadata.
        clock: when metadata that could not be read is tried again.
    """

    def __init__(self, overrides: Mapping[str, Price] | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        self._overrides = dict(overrides or {})
        self._now = clock.monotonic
        self._rates: dict[_Key, Rates | None] = {}
        self._served: dict[tuple[str, str | None, str], _Key] = {}
        self._unread: dict[_Key, _Unread] = {}

    def rates(self, model: str, provider: str | None = None, base: str | None = None) -> Rates | None:
        """The rates of a model; None when its price is unknown.

        Args:
            model: the string given to the LM.
            provider: DSPy's name of the provider that serves it (`dspy.clients.capabilities.resolve(lm).provider`), or
                `"litellm"` when the call goes through LiteLLM, which reports any usage in OpenAI's way; None resolves
                it as DSPy's `engine="auto"` does. For a provider that only LiteLLM has, its prefix and None mean the
                same.
            base: the model behind a deployment whose own name tells nothing (`base_of`).
        """
        key = (model, provider, base)
        try:
            return self._rates[key]
        except KeyError:
            pass
        unread = self._unread.get(key)
        if unread is not None and self._now() < unread.until:
            return unread.rates
        found, error = self._compile(model, provider, base)
        if error is None:
            self._unread.pop(key, None)
            _remember(self._rates, key, found)
        else:  # what cannot be read now may be readable in a moment; no call has to pay for the asking
            if unread is None:
                _log.warning("The metadata of %r cannot be read; its price counts as unknown", model, exc_info=error)
            pause = FIRST_PAUSE if unread is None else min(2 * unread.pause, LONGEST_PAUSE)
            _remember(self._unread, key, _Unread(found, self._now() + pause, pause))
        return found

    def settled(self, model: str, provider: str | None = None, base: str | None = None) -> bool:
        """Whether what `rates` said last of this model holds for good."""
        return (model, provider, base) in self._rates

    def _compile(self, model: str, provider: str | None, base: str | None) -> tuple[Rates | None, Exception | None]:
        """The rates, and why the metadata could not be read."""
        native, wire = lookup.resolve(model)
        provider = provider or native
        known, error = None, None
        try:
            for name in (*lookup.names_of(base, model), model):
                found = lookup.find(name, provider, *((native, wire) if name == model else lookup.resolve(name)))
                if found is not None:
                    known = Rates(found.name, provider, "dspy", found.prefix, found.info)
                    break
        except Exception as failed:
            error = failed
        for name in (model, model.partition("/")[2], wire):
            if name in self._overrides:
                return Rates(name, provider, "override", "", _priced(self._overrides[name], known)), error
        return known, error

    def served(self, model: str, provider: str | None, name: str) -> Rates | None:
        """The rates of the model that answered, `name`, for one whose own price is unknown: an Azure deployment."""
        if name == model:
            return None
        try:
            return self._rates[self._served[model, provider, name]]
        except KeyError:
            pass
        native, _ = lookup.resolve(model)
        head, slash, rest = model.partition("/")
        full = head + slash + name if lookup.through_litellm(model, provider, native) and rest else name
        _remember(self._served, (model, provider, name), (full, provider or native, None))
        return self.rates(full, provider or native)

    def price_response(
        self, rates: Rates | None, response: Response, request: Request | None, region: str | None = None
    ) -> int | None:
        """What a completed response cost in nano-USD, rounded up; None when it cannot be known.

        As in DSPy, the model that really served is priced when the metadata knows it, and the tier the provider
        reports wins over the one asked for; generated media and hosted tools are billed apart from tokens: None.
        `region` is where it was served, as in `Rates.uplifts`; what Anthropic tells of it wins.
        """
        if rates is None:
            return None
        parts = response.message.parts
        if len(parts) != 1 or parts[0].type != "text":
            if any(part.type in MEDIA for part in parts):
                return None
        elif response.provider_data is None and request is not None and response.model == rates.model:
            config = request.config
            if not (request.tools or config.extensions or config.service_tier or config.cache or rates.uplifts):
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
        cost = rates.cost(response.usage, tier if TIERS.get(tier) != "" else None, long_cache)
        if cost is None or not rates.uplifts:
            return cost
        usage = raw.get("usage")
        told = usage.get("inference_geo") if isinstance(usage, dict) else None
        return -(-cost * rates.uplifts.get(told.lower() if isinstance(told, str) else region or "", 1000) // 1000)
