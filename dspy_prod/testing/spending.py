"""What a piece of a test has spent: every attempt of every guarded LM and embedder in the process, while it lasts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

_NANO: Final = 10**9
_CALLS: Final = frozenset({"call_finished", "attempt_failed"})


class Spent:
    """What was spent so far, in all threads and tasks.

    Attributes:
        calls: attempts that were sent upstream, failed ones and retries included. cached: answers from a cache.
        failed: those of the attempts that ended without an answer. unknown: those whose cost is not known.
        input_tokens, output_tokens: as the provider told them.
        events: what was heard of each, as a listener gets it.

    Example:
        ```python
        with testing.costs() as spent:
            lm("hello")
        print(spent.usd, spent.calls, spent.cached)
        ```
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.events: list[Mapping[str, Any]] = []

    def _hear(self, event: Any) -> None:
        if event.name in _CALLS:
            with self._lock:
                self.events.append(event.data)

    def _attempts(self) -> list[Mapping[str, Any]]:
        with self._lock:
            return [data for data in self.events if not data["cached"]]

    @property
    def calls(self) -> int:
        return len(self._attempts())

    @property
    def cached(self) -> int:
        with self._lock:
            return sum(bool(data["cached"]) for data in self.events)

    @property
    def failed(self) -> int:
        return sum(data["outcome"] != "ok" for data in self._attempts())

    @property
    def unknown(self) -> int:
        return sum(data["cost_usd"] is None for data in self._attempts())

    @property
    def input_tokens(self) -> int:
        return sum(data["input_tokens"] or 0 for data in self._attempts())

    @property
    def output_tokens(self) -> int:
        return sum(data["output_tokens"] or 0 for data in self._attempts())

    @property
    def tokens(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens

    @property
    def nano(self) -> int:
        """The cost in nano-USD, exact; see `usd`."""
        return self._sum(self._attempts())

    @property
    def usd(self) -> float:
        """The cost in USD.

        Raises:
            AssertionError: the cost of an attempt is not known, which is not zero; the message says how to name it.
        """
        return self.nano / _NANO

    def by(self, dimension: str) -> dict[str, float]:
        """USD by `"model"`, `"route"`, `"user"`, `"tenant"`, `"program"`, `"outcome"`, ... or `"tag:<name>"`.

        Raises:
            ValueError: there is no such dimension. AssertionError: as of `usd`.
        """
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for data in self._attempts():
            name = dimension.removeprefix("tag:")
            if name == dimension and dimension not in data:
                raise ValueError(f"by({dimension!r}): an attempt has {', '.join(sorted(data))}, and tag:<name>")
            value = data["tags"].get(name) if name != dimension else data[dimension]
            groups.setdefault("" if value is None else str(value), []).append(data)
        return {value: self._sum(group) / _NANO for value, group in groups.items()}

    def _sum(self, attempts: list[Mapping[str, Any]]) -> int:
        unknown = sorted({str(data["model"]) for data in attempts if data["cost_usd"] is None})
        if unknown:
            raise AssertionError(
                f"The cost of calls of {', '.join(unknown)} is not known, which is not zero; pass "
                f"prices={{{unknown[0]!r}: dspy_prod.Price(input=..., output=...)}} (USD per million tokens)"
            )
        return sum(round(data["cost_usd"] * _NANO) for data in attempts)

    def __repr__(self) -> str:
        known = sum(round(data["cost_usd"] * _NANO) for data in self._attempts() if data["cost_usd"] is not None)
        unknown = f", {self.unknown} of unknown cost" if self.unknown else ""
        return f"<{self.calls} calls, {self.tokens} tokens, {known / _NANO:.9f} USD{unknown}>"


@contextmanager
def costs() -> Iterator[Spent]:
    """Count what is spent inside, and afterwards tell it:

        with costs() as spent:
            program(question="...")
        assert spent.usd <= 0.02
        assert spent.calls == 1

    It hears of every `dspy_prod.LM` and `dspy_prod.Embedder` of the process, in whatever thread; a plain `dspy.LM`
    tells nobody.
    """
    spent = Spent()
    remove = import_module("dspy_prod").add_listener(spent._hear)
    try:
        yield spent
    finally:
        remove()
