"""The provider's bill: what every generated answer cost, in exact integers.

One nano-USD is 1e-9 USD. A price of P USD per million tokens is P * 1,000 nano-USD per token, which need not be a
whole number, so a call's cost is summed as a fraction over its kinds of tokens and rounded *up* to a whole nano-USD
once per call.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any, NamedTuple

NANO_PER_USD = 1_000_000_000


class Usage(NamedTuple):
    """Tokens of one call, as OpenAI counts: cached ones are part of the input, reasoning ones part of the output.

    Example:
        ```python
        provider = testing.Provider(usage=testing.Usage(100, 20, cached_tokens=60))
        ```
    """

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BillRow:
    """One billed call.

    Example:
        ```python
        with testing.Provider() as provider:
            dspy_prod.LM("openai/gpt-4o-mini", api_base=provider.url, api_key="test", store="memory://")("hello")
            row = provider.bill.rows[0]
        print(row.model, row.input_tokens, row.output_tokens, row.nano)
        ```
    """

    call_id: str
    """The `id` in the answer the client saw; also `Call.call_id`."""
    model: str
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    nano: int
    """Cost in nano-USD, rounded up."""
    at: float
    """When it was billed, in seconds of `time.monotonic()`."""
    told: bool
    """Whether this usage was sent to the client in full."""
    status: int | None
    """The HTTP status sent, or None when the call ended before one was."""

    @property
    def usd(self) -> float:
        """Cost in USD."""
        return self.nano / NANO_PER_USD


class Rate(NamedTuple):
    """A model's price, in exact nano-USD per token."""

    input: Fraction
    output: Fraction
    cached: Fraction

    @classmethod
    def of(cls, price: Sequence[float]) -> Rate:
        """From (input, output[, cached input]) in USD per million tokens; decimals are taken as written."""
        if len(price) not in (2, 3):
            raise ValueError(f"a price is (input, output) or (input, output, cached_input), not {price!r}")
        parts = [Fraction(str(p)) * 1000 for p in (*price, price[0])]
        if min(parts) < 0:
            raise ValueError(f"a price cannot be negative: {price!r}")
        return cls(*parts[:3])

    def nano(self, usage: Usage) -> int:
        """Cost of `usage` in nano-USD, rounded up."""
        fresh = usage.input_tokens - usage.cached_tokens
        return ceil(fresh * self.input + usage.cached_tokens * self.cached + usage.output_tokens * self.output)


class Bill:
    """Every billed call, in the order of billing. Safe to read from any thread while the provider runs.

    Args:
        prices: model name (with or without "openai/") → (input, output[, cached input]) in USD per million tokens.
        price: the same for models not in `prices`.

    Example:
        ```python
        with testing.Provider(prices={"gpt-4o-mini": (0.15, 0.60)}) as provider:
            dspy_prod.LM("openai/gpt-4o-mini", api_base=provider.url, api_key="test", store="memory://")("hello")
            print(provider.bill.usd, provider.bill.by_model())
        ```
    """

    def __init__(self, prices: Mapping[str, Sequence[float]], price: Sequence[float]) -> None:
        self._lock = threading.Lock()
        self.models = list(prices)
        self._rates = {model: Rate.of(p) for model, p in prices.items()}
        for model in self.models:  # clients send "openai/gpt-x" as "gpt-x"
            self._rates.setdefault(model.partition("/")[2] or model, self._rates[model])
        self._default = Rate.of(price)
        self._rows: list[BillRow] = []
        self._nano = 0

    @property
    def rows(self) -> list[BillRow]:
        """A copy of all rows."""
        with self._lock:
            return list(self._rows)

    @property
    def nano(self) -> int:
        """The total in nano-USD, exact."""
        return self._nano

    @property
    def usd(self) -> float:
        """The total in USD."""
        return self._nano / NANO_PER_USD

    def by_model(self) -> dict[str, float]:
        """USD per model."""
        nano: dict[str, int] = {}
        for row in self.rows:
            nano[row.model] = nano.get(row.model, 0) + row.nano
        return {model: amount / NANO_PER_USD for model, amount in nano.items()}

    def cost(self, model: str, usage: Usage) -> int:
        """What `usage` of `model` costs in nano-USD, without billing it."""
        return self._rates.get(model, self._default).nano(usage)

    def add(self, call_id: str, model: str, usage: Usage, *, at: float, told: bool, status: int | None) -> BillRow:
        """Bill one call."""
        row = BillRow(call_id, model, *usage, nano=self.cost(model, usage), at=at, told=told, status=status)
        with self._lock:
            self._rows.append(row)
            self._nano += row.nano
        return row

    def mark_untold(self, call_id: str) -> None:
        """Correct a row whose usage was handed to the socket but whose client left before taking it."""
        with self._lock:
            for position in range(len(self._rows) - 1, -1, -1):
                if self._rows[position].call_id == call_id:
                    self._rows[position] = replace(self._rows[position], told=False)
                    return

    def clear(self) -> None:
        """Forget all rows."""
        with self._lock:
            self._rows.clear()
            self._nano = 0

    def as_dict(self) -> dict[str, Any]:
        """The bill as JSON-ready data, as served under `GET /_bill`."""
        rows = self.rows
        nano = sum(row.nano for row in rows)
        return {"usd": nano / NANO_PER_USD, "nano": nano, "rows": [{**asdict(row), "usd": row.usd} for row in rows]}
