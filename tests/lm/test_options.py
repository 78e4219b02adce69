"""A slip in a policy's options is told in words: which option, what was given, what is allowed, what was meant."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from dspy_prod import Budget, Cache, CircuitBreaker, ConfigError, Price, RateLimit, Retry
from dspy_prod.options import Options


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (Budget, {"usd": 1, "period": "day"}, ["Budget: period:", "'day'", "did you mean 'per'?", "usd, per, scope"]),
        (Budget, {"usd": 1, "per": "dya"}, ["Budget: per:", "'dya'", "'hour'", "did you mean 'day'?"]),
        (Budget, {"usd": -1}, ["Budget: usd:", "must be greater than 0", "-1"]),
        (Budget, {"per": "day"}, ["Budget: usd:", "is missing"]),
        (Budget, {"usd": 1, "scope": "tenants"}, ["Budget: scope:", "'tenants'", "'tenant'"]),
        (Budget, {"usd": 1, "timezone": "Mars"}, ["Budget: timezone:", "IANA"]),
        (Budget, {"usd": 1, "degrade_to": "m"}, ["Budget:", "degrade_to needs soft="]),
        (RateLimit, {"rmp": 5}, ["RateLimit: rmp:", "did you mean 'rpm'?"]),
        (RateLimit, {"rpm": "fast"}, ["RateLimit: rpm:", "valid number", "'fast'"]),
        (RateLimit, {"estimate": "learn"}, ["RateLimit: estimate:", "did you mean 'learned'?"]),
        (Retry, {"attemps": 3}, ["Retry: attemps:", "did you mean 'attempts'?"]),
        (Cache, {"ttl": -1}, ["Cache: ttl:", "greater than 0"]),
        (CircuitBreaker, {"window_type": "week"}, ["CircuitBreaker: window_type:", "'count' or 'time'"]),
        (Price, {"input": 1, "outputs": 2}, ["Price: "]),
        (Price, {"input": 1e15, "output": 2}, ["Price: input:", "less than or equal to 1000000", "got 10000"]),
    ],
)
def test_a_slip_is_told_in_words(kind: type[Options], given: dict[str, Any], words: list[str]) -> None:
    """It was pydantic's raw text, with a link to pydantic's documentation."""
    with pytest.raises(ConfigError) as caught:
        kind(**given)
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)
    assert "pydantic" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_what_may_be_a_secret_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        Retry(api_key="sk-live")  # type: ignore[call-arg]
    assert "sk-live" not in str(caught.value)


def test_options_do_not_change() -> None:
    budget = Budget(usd=1)
    with pytest.raises(ConfigError, match=r"model_copy\(update=\{'usd'"):
        budget.usd = 2


def test_a_copy_is_checked_as_what_it_is_a_copy_of() -> None:
    """The message above says how to change an option; a slip in it was no error, and the budget stayed as it was."""
    budget = Budget(usd=1, name="b")
    assert budget.model_copy(update={"usd": 2}) == Budget(usd=2, name="b")
    assert budget.model_copy(deep=True) == budget
    with pytest.raises(ConfigError, match="did you mean 'usd'"):
        budget.model_copy(update={"usdd": 2})
    with pytest.raises(ConfigError, match="greater than 0"):
        budget.model_copy(update={"usd": -2})


@pytest.mark.parametrize(
    "option", [Budget(usd=1), Cache(), CircuitBreaker(), Price(input=1, output=1), RateLimit(), Retry()]
)
def test_pickles_name_the_room_and_not_the_file(option: Options) -> None:
    """Those of other releases load here, and ours there."""
    data = pickle.dumps(option)
    assert b"dspy_prod.options\x94" in data
    assert pickle.loads(data) == option


@pytest.mark.parametrize(
    "make",
    [
        lambda: Budget(usd=1).model_copy(update={"usd": -1}),
        lambda: Budget.model_validate({"usd": -1}),
        lambda: Budget.model_validate({"usd": 1}).model_copy(update={"usd": -1}),
    ],
)
def test_other_ways_to_make_options_are_as_strict(make: Callable[[], Any]) -> None:
    """The error said `model_copy(update=...)`, which took a negative limit; `model_validate` said pydantic's words."""
    with pytest.raises(ConfigError, match="Budget: usd: must be greater than 0, got -1") as caught:
        make()
    assert "pydantic" not in str(caught.value)


def test_a_copy_keeps_what_is_not_changed() -> None:
    budget = Budget(usd=1, per="day", name="b")
    assert budget.model_copy(update={"usd": 2}) == Budget(usd=2, per="day", name="b")
    assert budget.model_copy() == budget
    assert Budget.model_validate(budget) is budget
