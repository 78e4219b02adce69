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

_ENGINES: Final = ("engine", "async_engine")
_OF_LMS: Final = frozenset({
    "model_type", "num_retries", "api_base", "base_url", "model_list", "api_key", "extra_headers", "fallbacks",
    *_ENGINES,
})  # fmt: skip
"""Keys of which one beside `model` shows that a mapping is the state of an LM."""


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
        elif (name not in _ENGINES or not isinstance(value, str)) and (ours or value or name in known):
            left_out.append(name)  # DSPy also writes down that it was given nothing: {}
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


def harmless_within(
    value: Any, class_key: str, refused: Callable[[str, Mapping[str, Any], list[str]], None], at: str = ""
) -> Any:
    """A state of which nobody knows who reads it, with each LM in it made of what is harmless.

    Args:
        value: whatever a class wrote that is not DSPy's.
        class_key: as of `harmless`.
        refused: told (where, the LM's state, what is left out of it); it may raise.
        at: where in the state it stands.
    """
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(harmless_within(item, class_key, refused, f"{at}[{n}]") for n, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    if _is_lm(at, value, class_key):
        ours = str(value.get(class_key)).startswith("dspy_prod.")
        kept, left_out = harmless(value, class_key, ours=ours)
        if left_out:
            refused(at, value, left_out)
        return {**kept, **{name: value[name] for name in _ENGINES if isinstance(value.get(name), str)}}
    return {
        key: harmless_within(item, class_key, refused, f"{at}.{key}" if at else str(key)) for key, item in value.items()
    }


def _is_lm(at: str, value: Mapping[str, Any], class_key: str) -> bool:
    if class_key in value:
        return True
    named_so = at == "lm" or at.endswith(".lm")
    return isinstance(value.get("model"), str) and (named_so or not _OF_LMS.isdisjoint(value))


def _own_cache(value: Any) -> tuple[Any, list[str]]:
    """Settings of a cache, but for what lets tenants see each other's answers."""
    if not isinstance(value, Mapping) or not value.get("shared"):
        return value, []
    return {name: item for name, item in value.items() if name != "shared"}, ["cache.shared"]


def _is_address(name: str, value: Any) -> bool:
    """Whether a model string is one: LiteLLM has providers that take an address for a model."""
    return name == "model" and isinstance(value, str) and "://" in value
