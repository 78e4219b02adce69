"""What `LM.copy` changes: new settings from old ones and some arguments."""

from __future__ import annotations

import datetime as dt
import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Any, Final

from dspy.clients.backend_selection import CLIENT_KEYS

from dspy_prod.compat.dspy import ENGINES, check_engines, refuse_client_settings
from dspy_prod.errors import ConfigError
from dspy_prod.lm.beneath import Beneath
from dspy_prod.lm.settings import Settings, budget_options, fallback_list, option, price_options, retry_option
from dspy_prod.options import Cache, CircuitBreaker, RateLimit
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores.base import Store

POLICIES: Final = frozenset(
    {"retry", "breaker", "limit", "budget", "fallbacks", "prices", "store", "namespace", "clock", "num_retries"}
)
REBUILDS: Final = POLICIES | {"model", "model_type", "engine", "async_engine"} | CLIENT_KEYS
"""Arguments of `LM.copy` that put a new pipeline beneath the copy."""

INSTALLED: Final = ("pipeline", "settings", "identity", "_variants", *ENGINES)
"""Attributes that `LM._install` sets."""

MAX_VARIANTS: Final = 16


def pinned(settings: Settings, store: Store) -> Settings:
    """The settings with the store they found, so that copies find the same one from another directory too."""
    if settings.opened is store or (settings.store is None and not store.durable):  # memory, for want of a file
        return settings
    return replace(settings, opened=store)


def changed(settings: Settings, policies: dict[str, Any], extras: dict[str, Any]) -> Settings:
    """The settings with some policies, client settings and extras replaced; None removes a client setting or extra."""
    changes: dict[str, Any] = {}
    if "retry" in policies or "num_retries" in policies:
        changes["retry"] = retry_option(policies.get("retry"), policies.get("num_retries"))
    if "breaker" in policies:
        changes["breaker"] = option(CircuitBreaker, policies["breaker"], "breaker", default=CircuitBreaker())
    if "limit" in policies:
        changes["limit"] = option(RateLimit, policies["limit"], "limit", default=None)
    if "cache" in policies:
        changes["cache"] = option(Cache, policies["cache"], "cache", default=Cache())
    if "budget" in policies:
        changes["budgets"] = budget_options(policies["budget"])
    if "prices" in policies:
        changes["prices"] = price_options(policies["prices"])
    if "fallbacks" in policies:
        changes["fallbacks"] = fallback_list(policies["fallbacks"])
    for name in ("store", "namespace", "clock", "engine", "async_engine"):
        if name in policies:
            changes[name] = policies[name]
    if "engine" in policies and "async_engine" not in policies:
        changes["async_engine"] = None
    clients = {key: value for key, value in policies.items() if key in CLIENT_KEYS}
    check_timeout(clients.get("timeout"))
    if clients:
        merged = {**settings.clients, **clients}
        changes["clients"] = {key: value for key, value in merged.items() if value is not None}
    if extras:
        changes["extras"] = {k: v for k, v in {**settings.extras, **extras}.items() if v is not None}
    if not changes.keys().isdisjoint(("store", "namespace", "clock")):
        changes["opened"] = None
    result = replace(settings, **changes)
    check_engines(result.engine, result.async_engine)
    connection = {key: value for key, value in result.clients.items() if key != "timeout"}
    refuse_client_settings(result.engine, connection, where="LM.copy")
    return result


class Variants:
    """LMs with per-call settings, kept so that their cache, connections and pipeline serve the next such call too."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Beneath] = OrderedDict()
        self._lock = threading.Lock()
        reset_after_fork(self)

    def find(self, key: str) -> Beneath | None:
        """The LM for these settings, if it is kept."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def keep(self, key: str, lm: Beneath) -> Beneath:
        """Keep an LM unless another thread was faster; which one it is."""
        with self._lock:
            kept = self._kept.setdefault(key, lm)
            while len(self._kept) > MAX_VARIANTS:
                self._kept.popitem(last=False)
            return kept

    def all(self) -> list[Beneath]:
        """Every LM kept."""
        with self._lock:
            return list(self._kept.values())

    def _after_fork(self) -> None:
        self._lock = threading.Lock()


def variant(lm: Beneath, policies: dict[str, Any]) -> Beneath:
    """The LM with some policies or client settings replaced for one call."""
    key = repr(sorted(policies.items()))  # what has its `id` in its repr is kept alive by the settings
    kept = lm._variants.find(key)
    if kept is None:
        made = _twin(lm)
        made._install(changed(lm.settings, policies, {}))
        kept = lm._variants.keep(key, made)
    twin = _twin(lm)  # model arguments and history are those of now
    for name in INSTALLED:
        setattr(twin, name, getattr(kept, name))
    return twin


def _twin(lm: Beneath) -> Beneath:
    twin: Beneath = object.__new__(type(lm))
    twin.__dict__.update(lm.__dict__)
    return twin


def check_timeout(timeout: Any) -> None:
    """Refuse a `timeout=` that is not a positive number of seconds (DSPy's own objects pass)."""
    if isinstance(timeout, dt.timedelta):
        raise ConfigError("timeout= takes seconds, as in dspy.LM; pass timeout=delta.total_seconds()")
    if isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and not 0 < timeout < float("inf"):
        raise ConfigError(f"timeout={timeout!r} must be a positive number of seconds")
