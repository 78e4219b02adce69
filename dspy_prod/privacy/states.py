"""What the saved state of an LM, or of a predictor, may say when nobody vouches for whoever wrote it.

A state decides where calls go, and the key in the environment goes with them. So without `allow_unsafe_lm_state=True`
an LM is rebuilt from the arguments listed here alone: those that shape an answer, and neither say who is called, nor
with what headers, credentials or tools, nor what it costs, nor where it is written down. A predictor's own arguments
(`config`) go the same way as its LM's: of them, too, only those that shape an answer are taken. DSPy sets each other
key of a predictor's state as an attribute, such as `forward`: only those that it writes itself are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from dspy_prod.compat.serving import is_served

SHAPING: Final = frozenset({
    "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "n", "num_generations", "stop", "seed",
    "frequency_penalty", "presence_penalty", "logprobs", "top_logprobs", "logit_bias", "reasoning", "reasoning_effort",
    "thinking", "verbosity", "response_format", "parallel_tool_calls", "rollout_id", "prompt_cache", "service_tier",
})  # fmt: skip
"""Arguments of generation."""

OPERATING: Final = frozenset({
    "model", "model_type", "cache", "num_retries", "use_developer_role", "retry", "breaker", "limit", "fallbacks",
})  # fmt: skip
"""Arguments of our own LM that say which model is asked, and how patiently."""

PLAIN: Final = frozenset({"model", "model_type", "cache", "num_retries", "use_developer_role"})
"""The same of DSPy's LM, which hands all else to LiteLLM, where `fallbacks` are whole calls with an address each."""

PREDICTOR: Final = frozenset({
    "traces", "train", "demos", "signature", "extended_signature", "fields", "config", "lm",
})  # fmt: skip
"""Keys of a predictor's state that DSPy writes, or refuses in its own words; and `config`, see `beyond`."""

Refused = Callable[[str, Mapping[str, Any], list[str]], None]
"""Told (where, the LM's state, what is left out of it); it may raise."""

_ENGINES: Final = ("engine", "async_engine")
_OF_LMS: Final = frozenset({
    "model_type", "num_retries", "api_base", "base_url", "model_list", "api_key", "api_version", "extra_headers",
    "extra_query", "extra_body", "fallbacks", "custom_llm_provider", "deployment_id", "azure", "use_litellm_proxy",
    *_ENGINES,
})  # fmt: skip
"""Keys of which one beside `model` shows that a mapping is the state of an LM, whatever the model's name: LiteLLM sends
a call for a model that it does not know where some of them say."""

_OF_PROVIDERS: Final = ("aws_", "azure_", "vertex_", "litellm_")
"""How such keys begin, too."""


def harmless(state: Mapping[str, Any], class_key: str, *, ours: bool) -> tuple[dict[str, Any], list[str]]:
    """(what of a state is harmless, the names of what else it has).

    Args:
        state: as `LM.dump_state` writes it.
        class_key: the key under which it names its class.
        ours: whether it is of our own LM, whose arguments are settings of ours. Any other LM hands on what it does not
            know.
    """
    known = SHAPING | (OPERATING if ours else PLAIN)
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in state.items():
        if name == "cache" and not isinstance(value, bool) and value is not None:
            value, others = _own_cache(value) if ours else ({}, [name])
            left_out.extend(others)
            if value:
                kept[name] = value
        elif name == class_key or value is None or (name in known and not _is_address(name, value)):
            kept[name] = value
        elif (name not in _ENGINES or not isinstance(value, str)) and (ours or name in known or not _is_empty(value)):
            left_out.append(str(name))
    return kept, sorted(left_out)


def beyond(state: Mapping[str, Any], own: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """What a predictor's state has beyond what is harmless: (keys of nobody, arguments that go with each call).

    Args:
        state: as `Predict.dump_state` writes it.
        own: keys that the predictor's own class writes.
    """
    config = state.get("config")
    arguments = [] if config is None else ["config"]
    if isinstance(config, Mapping):
        arguments = sorted(f"config.{name}" for name in config if name not in SHAPING)
    return sorted(str(name) for name in state if name not in PREDICTOR and name not in own), arguments


def harmless_within(value: Any, class_key: str, refused: Refused, at: str = "") -> Any:
    """A state of which nobody knows who reads it, with each LM in it made of what is harmless.

    Whatever would change where a call goes, or with what, were a mapping loaded as an LM, is not in what is returned.
    What could be no LM is returned as it is. A table with a column called `model`, of models that are served, could be
    one: what else stands in its rows is left out, and told.

    Args:
        value: whatever a class wrote that is not DSPy's.
        class_key: as of `harmless`.
        refused: told of each LM that is not kept as it is.
        at: where in the state it stands.
    """
    if isinstance(value, Mapping):
        if _is_lm(at, value, class_key):
            return rebuilt(value, class_key, refused, at)
        items = {
            key: harmless_within(item, class_key, refused, f"{at}.{key}" if at else str(key))
            for key, item in value.items()
        }
        return value if all(items[key] is item for key, item in value.items()) else items
    if isinstance(value, (list, tuple)):
        each = [harmless_within(item, class_key, refused, f"{at}[{n}]") for n, item in enumerate(value)]
        if all(new is old for new, old in zip(each, value, strict=True)):
            return value
        return tuple(each) if isinstance(value, tuple) else each
    return value


def rebuilt(state: Mapping[str, Any], class_key: str, refused: Refused, at: str = "") -> dict[str, Any]:
    """The state of an LM, made of what is harmless, whoever reads it; see `harmless_within`.

    A class of ours that it names says what it may hold, not who reads it. So within `fallbacks`, too, stands nothing
    but what is harmless: DSPy's LM would hand them to LiteLLM as whole calls.
    """
    kept, left_out = harmless(state, class_key, ours=str(state.get(class_key)).startswith("dspy_prod."))
    others = kept.pop("fallbacks", None) or []
    if not _are_calls(others):
        others, left_out = [], sorted([*left_out, "fallbacks"])
    if left_out:
        refused(at, state, left_out)
    kept |= {name: state[name] for name in _ENGINES if isinstance(state.get(name), str)}
    found = {name: harmless_within(value, class_key, refused, f"{at}.{name}") for name, value in kept.items()}
    if others:
        found["fallbacks"] = [
            fallback
            for n, item in enumerate(others)
            if (fallback := _fallback(item, class_key, refused, f"{at}.fallbacks[{n}]")) is not None
        ]
    return found


def _are_calls(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, (str, Mapping)) for item in value)


def _fallback(item: Any, class_key: str, refused: Refused, at: str) -> Any:
    if isinstance(item, Mapping):
        return rebuilt(item, class_key, refused, at)
    if _is_address("model", item):
        refused(at, {"model": item}, ["model"])
        return None
    return item


def _is_lm(at: str, value: Mapping[str, Any], class_key: str) -> bool:
    """Whether a mapping is to be taken for the state of an LM.

    One with a text for its `model` is, if anything of it were left out, and a call for that model went anywhere: it
    names a provider, or an address, or DSPy or LiteLLM knows whom to ask, or another key tells. "Golf" is nobody's.
    """
    if class_key in value:
        return True
    model = value.get("model")
    if not isinstance(model, str):
        return False
    left_out = harmless(value, class_key, ours=False)[1]
    return bool(left_out) and (
        at.rstrip("[0123456789]").rpartition(".")[2] == "lm"
        or "/" in model
        or not _OF_LMS.isdisjoint(value)
        or any(name.startswith(_OF_PROVIDERS) for name in left_out)
        or is_served(model)
    )


def _own_cache(value: Any) -> tuple[Any, list[str]]:
    """Settings of a cache, but for what lets tenants see each other's answers."""
    if not isinstance(value, Mapping) or not value.get("shared"):
        return value, []
    return {name: item for name, item in value.items() if name != "shared"}, ["cache.shared"]


def _is_empty(value: Any) -> bool:
    """DSPy also writes down that it was given nothing: {}. That TLS is not to be verified says something."""
    return isinstance(value, (str, bytes, list, tuple, Mapping)) and not value


def _is_address(name: str, value: Any) -> bool:
    """Whether a model string is one: LiteLLM has providers that take an address for a model."""
    return name == "model" and isinstance(value, str) and "://" in value
