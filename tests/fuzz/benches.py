"""The LMs that are fuzzed: every engine under every set of policies, on a clock that leaps instead of waiting."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any, Final

import dspy_prod
from dspy_prod import Budget, Cache, CircuitBreaker, Price, RateLimit, Retry
from tests.fuzz import invariants
from tests.fuzz.secrets import HEADER, SECRET
from tests.fuzz.sockets import URL


class LeapingClock:
    """A clock that goes on by itself, and leaps when somebody waits."""

    def __init__(self) -> None:
        self.leapt = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.leapt

    def time(self) -> float:
        return time.time() + self.leapt

    def leap(self, until: float) -> None:
        self.leapt += max(0.0, until - self.monotonic())


CLOCK = LeapingClock()


@dataclass
class Bench:
    """An LM that is fuzzed, and what it was last asked.

    Attributes:
        has_budget: a budget keeps an account of all that its calls cost.
    """

    name: str
    lm: Any
    api: str
    has_budget: bool
    numbers: Any = field(default_factory=lambda: itertools.count(1))
    spent: int = 0
    bound: int = 0


POLICIES: Final[dict[str, dict[str, Any]]] = {
    "guarded": {
        "budget": Budget(usd=1_000_000, name="all"),
        "limit": RateLimit(concurrency=8, rpm=1_000_000, tpm=1_000_000_000_000, max_wait=0.0),
        "retry": Retry(attempts=3, backoff=0.01, max_backoff=0.01, budget=None),
        "breaker": CircuitBreaker(failure_threshold=None, failure_rate=None),
        "cache": Cache(max_entries=50),
    },
    "bare": {"budget": None, "limit": None, "retry": False, "breaker": False, "cache": False},
    "falling back": {
        "budget": Budget(usd=1_000_000, name="all"),
        "retry": Retry(attempts=2, backoff=0.01, max_backoff=0.01, budget=None),
        "breaker": CircuitBreaker(failure_threshold=3, recovery_timeout=1.0),
        "cache": Cache(max_entries=50, stale_if_error=3_600),
    },
    "timed": {
        "budget": Budget(usd=1_000_000, name="all"),
        "limit": None,
        "retry": Retry(attempts=2, backoff=0.01, max_backoff=0.01, budget=None),
        "cache": False,
        "timeout": 60,
    },
}
ENGINES: Final[tuple[tuple[str, str, str], ...]] = (
    ("lm15", "chat", "chat"),
    ("lm15", "responses", "responses"),
    ("lm15", "anthropic", "chat"),
    ("lm15", "gemini", "chat"),
    ("litellm", "chat", "chat"),
    ("litellm", "responses", "responses"),
    ("litellm", "completions", "text"),
    ("litellm", "anthropic", "chat"),
    ("litellm", "gemini", "chat"),
)
_made = itertools.count()


def bench(engine: str, api: str, model_type: str, policies: str) -> Bench:
    """An LM of its own, with a store of its own."""
    price = Price(input=invariants.INPUT / 1_000, output=invariants.OUTPUT / 1_000)
    provider = api if api in ("anthropic", "gemini") else "openai"
    lm = dspy_prod.LM(
        f"{provider}/fuzz",
        model_type=model_type,
        engine=engine if model_type != "text" else "auto",
        api_key=SECRET,
        api_base=URL,
        max_tokens=50,
        prices={f"{provider}/fuzz": price, f"{provider}/spare": price},
        store=f"memory://fuzz-{next(_made)}",
        clock=CLOCK,
        namespace="fuzz",
        **({"extra_headers": {"x-fuzz": HEADER}} if engine == "litellm" else {}),
        **{**POLICIES[policies], **({"fallbacks": [f"{provider}/spare"]} if policies == "falling back" else {})},
    )
    return Bench(f"{engine} {api}, {policies}", lm, api, POLICIES[policies].get("budget") is not None)
