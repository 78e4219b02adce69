"""Which usage in LiteLLM's answers the provider told, and which LiteLLM made up.

Where a provider tells no usage, LiteLLM puts zeros (in a whole answer) or counts the tokens itself (of a stream), and
does not say that it did. An invented usage may be below the provider's bill, so only what is shown to be the provider's
own is believed; anything else becomes unknown, and the attempt is charged its bound as an estimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from dspy.lm15 import Response, StreamAssemblyError, StreamEndEvent, Usage

from dspy_prod.compat.litellm import answered_by, chunks_of, reason_told
from dspy_prod.pipeline.upstream.finish import broken
from dspy_prod.pipeline.upstream.usage import believed

_COUNTED: Final = frozenset({"a2a", "petals", "predibase", "replicate", "sagemaker"})
"""Providers that never tell a usage, for whose whole answers LiteLLM counts the tokens itself."""

_COUNTERS: Final = {
    "ollama": ('"prompt_eval_count"', '"eval_count"'),
    "ollama_chat": ('"prompt_eval_count"', '"eval_count"'),
}
"""What such an answer says where it tells its usage, of providers for which LiteLLM counts what they did not tell."""

_ANSWER: Final = ("content", "reasoning_content", "tool_calls", "refusal")
"""Fields of a chunk's delta in which LiteLLM passes a part of the answer."""


def told(response: Response, raw: Any, text: str = "") -> Response:
    """The response, with unknown usage unless the provider told both counts.

    LiteLLM replaces by zero what was not told.

    Args:
        response: the canonical response.
        raw: LiteLLM's, which names the provider.
        text: the answer as it arrived; empty where that is not known.
    """
    usage, provider = response.usage, answered_by(raw)
    known = believed(response) is usage and provider not in _COUNTED
    known = known and all(name in text for name in _COUNTERS.get(provider or "", ()))
    if known and not _no_count(usage.input_tokens, usage.output_tokens, getattr(raw, "usage", None)):
        return response
    return replace(response, usage=Usage())


def told_end(end: StreamEndEvent, source: Any, reason: str | None = None) -> StreamEndEvent:
    """The end of a stream, with unknown usage unless the provider's chunks tell it.

    Args:
        end: the last event, with the usage that LiteLLM states.
        source: LiteLLM's stream after its end. It keeps the chunks that the provider sent, so a usage that is found
            there was told; without chunks none is believed.

    Raises:
        StreamAssemblyError: the provider never said why it ended; LiteLLM says "stop" for it.
    """
    reason = reason_told(source) if reason is None else reason.lower()
    if reason == "":
        raise StreamAssemblyError("The provider's stream ended without saying why")
    if broken(reason):
        end = replace(end, finish_reason="error")
    if _told_in(chunks_of(source), end.usage):
        return end
    return replace(end, usage=Usage())


def told_before(whole: Response, source: Any) -> Response | None:
    """What is owed for a stream that failed though its provider had told its last count; None where it had not.

    A count that runs along may grow. The last one stands in a chunk of its own, or where the provider says that all
    was said: LiteLLM passes on an end, as "stop", also where no reason was told for it.

    Args:
        whole: what LiteLLM makes of all that came.
        source: its stream, which has failed.
    """
    chunks = list(chunks_of(source))
    last = next((chunk for chunk in reversed(chunks) if getattr(chunk, "usage", None) is not None), None)
    choices = getattr(last, "choices", None) or ()
    if last is None or (choices and not any(getattr(choice, "finish_reason", None) for choice in choices)):
        return None
    return whole if _told_in(chunks, whole.usage) else None


def _told_in(chunks: Iterable[Any], usage: Usage) -> bool:
    """Whether the chunks tell both counts, and the output's not before the answer was complete.

    Anthropic tells the input first, with a placeholder for the output, and the output at the end. Others tell both in
    the last chunk, in one after it, or a running count in each.
    """
    inputs: int | None = None
    outputs: int | None = 0
    last: Any = None
    for chunk in chunks:
        told = getattr(chunk, "usage", None)
        inputs = getattr(told, "prompt_tokens", None) or inputs
        last = told or last
        if count := getattr(told, "completion_tokens", None):
            outputs = count
        elif _answers(chunk):
            outputs = None
    return (inputs, outputs) == (usage.input_tokens, usage.output_tokens) and not _no_count(inputs, outputs, last)


def _no_count(inputs: int | None, outputs: int | None, told: Any) -> bool:
    """Whether a count was `true`, which LiteLLM takes for one token: only the total that was told shows it."""
    if inputs != 1 and outputs != 1:
        return False
    total = getattr(told, "total_tokens", None)
    return isinstance(total, int) and total > (inputs or 0) + (outputs or 0)


def _answers(chunk: Any) -> bool:
    deltas = [getattr(choice, "delta", None) for choice in getattr(chunk, "choices", None) or ()]
    return any(getattr(delta, field, None) for delta in deltas for field in _ANSWER)
