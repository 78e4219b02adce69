"""A route: one model behind one upstream, with its own breaker, limit and retry budget."""

from __future__ import annotations

import logging
from typing import Any

from dspy.lm15 import Request, Response, Usage

from dspy_prod.options import CircuitBreaker, RateLimit, Retry
from dspy_prod.pipeline.fitting import Fitting
from dspy_prod.pipeline.identities import shared_state
from dspy_prod.pipeline.upstream.destination import destination, fingerprint, server
from dspy_prod.pipeline.upstream.ordinary import Beside
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.policies.entries import EMPTY_USAGE
from dspy_prod.policies.shared_breaker import SharedBreaker
from dspy_prod.pricing.book import PriceBook, remedy
from dspy_prod.pricing.bounds import input_bound, output_bound
from dspy_prod.pricing.lookup import base_of
from dspy_prod.pricing.media import census
from dspy_prod.pricing.rates import ATTO_PER_NANO, Rates
from dspy_prod.pricing.regions import region_of
from dspy_prod.runtime.clock import Clock
from dspy_prod.runtime.forking import RegistryLock
from dspy_prod.stores.base import Store
from dspy_prod.stores.keys import joined
from dspy_prod.telemetry.events import EventBus

_log = logging.getLogger("dspy_prod")

PRIMARY = "primary"

_OPERATIONS = {"text": "text_completion", "embedding": "embeddings"}
"""What OpenTelemetry's conventions call what is asked of a model of this type; of every other it is `chat`."""

_UNKNOWN_OUTPUT = 4096
"""Output tokens reserved at the limiter while nothing is known about a model's answers."""


class Route:
    """See the module's docstring.

    Attributes:
        name: `"primary"`, or the model of a fallback.
        limit_key: identity of limiter and breaker: destination, key fingerprint and model.
        operation: what is asked of the model, as OpenTelemetry's conventions call it.
        place: address and model, whoever pays: what an operator speaks of.
        fitting: what the model of a fallback refuses; None of the model that was asked for.
        region: where the provider serves it, as far as its price depends on that (`Rates.uplifts`).
        rules: budgets of this route alone, next to those of the pipeline.
    """

    def __init__(
        self,
        name: str,
        upstream: Upstream,
        *,
        retry: Retry,
        breaker: CircuitBreaker | None,
        limit: RateLimit | None,
        prices: PriceBook,
        store: Store,
        clock: Clock,
        bus: EventBus,
        defaults: dict[str, Any] | None = None,
        rules: tuple[BudgetRule, ...] = (),
    ) -> None:
        self.name = name
        self.model = upstream.model
        self.upstream = upstream
        self.operation = _OPERATIONS.get(upstream.model_type, "chat")
        self.retry = retry
        self.limit = limit if limit is not None else _NO_LIMIT
        self.limited = any(value is not None for value in (self.limit.rpm, self.limit.tpm, self.limit.concurrency))
        self.paced = self.limit.rpm is not None or self.limit.tpm is not None
        self._tpm = int(self.limit.tpm or 0)
        self.learning = self.limit.estimate == "learned"  # the size of real answers says what to reserve
        self.prices = prices
        self.defaults = defaults or {}
        self.rules = rules
        self.fitting = None if name == PRIMARY else Fitting(self.model, upstream)
        clients, extras = upstream.clients, upstream.extras
        known = upstream.known_as
        self.limit_key = joined(destination(clients, self.model, extras), fingerprint(clients, extras), known)
        self.place = joined(server(clients, self.model), known)
        timeout = upstream.clients.get("timeout")
        self.timeout: float | None = float(timeout) if isinstance(timeout, (int, float)) else None
        self.region = region_of(upstream.clients, self.model)
        self._base = base_of(extras)
        self.state = shared_state(
            store, self.limit_key, self.place, model=self.model, retry=retry, breaker=breaker, clock=clock, bus=bus,
            everywhere=upstream.known_everywhere,
        )  # fmt: skip
        self._clock = clock
        self._bus = bus
        self._rates: Rates | None = None
        self._priced = False

    def __repr__(self) -> str:
        return f"Route({self.name!r}, {self.model!r})"

    @property
    def breaker(self) -> SharedBreaker | None:
        return self.state.breaker

    def rates(self) -> Rates | None:
        """The model's prices, None when unknown. Looked up until the answer holds for good."""
        if not self._priced:
            self._rates = self.prices.rates(self.model, self.upstream.provider, self._base)
            self._priced = self.prices.settled(self.model, self.upstream.provider, self._base)
            if self._priced and self._rates is None:
                self._warn_unpriced()
        return self._rates

    def _warn_unpriced(self) -> None:
        """Tell once per model that its cost is not known: an unknown price would else go unnoticed without a budget."""
        with _LOCK:
            if self.model in _UNPRICED or len(_UNPRICED) >= _MAX_UNPRICED:
                return
            _UNPRICED.add(self.model)
        _log.warning(
            "No price is known for %r, so its calls are recorded without a cost, unless their answers name a model "
            "that is known; %s",
            self.model,
            remedy(self.model),
        )
        self._bus.emit("unpriced_model", self._clock.time(), model=self.model)

    def price(
        self, request: Request, beside: Beside | None, response: Response, usage: Usage
    ) -> tuple[Rates | None, int | None]:
        """The prices by which an answer counts and what it cost in nano-USD, None where that is not known: `usage` is
        as much of what the answer told as is believed.

        LiteLLM counts usage in OpenAI's way, whatever the engine that was tried before it does. Where no price is known
        of the model that was asked, an Azure deployment for one, that of the model that answered holds.
        """
        upstream = self.upstream
        away = upstream.fell_back and not upstream.is_native(request, beside)
        if away:
            rates = self.prices.rates(self.model, "litellm", self._base)
        else:
            rates = self._rates if self._priced else self.rates()
        if rates is None:
            rates = self.prices.served(self.model, "litellm" if away else upstream.provider, response.model)
            if rates is None:
                return None, None
        if usage is EMPTY_USAGE:
            return rates, None
        return rates, self.prices.price_response(rates, response, request, self.region)

    def bounds(self, request: Request) -> tuple[int | None, int | None]:
        """Upper bounds of (input, output) tokens, None where none is known."""
        rates = self._rates if self._priced else self.rates()
        if rates is None:
            return input_bound(request, max_input_tokens=None), output_bound(request, max_output_tokens=None)
        return (
            input_bound(request, max_input_tokens=rates.max_input_tokens),
            output_bound(request, max_output_tokens=rates.max_output_tokens),
        )

    def most(self, request: Request, inputs: int | None, outputs: int | None) -> int | None:
        """The most that so many tokens of this request can cost, in nano-USD; None where that is not known."""
        rates = self._rates if self._priced else self.rates()
        if rates is None or inputs is None or outputs is None:
            return None
        if rates.flat is not None and request.config.service_tier is None:
            input_rate, output_rate, fee = rates.flat
            return -(-(inputs * input_rate + outputs * output_rate + fee) // ATTO_PER_NANO)
        images, others = census(request)
        return rates.bound(inputs, outputs, tier=request.config.service_tier, media=others, images=images)

    def affords(self, request: Request, nano: int, inputs: int) -> int:
        """The most output tokens of this request that `nano` nano-USD pay for; prices must be known."""
        rates = self._rates if self._priced else self.rates()
        assert rates is not None
        images, others = census(request)
        return rates.max_output_for(nano, inputs, tier=request.config.service_tier, media=others, images=images)

    def limiter_tokens(self, inputs: int | None, outputs: int | None) -> int:
        """Tokens to reserve at the limiter for these bounds: all of them, or the learned size; at most `tpm`."""
        most = self._tpm
        if outputs is None or self.limit.estimate == "learned":
            learned = self.state.typical_output()
            if outputs is None:
                outputs = _UNKNOWN_OUTPUT if learned is None else 2 * learned
            if self.limit.estimate == "learned" and learned is not None:
                outputs = min(outputs, learned)
                inputs = None if inputs is None else max(1, inputs // 3)  # about three bytes a token
        return most if inputs is None else min(most, inputs + outputs)


_NO_LIMIT = RateLimit()

_UNPRICED: set[str] = set()
_MAX_UNPRICED = 1_000
_LOCK = RegistryLock()
