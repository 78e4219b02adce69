"""DSPy's LiteLLM engines, sending what a plain `dspy.LM` sends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dspy.clients.engines.litellm_engine import AsyncLiteLLMEngine, LiteLLMEngine
from dspy.clients.lm import _is_openai_reasoning_model
from dspy.lm15 import Request, Response, Usage


class _Extended:
    """Adds arguments outside the canonical request, and the name under which every provider knows `max_tokens`."""

    client_options: dict[str, Any]

    def extended(self, extras: dict[str, Any]) -> Any:
        """The engine with arguments of LiteLLM's own vocabulary, which DSPy's engine refuses at construction."""
        self.client_options.update(extras)
        return self

    def _arguments(self, request: Request, *, streaming: bool = False) -> dict[str, Any]:
        data: dict[str, Any] = super()._arguments(request, streaming=streaming)  # type: ignore[misc]
        # DSPy's conversion says max_completion_tokens, which watsonx, replicate, zai and others do not take.
        if "max_completion_tokens" in data and not _is_openai_reasoning_model(request.model):
            data["max_tokens"] = data.pop("max_completion_tokens")
        return data

    def _response(self, raw: Any, request: Request) -> Response:
        response: Response = super()._response(raw, request)  # type: ignore[misc]
        return told(response)


def told(response: Response) -> Response:
    """The response, with unknown usage instead of the zeros by which LiteLLM replaces what the provider did not tell.

    No request has an empty prompt, so a usage without any input was not told.
    """
    usage = response.usage
    if usage.input_tokens or usage.output_tokens or usage.cache_read_tokens or usage.cache_write_tokens:
        return response
    return replace(response, usage=Usage())


class ExtendedLiteLLMEngine(_Extended, LiteLLMEngine):
    """The synchronous engine."""


class AsyncExtendedLiteLLMEngine(_Extended, AsyncLiteLLMEngine):
    """The asynchronous engine."""
