"""What an LM was built with, and the table of its arguments.

`Settings` is immutable and shared by copies. Secrets live in it while the process lives; they are never written: a
pickle carries a mark by which the same process finds them again. Another process takes keys from its environment.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated, Any, Final, get_type_hints

import dspy
from dspy.clients.backend_selection import CLIENT_KEYS

from dspy_prod.compat.lm15 import CANONICAL
from dspy_prod.errors import ConfigError
from dspy_prod.lm.arguments import (
    ALWAYS,
    Argument,
    budget_options,
    fallback_list,
    options_in,
    price_options,
    retry_option,
)
from dspy_prod.lm.sealing import SealedLM, seal, unseal
from dspy_prod.options import Budget, Cache, CircuitBreaker, Price, RateLimit, Retry
from dspy_prod.privacy.unshown import unshown
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.stores.addresses import with_password
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import default_namespace

DSPY: Final[Mapping[str, type | None]] = {
    "model": str,
    "model_type": str,
    "temperature": float,
    "max_tokens": int,
    "callbacks": None,
    "num_retries": int,  # another word for `retry`
    "provider": None,
    "finetuning_model": str,
    "launch_kwargs": object,
    "train_kwargs": object,
    "use_developer_role": bool,
    "prompt_cache": None,
}
"""Arguments that go on to `dspy.LM`, and the kind of each in a config file."""

ATTRIBUTES: Final = ("provider", "finetuning_model", "launch_kwargs", "train_kwargs", "use_developer_role")
"""Those that `dspy.LM` keeps beside its `kwargs`, and leaves out of its state."""


@dataclass(frozen=True)
class Settings:
    """What an LM was built with. Each field with an `Argument` is that argument of `LM.__init__`."""

    engine: Annotated[Any, Argument(str, "auto")]
    async_engine: Annotated[Any, Argument(None)]
    retry: Annotated[Retry, Argument(Retry, Retry(), off=Retry(attempts=1))]
    breaker: Annotated[CircuitBreaker | None, Argument(CircuitBreaker, CircuitBreaker(), off=None)]
    limit: Annotated[RateLimit | None, Argument(RateLimit, off=None)]
    cache: Annotated[Cache, Argument(Cache, Cache(), off=Cache(), rebuilds="nothing")]  # whether at all: `LM.cache`
    budgets: Annotated[tuple[Budget, ...], Argument(list[Budget], (), off=(), parse=budget_options, name="budget")]
    fallbacks: Annotated[tuple[str | dspy.LM | SealedLM, ...], Argument(list[str], (), off=(), parse=fallback_list)]
    prices: Annotated[Mapping[str, Price], Argument(dict[str, Price], {}, parse=price_options)]
    store: Annotated[str | Store | None, Argument(str, rebuilds="store")] = field(repr=False)
    namespace: Annotated[str, Argument(str, parse=default_namespace, rebuilds="store")]
    clock: Annotated[Clock, Argument(None, SYSTEM_CLOCK, rebuilds="store", saved=False)] = field(repr=False)
    clients: Mapping[str, Any] = field(repr=False)
    extras: Mapping[str, Any] = field(repr=False)
    opened: Store | None = field(default=None, repr=False)
    """The store object in use, once there is one: copies share it, wherever the process has changed to since."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A release with fewer arguments may have pickled it.
        self.__dict__.update({name: row.default for name, row in ROWS.items()}, **state)

    def off(self) -> Settings:
        """The same with every policy switched off."""
        return replace(self, **{name: row.off for name, row in ROWS.items() if row.off is not ALWAYS})

    def sealed(self, store: str | None = None) -> Settings:
        """The same settings, fit to be written: no secret in them, and a URL in place of the store."""
        fallbacks = tuple(SealedLM.of(item) if _writes_its_key(item) else item for item in self.fallbacks)
        return replace(
            self, clients=seal(self.clients), extras=seal(self.extras), fallbacks=fallbacks, store=store,
            clock=SYSTEM_CLOCK, opened=None,
        )  # fmt: skip

    def unsealed(self) -> Settings:
        """The settings with the secrets this process remembers for them."""
        fallbacks = tuple(item.opened() if isinstance(item, SealedLM) else item for item in self.fallbacks)
        store = with_password(self.store) if isinstance(self.store, str) else self.store
        return replace(self, clients=unseal(self.clients), extras=unseal(self.extras), fallbacks=fallbacks, store=store)


def _writes_its_key(item: Any) -> bool:
    return isinstance(item, dspy.LM) and not isinstance(getattr(item, "settings", None), Settings)


ROWS: Final[Mapping[str, Argument]] = {
    setting: replace(row, name=row.name or setting)
    for setting, hint in get_type_hints(Settings, include_extras=True).items()
    for row in getattr(hint, "__metadata__", ())
}
"""Our arguments, by the name of the setting."""

ARGUMENTS: Final[Mapping[str, Any]] = {**DSPY, **{row.name: row.kind for row in ROWS.values()}}
"""Every argument of `LM.__init__`, and its kind in a config file."""

OPTIONS: Final = {name: kind for name, given in ARGUMENTS.items() if (kind := options_in(given)) is not None}
"""The classes of options, by argument."""


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Settings` from arguments of `LM`, as far as they are given.

    Raises:
        ConfigError: an argument is impossible; the message names it.
    """
    if "num_retries" in given:
        given = {**given, "retry": retry_option(given.get("retry"), given["num_retries"])}
    return {name: row.setting(given[row.name]) for name, row in ROWS.items() if row.name in given}


OWN_KEYS: Final = frozenset({"rollout_id", "n", "num_generations", "prompt_cache"})
CANONICAL_KEYS: Final = CANONICAL | OWN_KEYS


def hide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The very arguments, in place: what is secret in them does not show itself any more, see `privacy.unshown`.

    For the doors, whose frames hold what they were given: an error reporter shows it.
    """
    for name, value in arguments.items():
        if name not in CANONICAL_KEYS or isinstance(value, str):  # one of them is `store`
            arguments[name] = unshown(value, name)
    return arguments


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


_POLICIES: Final = {
    "num_retries",
    *(row.name for row in ROWS.values() if row.name not in ("engine", "async_engine", "cache", "store", "clock")),
}
"""Names that are ours alone: what resembles one of the others may be an argument for LiteLLM."""


_ELSEWHERE: Final = frozenset(
    {"budget", "cached_input", "floor", "guard", "input", "jitter", "max_input_tokens", "max_output_tokens", "name",
     "output", "per", "per_request", "reasoning", "require", "scope", "shared", "soft", "window"}
)  # fmt: skip
"""Fields of options that may well be an argument of some provider."""

_SAID_OF_POLICIES: Final[Mapping[str, str]] = {
    **{
        field: f"{name}={kind.__name__}({field}=...)"
        for name, kind in OPTIONS.items()
        for field in kind.model_fields
        if field not in _ELSEWHERE
    },
    "fallback_models": "fallbacks=[...]",
    "fallback_model": "fallbacks=[...]",
    "retries": "retry=Retry(attempts=...)",
    "rate_limit": "limit=RateLimit(...)",
    "circuit_breaker": "breaker=CircuitBreaker(...)",
    "deadline": "with dspy_prod.call_context(deadline=...)",
}
"""Fields of options that were given to the LM itself, and other words for policies: what was meant."""

_PLAIN: Final = sorted({*ARGUMENTS, *CANONICAL_KEYS, *CLIENT_KEYS} - _POLICIES)
"""Names that DSPy knows. LiteLLM knows others, so that only a slip of the pen counts as one."""


@lru_cache(maxsize=256)
def _meant(name: str) -> str | None:
    from difflib import get_close_matches  # at the first use: importing the package stays light

    if name in _SAID_OF_POLICIES:
        return _SAID_OF_POLICIES[name]
    if name == "models":  # OpenRouter's
        return None
    near = get_close_matches(name, _POLICIES, n=1, cutoff=0.8) or get_close_matches(name, _PLAIN, n=1, cutoff=0.9)
    return next((f"{match}=..." for match in near), None)


def _refuse_slip(name: str, value: Any) -> None:
    """Refuse a misspelt policy: it would travel on to LiteLLM, and nobody would notice that it is not in force."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    meant = next((f"{argument}=..." for argument, kind in OPTIONS.items() if type(first) is kind), None) or _meant(name)
    if name in _POLICIES:
        raise ConfigError(f"{name}= is said to the LM, not to one call; use lm.copy({name}=...)")
    if meant is not None:
        raise ConfigError(f"LM has no argument {name!r}; did you mean {meant}?")


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
