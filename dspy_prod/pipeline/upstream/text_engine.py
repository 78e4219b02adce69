"""Text completions through LiteLLM on the engine contract; DSPy's own engine carries them only in its legacy form."""

from __future__ import annotations

from typing import Any

from dspy.clients.engines.litellm_errors import litellm_errors
from dspy.clients.lm15_boundary import request_kwargs, response_value
from dspy.lm15 import Request, Response, UnsupportedFeatureError

from dspy_prod.compat.litellm import get_litellm
from dspy_prod.pipeline.upstream.litellm_usage import told


class _TextConfig:
    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def _sent(self, request: Request) -> dict[str, Any]:
        data: dict[str, Any] = request_kwargs(request, "text")
        contents = [message["content"] for message in data.pop("messages")]
        if any(not isinstance(content, str) for content in contents):
            raise UnsupportedFeatureError("text-completion models take text only", feature="messages")
        data["prompt"] = "\n\n".join([*contents, "BEGIN RESPONSE:"])  # DSPy's own layout for text models
        if "max_completion_tokens" in data:  # the chat API's newer name, unknown to text completions
            data["max_tokens"] = data.pop("max_completion_tokens")
        options = {key: value for key, value in self._options.items() if value is not None}
        provider, _, name = request.model.rpartition("/")
        data["model"] = f"text-completion-openai/{name}" if provider in ("", "openai") else request.model
        data.update(options)
        data.update(num_retries=0, cache={"no-cache": True, "no-store": True})
        return data


class LiteLLMTextEngine(_TextConfig):
    """One synchronous text completion."""

    def complete(self, request: Request) -> Response:
        """Send one request.

        Raises:
            lm15 errors, translated from LiteLLM's.
        """
        with litellm_errors(model=request.model):
            raw = get_litellm(feature="text completion").text_completion(**self._sent(request))
        return told(response_value(raw, "text", request), raw)


class AsyncLiteLLMTextEngine(_TextConfig):
    """One asynchronous text completion."""

    async def complete(self, request: Request) -> Response:
        """Send one request, see `LiteLLMTextEngine.complete`."""
        with litellm_errors(model=request.model):
            raw = await get_litellm(feature="text completion").atext_completion(**self._sent(request))
        return told(response_value(raw, "text", request), raw)
