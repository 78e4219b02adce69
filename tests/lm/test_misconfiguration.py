"""Options that cannot work are refused where they are given, and the message names the field or the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod import (
    Budget,
    Cache,
    CircuitBreaker,
    ConfigError,
    Price,
    RateLimit,
    Retry,
    UnpricedModelError,
)
from dspy_prod.testing import ScriptedEngine
from tests.e2e.support import MODEL, fresh_memory

IMPOSSIBLE: list[tuple[type[Any], dict[str, Any], str]] = [
    (Retry, {"attempts": 0}, "attempts"),
    (Retry, {"backoff": -1}, "backoff"),
    (Retry, {"max_backoff": 0}, "max_backoff"),
    (Retry, {"budget": 0}, "budget"),
    (Retry, {"budget_refill": 0}, "budget_refill"),
    (CircuitBreaker, {"failure_threshold": 0}, "failure_threshold"),
    (CircuitBreaker, {"failure_rate": 1.5}, "failure_rate"),
    (CircuitBreaker, {"window": 0}, "window"),
    (CircuitBreaker, {"window_type": "days"}, "window_type"),
    (CircuitBreaker, {"window": 10, "minimum_calls": 20}, "lower minimum_calls or raise window"),
    (CircuitBreaker, {"slow_call_duration": 0}, "slow_call_duration"),
    (CircuitBreaker, {"slow_call_rate": 0}, "slow_call_rate"),
    (CircuitBreaker, {"recovery_timeout": float("nan")}, "recovery_timeout"),
    (CircuitBreaker, {"recovery_timeout": 60, "max_recovery_timeout": 30}, "raise it"),
    (CircuitBreaker, {"jitter": 2}, "jitter"),
    (CircuitBreaker, {"success_threshold": 0}, "success_threshold"),
    (CircuitBreaker, {"half_open_probes": 0}, "half_open_probes"),
    (CircuitBreaker, {"probe_lease": float("inf")}, "probe_lease"),
    (RateLimit, {"rpm": 0.5}, "use rpm >= 1"),
    (RateLimit, {"tpm": 0}, "tpm"),
    (RateLimit, {"concurrency": 0}, "concurrency"),
    (RateLimit, {"burst": 5}, "set rpm too"),
    (RateLimit, {"rpm": 5, "burst": 6}, "lower burst"),
    (RateLimit, {"max_wait": -1}, "max_wait"),
    (RateLimit, {"guard": -1}, "guard"),
    (RateLimit, {"estimate": "guess"}, "estimate"),
    (RateLimit, {"floor": 0}, "floor"),
    (RateLimit, {"fair_by": "team"}, "fair_by"),
    (Cache, {"ttl": 0}, "ttl"),
    (Cache, {"ttl_jitter": 1}, "ttl_jitter"),
    (Cache, {"max_entries": 0}, "max_entries"),
    (Cache, {"max_bytes": 0}, "max_bytes"),
    (Cache, {"stale_if_error": -1}, "stale_if_error"),
    (Budget, {}, "usd"),
    (Budget, {"usd": 0}, "usd"),
    (Budget, {"usd": True}, "expected a number"),
    (Budget, {"usd": 1, "per": "week"}, "per"),
    (Budget, {"usd": 1, "scope": "team"}, "'tag:<key>'"),
    (Budget, {"usd": 1, "timezone": "Mars/Olympus"}, "Europe/Berlin"),
    (Budget, {"usd": 1, "soft": 2}, "soft"),
    (Budget, {"usd": 1, "degrade_to": "cheaper"}, "needs soft="),
    (Budget, {"usd": 1, "max_wait": -1}, "max_wait"),
    (Price, {"input": -1, "output": 1}, "input"),
    (Price, {"input": 1}, "output"),
    (Price, {"input": 1, "output": 1, "max_output_tokens": 0}, "max_output_tokens"),
]


@pytest.mark.parametrize(("kind", "fields", "words"), IMPOSSIBLE, ids=lambda item: getattr(item, "__name__", str(item)))
def test_an_impossible_option_is_refused_at_construction(kind: type[Any], fields: dict[str, Any], words: str) -> None:
    """No policy can be built that could not work; the message names the field or the remedy."""
    with pytest.raises(ValueError) as caught:
        kind(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", [Retry, CircuitBreaker, RateLimit, Cache, Budget, Price])
def test_an_unknown_option_is_refused_by_name(kind: type[Any]) -> None:
    """A misspelt field is an error, not a default."""
    needed = {Budget: {"usd": 1}, Price: {"input": 1, "output": 1}}.get(kind, {})
    with pytest.raises(ValueError, match="attemps"):
        kind(attemps=3, **needed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budgets": Budget(usd=1)}, "did you mean budget="),
        ({"limits": RateLimit(rpm=1)}, "did you mean limit="),
        ({"circuit": CircuitBreaker()}, "did you mean breaker="),
        ({"fallback": ["openai/x"]}, "did you mean fallbacks="),
        ({"retries": Retry()}, "did you mean retry="),
        ({"retry": Retry(), "num_retries": 2}, "give one"),
        ({"retry": 3}, "takes a dspy_prod.Retry"),
        ({"num_retries": -1}, "non-negative"),
        ({"fallbacks": "openai/x"}, "takes a list"),
        ({"fallbacks": [3]}, "model names and dspy.LM"),
        ({"prices": [1, 2]}, "takes a mapping"),
        ({"budget": [Budget(usd=1), Budget(usd=2)]}, "its own name="),
        ({"timeout": 0}, "positive number of seconds"),
    ],
    ids=str,
)
def test_an_lm_that_cannot_work_is_refused_at_construction(arguments: dict[str, Any], words: str) -> None:
    """Contradictions and slips of the pen are told at once, with the remedy."""
    with pytest.raises(ConfigError) as caught:
        dspy_prod.LM(MODEL, store=fresh_memory(), **arguments)
    assert words in str(caught.value)


def test_one_budget_cannot_mean_two_things() -> None:
    """Of two LMs that give one budget's name different limits, the later one says what holds for both."""
    store = fresh_memory()
    first = dspy_prod.LM(MODEL, store=store, budget=Budget(usd=1, name="team"))
    second = dspy_prod.LM(MODEL, store=store, budget=Budget(usd=2, name="team"))
    assert [rule.options.usd for lm in (first, second) for rule in lm.pipeline.budgets] == [2, 2]


def test_a_model_without_a_price_is_refused_under_a_budget() -> None:
    """What cannot be bounded is not sent, and the message says which argument is missing."""
    engine = ScriptedEngine()
    unpriced = dspy_prod.LM("nobody/knows", engine=engine, store=fresh_memory(), budget=Budget(usd=1))
    with pytest.raises(UnpricedModelError, match=r"prices=.*dspy_prod\.Price\(input=\.\.\., output=\.\.\.\)"):
        unpriced("q")
    boundless = unpriced.copy(prices={"nobody/knows": Price(input=1, output=1)})
    with pytest.raises(UnpricedModelError, match=r"max_tokens=.*max_output_tokens="):
        boundless("q")
    assert engine.calls == 0


@pytest.mark.parametrize(
    ("slip", "remedy"),
    [
        ({"rpm": 5}, r"limit=RateLimit\(rpm"), ({"ttl": 5}, r"cache=Cache\(ttl"), ({"usd": 5}, r"budget=Budget\(usd"),
        ({"fallback_models": ["openai/m"]}, r"fallbacks=\["), ({"chache": False}, "cache="),
        ({"max_token": 10}, "max_tokens="), ({"tempature": 0.1}, "temperature="), ({"timeout": "10"}, "timeout=10"),
        ({"extra_header": {}}, "extra_headers="), ({"timeout": True}, "number of seconds"),
        ({"namespace": 5}, "namespace='5'"), ({"deadline": 5}, r"call_context\(deadline"),
        ({"store": Path("state.db")}, r"store=.*state\.db.*sqlite:///"), ({"store": 5}, "store=5 is neither"),
    ],
    ids=str,
)  # fmt: skip
def test_a_slip_is_refused_where_it_is_made(slip: dict[str, Any], remedy: str) -> None:
    """Each was accepted, travelled on to the provider, and was in force nowhere; or it was a raw AttributeError."""
    with pytest.raises(ConfigError, match=remedy):
        dspy_prod.LM("openai/m", **{"store": fresh_memory(), **slip})


@pytest.mark.parametrize(
    "name",
    ["num_ctx", "top_a", "min_p", "max_new_tokens", "max_output_tokens", "models", "stop_sequences", "project_id",
     "region_name", "caching", "best_of", "suffix", "input_cost_per_token", "web_search_options"],
)  # fmt: skip
def test_what_some_provider_knows_is_let_through(name: str) -> None:
    """Only near misses of our own and DSPy's names are slips."""
    assert dspy_prod.LM("openai/m", store=fresh_memory(), **{name: 1}).settings.extras == {name: 1}


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("given", ["many", [5], float("inf")], ids=str)
def test_a_bound_on_tokens_is_a_number(name: str, given: Any) -> None:
    """Under a budget it was a `ValueError: invalid literal for int()`, with no word of the argument."""
    with pytest.raises(ConfigError, match=rf"{name}=.* must be a number of tokens"):
        dspy_prod.LM(MODEL, **{name: given}, store=fresh_memory())
    with pytest.raises(ConfigError, match=rf"{name}=.* must be a number of tokens"):
        dspy_prod.LM(MODEL, store=fresh_memory()).copy(**{name: given})
