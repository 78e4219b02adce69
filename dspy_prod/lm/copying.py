"""What `LM.copy` changes: new settings from old ones and some arguments."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar

from dspy.clients.backend_selection import CLIENT_KEYS
from dspy.clients.base_lm import BaseLM
from dspy.lm15 import CacheConfig

from dspy_prod.compat.dspy import check_engines, refuse_client_settings
from dspy_prod.errors import ConfigError
from dspy_prod.lm.beneath import INSTALLED, Beneath
from dspy_prod.lm.settings import ROWS, Settings, hide, settings_of, split
from dspy_prod.options import Cache
from dspy_prod.policies.sharing import quoted
from dspy_prod.stores.base import Store

Copied = TypeVar("Copied", bound=Beneath)

REBUILDS: Final = (
    frozenset(row.name for row in ROWS.values() if row.rebuilds != "nothing")
    | {"model", "model_type", "num_retries"}
    | CLIENT_KEYS
)
"""Arguments of `LM.copy` that put a new pipeline beneath the copy."""


def copied(lm: Copied, arguments: dict[str, Any]) -> tuple[Copied, Settings | None]:
    """A copy with some arguments changed, and the settings to install beneath it; None: what is there serves it too."""
    hide(arguments)
    if arguments.get("prompt_cache") is not None and not isinstance(arguments["prompt_cache"], CacheConfig):
        raise TypeError("prompt_cache must be a dspy.lm15.CacheConfig or None")
    policies = {name: arguments.pop(name) for name in list(arguments) if name in REBUILDS}
    if isinstance(arguments.get("cache"), (Cache, Mapping)):
        policies["cache"] = arguments["cache"]
        arguments["cache"] = True
    attributes = {name: arguments.pop(name) for name in list(arguments) if hasattr(lm, name)}
    canonical, _, extras = split(arguments)
    twin: Copied = BaseLM.copy(lm, **attributes, **canonical)
    for name in policies.keys() & {"model", "model_type"}:
        setattr(twin, name, policies[name])
    return twin, changed(lm.settings, policies, extras) if policies or extras else None


def pinned(settings: Settings, store: Store) -> Settings:
    """The settings with the store they found, so that copies find the same one from another directory too."""
    if settings.opened is store or (settings.store is None and not store.durable):  # memory, for want of a file
        return settings
    return replace(settings, opened=store)


def changed(settings: Settings, policies: dict[str, Any], extras: dict[str, Any]) -> Settings:
    """The settings with some policies, client settings and extras replaced; None removes a client setting or extra."""
    changes = settings_of(policies)
    if "engine" in policies and "async_engine" not in policies:
        changes["async_engine"] = None
    clients = {key: value for key, value in policies.items() if key in CLIENT_KEYS}
    if clients:
        merged = {**settings.clients, **clients}
        changes["clients"] = {key: value for key, value in merged.items() if value is not None}
    if extras:
        changes["extras"] = {k: v for k, v in {**settings.extras, **extras}.items() if v is not None}
    if any(name in ROWS and ROWS[name].rebuilds == "store" for name in changes):
        changes["opened"] = None
    return checked(replace(settings, **changes), "LM.copy")


def checked(settings: Settings, where: str) -> Settings:
    """The settings, if engine, connection and timeout are possible together; `where` is what DSPy's errors name."""
    check_engines(settings.engine, settings.async_engine)
    timeout = settings.clients.get("timeout")
    if isinstance(timeout, dt.timedelta):
        raise ConfigError("timeout= takes seconds, as in dspy.LM; pass timeout=delta.total_seconds()")
    if isinstance(timeout, (str, bool)):
        raise ConfigError(f"timeout={timeout!r} must be a number of seconds, such as timeout=10")
    if isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and not 0 < timeout < float("inf"):
        raise ConfigError(f"timeout={timeout!r} must be a positive number of seconds")
    connection = {key: value for key, value in settings.clients.items() if key != "timeout"}
    refuse_client_settings(settings.engine, connection, where=where)
    return settings


def variant(lm: Beneath, policies: dict[str, Any]) -> Beneath:
    """The LM with some policies, client settings or, in `elsewhere`, extras replaced for one call."""
    key = repr(sorted(policies.items()))  # what has its `id` in its repr is kept alive by the settings
    kept = lm._variants.find(key)
    if kept is None:
        made = twin_of(lm)
        elsewhere = policies.pop("elsewhere", {})
        with quoted():
            made._install(changed(lm.settings, policies, elsewhere))
        kept = lm._variants.keep(key, made)
    twin = twin_of(lm)  # model arguments and history are those of now
    for name in INSTALLED:
        setattr(twin, name, getattr(kept, name))
    return twin


def twin_of(lm: Beneath) -> Beneath:
    """The same LM once more, to install something else beneath it; its `kwargs` are the very same."""
    twin: Beneath = object.__new__(type(lm))
    twin.__dict__.update(lm.__dict__)
    return twin
