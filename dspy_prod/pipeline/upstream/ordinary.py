"""What LiteLLM is called with for an ordinary call: DSPy's messages and arguments as they are, as plain `dspy.LM` does.

Only a typed `Request` is converted. A conversion there and back would lose, or refuse, what LiteLLM knows and the
canonical request does not: recordings, files, names of speakers, blocks of thought, hosted tools.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import dspy
from dspy.clients.legacy_requests import chat_to_responses
from dspy.lm15 import Request, UnsupportedFeatureError

from dspy_prod.compat.lm15 import CANONICAL

_OURS: Final = frozenset({"n", "rollout_id", "num_generations", "prompt_cache", "stream", "stream_options", "model"})
_CHANGEABLE: Final = ("max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "frequency_penalty",
                      "presence_penalty", "logprobs", "service_tier", "store")  # fmt: skip


class Beside(Protocol):
    """What an ordinary call says beside its canonical request.

    Attributes:
        extras: arguments of this call that only LiteLLM understands.
        body: its messages and arguments as `dspy.LM` hands them on; None for a typed `Request`.
        refusal: why no canonical request can say it; None when one does.
        asked: the call's canonical request, before a route changed anything in it.
    """

    extras: dict[str, Any] | None
    body: dict[str, Any] | None
    refusal: Exception | None
    asked: Request | None


def body_of(beside: Beside | None, request: Request, extras: Mapping[str, Any]) -> dict[str, Any] | None:
    """The body that a route sends through LiteLLM; None for a typed request, which is converted.

    Args:
        beside: the call's.
        request: its canonical request as the route sends it, perhaps with other settings than the call's own.
        extras: the route's own further arguments.
    """
    if beside is None or beside.body is None:
        return None
    body = {name: value for name, value in beside.body.items() if name in CANONICAL and name not in _OURS}
    config, asked = request.config, None if beside.asked is None else beside.asked.config
    for name in _CHANGEABLE if asked is not None and asked is not config else ():
        value = getattr(config, name)
        if value != getattr(asked, name):
            if name == "logprobs":
                body.pop("top_logprobs", None)
            key = "max_completion_tokens" if name == "max_tokens" and body.get("max_completion_tokens") else name
            body[key] = (list(value) or None) if name == "stop" else value
    if asked is not None and asked is not config:
        gone = (asked.extensions or {}).keys() - (config.extensions or {}).keys()
        if config.reasoning is None and asked.reasoning is not None:
            gone |= {"reasoning_effort", "reasoning"}
        body = {name: value for name, value in body.items() if name not in gone}
    return {**body, **extras, **(beside.extras or {})}


def as_sent(body: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The arguments of LiteLLM's function for a body."""
    data = dict(body)
    if model_type == "responses":
        data.pop("stop", None)  # that API has none; the answer is cut here
        data = {name: value for name, value in data.items() if name != "messages"} if "input" in data else (
            chat_to_responses(data)
        )  # fmt: skip
    elif model_type == "text":
        contents = [message["content"] for message in data.pop("messages")]
        if any(not isinstance(content, str) for content in contents):
            raise UnsupportedFeatureError("text-completion models take text only", feature="messages")
        data["prompt"] = "\n\n".join([*contents, "BEGIN RESPONSE:"])  # DSPy's own layout for text models
    return data


def signed(data: dict[str, Any]) -> dict[str, Any]:
    """The arguments with DSPy's mark, and without LiteLLM's own cache and retries."""
    data["headers"] = {"User-Agent": f"DSPy/{dspy.__version__}", **(data.get("headers") or {})}
    data.update(num_retries=0, cache={"no-cache": True, "no-store": True}, retry_strategy="exponential_backoff_retry")
    return data
