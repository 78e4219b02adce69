"""Who is being called: one name for a route's destination, for the cache, breakers, limiters and flights alike.

Whatever changes what is sent, or who answers, is part of it: the address, headers, organization, project, API version,
query, provider and region, given or from the environment. Keys and time-outs are not. The key has a fingerprint of its
own (an answer is the same whoever pays for it, a rate limit is not).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import orjson

from dspy_prod.privacy.names import address, is_secret
from dspy_prod.privacy.visible import carried

_KEYS: Final = frozenset({"api_key", "azure_ad_token_provider"})
_ELSEWHERE: Final = _KEYS | {"timeout", "api_base", "base_url"}
"""Client settings that say nothing of the destination, or are told by the address."""

_BASES: Final = ("{}_API_BASE", "{}_BASE_URL")
_OTHERS: Final = ("{}_API_VERSION", "{}_ORGANIZATION", "{}_ORG_ID", "{}_PROJECT", "{}_PROJECT_ID")
_CLOUDS: Final[Mapping[str, tuple[str, ...]]] = {
    "azure": ("AZURE_OPENAI_ENDPOINT",),
    "bedrock": ("AWS_REGION", "AWS_REGION_NAME", "AWS_DEFAULT_REGION", "AWS_BEDROCK_RUNTIME_ENDPOINT",
                "BEDROCK_MANTLE_REGION"),
    "cloudflare": ("CLOUDFLARE_ACCOUNT_ID",),
    "databricks": ("DATABRICKS_HOST",),
    "datarobot": ("DATAROBOT_ENDPOINT",),
    "gradient_ai": ("GRADIENT_AI_AGENT_ENDPOINT",),
    "mistral": ("MISTRAL_AZURE_API_BASE",),
    "sagemaker": ("AWS_REGION", "AWS_REGION_NAME", "AWS_DEFAULT_REGION"),
    "snowflake": ("SNOWFLAKE_ACCOUNT_ID",),
    "vertex_ai": ("VERTEXAI_PROJECT", "VERTEXAI_LOCATION", "VERTEX_PROJECT", "VERTEX_LOCATION", "VERTEXAI_API_BASE",
                  "GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_LOCATION", "GCLOUD_PROJECT"),
    "watsonx": ("WATSONX_URL", "WX_URL", "WML_URL", "WATSONX_REGION", "WX_REGION", "WATSONX_PROJECT_ID",
                "WX_PROJECT_ID", "WATSONX_DEPLOYMENT_SPACE_ID", "WATSONX_SPACE_ID", "WX_SPACE_ID"),
}  # fmt: skip
"""Variables with names of their own, by the beginning of the provider's."""

_SHORT: Final = {"huggingface": "HF", "friendliai": "FRIENDLI"}
"""Providers whose variables begin with no word of their names."""

_PLACE: Final = re.compile(r"region|project|location|endpoint|api_base|base_url|deployment|tenant|space_id|profile")


def places(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of LiteLLM's own arguments that say where a call goes, such as `aws_region_name`."""
    return {name: value for name, value in arguments.items() if _PLACE.search(name) and not is_secret(name)}


def credentials(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of LiteLLM's own arguments that say who pays, such as `aws_access_key_id`."""
    return {name: value for name, value in arguments.items() if is_secret(name)}


def without_credentials(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The others: those that may change what is sent or who answers."""
    return {name: value for name, value in arguments.items() if not is_secret(name)}


def variables(clients: Mapping[str, Any], model: str) -> tuple[str, ...]:
    """The environment variables that can change where a route's calls go, or who answers them.

    LiteLLM names them by the provider (`HOSTED_VLLM_API_BASE`), or by one word of it (`FIREWORKS_API_BASE` of
    `fireworks_ai`).
    """
    provider = _provider(clients, model)
    whole = provider.upper().replace("-", "_")
    words = [word for word in whole.split("_") if len(word) > 2 and word != whole]
    stems = [whole, *words, *([_SHORT[provider]] if provider in _SHORT else ())]
    around = _OTHERS if _url(clients) else _BASES + _OTHERS
    clouds = [name for cloud, names in _CLOUDS.items() if provider.startswith(cloud) for name in names]
    named = [name.format(stem) for stem in stems for name in around] + clouds
    return tuple([name for name in named if name == carried(name)])  # no variable is called by half a character


def destination(clients: Mapping[str, Any], model: str, extras: Mapping[str, Any] | None = None) -> str:
    """The destination of a route, fit to be written: values that may be secret are there as a digest.

    Args:
        clients: the client settings of its LM.
        model: model string, whose prefix names the provider.
        extras: further arguments that LiteLLM gets with each call.
    """
    around = _around(clients, model)
    servers = [] if _url(clients) else _servers(around)
    others = {name: value for name, value in clients.items() if name not in _ELSEWHERE and value is not None}
    others.update({name: value for name, value in around.items() if name not in servers}, **places(extras or {}))
    if len(servers) > 1:
        others["servers"] = [address(around[name]) for name in servers]  # one address may look like two, joined
    place = server(clients, model)
    return f"{place};{digest(others)}" if others else place


def server(clients: Mapping[str, Any], model: str) -> str:
    """The address of a destination, or its provider where none is told; `destination` begins with it."""
    url = _url(clients)
    around = _around(clients, model)
    base = [address(str(url))] if url else [address(around[name]) for name in _servers(around)]
    return "&".join(base) or _provider(clients, model)


def _around(clients: Mapping[str, Any], model: str) -> dict[str, str]:
    return {name: value for name in variables(clients, model) if (value := os.environ.get(name))}


def _servers(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(("_API_BASE", "_BASE_URL"))]


def fingerprint(clients: Mapping[str, Any], extras: Mapping[str, Any] | None = None) -> str:
    """A short digest that tells keys apart without revealing them."""
    key = clients.get("api_key") or clients.get("azure_ad_token_provider")
    if key is None:
        others = credentials(extras or {})
        return f"x{digest(others)}" if others else "env"
    text = key if isinstance(key, str) else f"callable:{getattr(key, '__qualname__', type(key).__name__)}"
    return hashlib.sha256(b"dspy_prod:key:" + text.encode("utf-8", "replace")).hexdigest()[:12]


def digest(values: Mapping[str, Any]) -> str:
    """A short digest of settings, equal in every process if they are JSON."""
    try:
        text = orjson.dumps(values, default=_told, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    except TypeError:  # half a character, which no UTF-8 can say, or a number beyond 64 bits
        text = json.dumps(values, default=_told, sort_keys=True).encode()
    return hashlib.sha256(b"dspy_prod:settings:" + text).hexdigest()[:16]


def _told(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else [type(value).__qualname__, repr(value)]


def _url(clients: Mapping[str, Any]) -> Any:
    return clients.get("api_base") or clients.get("base_url")


def _provider(clients: Mapping[str, Any], model: str) -> str:
    named = clients.get("custom_llm_provider")
    if isinstance(named, str) and named:
        return named
    return model.split("/", 1)[0] if "/" in model else "openai"
