"""Which usage is believed: one rule, whatever engine told it.

An invented or broken usage may be below the provider's bill. What is not believed counts as not told, and the attempt
is charged its bound as an estimate.
"""

from __future__ import annotations

from dspy.lm15 import Response, Usage

from dspy_prod.pipeline.upstream.vectors import Vectors
from dspy_prod.policies.entries import EMPTY_USAGE
from dspy_prod.records import MOST_TOKENS


def believed(response: Response) -> Usage:
    """The usage of an answer; empty when it cannot be true.

    No prompt is empty, an answer with anything in it took tokens unless it was not generated, and no counter is beyond
    measure.
    """
    usage: Usage = response.usage
    inputs, outputs, cached = usage.input_tokens, usage.output_tokens, usage.cache_read_tokens
    written, reasoning = usage.cache_write_tokens, usage.reasoning_tokens
    if (inputs or 0) + (outputs or 0) + (cached or 0) + (written or 0) + (reasoning or 0) > MOST_TOKENS:
        return EMPTY_USAGE
    if inputs is None or outputs is None or (inputs and outputs):
        return usage
    asked = inputs or cached or written
    if not asked or not (outputs or reasoning or _is_empty(response)):
        return EMPTY_USAGE
    return usage


def _is_empty(response: Response) -> bool:
    return isinstance(response, Vectors) or all(
        part.type == "text" and not part.text for part in response.message.parts
    )
