"""A route: one model behind one upstream, with its own breaker, limit and retry budget."""

from __future__ import annotations

import logging
import threading
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from dspy.lm15 import Request, Response, Usage

from dspy_prod.options import CircuitBreaker, RateLimit, Retry
from dspy_prod.pipeline.fitting import Fitting
from dspy_prod.pipeline.upstream.destination import destination, fingerprint
from dspy_prod.pipeline.upstream.ordinary import Beside
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.policies.breaker.breaker import Breaker
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.policies.cache import EMPTY_USAGE
from dspy_prod.policies.retry import RetryBudget
from dspy_prod.pricing.book import PriceBook, remedy
from dspy_prod.pricing.bounds import input_bound, output_bound
from dspy_prod.pricing.lookup import base_of
from dspy_prod.pricing.media import census
from dspy_prod.pricing.rates import ATTO_PER_NANO, Rates
from dspy_prod.pricing.regions import region_of
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.runtime.forking import RegistryLock, reset_after_fork
from dspy_prod.stores.base import Store
from dspy_prod.telemetry.events import EventBus

_log = logging.getLogger("dspy_prod")

PRIMARY = "primary"

_LONGEST_PAUSE: Final = 3600.0
_UNKNOWN_OUTPUT = 4096
"""Output tokens reserved at the limiter while nothing is known about a model's answers."""


class Identity:
    """What all routes of one limiter key share in this process; breaker and retry budget by their settings."""

    def __init__(self, store: Any = None) -> None:
        self.store: Callable[[], Any] = _reference(store)
        self.throttled_at: float | None = None
        self.throttled = False  # a 429 came: from now on the limiter is asked even when nothing is configured
        self.breakers: dict[CircuitBreaker, Breaker] = {}
        self.retry_budgets: dict[Retry, RetryBudget] = {}
        self.states: weakref.WeakValueDictionary[tuple[Any, ...], RouteState] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._outputs: deque[int] = deque(maxlen=200)
        self._sorted: list[int] = []
        reset_after_fork(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        for budget in self.retry_budgets.values():
            budget._after_fork()
        for breaker in self.breakers.values():
            breaker._after_fork()

    def tells(self) -> bool:
        """Whether a call that comes later has to know of it: a circuit that is not quite sound, or a pause."""
        if self.throttled_at is not None and SYSTEM_CLOCK.monotonic() < self.throttled_at + _LONGEST_PAUSE:
            return True
        looks = [breaker.snapshot() for breaker in self.breakers.values()]
        return any(look.state != "closed" or look.failures or look.slow for look in looks)

    def learn(self, output_tokens: int) -> None:
        """Remember the size of a real answer."""
        outputs, ordered = self._outputs, self._sorted
        with self._lock:
            if len(outputs) == outputs.maxlen:
                ordered.remove(outputs[0])
            outputs.append(output_tokens)
            insort(ordered, output_tokens)

    def typical_output(self) -> int | None:
        """Running p90 of real output tokens, None before the first."""
        with self._lock:
            ordered = self._sorted
            return ordered[min(len(ordered) - 1, int(len(ordered) * 0.9))] if ordered else None


class RouteState:
    """What all routes of one identity with the same settings share: the identity, and which of its parts they use."""

    __slots__ = ("__weakref__", "breaker", "identity", "learn", "retry_budget", "typical_output")

    def __init__(self, identity: Identity, breaker: Breaker | None, retry_budget: RetryBudget) -> None:
        self.identity = identity
        self.breaker = breaker
        self.retry_budget = retry_budget
        self.learn = identity.learn
        self.typical_output = identity.typical_output

    @property
    def throttled(self) -> bool:
        return self.identity.throttled

    @throttled.setter
    def throttled(self, throttled: bool) -> None:
        self.identity.throttled = throttled
        self.identity.throttled_at = SYSTEM_CLOCK.monotonic() if throttled else None


class Route:
    """See the module's docstring.

    Attributes:
        name: `"primary"`, or the model of a fallback.
        limit_key: identity of limiter and breaker: destination, key fingerprint and model.
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
        self.limit_key = f"{destination(clients, self.model, extras)}|{fingerprint(clients, extras)}|{self.model}"
        timeout = upstream.clients.get("timeout")
        self.timeout: float | None = float(timeout) if isinstance(timeout, (int, float)) else None
        self.region = region_of(upstream.clients, self.model)
        self.state = _shared_state(store, self, retry, breaker, clock, bus)
        self._base = base_of(extras)
        self._clock = clock
        self._bus = bus
        self._rates: Rates | None = None
        self._priced = False

    def __repr__(self) -> str:
        return f"Route({self.name!r}, {self.model!r})"

    @property
    def breaker(self) -> Breaker | None:
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

    def most(self, request: Request, inputs: int, outputs: int) -> int:
        """The most that so many tokens of this request can cost, in nano-USD; prices must be known."""
        rates = self._rates if self._priced else self.rates()
        assert rates is not None
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


_IDENTITIES: weakref.WeakValueDictionary[tuple[int, str], Identity] = weakref.WeakValueDictionary()
_REMEMBERED: dict[tuple[int, str], Identity] = {}
"""Those that are kept though no route uses them: a key that is seldom used finds its open circuit again."""


class _Sweep:
    """Forget what is not in use and has nothing to tell, each time when there are twice as many as were left."""

    fewest: Final = 256

    def __init__(self) -> None:
        self.at = self.fewest

    def __call__(self) -> None:
        for key, identity in list(_REMEMBERED.items()):
            if identity.store() is None or not (identity.states or identity.tells()):
                del _REMEMBERED[key]
        self.at = max(self.fewest, 2 * len(_REMEMBERED))


_sweep = _Sweep()


def _reference(store: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(store)
    except TypeError:  # None, or a store of somebody else's that cannot be referred to so
        return lambda: store


_UNPRICED: set[str] = set()
_MAX_UNPRICED = 1_000
_LOCK = RegistryLock()


def _shared_state(
    store: Store, route: Route, retry: Retry, breaker: CircuitBreaker | None, clock: Clock, bus: EventBus
) -> RouteState:
    # A copy with other breaker settings has a breaker of its own, but the same limiter.
    key = (id(store), route.limit_key)
    with _LOCK:
        identity = _IDENTITIES.get(key)
        if identity is None or identity.store() is not store:  # an `id` may be another object's by now
            if len(_REMEMBERED) >= _sweep.at:
                _sweep()
            identity = _IDENTITIES[key] = _REMEMBERED[key] = Identity(store)
        state = identity.states.get((breaker, retry))
        if state is not None:
            return state
        guard = None if breaker is None else identity.breakers.get(breaker)
        if breaker is not None and guard is None:
            guard = identity.breakers[breaker] = Breaker(breaker, name=route.model, clock=clock, bus=bus)
        budget = identity.retry_budgets.get(retry)
        if budget is None:
            budget = identity.retry_budgets[retry] = RetryBudget(retry)
        state = identity.states[breaker, retry] = RouteState(identity, guard, budget)
        return state
