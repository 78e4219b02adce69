"""Which entry of the model metadata a model string means: DSPy's order of look-up, then LiteLLM's spellings."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from dspy_prod.compat.dspy import listed
from dspy_prod.pricing.tables import atto, by_length

_SUBSCRIPTIONS = frozenset(("claude-code", "openai-codex", "chatgpt", "github_copilot"))
# Models that stand for another one, chosen per call; the metadata lists them at a price of zero.
_ROUTERS = frozenset(("openrouter/auto", "openrouter/bodybuilder"))
# Metadata namespaces of LiteLLM prefixes, where they differ from the prefix itself.
_NAMESPACES: Final[dict[str, tuple[str, ...]]] = {
    "bedrock": ("bedrock", "bedrock_converse"),
    "cohere": ("cohere", "cohere_chat"),
    "ollama_chat": ("ollama",),
    "vertex_ai": ("vertex_ai", "vertex_ai-language-models", "vertex_ai-text-models"),
}

# How a Bedrock model may be called (LiteLLM's routes), and the area that a cross-region profile serves.
_ROUTE = re.compile(r"^(?:bedrock/)?(?:(?:converse|converse_like|invoke|async_invoke|chat_completions|mantle)/)?")
_REGION = re.compile(r"^[a-z]{2}(?:-[a-z]+)+-\d/")
_AREA = re.compile(r"^(?:us-gov|us|eu|apac|au|jp|ca|sa|global)\.")
_THROUGHPUT = re.compile(r":\d+k$")
_SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")
_VERTEX_VERSION = re.compile(r"-\d{3}$")
_FINE_TUNED = re.compile(r"(ft:[^:]+)(?::[^:]*){1,3}$")
_SIZE, _EXPERTS = re.compile(r"(\d+)b"), re.compile(r"(\d+)x(\d+)b")


class Entry(NamedTuple):
    """What was found: the name it is listed under, what precedes it in LiteLLM's string, and the entry."""

    name: str
    prefix: str
    info: Mapping[str, Any]


def preload() -> None:
    """Load DSPy's model metadata: up to 5 s of network, once a process, here so that no request pays for it."""
    importlib.import_module("dspy.clients.model_metadata").source_info()


def resolve(model: str) -> tuple[str | None, str]:
    """DSPy's own provider and wire name for a model string; (None, model) when DSPy leaves it to LiteLLM."""
    try:
        from dspy.clients.engines.lm15_engine import LM15Engine
        from dspy.lm15 import RouterConfig

        route = LM15Engine(RouterConfig(env={})).resolve(model)
    except Exception:
        return None, model
    return route.provider, route.model


def base_of(extras: Mapping[str, Any]) -> str | None:
    """The model behind a deployment, as LiteLLM takes it: `base_model=`, or `model_info={"base_model": ...}`."""
    info = extras.get("model_info")
    base = extras.get("base_model") or (info.get("base_model") if isinstance(info, Mapping) else None)
    return base if isinstance(base, str) else None


def names_of(base: str | None, model: str) -> Iterator[str]:
    """How a base model may be listed: at the provider of the deployment, then as it was given."""
    if base:
        head, slash, _ = model.partition("/")
        if slash and not base.startswith(head + slash):
            yield head + slash + base
        yield base


def through_litellm(model: str, provider: str | None, native: str | None) -> bool:
    """Whether a call to this provider goes through LiteLLM, by whose names its models are then found."""
    return provider in (None, "litellm") or (native is None and provider == model.partition("/")[0])


def find(model: str, provider: str | None, native: str | None, wire: str) -> Entry | None:
    """The first priced entry in DSPy's order of look-up, then, for the same provider, in LiteLLM's.

    Args:
        model: as given to the LM. provider: who serves it, see `PriceBook.rates`.
        native, wire: what `resolve` says of it.
    """
    head, slash, rest = model.partition("/")
    foreign = through_litellm(model, provider, native)
    owner = native if foreign else provider
    prefix = head + slash if foreign and rest else ""
    places: list[tuple[str, str, tuple[str, ...] | None]] = [(owner, name, None) for name in (wire, model) if owner]
    if rest and (foreign or provider == native):
        places.append((head, rest, _NAMESPACES.get(head, (head,))))
    for where, name, namespaces in places:
        if not _ROUTERS.isdisjoint((name, wire)):
            return None
        if info := _priced(where, name, namespaces):
            return Entry(name, prefix, info)
    for where, name, namespaces in places:
        for spelling in _spellings(where, name):
            if info := _priced(where, spelling, namespaces):
                return Entry(name, prefix, info)
    return None


def _priced(where: str, name: str, namespaces: tuple[str, ...] | None) -> Mapping[str, Any] | None:
    if where in _SUBSCRIPTIONS:
        return None
    info = by_length(listed(where, name, namespaces))
    # Perplexity bills every request a search fee that no usage tells.
    searches = where == "perplexity" and "search_context_cost_per_query" in info
    priced = all(atto(info.get(f"{side}put_cost_per_token")) is not None for side in ("in", "out"))
    return info if priced and not searches else None


def _spellings(where: str, name: str) -> Iterator[str]:
    """Other names under which the metadata may list the same model."""
    if where.startswith("bedrock"):
        yield from _bedrock(name)
    elif where.startswith("fireworks"):
        yield from _fireworks(name)
    elif where.startswith("vertex") or where == "gemini":
        yield _VERTEX_VERSION.sub("", name)
    else:
        name = name.removeprefix("responses/")
        yield name
        yield _FINE_TUNED.sub(r"\1", name)
        yield _SNAPSHOT.sub("", name)


def _bedrock(name: str) -> Iterator[str]:
    """Without the route, then what an ARN names, without region, throughput and, last, area.

    A profile with an area of its own in the metadata is found as itself first: its price includes the area's uplift.
    """
    name = _ROUTE.sub("", name)
    yield name
    if name.startswith("arn:"):
        name = name.rpartition("/")[2]
        yield name
    name = _REGION.sub("", name)
    yield name
    name = _THROUGHPUT.sub("", name)
    yield name
    if _AREA.match(name):
        if not name.startswith("global."):
            yield _AREA.sub("us.", name)  # areas cost alike, and more than the global profile
        yield _AREA.sub("", name)


def _fireworks(name: str) -> Iterator[str]:
    """By full name, else by the price list for models of its size (fireworks.ai/pricing), as LiteLLM reads it."""
    if not name.startswith("accounts/"):
        yield f"accounts/fireworks/models/{name}"
    lower = name.lower()
    if mixture := _EXPERTS.search(lower):
        billions = int(mixture[1]) * int(mixture[2])
        if billions <= 176:
            yield "fireworks-ai-moe-up-to-56b" if billions <= 56 else "fireworks-ai-56b-to-176b"
    elif size := _SIZE.search(lower):
        billions = int(size[1])
        yield f"fireworks-ai-{'up-to-4b' if billions <= 4 else '4.1b-to-16b' if billions <= 16 else 'above-16b'}"
