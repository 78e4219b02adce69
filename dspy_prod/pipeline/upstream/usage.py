"""Which usage is believed: one rule, whatever engine told it.

An invented or broken usage may be below the provider's bill. What is not believed counts as not told, and the attempt
is charged its bound as an estimate.
"""

from __future__ import annotations

from typing import Final

from dspy.lm15 import Response, Usage

from dspy_prod.policies.cache import EMPTY_USAGE

MOST: Final = 10**12
"""Tokens that no call can use; a counter above it is no counter, and would not fit into a ledger."""


def believed(response: Response) -> Usage:
    """The usage of an answer; empty when it cannot be true.

    No prompt is empty, an answer with anything in it took tokens, and no counter is beyond measure.
    """
    usage: Usage = response.usage
    inputs, outputs = usage.input_tokens, usage.output_tokens
    if inputs is None or outputs is None:
        return usage if _sane(usage) else EMPTY_USAGE
    asked = inputs or usage.cache_read_tokens or usage.cache_write_tokens
    if not asked or not (outputs or usage.reasoning_tokens or _is_empty(response)):
        return EMPTY_USAGE
    if inputs + outputs > MOST or not _sane(usage):
        return EMPTY_USAGE
    return usage


def _is_empty(response: Response) -> bool:
    return all(part.type == "text" and not part.text for part in response.message.parts)


def _sane(usage: Usage) -> bool:
    cached, written, reasoning = usage.cache_read_tokens, usage.cache_write_tokens, usage.reasoning_tokens
    if cached is None and written is None and reasoning is None:
        return True
    return (cached or 0) + (written or 0) + (reasoning or 0) <= MOST
