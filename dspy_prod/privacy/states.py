"""What the saved state of an LM may say when nobody vouches for whoever wrote it.

A state decides where calls go, and the key in the environment goes with them. So without `allow_unsafe_lm_state=True`
an LM is rebuilt from the arguments listed here alone: those that shape an answer, and neither say who is called, nor
with what headers, credentials or tools, nor what it costs, nor where it is written down.
"""

from __future__ import annotations

from collections.abc import Mapping
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
"""Arguments that say which model is asked, and how patiently."""

_ENGINES: Final = ("engine", "async_engine")


def harmless(state: Mapping[str, Any], class_key: str) -> tuple[dict[str, Any], list[str]]:
    """(what of a state is harmless, the names of what else it has).

    Args:
        state: as `LM.dump_state` writes it.
        class_key: the key under which it names its class.
    """
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in state.items():
        if name == class_key or value is None or (name in SHAPING | OPERATING and not _is_address(name, value)):
            kept[name] = value
        elif name not in _ENGINES or not isinstance(value, str):
            left_out.append(name)
    return kept, sorted(left_out)


def _is_address(name: str, value: Any) -> bool:
    """Whether a model string is one: LiteLLM has providers that take an address for a model."""
    return name == "model" and isinstance(value, str) and "://" in value
