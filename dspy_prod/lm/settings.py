"""What an LM was built with: policies, client settings and everything outside DSPy's canonical arguments.

`Settings` is immutable and shared by copies. Secrets live in it while the process lives; they are never written: a
pickle carries a mark by which the same process finds them again. Another process takes keys from its environment.
"""

from __future__ import annotations

import os
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import dspy
from dspy.clients.backend_selection import CLIENT_KEYS

from dspy_prod.compat.lm15 import canonical_arguments
from dspy_prod.errors import ConfigError
from dspy_prod.lm.sealing import SealedLM, seal, unseal
from dspy_prod.options import Budget, Cache, CircuitBreaker, Options, Price, RateLimit, Retry
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock

_OWN_KEYS: Final = frozenset({"rollout_id", "n", "num_generations", "prompt_cache"})
CANONICAL_KEYS: Final = canonical_arguments() | _OWN_KEYS


def split(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """LM arguments as (canonical, client settings, extras that only LiteLLM understands)."""
    canonical: dict[str, Any] = {}
    clients: dict[str, Any] = {}
    extras: dict[str, Any] = {}
    for key, value in arguments.items():
        if key in CLIENT_KEYS:
            if value is not None:
                clients[key] = value
        elif key in CANONICAL_KEYS:
            canonical[key] = value
        else:
            _refuse_slip(key, value)
            extras[key] = value
    return canonical, clients, extras


_POLICY_NAMES: Final = ("retry", "breaker", "limit", "budget", "fallbacks", "prices", "namespace", "num_retries")


@lru_cache(maxsize=256)
def _meant(name: str) -> str | None:
    return next(iter(get_close_matches(name, _POLICY_NAMES, n=1, cutoff=0.8)), None)


def _refuse_slip(name: str, value: Any) -> None:
    """Refuse a misspelt policy: it would travel on to LiteLLM, and nobody would notice that it is not in force."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    kinds: dict[type[Any], str] = {
        Retry: "retry", CircuitBreaker: "breaker", RateLimit: "limit", Budget: "budget", Cache: "cache",
    }  # fmt: skip
    meant = kinds.get(type(first)) or _meant(name)
    if meant == name:
        raise ConfigError(f"{name}= is said to the LM, not to one call; use lm.copy({name}=...)")
    if meant is not None:
        raise ConfigError(f"LM has no argument {name!r}; did you mean {meant}=...?")


@dataclass(frozen=True)
class Settings:
    """See the module's docstring. Fields are those of `dspy_prod.LM`."""

    engine: Any = "auto"
    async_engine: Any = None
    clients: Mapping[str, Any] = field(default_factory=dict, repr=False)
    extras: Mapping[str, Any] = field(default_factory=dict, repr=False)
    retry: Retry = field(default_factory=Retry)
    breaker: CircuitBreaker | None = field(default_factory=CircuitBreaker)
    limit: RateLimit | None = None
    cache: Cache = field(default_factory=Cache)
    budgets: tuple[Budget, ...] = ()
    fallbacks: tuple[Any, ...] = ()
    prices: Mapping[str, Price] = field(default_factory=dict)
    store: Any = field(default=None, repr=False)
    namespace: str = ""
    clock: Clock = field(default=SYSTEM_CLOCK, repr=False)
    opened: Any = field(default=None, repr=False)
    """The store object in use, once there is one: copies share it, wherever the process has changed to since."""

    def sealed(self) -> Settings:
        """The same settings, fit to be written: no secret in them, and a URL in place of the store."""
        fallbacks = tuple(SealedLM.of(item) if _writes_its_key(item) else item for item in self.fallbacks)
        url = None if self.opened is None else self.opened.url
        return replace(
            self, clients=seal(self.clients), extras=seal(self.extras), fallbacks=fallbacks, store=url,
            clock=SYSTEM_CLOCK, opened=None,
        )  # fmt: skip

    def unsealed(self) -> Settings:
        """The settings with the secrets this process remembers for them."""
        fallbacks = tuple(item.opened() if isinstance(item, SealedLM) else item for item in self.fallbacks)
        return replace(self, clients=unseal(self.clients), extras=unseal(self.extras), fallbacks=fallbacks)


def _writes_its_key(item: Any) -> bool:
    return isinstance(item, dspy.LM) and not isinstance(getattr(item, "settings", None), Settings)


_LIVING: weakref.WeakValueDictionary[str, Settings] = weakref.WeakValueDictionary()


def remember(settings: Settings) -> str:
    """A token by which this process finds these very settings, for as long as anybody uses them."""
    token: str | None = settings.__dict__.get("_token")
    if token is None:
        token = uuid.uuid4().hex
        object.__setattr__(settings, "_token", token)  # not a field, so that `replace` does not copy it
    _LIVING[token] = settings
    return token


def recall(token: str) -> Settings | None:
    """The settings behind a token; None in another process, or when nobody uses them any more."""
    return _LIVING.get(token)


def option(kind: type[Options], value: Any, name: str, *, default: Options | None) -> Any:
    """A policy option as given: an instance, a table of its fields, None for the default, False for off."""
    if value is None:
        return default
    if value is False:
        return None
    if value is True:
        return default if default is not None else kind()
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        return kind(**value)
    raise ConfigError(
        f"{name}= takes a dspy_prod.{kind.__name__}, a mapping of its fields, or False to switch it off; "
        f"got {type(value).__name__}"
    )


def retry_option(retry: Any, num_retries: int | None) -> Retry:
    """`retry=` and DSPy's `num_retries=` as one policy."""
    if num_retries is not None:
        if retry is not None:
            raise ConfigError(
                "retry= and num_retries= both say how often to try; give one (num_retries=n means Retry(attempts=n+1))"
            )
        if isinstance(num_retries, bool) or not isinstance(num_retries, int) or num_retries < 0:
            raise ConfigError(f"num_retries={num_retries!r} must be a non-negative integer")
        return Retry(attempts=num_retries + 1)
    chosen = option(Retry, retry, "retry", default=Retry())
    return chosen if chosen is not None else Retry(attempts=1)


def budget_options(budget: Any) -> tuple[Budget, ...]:
    """`budget=`: none, one or several."""
    if budget is None or budget is False:
        return ()
    given: Sequence[Any] = budget if isinstance(budget, (list, tuple)) else (budget,)
    budgets = tuple(option(Budget, item, "budget", default=None) for item in given)
    if any(item is None for item in budgets):
        raise ConfigError("budget= takes dspy_prod.Budget objects; drop the empty entry")
    titles = [item.title for item in budgets]
    for title in titles:
        if titles.count(title) > 1:
            raise ConfigError(f"two budgets are called {title!r}; give one of them its own name=...")
    return budgets


def price_options(prices: Any) -> dict[str, Price]:
    """`prices=`: model string to `Price`."""
    if prices is None:
        return {}
    if not isinstance(prices, Mapping):
        raise ConfigError(
            'prices= takes a mapping such as {"openai/my-model": dspy_prod.Price(input=0.15, output=0.6)}'
        )
    return {str(name): option(Price, price, f"prices[{name!r}]", default=None) for name, price in prices.items()}


def fallback_list(fallbacks: Any) -> tuple[Any, ...]:
    """`fallbacks=`: model names and LMs, in order."""
    if isinstance(fallbacks, (str, dspy.LM)):
        raise ConfigError("fallbacks= takes a list, e.g. fallbacks=['anthropic/claude-haiku-4-5']")
    return tuple(fallbacks)


def default_namespace() -> str:
    """The project directory's name."""
    return os.environ.get("DSPY_PROD_NAMESPACE") or Path.cwd().name or "default"
