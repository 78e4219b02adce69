"""Text completions through LiteLLM on the engine contract; DSPy's own engine carries them only in its legacy form."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

from dspy.clients.engines.litellm_errors import litellm_errors
from dspy.clients.lm15_boundary import request_kwargs, response_value
from dspy.lm15 import Request, Response, Usage, response_to_events

from dspy_prod.compat.httpx import staying
from dspy_prod.compat.litellm import get_litellm, plain, unread
from dspy_prod.compat.lm15 import StreamEvent, read_or_billed
from dspy_prod.compat.stay import Attending
from dspy_prod.pipeline.upstream.litellm_usage import told
from dspy_prod.pipeline.upstream.ordinary import as_sent, signed


class _TextConfig(Attending):
    def __init__(self, options: dict[str, Any], extras: dict[str, Any], body: dict[str, Any] | None) -> None:
        self._options = options
        self._extras = extras
        self._body = body

    def _sent(self, request: Request) -> dict[str, Any]:
        body = {**request_kwargs(request, "text"), **self._extras} if self._body is None else self._body
        data = as_sent(body, "text")
        if "max_completion_tokens" in data:  # the chat API's newer name, unknown to text completions
            data["max_tokens"] = data.pop("max_completion_tokens")
        provider, _, name = request.model.rpartition("/")
        data["model"] = f"text-completion-openai/{name}" if provider in ("", "openai") else request.model
        data.update({key: value for key, value in self._options.items() if value is not None})
        return signed(data)


def _received(raw: Any, request: Request, odd: bytes | None) -> Response:
    """The answer; where a counter in it is no whole number, `odd` is its body."""
    found = read_or_billed(lambda answer: told(response_value(answer, "text", request), raw), raw, lambda: plain(raw))
    return found if odd is None or _tells(odd, found.usage) else replace(found, usage=Usage())


def _tells(body: bytes, usage: Usage) -> bool:
    """Whether a body tells this usage in whole numbers, whatever else in it is called so and is none."""
    try:
        told = json.loads(body)["usage"]
        counts = told["prompt_tokens"], told["completion_tokens"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
    return all(type(count) is int for count in counts) and counts == (usage.input_tokens, usage.output_tokens)


class LiteLLMTextEngine(_TextConfig):
    """One synchronous text completion."""

    def complete(self, request: Request) -> Response:
        """Send one request.

        Raises:
            lm15 errors, translated from LiteLLM's.
        """
        stay = self.attend()
        with unread(stay), litellm_errors(model=request.model), staying(stay):
            raw = get_litellm(feature="text completion").text_completion(**self._sent(request))
            odd = stay.body if stay.odd else None
        return _received(raw, request, odd)

    def stream(self, request: Request) -> Iterator[StreamEvent]:
        """The events of a completion, which comes whole."""
        yield from response_to_events(self.complete(request))


class AsyncLiteLLMTextEngine(_TextConfig):
    """One asynchronous text completion."""

    async def complete(self, request: Request) -> Response:
        """Send one request, see `LiteLLMTextEngine.complete`."""
        stay = self.attend()
        with unread(stay), litellm_errors(model=request.model), staying(stay):
            raw = await get_litellm(feature="text completion").atext_completion(**self._sent(request))
            odd = stay.body if stay.odd else None
        return _received(raw, request, odd)

    async def stream(self, request: Request) -> AsyncIterator[StreamEvent]:
        """The events of a completion, which comes whole."""
        for event in response_to_events(await self.complete(request)):
            yield event
