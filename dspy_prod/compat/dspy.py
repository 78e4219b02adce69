"""DSPy's own: engines and flags of an LM, which backend carries it, what an adapter or a module says of itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, Protocol

import dspy
from dspy.clients import model_metadata
from dspy.utils import lazy_import

from dspy_prod.compat.foreign import names

thread_local_overrides: ContextVar[dict[str, Any]]
"""The settings in force here, as `dspy.context` changes them; reading `dspy.settings` takes ten times as long."""
configured: dict[str, Any]
"""What `dspy.configure` says, which holds for what is not changed here."""
[thread_local_overrides, configured] = names("dspy.dsp.utils.settings", "thread_local_overrides", "main_thread_config")

[check_engines, refuse_client_settings, dump_engine, load_engine, is_openai_reasoning_model] = names(
    "dspy.clients.lm",
    "_check_engines",
    "_refuse_client_settings",
    "_dump_engine",
    "_load_engine",
    "_is_openai_reasoning_model",
)
[capabilities] = names("dspy.clients.capabilities", "_capabilities")
[definitions, _binding_for] = names("dspy.lm15", "_definitions", "_binding_for")
[_declared_fallback] = names("dspy.clients.execution", "_declared_fallback")

retry_after_seconds: Callable[[Any], float | None]
[retry_after_seconds] = names("dspy.clients._http", "retry_after_seconds")


def settings() -> tuple[dict[str, Any], dict[str, Any]]:
    """What `dspy.context` changes here, and what `dspy.configure` says: the first that has a name has its value."""
    return thread_local_overrides.get(), configured


def is_streaming() -> bool:
    """Whether `dspy.streamify` listens here, so that answers have to come event by event."""
    overrides = thread_local_overrides.get()
    return (overrides if "send_stream" in overrides else configured)["send_stream"] is not None


def has_callbacks(instance: Any) -> bool:
    """Whether any of DSPy's callbacks is told of the calls of an LM: its `with_callbacks` takes longer to find out."""
    overrides = thread_local_overrides.get()
    return bool((overrides if "callbacks" in overrides else configured)["callbacks"] or instance.callbacks)


# -- an LM -----------------------------------------------------------------------------------------------------------
ENGINES: Final = ("_engine_spec", "_async_engine_spec")
"""Attributes of an LM that hold what it sends its requests to."""


class OwnCache:
    """An LM whose answers are kept by a cache of its own. DSPy's optimizers ask whether any cache keeps them."""

    _cache_responses = True


_DSPY: Final = vars(dspy)


def caches_anything() -> bool:
    """Whether DSPy's cache is on: `dspy.configure_cache` switches it off for the whole process.

    DSPy makes it when it is first asked for, under a lock and on disk. It is not asked for here: until somebody has, it
    is on, and a child forked meanwhile would wait for that lock for ever.
    """
    cache = _DSPY.get("cache")
    return cache is None or bool(cache.enable_memory_cache or cache.enable_disk_cache)


class Engined(Protocol):
    """An LM, as far as its arguments and its engines."""

    model: str
    model_type: str
    cache: bool
    kwargs: dict[str, Any]
    use_developer_role: bool
    _engine_spec: Any
    _async_engine_spec: Any


def engines_of(lm: Any) -> tuple[Any, Any]:
    """(engine or its name, asynchronous engine) of an LM."""
    return lm._engine_spec, lm._async_engine_spec


def set_engines(lm: Any, engine: Any, async_engine: Any) -> None:
    """Put engines beneath an LM, unchecked."""
    lm._engine_spec, lm._async_engine_spec = engine, async_engine


def caches_responses(lm: Any) -> bool:
    """Whether DSPy's cache keeps the answers of an LM."""
    return bool(lm.cache and getattr(lm, "_cache_responses", True))


class StandIn:
    """What `capabilities`, `declared_door` and DSPy's `select_backend` read off an LM."""

    def __init__(
        self, model: str, model_type: str, engine: Any, clients: dict[str, Any], providers: tuple[Any, ...]
    ) -> None:
        self.model = model
        self.model_type = model_type
        self.kwargs = clients
        self.engine = self._engine_spec = engine
        self._providers = providers
        self._provider_name = model.split("/", 1)[0] if "/" in model else "openai"


def declared_door(lm: StandIn, resolution: Any, clients: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(model, client settings) by which LiteLLM reaches a provider that the user has declared."""
    binding = _binding_for(lm._providers, resolution.provider)
    wire_model, options = _declared_fallback(lm, binding, resolution, clients)
    return wire_model, options


# -- adapters, modules, examples -------------------------------------------------------------------------------------
try:
    _adapter_call: ContextVar[Any] | None
    [_adapter_call] = names("dspy.clients._deprecation", "_adapter_call")
except ImportError:  # goes with `messages=`, in DSPy 3.5
    _adapter_call = None


def warns_of_messages(lm: Any, messages: Any) -> bool:
    """Whether DSPy would call `messages=` deprecated: its own adapters may pass them."""
    if _adapter_call is None:
        return False
    origin = _adapter_call.get()
    return origin is None or origin[0] is not lm or origin[1] is not messages


def is_compiled(module: Any) -> bool:
    """Whether an optimizer has frozen a module."""
    return bool(getattr(module, "_compiled", False))


class CompiledAsProgram:
    """A module around a `program` that is frozen when the program is, and says so for it."""

    @property
    def _compiled(self) -> bool:
        return is_compiled(self.__dict__.get("program"))

    @_compiled.setter
    def _compiled(self, value: bool) -> None:
        program = self.__dict__.get("program")
        if program is not None:
            program._compiled = value


def input_keys(example: Any) -> set[str] | None:
    """Which keys of a `dspy.Example` are inputs, as far as anybody has said."""
    keys: set[str] | None = getattr(example, "_input_keys", None)
    return keys


def known_of(provider: str | None, model: str) -> dict[str, Any]:
    """What DSPy's catalogue of models tells of one; nothing of one that is not in it."""
    return dict(listed(provider, model))


def listed(provider: str | None, model: str, namespaces: tuple[str, ...] | None = None) -> Mapping[str, Any]:
    """An entry of DSPy's catalogue, looked up once a process; empty for a name that is not in it.

    DSPy goes through the whole of it for each name that it lacks, in milliseconds, and a model without a price has a
    dozen such names, which every new LM would ask for in its first call.
    """
    return _listed(model_metadata.model_info, provider, model, namespaces)


@lru_cache(maxsize=4_096)
def _listed(
    model_info: Callable[..., Any], provider: str | None, model: str, namespaces: tuple[str, ...] | None
) -> Mapping[str, Any]:
    return MappingProxyType(dict(model_info(provider, model, namespaces=namespaces) or {}))


def renew_metadata_lock() -> None:
    """In a forked child: nobody would release the lock if a thread of the parent held it."""
    if hasattr(model_metadata, "_lock"):
        model_metadata._lock = threading.RLock()


def import_locks() -> list[Any]:
    """The locks of the packages that DSPy imports late. Each use of one takes its lock, also when it is there."""
    return list(getattr(lazy_import, "_lazy_module_locks", {}).values())


# -- programs under an optimizer ---------------------------------------------------------------------------------------
def source_of(module: Any) -> str | None:
    """The code that an optimizer has written for a `dspy.Flex`; None of any other module."""
    source = getattr(module, "module_src", None) if type(module).__name__ == "Flex" else None
    return source if isinstance(source, str) else None


def rebind_sources(program: Any, sources: Mapping[str, str]) -> None:
    """Give every `dspy.Flex` within a program the code that `source_of` told, by path."""
    if not sources:
        return
    [rebind] = names("dspy.teleprompt.gepa.gepa_flex_utils", "rebind_flex_code")
    rebind(program, {path.removeprefix("self."): source for path, source in sources.items()})


def mark_compiled(program: Any, compiled: bool = True) -> None:
    """Say of a program whether an optimizer has made it."""
    program._compiled = compiled


class InForce:
    """Settings of DSPy's that are in force from one callback to another: `dspy.context` for those who have no block.

    Unlike a generator, it never acts when it is collected: where the end never comes, what was in force before is put
    back by whoever stands around it, as DSPy's workers do, or stays as it is.
    """

    __slots__ = ("_token",)

    def __init__(self, **settings: Any) -> None:
        overrides = thread_local_overrides.get()
        kind: Any = type(overrides)
        self._token = thread_local_overrides.set(kind({**overrides, **settings}))

    def end(self) -> None:
        """Put back what was in force before; nothing, where it was begun elsewhere."""
        try:
            thread_local_overrides.reset(self._token)
        except (ValueError, RuntimeError):
            pass  # another thread or task, or ended before: nothing of it is in force here


def copy_of(program: Any) -> Any:
    """A copy of a program that asks the very same LMs."""
    copied = program.deepcopy()
    own = dict(program.named_predictors())
    for name, predictor in copied.named_predictors():
        if name in own:
            predictor.lm = own[name].lm
    return copied
