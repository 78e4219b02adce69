"""LiteLLM's function for vectors, by which `dspy.Embedder` sends: once, with no retry of its own or its client's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dspy.clients.engines.litellm_errors import litellm_errors

from dspy_prod.compat.httpx import staying
from dspy_prod.compat.litellm import answered_by, get_litellm, unread
from dspy_prod.compat.stay import Stay

COUNTED: Final = frozenset(
    {"gemini", "huggingface", "ollama", "replicate", "sagemaker", "triton", "vertex_ai", "vertex_ai_beta"}
)
"""Providers for whose vectors LiteLLM counts the tokens itself, with whatever tokenizer: no usage that was told."""


class _Never(int):
    """No retry. LiteLLM takes a plain 0 for nothing said (`max_retries or DEFAULT_MAX_RETRIES`) and has the client of
    OpenAI retry twice: three requests, of which the second and third are neither admitted nor recorded."""

    def __bool__(self) -> bool:
        return True


_ALONE: Final[Mapping[str, Any]] = {
    "caching": False,
    "num_retries": 0,
    "cache": {"no-cache": True, "no-store": True},
}


def embed(arguments: Mapping[str, Any], stay: Stay) -> Any:
    """LiteLLM's answer to one request; raises lm15's errors.

    Args:
        arguments: as `litellm.embedding` takes them.
        stay: the attempt.
    """
    litellm = get_litellm(feature="dspy_prod.Embedder")
    with unread(stay), litellm_errors(model=arguments["model"]), staying(stay):
        return litellm.embedding(**{**arguments, **_ALONE, "max_retries": _Never(0)})


async def aembed(arguments: Mapping[str, Any], stay: Stay) -> Any:
    """Asynchronous `embed`."""
    litellm = get_litellm(feature="dspy_prod.Embedder")
    with unread(stay), litellm_errors(model=arguments["model"]), staying(stay):
        return await litellm.aembedding(**{**arguments, **_ALONE, "max_retries": _Never(0)})


def found_in(answer: Any) -> list[Any]:
    """The vectors of such an answer, in the order of the texts."""
    data = list(answer.data or ())
    places = [_get(each, "index") for each in data]
    if sorted(place for place in places if type(place) is int) == list(range(len(data))):
        data = [each for _, each in sorted(zip(places, data, strict=True), key=lambda pair: pair[0])]
    return [_get(each, "embedding") for each in data]


def input_tokens(answer: Any) -> int | None:
    """The tokens that the provider told; None when it did not."""
    told = _get(_get(answer, "usage"), "prompt_tokens")
    counted = answered_by(answer) in COUNTED
    return told if type(told) is int and told > 0 and not counted else None


def _get(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
