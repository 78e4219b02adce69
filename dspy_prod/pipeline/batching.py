"""Batches of texts: the route that sends them, what one may cost, and how texts are cut into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from dspy.lm15 import Request

from dspy_prod.context.current import CallContext
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.pipeline.routes import Route
from dspy_prod.pipeline.upstream.vectors import texts_of
from dspy_prod.policies.run import claims_of
from dspy_prod.pricing.bounds import text_bound

MOST_TOKENS: Final = 300_000
"""Tokens of one request at most, counted by their bound: what OpenAI takes, and few others more."""

PART: Final = 20
"""A batch reserves at most this part of a budget, where its texts can be cut so: its bound is several times what it
costs, and the last reservation that no longer fits stays unspent."""


class EmbeddingRoute(Route):
    """A route to a model for vectors: its answers are not generated, and its input limit is that of each text."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fitting = None  # the same model elsewhere takes the same settings

    def bounds(self, request: Request) -> tuple[int | None, int | None]:
        """Upper bounds of (input, output) tokens."""
        rates = self.rates()
        limit = None if rates is None else rates.max_input_tokens
        return sum([text_bound(text, max_input_tokens=limit) for text in texts_of(request)]), 0

    def sizes(self, texts: Sequence[str]) -> list[int]:
        """The bound of each text in tokens."""
        rates = self.rates()
        limit = None if rates is None else rates.max_input_tokens
        return [text_bound(text, max_input_tokens=limit) for text in texts]

    def tokens_for(self, nano: int) -> int:
        """The most input tokens that `nano` nano-USD pay for, up to `MOST_TOKENS`; those where no price is known."""
        rates = self.rates()
        if rates is None or rates.bound(MOST_TOKENS, 0) <= nano:
            return MOST_TOKENS
        low, high = 0, MOST_TOKENS  # what is bounded by `low` is paid for, by `high` it is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if rates.bound(middle, 0) <= nano else (low, middle)
        return low


def most_tokens(pipeline: Pipeline, context: CallContext) -> int:
    """The tokens of one batch at most, by their bound.

    No more than a provider takes at once, than a minute of the limiter holds, and than a part of each budget and of
    each cap of a run pays for. A text that is longer goes by itself, and is refused where it can never be admitted.
    """
    route = pipeline.primary
    assert isinstance(route, EmbeddingRoute)
    most = MOST_TOKENS
    if route.limit.tpm is not None:
        most = min(most, int(route.limit.tpm))
    for rule in pipeline.budgets:
        most = min(most, route.tokens_for(rule.limit // PART))
    for claim in claims_of(context.guards) if context.guards else ():
        limit = claim.account().limit
        if claim.dimension == "usd":
            most = min(most, route.tokens_for(limit // PART))
        elif claim.dimension == "tokens":
            most = min(most, limit // PART)
    return most


def batches(sizes: Sequence[int], count: int, tokens: int) -> Iterator[range]:
    """Which texts go together: in order, at most `count` of them and `tokens`, and one at least."""
    begin = held = 0
    for place, size in enumerate(sizes):
        if place > begin and (place - begin >= count or held + size > tokens):
            yield range(begin, place)
            begin, held = place, 0
        held += size
    if begin < len(sizes):
        yield range(begin, len(sizes))
